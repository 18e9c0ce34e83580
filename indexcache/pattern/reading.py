"""Read patterns from configs, from overrides of engines, and from files that hold either.

The class methods of `Pattern` are the way in, and their docstrings are the contracts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from indexcache.overrides import PATTERN_KEYS, flag_values, levels_of, sharing_keys, unwrapped
from indexcache.pattern.counts import DEFAULT_SKIP_OFFSET, full_by_rule, positive
from indexcache.pattern.value import TYPES, Pattern, filled
from indexcache.reading import parse_json, read_text
from indexcache.seen import Seen

MAX_FILE = 1 << 26  # bytes of a file that may hold a pattern


def of_config(config: Any) -> Pattern:
    """Read the pattern of a model config; see `Pattern.from_config`."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(
            f"A model config is a mapping of names to values, not {type(values).__name__}."
        )
    if "num_hidden_layers" not in values and isinstance(values.get("text_config"), Mapping):
        values = values["text_config"]
    layers = positive("num_hidden_layers", values.get("num_hidden_layers"))
    for key in ("indexer_types", "index_topk_pattern"):
        value = values.get(key)
        if value is None:
            continue
        is_string = key == "index_topk_pattern" and isinstance(value, str)
        is_types = isinstance(value, (list, tuple)) and all(t in TYPES.values() for t in value)
        if not (is_string or is_types):
            raise ValueError(
                f"{key} of the config may hold only full and shared, one per layer, not "
                f"{value!r:.60}: engines take anything else for full."
            )
        return Pattern(value).check(layers=layers, reindex=False)
    freq = max(_integer(values, "index_topk_freq", 1), 1)
    offset = _integer(values, "index_skip_topk_offset", DEFAULT_SKIP_OFFSET)
    return filled(full_by_rule(layers, freq, offset), "S", None)


def of_overrides(values: Mapping[str, Any], layers: int | None) -> Pattern:
    """Read the pattern of engine overrides or of a config; see `Pattern.from_overrides`."""
    values = unwrapped(values)
    keys = sharing_keys(values)
    for level in (levels := levels_of(values)):
        layers = level.get("num_hidden_layers", layers)
    found = {}
    for key in (key for key in PATTERN_KEYS if key in keys):
        value = keys[key]
        size = len(value) if isinstance(value, (str, list)) and layers is None else layers
        found[key] = of_config({"num_hidden_layers": size or 1, key: value})
    if len(set(found.values())) > 1:
        pairs = " but ".join(f"{key} gives {pattern}" for key, pattern in found.items())
        raise ValueError(f"{pairs}; engines read different ones, so make them equal.")
    if found:
        return next(iter(found.values()))
    is_config = any("num_hidden_layers" in level for level in levels)
    if layers is None or not (is_config or "index_topk_freq" in keys):
        raise ValueError(
            "there is no pattern; a pattern is under one of the keys pattern, "
            f"{', '.join((*PATTERN_KEYS, 'index_topk_freq'))}."
        )
    return of_config({"num_hidden_layers": layers, **keys})


def of_file(path: str | Path, layers: int | None) -> Pattern:
    """Read a pattern from a file; see `Pattern.from_file`."""
    path = Path(path)
    text = read_text(path, most=MAX_FILE).strip()
    try:
        pattern = _of_text(text, layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return pattern.chosen_on(_seen_in(text) or _seen_beside(path, pattern))


def _of_text(text: str, layers: int | None) -> Pattern:
    """Read a pattern from the text of a file."""
    try:
        value = parse_json(text)
    except ValueError as error:
        if flags := flag_values(text):
            patterns = {of_overrides(flag, layers) for flag in flags}
            if len(patterns) > 1:
                raise ValueError(
                    f"its flags give {len(patterns)} different patterns; keep one of them."
                ) from None
            return patterns.pop()
        if text.startswith(("{", "[")):
            raise ValueError(
                f"there is no pattern; it begins like JSON, but is none ({error!s:.200})."
            ) from None
        if not re.fullmatch(r"[\w@/, ]*", text):
            raise ValueError(
                "there is no pattern; a file holds FSSF.., JSON with a pattern, overrides of "
                "an engine, or a config."
            ) from None
        return Pattern(text)
    if not isinstance(value, Mapping):
        return Pattern(value)
    pattern = value.get("pattern")
    if pattern is None:
        flags = [] if sharing_keys(unwrapped(value)) else flag_values(text)
        return of_overrides(flags[0] if len(flags) == 1 else value, layers)
    if (types := value.get("indexer_types")) is not None and Pattern(types) != Pattern(pattern):
        raise ValueError(f"its pattern is {pattern}, but its indexer_types are others.")
    return Pattern(pattern)


def _integer(values: Mapping[str, Any], name: str, default: int) -> int:
    """Read an integer of a config; a null means the default."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, not {value!r:.60}.")
    return value


def _seen_in(text: str) -> Seen:
    try:
        return Seen.from_json(parse_json(text))
    except ValueError:
        return Seen()


def _seen_beside(path: Path, pattern: Pattern) -> Seen:
    """Return what the pattern.json beside a file of the same pattern says was seen."""
    beside = path.with_name("pattern.json")
    if path.name == beside.name or not beside.is_file():
        return Seen()
    try:
        other = of_file(beside, len(pattern))
    except ValueError:
        return Seen()
    return other.seen if other == pattern else Seen()
