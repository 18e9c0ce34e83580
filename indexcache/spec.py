"""Parse the names of patterns: the one language that every verb takes; see `SYNTAX`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from indexcache.checkpoint import read_header
from indexcache.pattern import MAX_FILE, Pattern, full_count, parse_pool
from indexcache.reading import parse_json, read_toml
from indexcache.records import read_json
from indexcache.seen import Seen

SYNTAX = """one of
  FSSF..          a pattern, one character per layer; FRRF..@8 gives R layers
                  a pool of 8 k, FRRF..@1/8 one of 1/8 of what a query sees,
                  and FRFR..@1/8,1/16 each group its own
  full, all       every layer is full
  1/4             the first of every four layers is full; uniform:1/4 and
                  uniform:4 mean the same
  uniform:1/4:2   the same with the offset 2, which engines take where a
                  config gives none: FFSSSFSSS..
  FILE            a file that holds a pattern: any that export writes, the
                  overrides of vLLM or SGLang or a script with them, a
                  config.json, a delta, or a TOML file of settings
  DIR             the folder of an export, a distillation or a checkpoint
  RUN             the last pattern of a search's folder
  RUN:1/4, RUN:3  the search's pattern that keeps 1/4 of the layers full, or 3
Any of them may end in +R8: its full layers stay, and all others become R layers
with a pool of 8 k (+R means +R8; +R1/8 is a share). NAME= in front of it gives it a name."""


NUMBER = r"-?[0-9]{1,9}(\.[0-9]{1,9}|/[0-9]{1,9})?"
"""A number or a fraction in a pattern's name."""


@dataclass(frozen=True)
class NamedPattern:
    """A pattern and its name."""

    name: str
    pattern: Pattern

    @property
    def seen(self) -> frozenset[str]:
        """The digests of the calibration documents that a search saw; empty if none found it."""
        return self.pattern.seen.digests

    @property
    def origin_known(self) -> bool:
        """Whether it is known which text chose the pattern, or that none did: a rule made it."""
        p = self.pattern
        made = Pattern(p.roles.replace("R", "S")).frequency() is not None
        return made or bool(p.seen)


def parse_pattern(spec: str, layers: int) -> NamedPattern:
    """Parse one specification; see `SYNTAX`. No model is needed, only its number of layers.

    Raises:
        ValueError: the specification names no pattern, or one for another number of layers.
    """
    name, equals, body = spec.partition("=")
    if not equals or _is_source(spec):
        body = spec
        name = spec
    suffix = None if _is_source(body) else re.fullmatch(r"(.*)\+R([\w/]*)", body, re.DOTALL)
    pool = parse_pool(suffix[2]) if suffix and suffix[2] else None
    if suffix and isinstance(pool, str):
        raise ValueError(
            f"{spec:.80}: behind +R stands {suffix[2]!r:.40}, which is no pool factor; a pool of "
            "8 k is +R8, and one of an eighth of the context +R1/8."
        )
    pattern = _parse(suffix[1] if suffix else body, layers)
    if suffix:
        assert not isinstance(pool, str)
        pattern = pattern.with_rest("R", pool)
    return NamedPattern(name, pattern.check(layers=layers))


def parse_patterns(specs: Iterable[str], layers: int) -> tuple[NamedPattern, ...]:
    """Parse several specifications, whose names must differ.

    Raises:
        ValueError: see `parse_pattern`; or two of them have the same name.
    """
    patterns = tuple(parse_pattern(spec, layers) for spec in specs)
    names = [p.name for p in patterns]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two patterns have the same name, {name!r}; give each its own with NAME=..."
            )
    return patterns


def _parse(spec: str, layers: int) -> Pattern:
    """Parse a specification without NAME= and +R; return the pattern."""
    if not spec.strip():
        raise ValueError(
            "The pattern is empty: name one, e.g. FSSF, 1/4, a file or the folder of a search."
        )
    if spec in ("full", "all"):
        return Pattern.full(layers)
    if re.fullmatch(r"1/[0-9]+", spec):
        spec = f"uniform:{spec}"
    kind, *values = spec.split(":")
    if kind == "uniform" and 1 <= len(values) <= 2:
        return _uniform(spec, values, layers)
    if spec.startswith(("{", "[")):
        return _of_json(spec, layers)
    head, colon, tail = spec.rpartition(":")
    if os.path.isdir(spec):
        return _of_folder(Path(spec), layers)
    if colon and os.path.isdir(head):
        kept = _positive(tail, spec)
        fraction = "/" in tail or kept.denominator != 1
        full = full_count(layers, float(kept)) if fraction else int(kept)
        return _frontier_point(Path(head), full, layers)
    if os.path.isfile(spec):
        return _of_file(Path(spec), layers)
    if os.path.lexists(spec):
        raise ValueError(f"{spec}: is neither a file nor a folder, so no pattern can be read.")
    if "/" in spec or "." in spec or colon:
        raise ValueError(f"{spec}: is no pattern, and there is no such file or run folder.")
    return Pattern(spec)


def _is_source(spec: str) -> bool:
    """Say whether the whole of a specification with an = is JSON, or names a file or folder."""
    return spec.startswith(("{", "[")) or os.path.exists(spec)


def _of_json(spec: str, layers: int) -> Pattern:
    """Read overrides or a list of types that were given instead of a file."""
    try:
        value = parse_json(spec)
    except ValueError as error:
        raise ValueError(f"{spec:.60}: begins like JSON, but is none ({error}).") from None
    return Pattern.of(value) if isinstance(value, list) else Pattern.from_overrides(value, layers)


def _of_file(file: Path, layers: int) -> Pattern:
    """Read the pattern of a file, with the text it was chosen on where the file says so."""
    if file.suffix == ".safetensors":
        metadata = read_header(file).metadata
        pattern = metadata.get("pattern")
        if pattern is None:
            raise ValueError(f"{file}: this is no delta, so it has no pattern.")
        return _named_in(file, pattern).chosen_on(Seen.from_metadata(metadata))
    if file.suffix == ".toml":
        return _of_settings(file, layers)
    value = _json_object(file)
    if "frontier" in value:
        return _frontier_point(file, None, layers)
    if isinstance(value.get("rows"), list):
        return _of_rows(file, value["rows"]).chosen_on(Seen.from_json(value))
    return Pattern.from_file(file, layers)


def _of_folder(folder: Path, layers: int) -> Pattern:
    """Read the pattern of a run's, an export's or a checkpoint's folder."""
    result = folder / "result.json"
    if result.is_file():
        if isinstance(_json_object(result).get("pattern"), str):
            return _of_file(result, layers)  # This is a distillation's.
        return _frontier_point(folder, None, layers)
    if not (folder / "journal.jsonl").exists():
        for name in ("pattern.json", "config.json", "evidence.json", "overlap.json"):
            if (folder / name).is_file():
                return _of_file(folder / name, layers)
    return _frontier_point(folder, None, layers)  # It says that there is none.


def _of_settings(file: Path, layers: int) -> Pattern:
    """Read the pattern of a TOML file of settings, as --config takes it."""
    values = read_toml(file)
    given = values.get("pattern", values.get("patterns"))
    specs = [given] if isinstance(given, str) else given
    if not isinstance(specs, list) or len(specs) != 1 or not isinstance(specs[0], str):
        raise ValueError(f"{file}: must have one pattern, under the key pattern.")
    if specs[0].endswith(".toml"):
        raise ValueError(f"{file}: its pattern is another file of settings; name that one.")
    return parse_pattern(specs[0], layers).pattern


def _of_rows(file: Path, rows: list[Any]) -> Pattern:
    """Read the only pattern of evidence.json or bench.json."""
    patterns = {
        row["pattern"]
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("pattern"), str)
    }
    if len(patterns) != 1:
        raise ValueError(
            f"{file}: its rows have {len(patterns)} different patterns; write down the one you "
            "mean."
        )
    return _named_in(file, patterns.pop())


def _named_in(file: Path, pattern: str) -> Pattern:
    """Return a pattern that a file holds; an error names the file."""
    try:
        return Pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one for any other file."""
    if file.stat().st_size > MAX_FILE:
        return {}
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _uniform(spec: str, values: list[str], layers: int) -> Pattern:
    """Build the pattern of uniform:FREQUENCY or uniform:FREQUENCY:OFFSET."""
    frequency = _positive(values[0], spec)
    if "/" in values[0]:
        frequency = 1 / frequency
    offset = _positive(values[1], spec) if len(values) > 1 else Fraction(1)
    if frequency.denominator != 1 or offset.denominator != 1:
        raise ValueError(
            f"{spec}: a uniform pattern has one full layer in a whole number of layers."
        )
    return Pattern.uniform(layers, int(frequency), int(offset))


def _positive(text: str, spec: str) -> Fraction:
    """Read a number or a fraction above 0; `spec` is named in the error.

    Numbers have at most nine digits: `Fraction` would compute all the digits of 1e99999999.
    """
    if not re.fullmatch(NUMBER, text) or re.search("/0+$", text):
        raise ValueError(
            f"{spec:.80}: {text!r:.80} is neither a number of layers nor a fraction such as 1/4."
        )
    value = Fraction(text)
    if value <= 0:
        raise ValueError(f"{spec}: {text} must be above 0.")
    return value


def _frontier_point(source: Path, full: int | None, layers: int) -> Pattern:
    """Read the pattern with `full` full layers from a search; None is the last one.

    `source` is its folder or its result.json.
    """
    file = source / "result.json" if source.is_dir() else source
    if not file.exists():
        raise ValueError(
            f"{source}: has no result.json; the search there is not finished (run it again to go "
            "on)."
        )
    result = read_json(file)
    try:
        frontier = {int(point["full"]): Pattern(point["pattern"]) for point in result["frontier"]}
        seen = Seen.from_json(result) | Seen(frozenset(result["calibration"]["digests"]))
        min(frontier)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{source}: {file.name} is not the result of a search.") from None
    full = min(frontier) if full is None else full
    if full not in frontier:
        raise ValueError(
            f"{source}: the search has no pattern with {full} full layers, only {min(frontier)} to "
            f"{max(frontier)}; search further, with a smaller --keep and a new --out."
        )
    return frontier[full].check(layers=layers).chosen_on(seen)
