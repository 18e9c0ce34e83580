"""Compare the search with a brute force on stock models; test its journal, kills and resuming."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from indexcache import Pattern, SearchSettings, search
from indexcache.data import make_batches
from indexcache.records import read_json
from tests.support import documents, make_model, stock_loss


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(), length=64, sequences=4, batch=2)


def brute_force(model, batches, full: int):
    roles = "F" * 6
    path = [(roles, stock_loss(model, roles, batches))]
    while roles.count("F") > full:
        tried = []
        for layer in range(1, 6):
            if roles[layer] == "F":
                flipped = roles[:layer] + "S" + roles[layer + 1 :]
                tried.append((stock_loss(model, flipped, batches), flipped))
        loss, roles = min(tried)
        path.append((roles, loss))
    return path


def test_greedy_equals_brute_force_on_stock_models(glm, batches, tmp_path):
    result = search(glm, batches, tmp_path / "run", SearchSettings(keep=1 / 6, uniform=False))
    expected = brute_force(glm, batches, 1)
    assert [str(p.pattern) for p in result.frontier] == [p for p, _ in expected]
    for point, (_, loss) in zip(result.frontier, expected, strict=True):
        assert point.loss == pytest.approx(loss, rel=1e-6)
    assert [p.full for p in result.frontier] == [6, 5, 4, 3, 2, 1]
    for a, b in pairwise(result.frontier):  # The patterns are nested.
        assert [i for i in range(6) if a.pattern[i] != b.pattern[i]] == [b.flipped]
    assert result.to_json() == read_json(tmp_path / "run" / "result.json")
    assert result.table().splitlines()[-1].split()[:3] == ["searched,", "1", "full"]


def test_search_works_on_deepseek_v32(batches, tmp_path):
    result = search(make_model("deepseek_v32"), batches, tmp_path, SearchSettings(keep=0.5))
    assert result.pattern == result.frontier[-1].pattern
    assert result.frontier[-1].full == 3
    assert {str(p.pattern) for p in result.uniform} == {
        "FSFSFS",
        "FRFRFR@4",
    }  # A pool of 8 k would hold all 64.


def test_stages_keep_their_first_layer_and_evaluate_less(glm, batches, tmp_path):
    search(glm, batches, tmp_path / "a", SearchSettings(keep=1 / 3, uniform=False))
    result = search(
        glm, batches, tmp_path / "b", SearchSettings(keep=1 / 3, stages=2, uniform=False)
    )
    assert all(p.pattern[0] == p.pattern[3] == "F" for p in result.frontier)
    count = [len((tmp_path / r / "journal.jsonl").read_text().splitlines()) for r in "ab"]
    assert count == [1 + 5 + 4 + 3 + 2, 1 + 2 + 2 + 1 + 1]


def test_two_runs_are_identical(glm, batches, tmp_path):
    for name in "ab":
        search(glm, batches, tmp_path / name)
    for file in ("journal.jsonl", "result.json", "settings.json", "pattern.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_resume_from_every_journal_line(glm, batches, tmp_path):
    settings = SearchSettings(keep=1 / 3)
    search(glm, batches, tmp_path / "whole", settings)
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    lines = journal.splitlines(keepends=True)
    for n in range(len(lines)):
        folder = tmp_path / f"cut{n}"
        folder.mkdir()
        (folder / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:n]) + lines[n][: n % len(lines[n])])
        search(glm, batches, folder, settings)
        assert (folder / "journal.jsonl").read_bytes() == journal
        assert (folder / "result.json").read_bytes() == (
            tmp_path / "whole" / "result.json"
        ).read_bytes()


def test_changed_settings_data_or_model_are_refused(glm, batches, tmp_path):
    search(glm, batches, tmp_path, SearchSettings(keep=0.5), identity={"model": "a"})
    before = (tmp_path / "journal.jsonl").read_bytes()
    other = make_batches(documents(seed=1), length=64, sequences=4, batch=2)
    for change, name in (
        (
            lambda: search(
                glm, batches, tmp_path, SearchSettings(keep=0.25), identity={"model": "a"}
            ),
            "keep",
        ),
        (
            lambda: search(glm, other, tmp_path, SearchSettings(keep=0.5), identity={"model": "a"}),
            "data",
        ),
        (
            lambda: search(
                glm, batches, tmp_path, SearchSettings(keep=0.5), identity={"model": "b"}
            ),
            "model",
        ),
    ):
        with pytest.raises(ValueError, match=f"other settings .*{name} was"):
            change()
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_another_model_is_refused_without_being_told(glm, batches, tmp_path):
    search(glm, batches, tmp_path, SearchSettings(keep=0.5))
    other = make_model("glm_moe_dsa", seed=7)
    with pytest.raises(ValueError, match=r"other settings .*weights was"):
        search(other, batches, tmp_path, SearchSettings(keep=0.5))


def test_a_model_trained_with_sharing_is_refused(glm, batches, tmp_path):
    native = make_model(
        "glm_moe_dsa", indexer_types=["full", "shared", "shared", "full", "shared", "shared"]
    )
    with pytest.raises(
        ValueError,
        match="can never be full. A search is pointless on a model that was trained with sharing",
    ):
        search(native, batches, tmp_path)


def test_short_sequences_are_refused(glm, tmp_path):
    with pytest.raises(ValueError, match="too short for this model: with index_topk = 8 only 50%"):
        search(glm, make_batches(documents(), length=16, sequences=4), tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_journal(batches, tmp_path):
    model = make_model("glm_moe_dsa")
    with pytest.raises(ValueError, match="loss of .* is nan"):
        model.model.norm.weight.data[3] = float("nan")
        search(model, batches, tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == ""


def test_a_full_disk_loses_nothing(glm, batches, tmp_path, monkeypatch):
    from indexcache.records import Run

    append = Run.append
    lines = []

    def full(self, entry):
        if len(lines) == 5:
            self._file.write('{"pattern": "FF')  # Only this fits on the disk.
            self._file.flush()
            raise OSError(28, "No space left on device", "journal.jsonl")
        lines.append(entry)
        append(self, entry)

    monkeypatch.setattr(Run, "append", full)
    with pytest.raises(OSError, match="No space"):
        search(glm, batches, tmp_path / "a")
    monkeypatch.undo()
    search(glm, batches, tmp_path / "a")
    search(glm, batches, tmp_path / "b")
    assert (tmp_path / "a" / "journal.jsonl").read_bytes() == (
        tmp_path / "b" / "journal.jsonl"
    ).read_bytes()


def command(out):
    flags = f"--out {out} --length 128 --sequences 3 --keep 1/4"
    return [sys.executable, "-m", "indexcache", "search", "tiny", *flags.split()]


@pytest.mark.long
def test_kill_nine_at_ten_random_moments_and_resume(tmp_path):
    """A search that was killed ten times ends with the files of one that ran through."""
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    expected = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    out = tmp_path / "killed"
    rng = random.Random(0)
    kills = 0
    for target in sorted(rng.sample(range(1, len(expected.splitlines()) - 2), 10)):
        process = subprocess.Popen(
            command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        journal = out / "journal.jsonl"
        while process.poll() is None and (
            not journal.exists() or journal.read_bytes().count(b"\n") < target
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.08))
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "result.json").exists()
    assert kills == 10
    subprocess.run(command(out), check=True, capture_output=True)
    assert journal.read_bytes() == expected
    assert (out / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()
    assert (
        str(Pattern.from_file(out / "pattern.json"))
        == read_json(out / "result.json")["frontier"][-1]["pattern"]
    )
    assert json.loads(expected.splitlines()[0])["pattern"] == "F" * len(
        read_json(out / "result.json")["frontier"][0]["pattern"]
    )
