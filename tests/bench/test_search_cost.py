"""Test what the comparison of searches keeps in its result file, and takes from it."""

from __future__ import annotations

import pytest

from benchmarks.search_cost import known_searches, read_rows, write_rows

OWN = {"model": "m", "seed": 0, "length": 64, "data": "d", "weights": "w"}


def test_a_search_is_taken_again_only_with_the_same_weights_and_text(tmp_path):
    file = tmp_path / "cost.json"
    search = {**OWN, "method": "exact", "patterns": {"2": "FSFS"}}
    write_rows(file, "searches", [search, {**OWN, "method": "fast", "seed": 1}])
    assert known_searches(file, OWN) == {"exact": search}
    for key in OWN:
        assert known_searches(file, {**OWN, key: "other"}) == {}
    assert known_searches(tmp_path / "none.json", OWN) == {}


def test_rows_replace_those_of_the_same_search_and_others_stay(tmp_path):
    file = tmp_path / "cost.json"

    def row(method, full, loss, seed=0):
        return {"model": "m", "seed": seed, "method": method, "full": full, "loss": loss}

    write_rows(file, "rows", [row("fast", 2, 1.0), row("exact", 2, 0.9), row("exact", 4, 0.5)])
    write_rows(file, "starts", [{"model": "m", "seed": 0, "gradients": 0.5}])
    write_rows(file, "rows", [row("fast", 2, 0.8), row("exact", 2, 0.7, seed=1)])
    found = [(r["seed"], r["full"], r["method"], r["loss"]) for r in read_rows(file, "rows")]
    assert found == [
        (0, 4, "exact", 0.5),
        (0, 2, "exact", 0.9),
        (0, 2, "fast", 0.8),
        (1, 2, "exact", 0.7),
    ]
    assert read_rows(file, "starts")[0]["gradients"] == pytest.approx(0.5)
