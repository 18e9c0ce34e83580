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

_LINE = re.compile(
    r"""(?P<name>[A-Za-z][\w-]*)["']?(?:\s*[:=]\s*|\s+)"""
    r"""(?P<value>"[^"]*"|'[^']*'|\[[^\]]*\]|[^\s,#})\\]+)?"""
)


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
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in lines:
        for match in _LINE.finditer(line):
            name = match["name"].replace("-", "_")
            if name in MEGATRON or name in SHARING_KEYS:
                yield name, _scalar(match["value"])


def _scalar(text: str | None) -> Any:
    if text is None or text.startswith("--"):
        return True
    bare = text.strip("\"'")
    words = {"true": True, "false": False, "null": None, "none": None, "~": None}
    if bare.lower() in words:
        return words[bare.lower()]
    if re.fullmatch(r"-?[0-9]{1,9}", bare):
        return int(bare)
    if bare.startswith("["):
        return [item.strip(" \"'") for item in bare.strip("[]").split(",") if item.strip()]
    return bare
