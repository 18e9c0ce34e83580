"""Test that a step of a Decoder by the products of `ops.step` equals the compiled one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from indexcache import ops, use_pattern
from indexcache.models.family import family_of
from indexcache.models.fast import token
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder
from indexcache.models.fast.layer import has_one_choice_of_groups
from indexcache.models.fast.prefill import prefill
from indexcache.models.random import random_model
from indexcache.ops import step
from indexcache.shapes import shape_config
from tests.support import FAMILIES, make_model, relative

ON = {"products": True, "experts": True, "indexer": True, "attention": True}
OFF = dict.fromkeys(ON, False)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Name the operations of `ops.step` as they are called."""
    names: list[str] = []
    for name in ("products", "absorb", "attend", "experts", "index_rows"):

        def counted(*args, real=getattr(step, name), name=name, **options):
            names.append(name)
            return real(*args, **options)

        monkeypatch.setattr(step, name, counted)
    return names


def steps(model, ids, tuning, count=2):
    cache = FastCache(model, 64)
    with torch.no_grad(), ops.tuned(step=tuning, backend="torch"):
        seen = [prefill(model, ids, cache, chunk=30)]
        decoder = Decoder(model, cache)
        for _ in range(count):
            seen.append(decoder.step(seen[-1].argmax(-1)))
    return torch.cat(seen), cache


@pytest.mark.parametrize(
    ("family", "index_dtype"), [(FAMILIES[0], "fp8"), (FAMILIES[1], "fp8"), (FAMILIES[0], "auto")]
)
def test_a_step_by_kernels_equals_a_compiled_one(family, index_dtype, eager, calls):
    """Logits, latents and keys agree, and each product runs where it was asked for."""
    model = make_model(family)
    ids = torch.randint(0, 128, (1, 45), generator=torch.Generator().manual_seed(1))
    fast = accelerate(model, compile=True, index_dtype=index_dtype)
    with fast, use_pattern(model, "FSFRSS@2"):
        want, cache = steps(model, ids, OFF)
        assert not calls
        got, again = steps(model, ids, ON)
    assert relative(got, want) < 1e-5
    for a, b in zip(again.layers, cache.layers, strict=True):
        assert (a.length, a.indexed) == (b.length, b.indexed)
        assert relative(a.latents, b.latents) < 1e-5
        if a.indexer_scales is not None:
            assert relative(a.indexer_scales, b.indexer_scales) < 1e-5
            assert relative(a.indexer_keys.float(), b.indexer_keys.float()) < 1e-2
    indexed = 3 if index_dtype == "fp8" else 0  # layers with F and R
    assert calls.count("absorb") == 2 * 6
    assert calls.count("experts") == 2 * 3
    assert calls.count("index_rows") == 2 * indexed
    assert calls.count("attend") == 2 * 6
    assert calls.count("products") == 2 * (6 * 3 + 3)


def test_what_the_kernels_leave_to_the_compiler():
    """Biases, choices of groups, other activations and odd widths stay compiled functions."""
    model = make_model("glm_moe_dsa", attention_bias=True)
    layer, family = model.model.layers[-1], family_of(model)
    assert not token.fits_attention(layer, family)
    assert token.fits_experts(layer, True)
    assert not token.fits_experts(layer, False)
    layer.mlp.shared_experts.act_fn = torch.nn.GELU()
    assert not token.fits_experts(layer, True)
    layer = make_model("glm_moe_dsa", kv_lora_rank=24).model.layers[0]
    assert not token.fits_attention(layer, family)
    grouped = make_model("deepseek_v32", n_group=2, topk_group=1)
    gate = grouped.model.layers[-1].mlp.gate
    assert not token.fits_experts(grouped.model.layers[-1], has_one_choice_of_groups(gate))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_are_as_near_to_fp32_at_the_30b_shape(calls):
    """They are the default, repeat bit for bit, and round no worse than compiled products."""
    model = random_model(
        shape_config("glm-4.7-flash-dsa", 3), dtype="bfloat16", device="cuda", seed=0
    )
    ids = torch.randint(0, 10_000, (4, 3000), device="cuda")

    def decoded(compiled=True, **settings):
        fast = accelerate(model, index_dtype="fp8" if compiled else "auto", compile=compiled)
        seen = []
        with torch.no_grad(), fast, use_pattern(model, "FSF"), ops.tuned(step=settings):
            for text in ids:
                cache = FastCache(model, 3100)
                prefill(model, text[None], cache, chunk=1000)
                decoder = Decoder(
                    model, cache, graph=compiled
                )  # No kernel takes index keys in fp32.
                seen += [decoder.step(token).clone() for token in text[:15, None]]
        return torch.cat(seen).float()

    compiled = decoded(**OFF)
    assert not calls
    kernels = decoded()
    assert set(calls) == {"products", "absorb", "index_rows", "experts"}
    assert torch.equal(decoded(), kernels)
    assert torch.equal(decoded(pdl=False), kernels)
    model.float()
    exact = decoded(compiled=False)
    theirs, ours = (float((x - exact).norm(dim=-1).median()) for x in (compiled, kernels))
    print(f"median distance from fp32: {theirs:.4g} compiled, {ours:.4g} by kernels")
    assert ours < 1.2 * theirs
