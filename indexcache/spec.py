"""Naming patterns: literal ones, uniform ones, files, and points of a search's frontier."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from indexcache.pattern import Pattern, full_count
from indexcache.records import read_json

SYNTAX = """one of
  FSSF..            a pattern, one character per layer (R layers: FRRF..@8, pool factor behind the @)
  full              every layer full
  uniform:1/4       one full layer in four, the first of each four (or uniform:4); uniform:1/4:2 with the offset 2,
                    which engines take where a config gives none: FFSSSFSSS..
  FILE              a file with a pattern, or a config.json
  RUN               the last pattern of a search's folder; RUN:1/4 or RUN:3 the point that keeps 1/4 or 3 full layers
each may be followed by +R8: the same full layers, R (pool 8 k) in the others; NAME=.. in front gives it a name."""


@dataclass(frozen=True)
class Chosen:
    """A named pattern, and the digests of the calibration documents it was searched on (empty: not searched)."""

    name: str
    pattern: Pattern
    seen: frozenset[str] = frozenset()


def choose(spec: str, layers: int) -> Chosen:
    """The pattern that a specification names; see SYNTAX.

    Raises:
        ValueError: it names none, or one of another length.
    """
    name, named, rest = spec.partition("=")
    body = rest if named else spec
    match = re.fullmatch(r"(.*)\+R(\d*)", body)
    base, seen = _base(match[1] if match else body, layers)
    if match:
        base = base.with_rest("R", int(match[2]) if match[2] else None)
    return Chosen(name if named else spec, base.check(layers=layers), seen)


def _base(spec: str, layers: int) -> tuple[Pattern, frozenset[str]]:
    if not spec.strip():
        raise ValueError(
            "The pattern is empty: name one, e.g. FSSF, uniform:1/4, a file or the folder of a search."
        )
    if spec == "full":
        return Pattern.full(layers), frozenset()
    kind, *values = spec.split(":")
    if kind == "uniform" and 1 <= len(values) <= 2:
        freq = 1 / _fraction(values[0], spec) if "/" in values[0] else _fraction(values[0], spec)
        offset = _fraction(values[1], spec) if len(values) > 1 else Fraction(1)
        if freq.denominator != 1 or offset.denominator != 1:
            raise ValueError(
                f"{spec}: a uniform pattern has one full layer in a whole number of layers."
            )
        return Pattern.uniform(layers, int(freq), int(offset)), frozenset()
    head, colon, tail = spec.rpartition(":")
    if os.path.isdir(spec):
        return _point(Path(spec), None, layers)
    if colon and os.path.isdir(head):
        value = _fraction(tail, spec)
        return _point(
            Path(head),
            full_count(layers, float(value))
            if "/" in tail or value.denominator != 1
            else int(value),
            layers,
        )
    if os.path.isfile(spec):
        return Pattern.from_file(spec), _digests(Path(spec))
    if "/" in spec or "." in spec or colon:
        raise ValueError(f"{spec}: is no pattern, and there is no such file or run folder.")
    return Pattern(spec), frozenset()


def _fraction(text: str, spec: str) -> Fraction:
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
    """The calibration documents that a search noted in its pattern.json; none in any other file."""
    try:
        found = read_json(file)
    except ValueError:
        return frozenset()
    digests = found.get("calibration_digests", ()) if isinstance(found, dict) else ()
    return frozenset(d for d in digests if isinstance(d, str))


def _point(folder: Path, full: int | None, layers: int) -> tuple[Pattern, frozenset[str]]:
    if not (folder / "result.json").exists():
        raise ValueError(
            f"{folder}: has no result.json; the search there is not finished (run it again to go on)."
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
            f"{folder}: the search has no pattern with {full} full layers, only {min(frontier)} to {max(frontier)}; "
            "search further, with a smaller --keep and a new --out."
        )
    return frontier[full].check(layers=layers), seen
