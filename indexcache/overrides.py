"""Read the config overrides that users give to engines, in whatever file they keep them.

vLLM takes `--hf-overrides '{..}'`, SGLang `--json-model-override-args '{..}'`; both are found as a
bare JSON object, in a launch script, in a YAML file of flags, and in a full config.json. No file is
opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PATTERN_KEYS = ("index_topk_pattern", "indexer_types")
FREQUENCY_KEYS = ("index_topk_freq", "index_skip_topk_offset")
SHARING_KEYS = ("use_index_cache", *PATTERN_KEYS, *FREQUENCY_KEYS)
"""The keys of a config that say which layers share."""

_FLAG = r"(?:hf[-_]overrides|json[-_]model[-_]override[-_]args)"
_OBJECT = re.compile(_FLAG + r"[\s=:,\\'\"]*(?=\{)")
_VARIABLE = re.compile(_FLAG + r"[\s=]*['\"]?\$")
_DOTTED = re.compile(_FLAG + r"\.([\w.]+)[\s=]+['\"]?([^\s'\"]+)")


def flag_values(text: str) -> list[dict[str, Any]]:
    """Return the overrides of every engine's flag in a text, such as a launch script.

    A line that begins with # is a comment. vLLM's `--hf-overrides.key value` counts as well.

    Where a flag's value is a variable, e.g. `--hf-overrides "$OVERRIDES"`, the objects with sharing
    keys anywhere in the text count. Python's True, False and None are read too.

    Raises:
        ValueError: a flag is there, but its value is no JSON object.
    """
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for match in _OBJECT.finditer(text):
        overrides = _object_at(text[match.end() :])
        if overrides is None:
            raise ValueError(f"the value of {match[0].strip(' =:')!r:.40} is no JSON object.")
        found.append(overrides)
    if not found and _VARIABLE.search(text):
        objects = (_object_at(text[m.start() :]) for m in re.finditer(r"(?<![$\\])\{", text))
        found = [v for v in objects if v is not None and any(k in v for k in SHARING_KEYS)]
    dotted: dict[str, Any] = {}
    for match in _DOTTED.finditer(text):
        try:
            value = json.loads(match[2])
        except ValueError:
            value = match[2]
        dotted[match[1].removeprefix("text_config.")] = value
    return [*found, dotted] if dotted else found


def _object_at(text: str) -> dict[str, Any] | None:
    """Read the object that a text begins with: plain, escaped, continued, or Python's."""
    plain = text.replace("\\\n", "")
    unescaped = plain.replace('\\"', '"')
    python = re.sub(
        r"\b(True|False|None)\b", lambda m: {"None": "null"}.get(m[0], m[0].lower()), text
    )
    for candidate in (text, text.replace('\\"', '"'), plain, unescaped, python):
        try:
            value = json.JSONDecoder().raw_decode(candidate)[0]
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def levels_of(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return overrides or a config, and its `text_config` where it has one."""
    return [v for v in (values, values.get("text_config")) if isinstance(v, Mapping)]


def sharing_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sharing keys of overrides or of a config, at the top or in `text_config`.

    Raises:
        ValueError: both places have a key, with different values.
    """
    found: dict[str, Any] = {}
    for level in levels_of(values):
        for key in SHARING_KEYS:
            value = level.get(key)
            if value is None:
                continue
            if found.setdefault(key, value) != value:
                raise ValueError(
                    f"{key} is given twice, at the top and in text_config, and the two differ."
                )
    return found


def unwrapped(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the overrides inside an object of an engine's settings, or the object itself."""
    for key, inner in value.items():
        if re.fullmatch(_FLAG, key):
            if isinstance(inner, str):
                inner = json.loads(inner)
            if isinstance(inner, Mapping):
                return inner
    return value
