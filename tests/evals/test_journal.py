"""The journal of an evaluation: interruptions, kills, other settings, and changes by hand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import indexcache as ic
from indexcache import Pattern, evaluate
from indexcache.data import make_batches
from indexcache.data.retrieval import retrieval_batches
from indexcache.evals.subject import ModelSubject
from indexcache.models.stream.run import Stream
from indexcache.models.stream.settings import StreamSettings
from indexcache.records import Run
from tests.support import documents, refused

ROOT = Path(ic.__file__).parents[1]
PATTERNS = {"a": "FSSSSS", "b": "FSFSFS", "all": "FFFFFF"}


@pytest.fixture(scope="module")
def batches():
    asked = retrieval_batches(
        lambda text: [ord(c) % 128 for c in text], 128, ("passkey",), length=256, sequences=2
    )
    return make_batches(documents(4), length=64, sequences=4, batch=2) + asked


def text_of(evidence) -> str:
    return json.dumps(evidence.to_json())


def test_an_interruption_at_any_line_costs_that_line_alone(glm, batches, tmp_path, monkeypatch):
    whole = text_of(evaluate(glm, PATTERNS, batches, out=tmp_path / "whole"))
    assert whole == text_of(evaluate(glm, PATTERNS, batches))
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    total = len(batches) * len(PATTERNS)
    assert len(journal.splitlines()) == total
    append, compare = Run.append, ModelSubject.compare
    measured = []

    def stopped(self, entry):
        append(self, entry)
        if len(self.journal) in (1, 4, total - 1):
            raise KeyboardInterrupt

    def counted(self, batch, base, named, *args, **kwargs):
        measured.extend(named)
        return compare(self, batch, base, named, *args, **kwargs)

    monkeypatch.setattr(Run, "append", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            evaluate(glm, PATTERNS, batches, out=tmp_path / "cut")
    with open(tmp_path / "cut" / "journal.jsonl", "a") as f:
        f.write('{"batch": 2, "pat')  # A kill cuts a line off.
    monkeypatch.setattr(ModelSubject, "compare", counted)
    assert text_of(evaluate(glm, PATTERNS, batches, out=tmp_path / "cut")) == whole
    assert measured == ["all"]
    assert (tmp_path / "cut" / "journal.jsonl").read_bytes() == journal
    measured.clear()
    assert text_of(evaluate(glm, PATTERNS, batches, out=tmp_path / "cut")) == whole
    assert not measured


def test_other_settings_and_changed_lines_are_refused(glm, batches, tmp_path):
    evaluate(glm, "FSSSSS", batches, out=tmp_path)
    refused(lambda: evaluate(glm, "FSFSSS", batches, out=tmp_path), "other settings", "FSFSSS")
    refused(lambda: evaluate(glm, "FSSSSS", batches[:2], out=tmp_path), "data was")
    refused(lambda: evaluate(glm, "FSSSSS", batches, against="FSSSSS", out=tmp_path), "against was")
    path = tmp_path / "journal.jsonl"
    good = path.read_text()
    line = json.loads(good.splitlines()[0])
    rows = line["sums"]
    for change in (
        {"batch": 99},
        {"batch": True},
        {"pattern": "FF"},
        {"pattern": 3},
        {"sums": rows[:-1]},
        {"sums": [row[:-1] for row in rows]},
        {"sums": [["1", *row[1:]] for row in rows]},
        {"sums": None},
    ):
        path.write_text(good + json.dumps(line | change) + "\n")
        refused(lambda: evaluate(glm, "FSSSSS", batches, out=tmp_path), "changed by hand")
    path.write_text(good)
    (tmp_path / "file").write_text("x")
    refused(lambda: evaluate(glm, "FSSSSS", batches, out=tmp_path / "file"), "this is a file")


def test_a_streamed_evaluation_goes_on_with_the_journal_of_a_loaded_one(
    checkpoint, batches, tmp_path, monkeypatch
):
    loaded = ic.load(checkpoint)
    whole = evaluate(loaded, PATTERNS, batches, out=tmp_path / "whole")
    streamed = ic.load(checkpoint, stream=StreamSettings(stream=True))
    found = evaluate(streamed, PATTERNS, batches, out=tmp_path / "streamed")
    assert text_of(found) == text_of(whole)
    journals = [tmp_path / name / "journal.jsonl" for name in ("whole", "streamed")]
    assert journals[0].read_bytes() == journals[1].read_bytes()
    lines = journals[0].read_text().splitlines(keepends=True)
    journals[1].write_text("".join(lines[:4]))
    assert text_of(evaluate(streamed, PATTERNS, batches, out=tmp_path / "streamed")) == text_of(
        whole
    )
    assert sorted(journals[1].read_text().splitlines(keepends=True)) == sorted(lines)
    monkeypatch.setattr(Stream, "run", None)  # No pass is needed any more.
    assert text_of(evaluate(streamed, PATTERNS, batches, out=tmp_path / "streamed")) == text_of(
        whole
    )


def command(checkpoint: Path, folder: Path, out: Path, sequences: int) -> list[str]:
    np.save(folder / "text.npy", np.random.default_rng(0).integers(0, 128, 64 * sequences))
    flags = f"--data {folder}/text.npy --split all --length 64 --sequences {sequences} --out {out}"
    patterns = [str(Pattern.uniform(6, n)) for n in (2, 3, 6)]
    verb = ["-m", "indexcache", "evaluate", str(checkpoint), *flags.split()]
    return [sys.executable, *verb, "--pattern", *patterns]


def test_kill_nine_after_some_lines(checkpoint, tmp_path):
    kill_and_go_on(checkpoint, tmp_path, sequences=40, kills=1)


@pytest.mark.long
def test_kill_nine_at_ten_random_moments(checkpoint, tmp_path):
    kill_and_go_on(checkpoint, tmp_path, sequences=400, kills=10)


def kill_and_go_on(checkpoint, folder, sequences, kills):
    """Kill the verb again and again, each time some lines later; it ends with the same files."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    whole, killed = (folder / name / "evidence.json" for name in ("whole", "killed"))
    subprocess.run(command(checkpoint, folder, whole.parent, sequences), check=True, **quiet)
    run = command(checkpoint, folder, killed.parent, sequences)
    journal = killed.parent / "evaluation" / "journal.jsonl"
    rng = random.Random(0)
    lines = 0
    for _ in range(kills):
        lines += rng.randrange(1, max(3 * sequences // (2 * kills), 2))
        with subprocess.Popen(run, **quiet) as process:
            while process.poll() is None:
                with suppress(FileNotFoundError):
                    if journal.read_bytes().count(b"\n") >= lines:
                        process.send_signal(signal.SIGKILL)
                        break
                time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert not killed.exists()
        lines = journal.read_bytes().count(b"\n")
    subprocess.run(run, check=True, **quiet)
    assert killed.read_bytes() == whole.read_bytes()
    assert [p.name for p in killed.parent.iterdir()] == ["evidence.json"]
