"""Parse the names of patterns: the one language that every verb takes; see `SYNTAX`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from indexcache.pattern import Pattern, full_count
from indexcache.records import read_json

SYNTAX = """one of
  FSSF..          a pattern, one character per layer; FRRF..@8 gives R layers
                  a pool of 8 k
  full, all       every layer is full
  1/4             the first of every four layers is full; uniform:1/4 and
                  uniform:4 mean the same
  uniform:1/4:2   the same with the offset 2, which engines take where a
                  config gives none: FFSSSFSSS..
  FILE            a file that holds a pattern, or a config.json
  RUN             the last pattern of a search's folder
  RUN:1/4, RUN:3  the search's pattern that keeps 1/4 of the layers full, or 3
Any of them may end in +R8: its full layers stay, and all others become R layers
with a pool of 8 k (+R means +R8). NAME= in front of it gives it a name."""


@dataclass(frozen=True)
class NamedPattern:
    """A pattern, its name, and the digests of the calibration documents that a search saw.

    `seen` is empty for a pattern that no search found.
    """

    name: str
    pattern: Pattern
    seen: frozenset[str] = frozenset()


def parse_pattern(spec: str, layers: int) -> NamedPattern:
    """Parse one specification; see `SYNTAX`. No model is needed, only its number of layers.

    Raises:
        ValueError: the specification names no pattern, or one for another number of layers.
    """
    name, equals, body = spec.partition("=")
    if not equals:
        body = spec
        name = spec
    suffix = re.fullmatch(r"(.*)\+R(\d*)", body)
    pattern, seen = _parse(suffix[1] if suffix else body, layers)
    if suffix:
        pattern = pattern.with_rest("R", int(suffix[2]) if suffix[2] else None)
    return NamedPattern(name, pattern.check(layers=layers), seen)


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


def _parse(spec: str, layers: int) -> tuple[Pattern, frozenset[str]]:
    """Parse a specification without NAME= and +R; return the pattern and the digests seen."""
    if not spec.strip():
        raise ValueError(
            "The pattern is empty: name one, e.g. FSSF, 1/4, a file or the folder of a search."
        )
    if spec in ("full", "all"):
        return Pattern.full(layers), frozenset()
    if re.fullmatch(r"1/\d+", spec):
        spec = f"uniform:{spec}"
    kind, *values = spec.split(":")
    if kind == "uniform" and 1 <= len(values) <= 2:
        return _uniform(spec, values, layers), frozenset()
    head, colon, tail = spec.rpartition(":")
    if os.path.isdir(spec):
        return _frontier_point(Path(spec), None, layers)
    if colon and os.path.isdir(head):
        kept = _positive(tail, spec)
        fraction = "/" in tail or kept.denominator != 1
        full = full_count(layers, float(kept)) if fraction else int(kept)
        return _frontier_point(Path(head), full, layers)
    if os.path.isfile(spec):
        return Pattern.from_file(spec), _digests(Path(spec))
    if "/" in spec or "." in spec or colon:
        raise ValueError(f"{spec}: is no pattern, and there is no such file or run folder.")
    return Pattern(spec), frozenset()


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
    """Read a number or a fraction above 0; `spec` is named in the error."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{spec}: {text!r} is neither a number of layers nor a fraction such as 1/4."
        ) from None
    if value <= 0:
        raise ValueError(f"{spec}: {text} must be above 0.")
    return value


def _digests(file: Path) -> frozenset[str]:
    """Read which documents a search saw from its pattern.json; any other file names none."""
    try:
        value = read_json(file)
    except ValueError:
        return frozenset()
    digests = value.get("calibration_digests", ()) if isinstance(value, dict) else ()
    return frozenset(d for d in digests if isinstance(d, str))


def _frontier_point(folder: Path, full: int | None, layers: int) -> tuple[Pattern, frozenset[str]]:
    """Read the pattern with `full` full layers from a search's folder; None is the last one."""
    if not (folder / "result.json").exists():
        raise ValueError(
            f"{folder}: has no result.json; the search there is not finished (run it again to go "
            "on)."
        )
    result = read_json(folder / "result.json")
    try:
        frontier = {int(point["full"]): Pattern(point["pattern"]) for point in result["frontier"]}
        seen = frozenset(result["calibration"]["digests"])
        min(frontier)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{folder}: result.json is not the result of a search.") from None
    full = min(frontier) if full is None else full
    if full not in frontier:
        raise ValueError(
            f"{folder}: the search has no pattern with {full} full layers, only {min(frontier)} to "
            f"{max(frontier)}; search further, with a smaller --keep and a new --out."
        )
    return frontier[full].check(layers=layers), seen
