"""Read the sharing settings of a training run: Megatron-LM's and prime-rl's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from indexcache.configs import text_section
from indexcache.engines.rules import FREQ, OFFSET, TRAINERS
from indexcache.engines.schedules import Schedule, resolve
from indexcache.overrides import SHARING_KEYS
from indexcache.reading import parse_json, read_text, read_toml

MEGATRON = {"dsa_indexer_topk_freq": FREQ, "dsa_indexer_skip_topk_offset": OFFSET}
"""Megatron-LM's names of the keys."""

MAX_BYTES = 1 << 24

_NAMES = "|".join(name.replace("_", "[_-]") for name in (*MEGATRON, *SHARING_KEYS))
_SETTING = re.compile(
    rf"""(?<![\w.])(?:--)?(?P<name>{_NAMES})["']?(?:[ \t]*[:=][ \t]*|[ \t]+|(?=\s|$))"""
    r"""(?P<value>"[^"]*"|'[^']*'|\[[^\]]*\]|(?!--)[^\s,#})\\]+|(?:\s*\n[ \t]*-[ \t]+\S+)+)?"""
)
"""A setting in YAML or in a script; its value may be a list of either style of YAML."""


def train_schedules(path: str | Path, config: dict[str, Any], family: str) -> tuple[Schedule, ...]:
    """Return the schedules by which a training run with these settings shares.

    Args:
        path: settings as JSON, TOML or YAML, or a script with flags. Keys may be nested.
        config: the model's config, for the number of layers.
        family: its family, see `schedules.FAMILIES`.

    Raises:
        ValueError: the file cannot be read, or has no key of a known trainer.
    """
    keys = _keys_of(Path(path))
    section = {k: v for k, v in text_section(config).items() if k not in SHARING_KEYS}
    found = []
    megatron = {MEGATRON[k]: v for k, v in keys.items() if k in MEGATRON}
    other = {k: v for k, v in keys.items() if k in SHARING_KEYS}
    if set(other) == {"use_index_cache"}:  # The rest is the model's own.
        other = {k: v for k, v in text_section(config).items() if k in SHARING_KEYS} | other
    for rule, values in zip(TRAINERS, (megatron, other), strict=True):
        if values:
            found.append(resolve(rule, section | values, family))
    if not found:
        raise ValueError(
            f"{path}: there is no sharing key; Megatron-LM's are {' and '.join(MEGATRON)}, "
            f"prime-rl's {', '.join(SHARING_KEYS)}."
        )
    return tuple(found)


def _keys_of(path: Path) -> dict[str, Any]:
    """Return every setting of a file by its last name, with _ for -."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of training settings.")
    if path.suffix == ".toml":
        return dict(_leaves(read_toml(path)))
    text = read_text(path, most=MAX_BYTES)
    try:
        value = parse_json(text)
    except ValueError:
        return dict(_lines(text))
    return dict(_leaves(value)) if isinstance(value, Mapping) else {}


def _leaves(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner)
        else:
            yield str(key).lstrip("-").replace("-", "_"), inner


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    """Read settings from YAML, or from a script with flags."""
    lines = [line.split(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
    for match in _SETTING.finditer("\n".join(lines)):
        value = match["value"]
        items = re.findall(r"-[ \t]+(\S+)", value or "") if "\n" in (value or "")[:200] else []
        yield match["name"].replace("-", "_"), items or _scalar(value)


def _scalar(text: str | None) -> Any:
    if text is None:  # A flag by itself.
        return True
    bare = text.strip("\"'")
    words = {"true": True, "false": False, "null": None, "none": None, "~": None}
    if bare.lower() in words:
        return words[bare.lower()]
    if re.fullmatch(r"-?[0-9]{1,9}", bare):
        return int(bare)
    if bare.startswith("["):
        return [item.strip(" \"'\n\t") for item in bare.strip("[]").split(",") if item.strip()]
    return bare
