"""Test the fast path with adapters of peft against stock transformers with the same adapters."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from tests.support import FAMILIES, logits, make_model, relative

SHORT = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
CONFIGS = {
    "queries": LoraConfig(r=4, target_modules=["q_a_proj", "q_b_proj", "o_proj"]),
    "keys": LoraConfig(r=4, target_modules=["kv_a_proj_with_mqa", "kv_b_proj"]),
    "all-linear": LoraConfig(r=4, target_modules="all-linear"),
    "indexer": LoraConfig(r=4, target_modules=["wq_b", "wk", "weights_proj"]),
    "mlp and ends": LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "lm_head"]),
    "router and experts": LoraConfig(
        r=4,
        target_modules=[],
        target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "whole modules": LoraConfig(
        r=4, target_modules=["q_a_proj"], modules_to_save=["gate", "kv_b_proj"]
    ),
    "dora": LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], use_dora=True),
    "bias": LoraConfig(r=4, target_modules=["kv_b_proj"], lora_bias=True),
    "ia3": IA3Config(target_modules=["kv_b_proj"], feedforward_modules=[]),
    "loha": LoHaConfig(r=4, target_modules=["kv_b_proj"]),
}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def adapted(model, config, name="default", seed=3):
    """Put an adapter with random weights on a model."""
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
        model.set_adapter(name)
    else:
        model = get_peft_model(model, config, name).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    return model


def steps(model, ids, accelerated):
    """Return the logits of a pass, and of a prefill with two steps of decoding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = FastCache(accelerated, 32, 2) if accelerated is not None else None
    parts = []
    with torch.no_grad():
        for a, b in ((0, 22), (22, 23), (23, 24)):
            out = base(ids[:, a:b], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache = out.past_key_values
    return logits(base, ids), torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_set_equals_stock(family, name, ids):
    model = make_model(family, **SHORT)
    plain = logits(model, ids)
    peft = adapted(model, CONFIGS[name])
    stock = logits(model, ids)
    assert relative(stock, plain) > 0.02
    with accelerate(model):
        for got in steps(peft, ids, model):
            assert relative(got, stock) < 1e-5


@pytest.mark.parametrize("name", ["all-linear", "router and experts", "whole modules", "dora"])
def test_adapters_that_come_later(name, ids):
    stock = logits(adapted(make_model("glm_moe_dsa", **SHORT), CONFIGS[name]), ids)
    model = make_model("glm_moe_dsa", **SHORT)
    with accelerate(model):
        plain = logits(model, ids)
        peft = adapted(model, CONFIGS[name])
        for got in steps(peft, ids, model):
            assert relative(got, stock) < 1e-5
        assert relative(plain, stock) > 0.02


def test_adapters_that_change(ids):
    """Merged, unmerged, disabled, scaled and second adapters are those that stock would run."""
    model = make_model("deepseek_v32", **SHORT)
    config = CONFIGS["keys"]
    peft = adapted(adapted(model, config), config, "other", seed=4)
    changes = [
        lambda: peft.set_adapter("default"),
        lambda: peft.base_model.set_adapter(["default", "other"]),
        peft.merge_adapter,
        peft.unmerge_adapter,
        lambda: peft.set_adapter("other"),
        peft.base_model.disable_adapter_layers,
        peft.base_model.enable_adapter_layers,
        lambda: [m.scale_layer(3.0) for m in model.modules() if hasattr(m, "scale_layer")],
        lambda: [p.data.mul_(2) for n, p in model.named_parameters() if "lora_A.other" in n],
    ]
    seen = []
    for change in changes:
        change()
        seen.append(logits(model, ids))
        with accelerate(model):
            assert relative(logits(model, ids), seen[-1]) < 1e-5
    handle = accelerate(model)
    changes[0]()
    assert relative(logits(model, ids), seen[0]) < 1e-5
    handle.undo()
    assert all(relative(a, b) > 1e-3 for a, b in zip(seen[:2], seen[4:6], strict=True))
