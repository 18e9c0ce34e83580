"""Check the domain matrix against single searches and evaluations, and its resumption."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from indexcache import evaluate, search
from indexcache.cli import main
from indexcache.crossing.run import matrix
from indexcache.crossing.settings import MatrixSettings
from indexcache.data import make_batches
from indexcache.report.html import make_report
from indexcache.searching.settings import SearchSettings
from tests.support import documents, refused

BUDGETS = MatrixSettings(keep=(1 / 6, 1 / 2))


@pytest.fixture(scope="module")
def texts():
    both = documents(80, 48)
    return (
        make_batches(both[:4], length=48, sequences=4, batch=2),
        make_batches(both[4:], length=48, sequences=74, batch=37),
    )


@pytest.fixture(scope="module")
def whole(glm, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrix")
    return out, matrix(glm, *texts, out, BUDGETS)


def test_cells_are_those_of_single_searches_and_evaluations(glm, texts, whole, tmp_path):
    calibration, heldout = texts
    _, result = whole
    assert result.domains == ("d0", "d1")
    cells = {(r["calibrated"], r["objective"], r["full"], r["tested"]): r for r in result.rows}
    assert len(cells) == len(result.rows) == 4 * 2 * 2
    for domain, objective in (("all", "worst"),):
        own = [b for b in calibration if domain in ("all", b.domain)]
        settings = SearchSettings(keep=1 / 6, uniform=False, objective=objective)
        point = search(glm, own, tmp_path / domain, settings).frontier
        for full in (3, 1):
            pattern = next(p.pattern for p in point if p.full == full)
            for tested in ("d0", "d1"):
                cell = cells[domain, objective, full, tested]
                text = [b for b in heldout if b.domain == tested]
                row = evaluate(glm, pattern, text).rows[0]
                assert cell["pattern"] == str(pattern)
                for key in ("delta_loss", "ci_low", "ci_high", "documents"):
                    assert cell[key] == getattr(row, key)
                assert cell["ci_low"] < cell["delta_loss"] < cell["ci_high"]
    for most in result.worst:
        own = [
            r
            for r in result.rows
            if all(r[k] == most[k] for k in ("calibrated", "objective", "full"))
        ]
        assert most["delta_loss"] == max(r["delta_loss"] for r in own)
        assert most["mean"] == pytest.approx(np.mean([r["delta_loss"] for r in own]))
    assert result.table().count("all, worst") == 2


def test_a_killed_matrix_goes_on_to_the_same_file(glm, texts, whole, tmp_path, monkeypatch):
    """It is killed at each line of its journal, and within a search."""
    out, _ = whole
    from indexcache.records import Run

    append = Run.append

    class Killed(Exception):
        pass

    stops = iter([3, 40, 61, 10**6])
    written = 0
    limit = next(stops)

    def counted(self, entry):
        nonlocal written
        append(self, entry)
        written += 1
        if written >= limit:
            raise Killed

    monkeypatch.setattr(Run, "append", counted)
    kills = 0
    while True:
        written = 0
        try:
            matrix(glm, *texts, tmp_path / "again", BUDGETS)
            break
        except Killed:
            kills += 1
            limit = next(stops)
    assert kills >= 2
    for name in ("matrix.json", "journal.jsonl", "searches/0-d0/journal.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_what_makes_no_matrix_is_refused(glm, texts, whole, tmp_path):
    calibration, heldout = texts
    one = [b for b in calibration if b.domain == "d0"]
    refused(lambda: matrix(glm, one, heldout, tmp_path / "a"), "one domain", "d0")
    two = [b for b in heldout if b.domain == "d0"]
    refused(lambda: matrix(glm, calibration, two, tmp_path / "a"), "d1", "only")
    refused(lambda: matrix(glm, calibration, calibration, tmp_path / "a"), "calibration text")
    refused(lambda: matrix(glm, *texts, tmp_path / "a", MatrixSettings(keep=())), "--keep")
    refused(lambda: matrix(glm, *texts, tmp_path / "a", MatrixSettings(keep=(1.0,))), "nothing to")
    refused(lambda: matrix(glm, *texts, whole[0]), "other settings", "keep")
    path = whole[0] / "journal.jsonl"
    before = path.read_text()
    path.write_text('{"tested": "d0", "rows": [{}], "conditions": {}}\n')
    refused(lambda: matrix(glm, *texts, whole[0], BUDGETS), "line 1", "by hand")
    path.write_text(before)


def test_the_verb_writes_the_matrix(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [
        {"text": "".join(map(chr, rng.integers(97, 123, 80))), "domain": "ab"[i % 2]}
        for i in range(24)
    ]
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = f"matrix {checkpoint} --data {data} --length 64 --sequences 2 --keep 1/2 --json"
    assert main(shlex.split(f"{command} --out {tmp_path / 'out'}")) == 0
    printed = capsys.readouterr().out
    value = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == value
    assert {r["calibrated"] for r in value["rows"]} == {"a", "b", "all"}
    assert "all, mean" in printed
    assert "fewer than 36 documents" in printed
    found = tmp_path / "out" / "searches" / "0-a" / "pattern.json"
    assert json.loads(found.read_text())["full"] == 3
    one = tmp_path / "one.jsonl"
    alone = command.replace(str(data), str(one))
    one.write_text("\n".join(json.dumps(row | {"domain": "a"}) for row in rows))
    assert main(shlex.split(f"{alone} --out {tmp_path / 'no'}")) == 2
    assert "one domain" in capsys.readouterr().err
    for rest, word in (
        ("--keep 2", "keep"),
        ("--keep 1", "keep"),
        ("--sequences 0", "sequences"),
        ("--length 16", "too short"),
        ("--method slow", "method"),
        ("--engine-arg a=1", "--engine vllm"),
    ):
        assert main(shlex.split(f"{command} --out {tmp_path / 'no'} {rest}")) == 2, rest
        assert word in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_the_page_shows_the_matrix(whole):
    out, result = whole
    made = make_report([str(out)])
    assert "matrix" in made.sections
    assert all(f'value="{float(row["delta_loss"])!r}"' in made.html for row in result.rows)
