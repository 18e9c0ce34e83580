"""Test the cost model on rows that follow its law, and the verb plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from indexcache.bench.cost import (
    FLOOR_ONLY,
    errors_left_out,
    fit,
    non_negative,
    parts_of_ttft,
    point,
    usable,
)
from indexcache.bench.floors import PARTS, decode_floor, prefill_floor
from indexcache.bench.plan import Traffic, predict, worth_from
from indexcache.cli import main
from indexcache.pattern import Pattern
from indexcache.shapes import SHAPES, rates_named, shape_of
from tests.support import refused

H100 = rates_named("H100")
FLASH = shape_of("glm-4.7-flash-dsa")
PATTERNS = tuple(Pattern.uniform(47, f) for f in (1, 2, 4))
CONTEXTS = (10_000, 60_000, 120_000, 200_000)


def law(context: int, pattern: Pattern, batch: int = 1, **change: float) -> dict[str, Any]:
    """Make a row whose times follow the law of the cost model exactly."""
    row = dict(point(FLASH, context, pattern, H100, chunk=8192, batch=batch))
    chunks = -(-context // 8192)
    calls = {"indexer": row["full"], "index_topk": row["full"], "head": 1 / chunks} | dict.fromkeys(
        ("attention", "linears", "mlp", "rest"), 47
    )
    slow = {
        "index_topk": 1.6,
        "attention": 3.0,
        "linears": 1.3,
        "mlp": 1.5,
        "indexer": 2.0,
        "head": 1.0,
        "rest": 2.5,
    } | change
    parts = {p: 0.05 * n * chunks + slow[p] * row["floor_ms"][p] for p, n in calls.items()}
    index = row["decode_floor_ms"]["indexer"] + row["decode_floor_ms"]["index_topk"]
    step = (
        0.6
        + 1.4 * (sum(row["decode_floor_ms"].values()) - index)
        + 0.03 * row["full"]
        + 1.2 * index
    )
    ttft = sum(parts.values()) / 1e3 if batch == 1 else None
    return row | {
        "ttft_s": ttft,
        "parts_ms": parts if batch == 1 else {},
        "decode_tok_s": 1e3 / step,
        "name": "x",
    }


def rows() -> list[dict[str, Any]]:
    return [law(c, p) for c in CONTEXTS for p in PATTERNS] + [
        law(c, p, 4) for c in CONTEXTS for p in PATTERNS
    ]


def results(tmp_path, rows: list[dict[str, Any]], **change: Any) -> str:
    file = tmp_path / "bench.json"
    value = {
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-22",
        "model": "glm-4.7-flash-dsa",
        "shape": asdict(FLASH),
        "ceilings": asdict(H100),
        "settings": {"index_dtype": "fp8"},
        "rows": rows,
    } | change
    file.write_text(json.dumps(value))
    return str(file)


@pytest.mark.parametrize("seed", range(5))
def test_non_negative_least_squares_is_the_best_there_is(seed):
    """Projected descent from 20 starts finds nothing better, and unconstrained optima are kept."""
    rng = np.random.default_rng(seed)
    a, y = rng.normal(size=(9, 3)), rng.normal(size=9)
    x = np.array(non_negative(a, y))
    assert (x >= 0).all()
    error = np.square(a @ x - y).sum()
    for _ in range(20):
        z = rng.uniform(0, 2, 3)
        for _ in range(3000):
            z = np.maximum(z - 0.02 * a.T @ (a @ z - y), 0)
        assert error <= np.square(a @ z - y).sum() + 1e-9
    positive = np.array([0.5, 2.0, 0.1])
    np.testing.assert_allclose(non_negative(a, a @ positive), positive)
    assert non_negative(np.zeros((3, 2)), np.ones(3)) == [0, 0]


def test_a_fit_recovers_the_law_and_predicts_other_lengths():
    model = fit(rows())
    assert model.prefill is not None
    for name, slow in {"index_topk": 1.6, "attention": 3.0, "mlp": 1.5}.items():
        assert model.prefill[name] == pytest.approx((0.05, slow), rel=1e-3)
    for context, freq in ((35_000, 3), (150_000, 1), (5000, 4)):
        want = law(context, Pattern.uniform(47, freq))
        assert model.ttft_s(want) == pytest.approx(want["ttft_s"], rel=1e-3)
        assert model.step_ms(want) == pytest.approx(1e3 / want["decode_tok_s"], rel=1e-3)
    errors = errors_left_out(rows())
    assert {e["context"] for e in errors} == set(CONTEXTS)
    assert len([e for e in errors if e["what"] == "ttft_s"]) == 12
    assert len([e for e in errors if e["what"] == "decode_tok_s"]) == 24
    assert max(abs(e["error"]) for e in errors) < 1e-3


def test_an_error_left_out_is_that_of_its_context():
    """A row that breaks the law causes an error of the same size at its context."""
    made = [law(c, p) for c in CONTEXTS for p in PATTERNS]
    for row in made:
        if row["context"] == 60_000:
            row["ttft_s"] *= 1.5
    errors = {e["context"]: e["error"] for e in errors_left_out(made) if e["what"] == "ttft_s"}
    assert errors[60_000] == pytest.approx(1 / 1.5 - 1, abs=1e-3)


def test_parts_add_up_to_the_ttft():
    row = law(60_000, PATTERNS[0])
    assert sum(parts_of_ttft(row).values()) == pytest.approx(1e3 * row["ttft_s"])
    slower = parts_of_ttft(row | {"ttft_s": row["ttft_s"] + 0.1})
    assert slower["rest"] == pytest.approx(row["parts_ms"]["rest"] + 100)
    faster = parts_of_ttft(row | {"ttft_s": row["ttft_s"] / 2})  # The timed pass was slower.
    assert sum(faster.values()) == pytest.approx(500 * row["ttft_s"])
    assert faster["rest"] == 0


def test_only_measured_rows_of_full_and_shared_layers_count():
    pooled = law(60_000, Pattern.uniform(47, 8, rest="R"))
    failed = {
        "context": 60_000,
        "pattern": "F" * 47,
        "full": 47,
        "layers": 47,
        "error": "Out of memory",
    }
    bare = law(60_000, PATTERNS[0]) | {"floor_ms": {}}
    assert usable([pooled, failed, bare]) == []
    refused(lambda: fit([pooled, failed, bare]), "nothing to fit to")
    assert fit([*rows(), pooled, failed, bare]) == fit(rows())
    assert errors_left_out([r for r in rows() if r["context"] == 10_000]) == []


def test_floors_alone():
    row = point(FLASH, 60_000, PATTERNS[2], H100, chunk=8192)
    assert FLOOR_ONLY.ttft_s(row) == pytest.approx(
        sum(prefill_floor(FLASH, 60_000, PATTERNS[2], H100).values()) / 1e3
    )
    assert FLOOR_ONLY.step_ms(row) == pytest.approx(
        sum(decode_floor(FLASH, 60_000, PATTERNS[2], H100).values())
    )
    assert set(FLOOR_ONLY.prefill or ()) == set(PARTS)


def test_a_plan_is_the_arithmetic_it_says():
    model = fit(rows())
    traffic = Traffic(context=100_000, output_tokens=500, price=3.6, batch=4)
    full, half, quarter = predict(FLASH, model, H100, traffic, chunk=8192)
    first = law(100_000, PATTERNS[0])["ttft_s"]
    step = 1 / law(100_250, PATTERNS[0], 4)["decode_tok_s"]
    assert full["gpu_s"] == pytest.approx(first + 500 * step / 4, rel=1e-3)
    assert full["cost_per_million"] == pytest.approx(full["gpu_s"] * 1e-3 / 100_500 * 1e6)
    assert full["saving"] is None
    assert (
        0
        < half["saving"]
        < quarter["saving"]
        == pytest.approx(1 - quarter["gpu_s"] / full["gpu_s"])
    )
    assert [r["full"] for r in (full, half, quarter)] == [47, 24, 12]

    def predict_at(context: int) -> list[dict[str, Any]]:
        one = Traffic(context=context, output_tokens=500, price=1.0)
        return predict(FLASH, model, H100, one, chunk=8192)

    start = worth_from(FLASH, 0.2, predict_at)
    assert start is not None
    assert predict_at(start)[-1]["saving"] >= 0.2 > predict_at(int(start / 1.06))[-1]["saving"]
    assert worth_from(FLASH, 0.9, predict_at) is None


def test_the_verb(tmp_path, capsys):
    traffic = ["--gpu", "H100", "--output-tokens", "500", "--price", "2", "--json"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["glm-4.7-flash-dsa"]))
    assert (
        main(
            [
                "plan",
                str(config),
                "--context",
                "100K",
                "--bench",
                results(tmp_path, rows()),
                *traffic,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    plan = json.loads(out.splitlines()[-1])
    assert plan["basis"] == "bench"
    assert plan["notes"] == []
    assert plan["rows"][0]["ttft_s"] == pytest.approx(law(100_000, PATTERNS[0])["ttft_s"], rel=1e-3)
    assert "Worth it here" in out
    assert "Error on lengths left out of the fit: TTFT 0.0% in the mean" in out
    assert main(["plan", "glm-4.7-flash-dsa", "--context", "4K", *traffic]) == 0
    out = capsys.readouterr().out
    assert "floor only" in out
    assert "Not worth it here" in out
    assert json.loads(out.splitlines()[-1])["left_out"] == []
    assert main(["plan", "tiny", "--context", "20", *traffic]) == 0
    assert "Sharing changes nothing at 20 tokens: up to k = 32" in capsys.readouterr().out


def test_what_goes_beyond_the_measurement_is_said(tmp_path, capsys):
    traffic = ["--output-tokens", "500", "--price", "2", "--context", "100K"]
    near = [r for r in rows() if r["context"] < 70_000]
    assert (
        main(
            [
                "plan",
                "glm-5",
                "--gpu",
                "h200",
                "--bench",
                results(tmp_path, near),
                "--batch",
                "8",
                *traffic,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    for said in (
        "not on an H200",
        "another shape",
        "outside of what was measured (10000 to 60000)",
        "8 requests together are more",
        "more than the 141 GB of one H200",
    ):
        assert said in out, said
    mine = results(
        tmp_path,
        rows(),
        device="NVIDIA A100",
        ceilings=asdict(H100) | {"name": "measured here", "memory": 0.0},
    )
    assert main(["plan", "glm-4.7-flash-dsa", "--gpu", "bench", "--bench", mine, *traffic]) == 0
    assert "on NVIDIA A100" in capsys.readouterr().out


def test_bad_input_gets_one_sentence(tmp_path, capsys):
    def said(*argv: str) -> str:
        assert main(["plan", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    traffic = ["--gpu", "H100", "--output-tokens", "500", "--price", "2", "--context", "100K"]
    shape = "glm-4.7-flash-dsa"
    assert "no named shape" in said("glm-9", *traffic)
    assert "A100" in said(shape, *traffic, "--gpu", "A100")
    assert "needs --gpu" in said(shape)
    assert "maximum of 202752" in said(shape, *traffic, "--context", "202.7K")
    assert "number of tokens" in said(shape, *traffic, "--context", "long")
    assert "--price" in said(shape, *traffic, "--price", "nan")
    assert "at least 1" in said(shape, *traffic, "--output-tokens", "0")
    assert "cannot be read" in said(shape, *traffic, "--bench", str(tmp_path / "none.json"))
    assert "nothing to fit to" in said(shape, *traffic, "--bench", results(tmp_path, []))
    assert "a row lacks" in said(shape, *traffic, "--bench", results(tmp_path, [{"context": 1}]))
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    assert "is not a bench.json" in said(shape, *traffic, "--bench", str(other))
    assert "not what a bench writes" in said(
        shape, *traffic, "--bench", results(tmp_path, [rows()[0] | {"ttft_s": "fast"}])
    )
    cpu = results(tmp_path, rows(), device="cpu", ceilings={"memory": 0.0})
    assert "says nothing of an H100" in said(shape, *traffic, "--bench", cpu)
    assert "with --bench" in said(shape, *traffic, "--gpu", "bench")
    config = tmp_path / "config.json"
    config.write_text('{"num_hidden_layers": 3}')
    assert "hidden_size is None" in said(str(config), *traffic)
