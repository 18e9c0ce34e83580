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
from recipes.smollm2.report import insert, report
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


def test_experiment(saved, tmp_path, monkeypatch, capsys):
    """Run every stage at its smallest.

    Finished pieces are not done again, seeds do not change each other, and other settings are
    refused.
    """
    rng = np.random.default_rng(0)
    data, out = tmp_path / "data", tmp_path / "out"
    for i in range(12):  # two sources, more than the search has sequences
        (data / "train" / f"some{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(data / "train" / f"some{i % 2}" / f"{i}.npy", rng.integers(0, 4096, 200))
    rows = [{"domain": f"d{i % 5}", "ids": rng.integers(0, 4096, 96).tolist()} for i in range(10)]
    (data / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ids = rng.integers(0, 4096, 80).tolist()
    (data / "tasks.jsonl").write_text(
        json.dumps({"task": "passkey", "length": 80, "seed": 0, "ids": ids, "answers": [[70, 75]]})
        + "\n"
    )

    def run(folder, *changes):
        command = [
            "x",
            str(saved),
            "--data",
            str(data),
            "--out",
            str(folder),
            "--length",
            "96",
            "--steps",
            "2",
            "--more",
            "1",
            "--rows",
            "1",
        ]
        command += [
            "--calibration",
            "1",
            "--documents",
            "2",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            *changes,
        ]
        monkeypatch.setattr(sys, "argv", command)
        experiment.main()
        return json.loads((folder / "result.json").read_text())

    run(out, "--seeds", "1")
    run(out, "--seeds", "0", "--stage", "train", "search", "vary", "--vary", "long")
    assert sorted(p.name for p in (out / "seed0").glob("*-long")) == ["full-long", "multi-4-long"]
    run(out, "--seeds", "0", "--stage", "vary", "evaluate", "groups")
    result = run(out, "--seeds", "0", "1")
    found = {(r["method"], r["kept"], r["domain"]): r for r in result["rows"]}
    ways = {"untouched", "own", "multi", "searched", "searched+R4", "searched+R8"}
    domains = {"all", "d0", "d1", "d2", "d3", "d4"}
    grid = {(w, k) for w in ways for k in (2, 4, 8)} | {("full", 1), ("start", 1), ("dense", 1)}
    zero = {
        (f"{way}, {bits} bits", kept)
        for way, kept in (("full", 1), ("multi", 4))
        for bits in (8, 4)
    }  # of seed 0
    zero |= {("full, short", 1), ("full, long", 1), ("untouched, offset2", 4), ("own, offset2", 4)}
    zero |= {(f"multi, {name}", 4) for name in experiment.VARIED}
    none = {("dense", 1), *(("oracle", k) for k in (1, 2, 4, 8))}
    grid |= zero | none
    assert set(found) == {(*way, domain) for way in grid for domain in domains}
    assert all(
        r["delta_loss"] == r["ci_low"] == r["ci_high"] == 0
        for (w, *_), r in found.items()
        if w == "full"
    )
    assert all(
        r["seeds"] == (1 if (w, k) in zero | none else 2)
        and r["ci_low"] <= r["delta_loss"] <= r["ci_high"]
        for (w, k, _), r in found.items()
    )
    assert 0 < abs(found["full, 8 bits", 1, "all"]["delta_loss"]) < 0.1
    pairs = {
        (p["method"], p["against"], p["kept"]): p for p in result["pairs"] if p["domain"] == "all"
    }
    for p in (
        p for p in result["pairs"] if p["domain"] == "d2" and "," not in p["method"] + p["against"]
    ):
        a, b = (found[w, p["kept"], "d2"]["delta_loss"] for w in (p["method"], p["against"]))
        assert p["delta_loss"] == pytest.approx(a - b, abs=2e-6)
    few = {a: (1,) if a.startswith("full") else (4,) for a, b in compare.PAIRS if "," in a + b}
    assert set(pairs) == {
        (a, b, k) for a, b in compare.PAIRS for k in (few[a] if "," in a + b else (2, 4, 8))
    }
    assert all(p in {w for w, _ in grid} for pair in compare.PAIRS for p in pair)
    for (method, other, kept), p in pairs.items():
        one, two = found[method, kept, "all"], found[other, kept, "all"]
        assert p["ci_low"] <= p["delta_loss"] <= p["ci_high"] and p["seeds"] == min(
            one["seeds"], two["seeds"]
        )
        of_seed = (
            (one["of_seeds"]["0"] - two["of_seeds"]["0"])
            if p["seeds"] == 1
            else one["delta_loss"] - two["delta_loss"]
        )
        assert p["delta_loss"] == pytest.approx(of_seed, abs=2e-6)
    closed = {(c["method"], c["of"], c["kept"]): c for c in result["closed"]}
    assert set(closed) == {
        (a, b, k) for a, b in compare.CLOSED for k in ((4,) if "," in a else (2, 4, 8))
    }
    c, multi, untouched = (
        closed["multi", "untouched", 4],
        found["multi", 4, "all"],
        found["untouched", 4, "all"],
    )
    assert (
        c["share"] == pytest.approx(1 - multi["delta_loss"] / untouched["delta_loss"])
        and c["ci_low"] <= c["share"] <= c["ci_high"]
    )
    assert result["sharing_costs"]["0"] == sharing_costs(out / "seed0" / "search", 3) and set(
        result["sharing_costs"]
    ) == {"0", "1"}
    groups = {
        g["method"]: g for g in result["groups"]
    }  # uniform 1/4 of three layers is one group, which is all there is to share
    assert set(groups) == {"own", "multi"} and all(
        g["layers"] == [0, 1, 2] and g["seeds"] == 1 for g in groups.values()
    )
    assert all(
        g["delta_loss"] == pytest.approx(found[w, 4, "all"]["of_seeds"]["0"], abs=1e-5)
        for w, g in groups.items()
    )
    refused(lambda: run(tmp_path / "none", "--stage", "table"), "lacks evaluations of all indexers")
    assert {p.name for p in (tmp_path / "none").iterdir()} == {".lock", "settings.json"}
    shutil.rmtree(tmp_path / "none")
    refused(lambda: run(tmp_path / "none", "--documents", "1"), "at least two documents")
    refused(lambda: run(tmp_path / "none", "--length", "64"), "0 tasks of at most 64 tokens")
    assert not (tmp_path / "none").exists()
    refused(lambda: run(tmp_path / "none", "--seeds", "0", "--stage", "evaluate"), "run the stage")
    lines = [
        json.loads(line)
        for line in (out / "seed0" / "evaluated" / "journal.jsonl").read_text().splitlines()
    ]
    one, full = (
        next(r for r in lines if (r["seed"], r["method"], r["kept"]) == (0, *w))
        for w in (("own", 4), ("full", 1))
    )
    want = sum(a[2] - b[2] for a, b in zip(one["documents"], full["documents"], strict=True)) / sum(
        d[3] for d in full["documents"]
    )
    assert list(found["own", 4, "all"]["of_seeds"]) == ["0", "1"]  # though seed 1 came first
    assert found["own", 4, "all"]["of_seeds"]["0"] == pytest.approx(want, abs=1e-6)
    assert np.array(result["overlap"]["overlap"]).shape == (3, 3)
    mass = result["mass_kept"]
    assert mass["seed"] == 0 and set(mass["of"]) == {
        "full 1/1",
        *(f"{w} 1/{k}" for w in ("own", "multi") for k in (2, 4, 8)),
    }
    assert len(mass["of"]["full 1/1"]) == 3 and all(0 < x <= 1 for x in mass["of"]["full 1/1"])

    trained = {
        name: json.loads((out / "seed0" / f"multi-4-{name}" / "settings.json").read_text())
        for name in experiment.VARIED
    }
    facts = {name: (t["stage"], t["steps"], t["lr"]) for name, t in trained.items()}
    plain = ("warmup", 1, 2e-3)
    assert facts == {
        "weighted": plain,
        "short": plain,  # a fifth of a step is one
        "offset2": plain,
        "found": plain,
        "long": ("warmup", 4, 2e-3),
        "slow": ("warmup", 1, pytest.approx(2e-3 / 3)),
        "fast": ("warmup", 1, pytest.approx(6e-3)),
        "sparse": ("sparse", 1, 5e-4),
    }
    weights = trained["weighted"].pop("layer_weights")
    assert len(weights) == 3 and weights == weights_of_costs(
        sharing_costs(out / "seed0" / "search", 3)
    )
    assert all(t["layer_weights"] is None for name, t in trained.items() if name != "weighted")
    patterns = {name: t["pattern"] for name, t in trained.items()}
    searched = json.loads((out / "seed0" / "search" / "result.json").read_text())["frontier"][-1][
        "pattern"
    ]
    assert (
        patterns.pop("offset2") == "FFS"
        and patterns.pop("found") == searched
        and set(patterns.values()) == {"FSS"}
    )

    (task,) = (t for t in result["tasks"] if (t["method"], t["kept"]) == ("multi", 8))
    assert task["seeds"] == 2 and task["accuracy"] == pytest.approx(
        found["multi", 8, "all"]["retrieval"]
    )

    shown = report(result)
    page = insert(shown, "# A\n<!-- tables -->\nold\n<!-- end of tables -->\nB\n")
    assert (
        page
        == f"# A\n<!-- tables -->\n\n{shown}\n\n<!-- end of tables -->\nB\n"
        == insert(shown, page)
    )
    refused(lambda: insert(shown, "<!-- end of tables --> <!-- tables -->"), "in this order")
    row = found["multi", 4, "d2"]
    assert f"{row['delta_loss']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]" in shown
    assert "| 0 to 2 |" in shown
    assert all(line.startswith("|") == line.endswith("|") for line in shown.splitlines())
    assert "| multi, weighted | 1/4 |" in shown and "| own | 1/8 |" in shown and "2 seeds" in shown

    run(tmp_path / "alone", "--seeds", "0")  # the same as after seed 1
    for name in ("start", "full", "multi-4"):
        a, b = (
            load_file(folder / "seed0" / name / "delta.safetensors")
            for folder in (out, tmp_path / "alone")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)

    o = argparse.Namespace(checkpoint=saved, data=data, out=out, dtype="float32", device="cpu")
    e = experiment.Experiment(o, [])
    multi, full = (
        load_file(out / "seed0" / name / "delta.safetensors") for name in ("multi-2", "full")
    )
    e.put_full_but(0, 2, "multi-2")  # Layer 0 has the other indexer of FSF; it stays full's.
    for i, indexer in enumerate(indexers(e.model)):
        for key, p in indexer.named_parameters():
            name = f"model.layers.{i}.self_attn.indexer.{key}"
            assert torch.equal(p, (multi if i == 2 else full)[name])
    assert not torch.equal(
        multi["model.layers.0.self_attn.indexer.wq_b.weight"],
        full["model.layers.0.self_attn.indexer.wq_b.weight"],
    )

    before = {p: p.read_bytes() for p in out.rglob("journal.jsonl")}
    for path in out.rglob("*.safetensors"):  # finished seeds need their journal and results alone
        path.unlink()
    for name in ("distill", "search", "measure"):
        monkeypatch.setattr(experiment, name, None)
    run(out, "--seeds", "0", "1")
    run(out, "--seeds", "0", "--stage", *experiment.STAGES)
    assert {p: p.read_bytes() for p in out.rglob("journal.jsonl")} == before
    refused(lambda: run(out, "--steps", "3"), "other settings")
