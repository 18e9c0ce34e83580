"""Count the bytes of quantised weights, and plan with them from a config alone."""

from __future__ import annotations

import json

import pytest

from indexcache.bench.floors import decode_floor, prefill_floor
from indexcache.bench.plan import Traffic, make_plan
from indexcache.bench.storage import Storage
from indexcache.configs import quantization_of
from indexcache.pattern import Pattern
from indexcache.shapes import SHAPES, rates_named, shape_of
from tests.bench.test_plan import results, rows
from tests.support import refused

SHAPE = shape_of("glm-5")
H200 = rates_named("H200")
FULL = Pattern.full(SHAPE.layers)
TRAFFIC = Traffic(context=200_000, output_tokens=1000, price=3.0)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4 = {"quant_method": "awq", "bits": 4, "group_size": 128}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*self_attn*"]}


def storage(section):
    return Storage.of(SHAPE, quantization_of({"quantization_config": section}))


def config(tmp_path, **changes):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPES["glm-5"] | changes))
    return file


def test_fp8_takes_a_byte_and_a_scale_for_each_block():
    plain = Storage().weight_bytes(SHAPE)
    assert plain == 2 * SHAPE.weights
    rest = (
        2 * SHAPE.head_weights
        + SHAPE.moe_layers * SHAPE.router_weights
        + SHAPE.layers * SHAPE.index_heads * SHAPE.hidden
    )
    covered = SHAPE.weights - rest
    found = storage(FP8).weight_bytes(SHAPE)
    assert found == pytest.approx(2 * rest + covered * (1 + 4 / 128**2), rel=1e-5)
    assert 744e9 < found < 748e9


def test_what_the_config_excludes_stays_in_bf16():
    base = storage(FP8).weight_bytes(SHAPE)
    kept = storage(FP8 | {"modules_to_not_convert": ["model.layers.0.mlp"]}).weight_bytes(SHAPE)
    extra = SHAPE.dense_weights - (SHAPE.dense_weights / 128**2) * 4
    assert kept - base == pytest.approx(extra, rel=1e-3)
    all_attention = storage(NVFP4)
    assert all_attention.attention.bytes == 2
    assert all_attention.indexer.bytes == 2
    assert all_attention.experts.bytes == pytest.approx(0.5 + 1 / 16)


@pytest.mark.parametrize(("section", "least", "most"), [(FP8, 0.49, 0.52), (INT4, 0.25, 0.30)])
def test_a_step_reads_the_bytes_that_are_stored(section, least, most):
    plain = decode_floor(SHAPE, 200_000, FULL, H200)
    stored = decode_floor(SHAPE, 200_000, FULL, H200, storage=storage(section))
    for part in ("linears", "mlp"):
        assert least < stored[part] / plain[part] < most
    for part in ("attention", "index_topk", "head", "rest"):
        assert stored[part] == plain[part]


def test_products_run_in_fp8_only_where_activations_do():
    plain = prefill_floor(SHAPE, 200_000, FULL, H200)
    fast = prefill_floor(SHAPE, 200_000, FULL, H200, storage=storage(FP8))
    assert fast["linears"] / plain["linears"] == pytest.approx(H200.bf16 / H200.fp8)
    same = prefill_floor(SHAPE, 200_000, FULL, H200, storage=storage(INT4))
    assert same["linears"] == plain["linears"]


def test_a_plan_counts_what_the_config_says(tmp_path):
    plain = make_plan(config(tmp_path), "H200", TRAFFIC)
    assert plain.weights["bytes"] == 2 * SHAPE.weights
    assert "no quantization_config" in plain.report()
    half = make_plan(config(tmp_path, quantization_config=FP8), "H200", TRAFFIC)
    assert "fp8 weights (746 GB)" in half.report()
    assert half.rows[0]["decode_tok_s"] > 1.8 * plain.rows[0]["decode_tok_s"]
    nested = {"text_config": SHAPES["glm-5"], "quantization_config": FP8, "model_type": "glm5v"}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert make_plan(tmp_path, "H200", TRAFFIC).rows == half.rows
    config(tmp_path)
    value = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(value))
    assert make_plan(tmp_path, "H200", TRAFFIC).weights["bytes"] < 748e9
    json.dumps(half.to_json(), allow_nan=False)


def test_unknown_bits_are_one_sentence(tmp_path):
    file = config(tmp_path, quantization_config={"quant_method": "new"})
    refused(lambda: make_plan(file, "H200", TRAFFIC), "config.json", "new", "bits")


def test_a_plan_says_what_it_leaves_out(tmp_path):
    file = config(tmp_path, num_nextn_predict_layers=1, index_topk_freq=4, quantization_config=FP8)
    plan = make_plan(file, "H200", TRAFFIC, bench=results(tmp_path, rows()))
    notes = " ".join(plan.notes)
    for said in ("MTP", "shares already", "carried over to fp8"):
        assert said in notes
    assert [row["name"] for row in plan.rows] == ["all", "1/2", "1/4", "config"]
    assert plan.rows[3]["pattern"].startswith("FFSSSF")
    bad = make_plan(config(tmp_path, index_topk_pattern="ff"), "H200", TRAFFIC)
    assert any("no valid pattern" in note for note in bad.notes)


@pytest.mark.parametrize("kind", ["glm5_next", "deepseek_v3", "hy_v4"])
def test_a_family_that_is_not_known_is_not_planned(tmp_path, kind):
    file = config(tmp_path, model_type=kind)
    refused(lambda: make_plan(file, "H200", TRAFFIC), "config.json", kind, "glm_moe_dsa")
