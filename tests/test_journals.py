"""Refuse journals whose lines are JSON objects, but not what the run would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from indexcache import Pattern, SearchSettings, search
from indexcache.bench.run import Grid, run_bench
from indexcache.bench.subject import open_subject
from indexcache.data import make_batches
from indexcache.spec import NamedPattern
from tests.distilling import worker
from tests.support import documents, make_model, one_line

HUGE = "9" * 400


def changes_of(line: dict, keys: tuple[str, ...]) -> list[str]:
    """List lines in which a key is missing, or has a value of another kind."""
    bad = ["{}", '{"a": 1}', '{"a": NaN}', "[]", "[" * 100_000]
    for key in keys:
        bad.append(json.dumps({k: v for k, v in line.items() if k != key}))
        for value in ("NaN", "-Infinity", "1e999", HUGE, '"text"', "null", "[[1]]", "{}", "true"):
            text = json.dumps(line | {key: "@"}).replace('"@"', value)
            bad.append(text)
    return bad


def refused_lines(folder: Path, lines: list[str], go_on) -> None:
    """Expect a refusal of each line behind the good ones, which names the journal."""
    path = folder / "journal.jsonl"
    good = path.read_text()
    for line in lines:
        path.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError) as error:  # noqa: PT011
            go_on()
        one_line(error.value, str(folder), "changed by hand")
        assert len(str(error.value)) < 800
    path.write_text(good)
    go_on()


def test_lines_that_no_search_writes(tmp_path):
    model = make_model("glm_moe_dsa", num_hidden_layers=2)
    batches = make_batches(documents(2), length=64, sequences=2)

    def go_on():
        search(model, batches, tmp_path, SearchSettings(keep=0.5, uniform=False))

    go_on()
    line = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert line["pattern"] == "FF"
    others = [{"pattern": p, "loss": 1.0} for p in ("F", "FSS", "SF", "", "FF ", "FR")]
    others += [line | {"loss": line["loss"] + 1}]  # Another loss of the same pattern.
    refused_lines(
        tmp_path, changes_of(line, ("pattern", "loss")) + [json.dumps(o) for o in others], go_on
    )


def test_lines_that_no_bench_writes(tmp_path):
    subject = open_subject(
        "tiny-random", layers=2, dtype="float32", device="cpu", index_dtype="auto"
    )
    named = (NamedPattern("all", Pattern.full(2)),)
    grid = Grid(contexts=(40,), patterns=named, decode_tokens=2, chunk=64)

    def go_on():
        run_bench(subject, grid, tmp_path)

    go_on()
    line = json.loads((tmp_path / "journal.jsonl").read_text())
    refused_lines(tmp_path, changes_of(line, ("context", "pattern", "full", "ttft_s")), go_on)


def test_lines_that_no_distillation_writes(tmp_path):
    def go_on():
        worker.train(tmp_path, "frozen", pattern="FSFSSS", steps=1, rows=1, eval_every=1)

    go_on()
    lines = [json.loads(x) for x in (tmp_path / "journal.jsonl").read_text().splitlines()]
    held_out = next(x for x in lines if "held_out" in x)
    step = next(x for x in lines if "loss" in x)
    bad = changes_of(held_out, ("step",)) + changes_of(step, ("tokens", "kl"))
    bad += [json.dumps(held_out | {"held_out": None}), json.dumps(step | {"step": -1})]
    refused_lines(tmp_path, bad, go_on)
