"""Test the language of patterns: literal and uniform ones, files, and results of a search."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexcache.pattern import Pattern
from indexcache.spec import SYNTAX, parse_pattern, parse_patterns
from tests.support import refused

FRONTIER = ["FFFFFFFF", "FFFFSFFF", "FSFFSFFF", "FSFFSSFF", "FSFSSSFF", "FSFSSSSF", "FSSSSSSF"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Write a search's folder `run` into the working directory by hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    frontier = [
        {"full": p.count("F"), "pattern": p, "loss": 1.0, "flipped": None} for p in FRONTIER
    ]
    write(
        tmp_path / "run",
        {"frontier": frontier, "uniform": [], "calibration": {"digests": ["d1", "d2"]}},
    )
    return tmp_path / "run"


def write(folder: Path, value: Any) -> None:
    (folder / "result.json").write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("FSSFSSSF", "FSSFSSSF"),
        ("FRRFRRRF@4", "FRRFRRRF@4"),
        ("FRRFRRRF", "FRRFRRRF@8"),
        ("full", "FFFFFFFF"),
        ("all", "FFFFFFFF"),
        ("1/4", "FSSSFSSS"),
        ("1/1", "FFFFFFFF"),
        ("1/4+R", "FRRRFRRR@8"),
        ("1/2+R4", "FRFRFRFR@4"),
        ("uniform:1/4", "FSSSFSSS"),
        ("uniform:4", "FSSSFSSS"),
        ("uniform:2/8", "FSSSFSSS"),
        ("uniform:1", "FFFFFFFF"),
        ("uniform:1/1", "FFFFFFFF"),
        ("uniform:3", "FSSFSSFS"),
        ("uniform:99", "FSSSSSSS"),
        ("uniform:4+R8", "FRRRFRRR@8"),
        ("uniform:1/4+R", "FRRRFRRR@8"),
        ("uniform:4+R2", "FRRRFRRR@2"),
        ("full+R8", "FFFFFFFF"),
        ("FRRFRRRF@4+R2", "FRRFRRRF@2"),
        ("FSSFSSSF+R16", "FRRFRRRF@16"),
        ("run", "FSSSSSSF"),
        ("run/", "FSSSSSSF"),
        ("./run", "FSSSSSSF"),
        ("run:2", "FSSSSSSF"),
        ("run:3", "FSFSSSSF"),
        ("run:8", "FFFFFFFF"),
        ("run:1/4", "FSSSSSSF"),
        ("run:1/2", "FSFSSSFF"),
        ("run:0.5", "FSFSSSFF"),
        ("run:3/8", "FSFSSSSF"),
        ("run:1/3", "FSFSSSSF"),
        ("run:1/1", "FFFFFFFF"),
        ("run+R8", "FRRRRRRF@8"),
        ("run:1/2+R4", "FRFRRRFF@4"),
    ],
)
def test_specifications_are_parsed(run, spec, expected):
    parsed = parse_pattern(spec, 8)
    assert str(parsed.pattern) == expected
    assert parsed.name == spec
    assert parsed.seen == ({"d1", "d2"} if spec.startswith(("run", "./run")) else set())
    named = parse_pattern(f"my name={spec}", 8)
    assert named.name == "my name"
    assert (named.pattern, named.seen) == (parsed.pattern, parsed.seen)


def test_files_are_parsed(run, tmp_path):
    Pattern("FSSFSSSF").to_file(tmp_path / "p.json")
    (tmp_path / "plain").write_text("FRRFRRRF@4\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 8, "index_topk_freq": 4})
    )
    for spec, expected in (
        ("p.json", "FSSFSSSF"),
        ("plain", "FRRFRRRF@4"),
        ("config.json", "FFSSSFSS"),
        (str(tmp_path / "p.json"), "FSSFSSSF"),
        ("x=p.json+R2", "FRRFRRRF@2"),
        ("uniform=p.json", "FSSFSSSF"),
    ):
        assert str(parse_pattern(spec, 8).pattern) == expected
        assert parse_pattern(spec, 8).seen == frozenset()


def test_several_patterns_have_different_names(run):
    named = parse_patterns(("all", "1/2", "half=1/2", "run"), 8)
    assert [p.name for p in named] == ["all", "1/2", "half", "run"]
    assert parse_patterns((), 8) == ()
    refused(lambda: parse_patterns(("a=1/2", "all", "a=1/4"), 8), "'a'", "NAME=")


def test_syntax_names_every_form():
    for part in (
        "FSSF",
        "@8",
        "full",
        "all",
        "uniform:1/4",
        "uniform:4",
        "FILE",
        "RUN:1/4",
        "RUN:3",
        "+R8",
        "NAME=",
    ):
        assert part in SYNTAX


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("", ["empty"]),
        ("  ", ["empty"]),
        ("a=", ["empty"]),
        ("+R8", ["empty"]),
        ("=", ["empty"]),
        ("FSS", ["3 layers", "8"]),
        ("FSSFSSSFF", ["9 layers", "8"]),
        ("SSSSSSSS", ["Layer 0"]),
        ("fsssssss", ["'f'", "Write 'F'"]),
        ("FXSSSSSS", ["'X'"]),
        ("FSSSSSSS@8", ["no R"]),
        ("FRRRRRRR@0", ["pool factor"]),
        ("F" * 300, ["300 layers"]),
        ("x" * 5000, ["'x'"]),
        ("uniform:4+R1000000", ["pool factor"]),
        ("uniform", ["'u'"]),
        ("1/0", ["1/0"]),
        ("1/4:2", ["1/4:2"]),
        ("3/4", ["no such"]),
        ("uniform:", ["uniform:"]),
        ("uniform:0", ["above 0"]),
        ("uniform:-2", ["above 0"]),
        ("uniform:1/0", ["1/0", "neither"]),
        ("FSSSSSSS+R99999999999", ["'99999999999'", "pool factor"]),
        ("1/4+R\u0668", ["'\u0668'", "pool factor"]),
        ("uniform:a", ["'a'"]),
        ("uniform:3/4", ["whole number"]),
        ("uniform:2.5", ["whole number"]),
        ("uniform:4+R0", ["pool factor"]),
        ("uniform:4+r8", ["uniform:4+r8"]),
        ("uniform:4+R8+R8+Rx", ["uniform:4"]),
        ("missing/run", ["missing/run", "no such"]),
        ("missing:1/4", ["missing:1/4"]),
        ("missing.json", ["missing.json"]),
        ("run:1", ["1 full", "2 to 8"]),
        ("run:9", ["9 full", "2 to 8"]),
        ("run:1/8", ["1 full"]),
        ("run:0", ["above 0"]),
        ("run:-1/4", ["above 0"]),
        ("run:5/4", ["1.25"]),
        ("run:x", ["'x'"]),
        ("run:", ["run:"]),
        ("run:1:2", ["run:1:2"]),
        ("empty", ["empty", "not finished"]),
        ("empty:1/4", ["empty", "not finished"]),
        ("a\0b", ["'a'"]),
    ],
)
def test_specifications_that_are_refused(run, tmp_path, spec, parts):
    (tmp_path / "empty").mkdir()
    refused(lambda: parse_pattern(spec, 8), *parts)
    refused(lambda: parse_pattern("n=" + spec, 8))


def test_patterns_of_another_model_are_refused(run):
    refused(lambda: parse_pattern("run", 9), "8 layers", "9")
    refused(lambda: parse_pattern("run:1/4", 12))


@pytest.mark.parametrize(
    "result",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        {"frontier": []},
        {"frontier": [], "calibration": {"digests": []}},
        {"frontier": {}, "calibration": {"digests": []}},
        {"frontier": [1], "calibration": {"digests": []}},
        {"frontier": [{"full": "x", "pattern": "F"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": "X"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": None}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1e999, "pattern": "F"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": "F"}]},
        {"frontier": [{"full": 1, "pattern": "F"}], "calibration": {"digests": 3}},
        {"frontier": [{"full": 1, "pattern": "F"}], "calibration": None},
    ],
)
def test_results_changed_by_hand_are_refused(run, result):
    write(run, result)
    for spec in ("run", "run:1", "run:1/4"):
        refused(lambda spec=spec: parse_pattern(spec, 8), "run", "result.json")


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.one_of(
        st.text(max_size=20),
        st.from_regex(r"(a=)?(uniform|run|F[FRS]{7})(:[0-9]/?[0-9]?)?(\+R[0-9]?)?", fullmatch=True),
    )
)
def test_anything_is_parsed_or_refused(run, spec):
    with contextlib.suppress(ValueError):
        assert len(parse_pattern(spec, 8).pattern) == 8
