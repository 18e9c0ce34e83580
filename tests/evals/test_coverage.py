"""Check the simulation of coverage: its result file, its counts, and that it can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import coverage
from indexcache.evals import statistics


@pytest.fixture(scope="module")
def result():
    return json.loads(coverage.OUT.read_text(encoding="utf-8"))


def test_the_result_file_has_the_promised_rates(result):
    rows = {(r["differences"], r["documents"]): r for r in result["rows"]}
    assert set(rows) == {
        (s, n) for s in coverage.sources(result["tiny"]) for n in (coverage.DOCUMENTS)
    }
    assert {3, 8, 24, 50} <= set(coverage.DOCUMENTS)
    assert [n for n in coverage.DOCUMENTS if n >= statistics.LEAST_DOCUMENTS] == [36, 50, 108]
    for (_, documents), row in rows.items():
        assert row["interval"] == (documents >= statistics.LEAST_DOCUMENTS)
        if row["interval"]:
            assert row["covered"] >= 0.93
            assert row["false_safe"] <= 0.03
            assert row["aa_different"] <= 0.05
            assert coverage.kept(row)
    # Without the least number of documents the rates would not hold.
    assert rows["one in ten broken", 24]["false_safe"] > 0.05


def test_sums_of_tiny_are_those_of_its_documents(result):
    tiny = result["tiny"]
    assert set(tiny["sums"]) == set(coverage.PATTERNS)
    assert all(len(sums) == 72 for sums in tiny["sums"].values())
    means = {p: sum(s) / 72 / tiny["tokens"] for p, s in tiny["sums"].items()}
    assert means["FFRRRRRRRFRR@2"] < means["FFSSSSSSSFSS"] < means["FSFSFSFSFSFS"]


def test_simulation_counts_what_the_intervals_do(monkeypatch):
    """Count by the intervals themselves; the simulation inverts them."""
    for name in ("REPETITIONS", "BOOTSTRAPS", "WIDTHS"):
        monkeypatch.setattr(coverage, name, 60)
    draw, truth = coverage.lognormal(1.5)
    row = coverage.simulate("x", draw, truth, 36)
    values = draw(np.random.default_rng([36, *b"x"]), (60, 36))
    ends = [statistics.bootstrap_interval(v, np.ones(36)) for v in values]
    assert row["covered"] == pytest.approx(np.mean([a <= truth <= b for a, b in ends]), abs=1e-3)
    assert row["false_safe"] == pytest.approx(np.mean([b < truth for _, b in ends]), abs=1e-3)


def test_a_narrower_interval_misses_the_rates(monkeypatch):
    """Without the unseen document, the simulation says so."""
    monkeypatch.setattr(statistics, "TAIL", -1)  # It is the fourth, so no document is added.
    monkeypatch.setattr(coverage, "REPETITIONS", 1500)
    monkeypatch.setattr(coverage, "BOOTSTRAPS", 2)
    monkeypatch.setattr(coverage, "WIDTHS", 1)
    row = coverage.simulate("lognormal 1.5", *coverage.lognormal(1.5), 36)
    assert row["false_safe"] > 0.08
    assert not coverage.kept(row)
