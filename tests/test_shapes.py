"""Test the rates of devices, named shapes, and random models of these shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from indexcache.cli.timing import NAMED
from indexcache.models.random import random_model
from indexcache.shapes import (
    DEVICES,
    SHAPES,
    Shape,
    peak_of,
    rates_named,
    reachable_of,
    read_shape,
    shape_config,
    shape_of,
)
from tests.support import refused

pytestmark = pytest.mark.usefixtures("one_thread")

H100 = rates_named("H100")
FLASH = shape_of("glm-4.7-flash-dsa")


@pytest.mark.parametrize("name", SHAPES)
def test_counts_of_weights_are_those_of_the_model(name):
    import transformers

    config = shape_config(name, 5)
    shape = Shape.of(config)
    kind = config.pop("model_type")
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **config)
        )
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    assert shape.weights == sum(sizes.values())
    layer = {
        n.removeprefix("model.layers.4."): c
        for n, c in sizes.items()
        if n.startswith("model.layers.4.")
    }
    assert shape.indexer_weights == sum(c for n, c in layer.items() if "indexer" in n)
    assert shape.attention_weights == sum(
        c for n, c in layer.items() if "self_attn" in n and "indexer" not in n
    )
    assert shape.experts * shape.expert_weights == sum(
        c for n, c in layer.items() if "experts" in n and "shared" not in n
    )


def test_named_shapes_have_the_published_sizes():
    assert FLASH.weights == pytest.approx(30.1e9, rel=0.01)
    assert shape_of("glm-5").weights == pytest.approx(744e9, rel=0.01)
    assert shape_of("deepseek-v3.2").weights == pytest.approx(672e9, rel=0.01)
    assert FLASH.cache_bytes(47) == 47 * (576 * 2 + 132)
    assert FLASH.cache_bytes(12, index_dtype="bf16") == 47 * 576 * 2 + 12 * 256
    assert ", ".join(SHAPES) == NAMED


def test_random_models_are_seeded_and_complete():
    config = shape_config("tiny-random", 3)
    model, again, other = (random_model(config, dtype="bfloat16", seed=seed) for seed in (1, 1, 2))
    states = [m.state_dict() for m in (model, again, other)]
    assert all(torch.equal(a, states[1][n]) for n, a in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    # From transformers 5.24 on these contain the routers.
    fp32 = {*type(model)._keep_in_fp32_modules, *type(model)._keep_in_fp32_modules_strict}
    assert "indexer.weights_proj" in fp32
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.float().std() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(
                p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            ), name
        is_fp32 = any(module in name for module in fp32)
        assert p.dtype == (torch.float32 if is_fp32 else torch.bfloat16), name
    stock: Any = type(model)(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert model(torch.arange(50)[None]).logits.isfinite().all()


def test_a_cut_shape_of_the_other_family_runs():
    config = shape_config("deepseek-v3.2", 2)
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "vocab_size": 99,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
    }
    model = random_model(config | small, dtype="float32")
    assert model(torch.arange(40)[None]).logits.isfinite().all()


def test_shapes_that_are_none(tmp_path):
    refused(lambda: shape_config("glm-9"), "glm-9", "glm-4.7-flash-dsa")
    refused(lambda: shape_config("tiny-random", 9), "has 8 layers")
    refused(lambda: shape_of("tiny", 2), "--layers")
    refused(lambda: read_shape(tmp_path / "no.json"), "no.json", "named shape")
    refused(lambda: Shape.of(SHAPES["glm-5"] | {"kv_lora_rank": None}), "kv_lora_rank", "None")
    refused(lambda: random_model(SHAPES["glm-5"] | {"model_type": "llama"}), "llama")
    refused(lambda: random_model(SHAPES["glm-5"]), "1487.8 GB", "--layers")
    refused(lambda: random_model(SHAPES["tiny-random"], device="cuda:7"), "cuda:7")
    assert shape_of("tiny").layers == 12


def test_one_table_holds_peaks_and_reachable_rates():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 > H100.bf16 == 790e12
    assert peak_of("NVIDIA B200") == 2250e12
    assert peak_of("NVIDIA T4") is None
    assert reachable_of("NVIDIA H200") is DEVICES["H200"].reachable
    assert reachable_of("NVIDIA H100 PCIe") is None
    assert reachable_of("NVIDIA B200") is None
