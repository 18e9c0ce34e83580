"""Test the comparison on SmolLM2: every stage, resuming, and its statistics."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from indexcache.distilling.layer_weights import sharing_costs, weights_of_costs
from indexcache.models.family import indexers
from recipes.smollm2 import compare, experiment
from recipes.smollm2.compare import closed_of, pairs_of
from recipes.smollm2.report import GRID, KEPT, insert, report
from tests.support import refused


def test_what_training_closes():
    """Compute it by hand for two seeds and three documents.

    Seeds are averaged, documents are summed, and both losses are resampled together.
    """

    def line(method, kept, seed, *sums):
        return {
            "method": method,
            "kept": kept,
            "seed": seed,
            "documents": [["d", f"{i}", s, 10] for i, s in enumerate(sums)],
        }

    lines = [line("full", 1, 0, 1, 2, 3), line("full", 1, 1, 1, 2, 5)]
    lines += [
        line("untouched", 4, 0, 3, 6, 7),
        line("untouched", 4, 1, 3, 4, 9),
        line("multi", 4, 1, 1, 3, 8),
        line("multi", 4, 0, 2, 4, 5),
    ]
    (c,) = closed_of(lines)
    gains, gaps = np.array([1.5, 1.5, 1.5]), np.array([2, 3, 4])
    assert (c["method"], c["of"], c["kept"], c["seeds"]) == ("multi", "untouched", 4, 2)
    assert c["share"] == pytest.approx(gains.sum() / gaps.sum())
    assert 1.5 / 4 <= c["ci_low"] < c["share"] < c["ci_high"] <= 1.5 / 2
    assert (
        pairs_of(
            [
                line("own", 4, 0, 3, 5, 1),
                line("untouched", 4, 0, 1, 2, 3),
                line("untouched", 4, 1, 9, 9, 9),
            ]
        )[0]["delta_loss"]
        == 0.1
    )


def journals(folder):
    return {p: p.read_bytes() for p in folder.rglob("journal.jsonl")}


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write random training text of two sources, ten held-out documents and one task."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(12):  # There are more documents than the search has sequences.
        source = folder / "train" / f"some{i % 2}"
        source.mkdir(parents=True, exist_ok=True)
        np.save(source / f"{i}.npy", rng.integers(0, 4096, 200))
    rows = [{"domain": f"d{i % 5}", "ids": rng.integers(0, 4096, 96).tolist()} for i in range(10)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ids = rng.integers(0, 4096, 80).tolist()
    task = {"task": "passkey", "length": 80, "seed": 0, "ids": ids, "answers": [[70, 75]]}
    (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(saved, data):
    """Return a function that runs the experiment in a folder and returns its result."""
    smallest = [
        "--length",
        "96",
        "--steps",
        "2",
        "--more",
        "1",
        "--rows",
        "1",
        "--calibration",
        "1",
        "--documents",
        "2",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]

    def run(folder, *changes):
        command = ["x", str(saved), "--data", str(data), "--out", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*command, *smallest, *changes])
            experiment.main()
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Run all stages of two seeds, some of them in several processes; returns folder and result."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    run(out, "--seeds", "1")
    run(out, "--seeds", "0", "--stage", "train", "search", "vary", "--vary", "long")
    assert sorted(p.name for p in (out / "seed0").glob("*-long")) == ["full-long", "multi-4-long"]
    run(out, "--seeds", "0", "--stage", "vary", "evaluate", "groups")
    return out, run(out, "--seeds", "0", "1")


@pytest.fixture(scope="module")
def rows(finished):
    return {(r["method"], r["kept"], r["domain"]): r for r in finished[1]["rows"]}


SEED_0 = {  # Seed 0 alone has these methods and fractions.
    *((f"full, {bits} bits", 1) for bits in (8, 4)),
    *((f"multi, {bits} bits", 4) for bits in (8, 4)),
    ("full, short", 1),
    ("full, long", 1),
    ("untouched, offset2", 4),
    ("own, offset2", 4),
    *((f"multi, {name}", 4) for name in experiment.VARIED),
}
WITHOUT_SEED = {("dense", 1), *(("oracle", kept) for kept in (1, 2, 4, 8))}
SEVERAL_SEEDS = {
    ("full", 1),
    ("start", 1),
    *((method, kept) for method in GRID if method != "oracle" for kept in KEPT),
}


def test_every_method_is_compared_with_full(rows):
    methods = SEED_0 | WITHOUT_SEED | SEVERAL_SEEDS
    domains = {"all", "d0", "d1", "d2", "d3", "d4"}
    assert set(rows) == {(*method, domain) for method in methods for domain in domains}
    for (method, kept, _), r in rows.items():
        assert r["seeds"] == (2 if (method, kept) in SEVERAL_SEEDS else 1)
        assert r["ci_low"] <= r["delta_loss"] <= r["ci_high"]
        if method == "full":
            assert r["delta_loss"] == r["ci_low"] == r["ci_high"] == 0
    assert 0 < abs(rows["full, 8 bits", 1, "all"]["delta_loss"]) < 0.1


def test_a_difference_is_that_of_the_documents(finished, rows):
    out, _ = finished
    journal = (out / "seed0" / "evaluated" / "journal.jsonl").read_text()
    lines = {(r["method"], r["kept"]): r for r in map(json.loads, journal.splitlines())}
    own = lines["own", 4]["documents"]
    full = lines["full", 1]["documents"]
    difference = sum(a[2] - b[2] for a, b in zip(own, full, strict=True))
    tokens = sum(d[3] for d in full)
    of_seeds = rows["own", 4, "all"]["of_seeds"]
    assert list(of_seeds) == ["0", "1"]  # Seed 1 was run first.
    assert of_seeds["0"] == pytest.approx(difference / tokens, abs=1e-6)


def test_methods_are_compared_with_each_other(finished, rows):
    _, result = finished

    def fractions(a, b):
        if "," not in a + b:
            return (2, 4, 8)
        return (1,) if a.startswith("full") else (4,)

    pairs = {
        (p["method"], p["against"], p["kept"]): p for p in result["pairs"] if p["domain"] == "all"
    }
    assert set(pairs) == {(a, b, kept) for a, b in compare.PAIRS for kept in fractions(a, b)}
    for (method, other, kept), p in pairs.items():
        a = rows[method, kept, "all"]
        b = rows[other, kept, "all"]
        assert p["seeds"] == min(a["seeds"], b["seeds"])
        assert p["ci_low"] <= p["delta_loss"] <= p["ci_high"]
        if p["seeds"] == 1:
            difference = a["of_seeds"]["0"] - b["of_seeds"]["0"]
        else:
            difference = a["delta_loss"] - b["delta_loss"]
        assert p["delta_loss"] == pytest.approx(difference, abs=2e-6)
    for p in result["pairs"]:
        if p["domain"] == "d2" and "," not in p["method"] + p["against"]:
            a, b = (rows[m, p["kept"], "d2"]["delta_loss"] for m in (p["method"], p["against"]))
            assert p["delta_loss"] == pytest.approx(a - b, abs=2e-6)


def test_the_share_that_training_closes(finished, rows):
    _, result = finished
    closed = {(c["method"], c["of"], c["kept"]): c for c in result["closed"]}
    assert set(closed) == {
        (a, b, kept) for a, b in compare.CLOSED for kept in ((4,) if "," in a else (2, 4, 8))
    }
    c = closed["multi", "untouched", 4]
    multi = rows["multi", 4, "all"]["delta_loss"]
    untouched = rows["untouched", 4, "all"]["delta_loss"]
    assert c["share"] == pytest.approx(1 - multi / untouched)
    assert c["ci_low"] <= c["share"] <= c["ci_high"]


def test_what_is_measured_beside_the_losses(finished, rows):
    out, result = finished
    assert set(result["sharing_costs"]) == {"0", "1"}
    assert result["sharing_costs"]["0"] == sharing_costs(out / "seed0" / "search", 3)
    # Uniform 1/4 of three layers is one group, so that group alone is the pattern.
    groups = {g["method"]: g for g in result["groups"]}
    assert set(groups) == {"own", "multi"}
    for method, g in groups.items():
        assert (g["layers"], g["seeds"]) == ([0, 1, 2], 1)
        of_seed = rows[method, 4, "all"]["of_seeds"]["0"]
        assert g["delta_loss"] == pytest.approx(of_seed, abs=1e-5)
    assert np.array(result["overlap"]["overlap"]).shape == (3, 3)
    mass = result["mass_kept"]
    shared = {f"{method} 1/{kept}" for method in ("own", "multi") for kept in KEPT}
    assert mass["seed"] == 0
    assert set(mass["of"]) == {"full 1/1"} | shared
    assert len(mass["of"]["full 1/1"]) == 3
    assert all(0 < x <= 1 for x in mass["of"]["full 1/1"])
    (task,) = (t for t in result["tasks"] if (t["method"], t["kept"]) == ("multi", 8))
    assert task["seeds"] == 2
    assert task["accuracy"] == pytest.approx(rows["multi", 8, "all"]["retrieval"])


def test_a_variant_changes_one_thing(finished):
    out, _ = finished
    trained = {name: settings_of(out / "seed0" / f"multi-4-{name}") for name in experiment.VARIED}
    plain = ("warmup", 1, 2e-3)
    assert {name: (t["stage"], t["steps"], t["lr"]) for name, t in trained.items()} == {
        "weighted": plain,
        "short": plain,  # A fifth of one step is rounded to one.
        "offset2": plain,
        "found": plain,
        "long": ("warmup", 4, 2e-3),
        "slow": ("warmup", 1, pytest.approx(2e-3 / 3)),
        "fast": ("warmup", 1, pytest.approx(6e-3)),
        "sparse": ("sparse", 1, 5e-4),
    }
    weights = trained["weighted"].pop("layer_weights")
    assert len(weights) == 3
    assert weights == weights_of_costs(sharing_costs(out / "seed0" / "search", 3))
    assert all(t["layer_weights"] is None for name, t in trained.items() if name != "weighted")
    patterns = {name: t["pattern"] for name, t in trained.items()}
    frontier = json.loads((out / "seed0" / "search" / "result.json").read_text())["frontier"]
    assert patterns.pop("offset2") == "FFS"
    assert patterns.pop("found") == frontier[-1]["pattern"]
    assert set(patterns.values()) == {"FSS"}


def test_the_report_has_every_table(finished, rows):
    _, result = finished
    tables = report(result)
    page = insert(tables, "# A\n<!-- tables -->\nold\n<!-- end of tables -->\nB\n")
    assert page == f"# A\n<!-- tables -->\n\n{tables}\n\n<!-- end of tables -->\nB\n"
    assert insert(tables, page) == page
    refused(lambda: insert(tables, "<!-- end of tables --> <!-- tables -->"), "in this order")
    row = rows["multi", 4, "d2"]
    assert f"{row['delta_loss']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]" in tables
    for cells in ("| 0 to 2 |", "| multi, weighted | 1/4 |", "| own | 1/8 |", "2 seeds"):
        assert cells in tables
    assert all(line.startswith("|") == line.endswith("|") for line in tables.splitlines())


def test_too_little_to_evaluate_is_refused(run, tmp_path):
    out = tmp_path / "none"
    refused(lambda: run(out, "--documents", "1"), "at least two documents")
    refused(lambda: run(out, "--length", "64"), "0 tasks of at most 64 tokens")
    assert not out.exists()
    refused(lambda: run(out, "--stage", "table"), "lacks evaluations of all indexers")
    assert {p.name for p in out.iterdir()} == {".lock", "settings.json"}
    refused(lambda: run(out, "--seeds", "0", "--stage", "evaluate"), "run the stage")


def test_one_layer_takes_the_indexer_of_another_delta(finished, saved, data):
    out, _ = finished
    o = argparse.Namespace(checkpoint=saved, data=data, out=out, dtype="float32", device="cpu")
    e = experiment.Experiment(o, [])
    multi = load_file(out / "seed0" / "multi-2" / "delta.safetensors")
    full = load_file(out / "seed0" / "full" / "delta.safetensors")
    e.put_full_but(0, 2, "multi-2")
    for i, indexer in enumerate(indexers(e.model)):
        for key, p in indexer.named_parameters():
            name = f"model.layers.{i}.self_attn.indexer.{key}"
            assert torch.equal(p, (multi if i == 2 else full)[name])
    # Multi has trained the indexer of layer 0 too, since its pattern is FSF.
    name = "model.layers.0.self_attn.indexer.wq_b.weight"
    assert not torch.equal(multi[name], full[name])


def test_seeds_do_not_change_each_other(finished, run, tmp_path):
    out, _ = finished
    run(tmp_path, "--seeds", "0")
    for name in ("start", "full", "multi-4"):
        a = load_file(out / "seed0" / name / "delta.safetensors")
        b = load_file(tmp_path / "seed0" / name / "delta.safetensors")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_experiment_does_nothing_again(finished, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for path in out.rglob("*.safetensors"):  # Journals and results are enough.
        path.unlink()
    before = journals(out)
    for name in ("distill", "search", "measure"):
        monkeypatch.setattr(experiment, name, None)
    run(out, "--seeds", "0", "1")
    run(out, "--seeds", "0", "--stage", *experiment.STAGES)
    assert journals(out) == before
    refused(lambda: run(out, "--steps", "3"), "other settings")
