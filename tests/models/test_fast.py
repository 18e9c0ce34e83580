"""Test the fast path against stock, on both families, under patterns."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from indexcache import Pattern, SearchSettings, evaluate, ops, search, use_pattern
from indexcache.data import make_batches
from indexcache.models.family import decoder_layers, family_of, indexers
from indexcache.models.fast import accelerate as fast_path
from indexcache.models.fast import layer as layer_of_fast_path
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.prefix import PrefixCache
from indexcache.ops import reference
from tests.support import FAMILIES, PATTERNS, SHAPE, documents, logits, make_model, relative


def both(model, call, pattern=None):
    """Return (stock's result, the fast path's result) of call(model) under a pattern."""
    results = []
    for fast in (False, True):
        handle = accelerate(model) if fast else None
        try:
            with use_pattern(model, pattern or "F" * 6), torch.no_grad():
                results.append(call(model))
        finally:
            if handle:
                handle.undo()
    return results


@pytest.mark.parametrize("pattern", ["FFFFFF", *PATTERNS])
def test_prefill(model, ids, pattern):
    stock, fast = both(model, lambda m: m(ids).logits, pattern)
    assert relative(fast, stock) < 1e-5


@pytest.mark.parametrize("chunks", [(41, 1, 18, 36), (96,), (7,) * 13 + (5,), (1,) * 96])
def test_chunked_prefill_and_decode(model, ids, chunks):
    stock = logits(model, ids)
    with accelerate(model):
        outputs: list[torch.Tensor] = []
        cache = None
        start = 0
        for n in chunks:
            with torch.no_grad():
                out = model(ids[:, start : start + n], past_key_values=cache, use_cache=True)
            outputs.append(out.logits)
            cache, start = out.past_key_values, start + n
        # The cache has latents, not expanded keys.
        assert cache.layers[0].keys.shape == (2, 1, 96, SHAPE["kv_lora_rank"])
    assert relative(torch.cat(outputs, 1), stock) < 1e-5


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSFRSS@2"])
def test_batch_with_unequal_lengths(model, ids, pattern):
    mask = torch.ones_like(ids)
    mask[1, :29] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(m):
        first = m(
            ids[:, :80], attention_mask=mask[:, :80], position_ids=positions[:, :80], use_cache=True
        )
        second = m(
            ids[:, 80:],
            attention_mask=mask,
            position_ids=positions[:, 80:],
            past_key_values=first.past_key_values,
        )
        return torch.cat([first.logits, second.logits], 1)

    stock, fast = both(model, run, pattern)
    assert relative(fast[0], stock[0]) < 1e-5
    assert relative(fast[1, 29:], stock[1, 29:]) < 1e-5
    with accelerate(model), use_pattern(model, pattern):  # Padding changes no result.
        assert relative(fast[1, 29:], logits(model, ids[1:, 29:])[0]) < 1e-5


def test_generate(model, ids):
    def run(m):
        mask = torch.ones_like(ids[:, :40])
        return m.generate(
            ids[:, :40],
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    stock, fast = both(model, run, "FSSFSS")
    assert torch.equal(stock, fast)


def test_bf16_is_as_near_to_fp32_as_stock_is(ids):
    for family in FAMILIES:
        exact = logits(make_model(family), ids)
        half = make_model(family).to(torch.bfloat16)
        stock, fast = both(half, lambda m: m(ids).logits.float())
        assert relative(fast, exact) < 1.1 * relative(stock, exact)


def test_selections_agree_by_margin(model, ids):
    """The paths select the same ids, except for at most two near ties."""

    def run(m):
        with use_pattern(m, "FFFFFF", capture=True) as seam:
            m(ids)
            return seam.selections

    stock, fast = both(model, run)
    different = 0
    for i in range(6):
        for b in range(2):
            for t in range(96):
                a = {x for x in stock[i][b, t].tolist() if x <= t}
                c = {x for x in fast[i][b, t].tolist() if x >= 0}
                assert len(a) == len(c) == min(t + 1, SHAPE["index_topk"])
                different += len(a - c)
    assert different <= 2  # ids of 6 x 2 x 96 x 8


def test_natively_shared_model(glm, ids):
    native = make_model(
        "glm_moe_dsa", indexer_types=["full", "shared", "shared", "full", "shared", "shared"]
    )
    native.load_state_dict(glm.state_dict(), strict=False)
    stock, fast = both(native, lambda m: m(ids).logits, "FSSFSS")
    assert relative(fast, stock) < 1e-5


def test_undo_restores_stock_bitwise(model, ids):
    before = logits(model, ids)
    keys = list(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), accelerate(model) as handle:
        assert list(model.state_dict()) == keys
        logits(model, ids)
        raise RuntimeError("inside")
    handle.undo()
    assert torch.equal(logits(model, ids), before)
    modules = [model.model, *indexers(model), *(layer.self_attn for layer in decoder_layers(model))]
    assert all("forward" not in m.__dict__ for m in modules)


def test_prefix_reuse_is_bitwise_on_the_fast_path_too(model, ids):
    with accelerate(model):
        cache = PrefixCache(model, [ids])
        cache.rebase(Pattern("FFFSFF"))
        for pattern in ("FFFSFS", "FSFSFF", "FFRSFF@2", "FSSSSS"):
            with use_pattern(model, pattern):
                expected = hidden_states(model, ids)
            assert torch.equal(cache.hidden(0, Pattern(pattern)), expected), pattern


def test_search_and_evidence_agree_with_stock(glm, tmp_path):
    batches = make_batches(documents(), length=64, sequences=4, batch=2)
    settings = SearchSettings(keep=1 / 3)
    stock = search(glm, batches, tmp_path / "stock", settings)
    rows = evaluate(glm, ["FSSFSS", "FRRRRR@2"], batches).rows
    with accelerate(glm):
        fast = search(glm, batches, tmp_path / "fast", settings)
        fast_rows = evaluate(glm, ["FSSFSS", "FRRRRR@2"], batches).rows
        with pytest.raises(ValueError, match="path was"):
            search(glm, batches, tmp_path / "stock", settings)
    for a, b in zip(stock.frontier + stock.uniform, fast.frontier + fast.uniform, strict=True):
        assert a.pattern == b.pattern
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for a, b in zip(rows, fast_rows, strict=True):
        assert a.delta_loss == pytest.approx(b.delta_loss, abs=1e-4)


def test_shared_layers_read_the_groups_of_their_source(model, ids, monkeypatch):
    made, used = [], []
    group, attend = ops.group_queries, ops.sparse_mla

    def seen(q, latents, selected, scale, *, value_dim, groups):
        expected = group(selected, 3)
        assert all(torch.equal(a, b) for a, b in zip(groups[:3], expected[:3], strict=True))
        used.append(groups)
        return attend(q, latents, selected, scale, value_dim=value_dim, groups=groups)

    monkeypatch.setattr(ops, "query_group", lambda ids, heads: 3 if ids.shape[1] > 8 else 1)
    monkeypatch.setattr(ops, "group_queries", lambda *args: made.append(group(*args)) or made[-1])
    monkeypatch.setattr(ops, "sparse_mla", seen)
    for pattern, count in (("FSSFSS", 2), ("FSFRSS@2", 3), ("FFFFFF", 6)):
        with accelerate(model), use_pattern(model, pattern):
            made.clear(), used.clear()
            logits(model, ids)
            assert len(made) == count
            assert len({id(g) for g in used}) == count
            assert len(used) == 6


def test_rope_with_the_quantisation_is_the_indexers(model):
    family, indexer = family_of(model), indexers(model)[1]
    x, q_resid = torch.randn(1, 9, SHAPE["hidden_size"]), torch.randn(1, 9, SHAPE["q_lora_rank"])
    angles = torch.rand(1, 9, indexer.qk_rope_head_dim // 2) * 6
    rope = tuple(torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    with torch.no_grad():
        q, k, w = family.project(indexer, x, q_resid, rope)
        plain_q, plain_k, plain_w = family.project(indexer, x, q_resid, None)
    assert torch.equal(w, plain_w)
    for got, want, cos, sin in (
        (plain_q, q, angles.cos()[:, :, None], angles.sin()[:, :, None]),
        (plain_k, k, angles.cos(), angles.sin()),
    ):
        rotated = reference.rope(got, cos, sin, interleaved=family.interleaved)
        if family.interleaved:
            rotated = reference.half_split(rotated, angles.shape[-1])
        assert relative(rotated, want) < 1e-6
        assert relative(got, want) > 1e-2


def test_what_only_a_gpu_gets(model, ids, monkeypatch):
    """Fused norms and grouped experts, which this test forces, change no result and are undone."""
    model.set_experts_implementation("eager")
    try:
        stock = logits(model, ids)
        monkeypatch.setattr(fast_path, "on_gpu", lambda _: True)
        with accelerate(model):
            assert model.config._experts_implementation == "grouped_mm"
            assert relative(logits(model, ids), stock) < 1e-5
        assert model.config._experts_implementation == "eager"
        assert torch.equal(logits(model, ids), stock)
        assert all("forward" not in m.__dict__ for m in model.modules())
    finally:
        model.set_experts_implementation("grouped_mm")
    half = make_model(model.config.model_type).to(torch.bfloat16)
    exact, stock = stock, logits(half, ids)
    with accelerate(half):
        assert relative(logits(half, ids).float(), exact) < 1.1 * relative(stock.float(), exact)


def test_routers_that_take_all_groups_skip_the_choice(model, monkeypatch):
    """Routers give the same experts and weights; one that leaves groups out stays stock."""
    router = next(m for m in model.modules() if hasattr(m, "e_score_correction_bias"))
    x, bias = torch.randn(7, 5, router.hidden_dim), router.e_score_correction_bias
    before = bias.clone()
    try:
        bias.normal_()
        for groups, taken, shortened in ((1, 1, True), (2, 2, True), (2, 1, False)):
            monkeypatch.setattr(router, "num_group", groups)
            monkeypatch.setattr(router, "topk_group", taken)
            stock = router(x)
            with accelerate(model):
                assert ("forward" in router.__dict__) is shortened
                got = router(x)
            for a, b in zip(stock, got, strict=True):
                assert torch.equal(a.sort().values, b.sort().values)
    finally:
        bias.copy_(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensor cores need a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_routers_on_tensor_cores(compile):
    """In bf16 on a GPU the logits differ from stock's fp32 product only by the order of its sum."""
    model = make_model("glm_moe_dsa").to("cuda", torch.bfloat16)
    router = next(m for m in model.modules() if hasattr(m, "e_score_correction_bias"))
    x = torch.randn(3, 50, router.hidden_dim, device="cuda").bfloat16()
    stock = router(x)
    with accelerate(model, compile=compile), torch.no_grad():
        got = torch.compile(router, dynamic=True)(x) if compile else router(x)
    assert relative(got[0], stock[0]) < 1e-5
    assert torch.equal(got[2].sort(-1).values, stock[2].sort(-1).values)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.long)])
def test_compiled_pieces(model, ids, monkeypatch, batch):
    """Functions are traced once for each shape, not for each layer.

    A step of one sequence has compiled functions of its own. The backend, which takes a minute, is
    left out here.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(fast_path, "on_gpu", lambda _: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = ids[:batch]
    with use_pattern(model, "FSFRSS@2"):
        stock = logits(model, ids)
    with accelerate(model, compile=True), use_pattern(model, "FSFRSS@2"):
        got = [logits(model, ids[:, :50], past_key_values=(cache := FastCache(model, 96, batch)))]
        got += [
            logits(model, ids[:, a:b], past_key_values=cache)
            for a, b in ((50, 51), (51, 80), (80, 81), (81, 96))
        ]
    assert relative(torch.cat(got, 1), stock) < 1e-5
    # Far fewer than one set for each layer.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all("forward" not in m.__dict__ for m in model.modules())
    torch._dynamo.reset()
    monkeypatch.setattr(
        layer_of_fast_path, "_experts_of_one", lambda _experts, x, _indices, _weights: x * torch.nan
    )
    with accelerate(model, compile=True), use_pattern(model, "FSFRSS@2"):
        logits(model, ids[:, :50], past_key_values=(cache := FastCache(model, 96, batch)))
        assert bool(logits(model, ids[:, 50:51], past_key_values=cache).isnan().all()) == (
            batch == 1
        )


@pytest.mark.parametrize("change", ["mlp", "experts", "hook"])
def test_a_step_calls_replaced_forwards_and_hooks(model, ids, monkeypatch, change):
    """A layer with a replaced forward or a hook does not run as a compiled step, with a warning."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    layer = next(layer for layer in model.model.layers if hasattr(layer.mlp, "experts"))
    module = layer.mlp.experts if change == "experts" else layer.mlp
    calls, stock = [], module.forward
    handle = None
    if change == "hook":
        handle = module.register_forward_hook(lambda *_: calls.append(1))
    else:
        module.forward = lambda *args: stock(*args) * 3  # type: ignore[method-assign]
    try:
        want = logits(model, ids[:1])
        calls.clear()
        with pytest.warns(UserWarning, match="do not compile"):
            handle_of_fast = accelerate(model, compile=True)
        with handle_of_fast:
            got = [logits(model, ids[:1, :95], past_key_values=(cache := FastCache(model, 96, 1)))]
            got.append(logits(model, ids[:1, 95:], past_key_values=cache))
        assert relative(torch.cat(got, 1), want) < 1e-5
        assert len(calls) == (2 if change == "hook" else 0)
    finally:
        module.__dict__.pop("forward", None)
        if handle is not None:
            handle.remove()


def test_refusals(model, ids):
    with accelerate(model):
        with pytest.raises(ValueError, match="already"):
            accelerate(model)
        with use_pattern(model, "FSSFSS"), pytest.raises(ValueError, match="inference"):
            model(ids)
        with torch.no_grad():
            cache = model(ids[:, :40], use_cache=True).past_key_values
            with use_pattern(model, "FSSFSS"):
                shared = model(ids[:, :40], use_cache=True).past_key_values
            with pytest.raises(ValueError, match="start a new cache"):
                model(ids[:, 40:41], past_key_values=shared)
            model(ids[:, 40:41], past_key_values=cache)
    with use_pattern(model, "FSSFSS"), pytest.raises(ValueError, match="outside of use_pattern"):
        accelerate(model)
    handle = accelerate(model)
    with use_pattern(model, "FSSFSS"), pytest.raises(ValueError, match="Leave use_pattern"):
        handle.undo()
    handle.undo()


def test_tiny_agrees_on_real_text(tiny):
    """Near ties may be selected differently, but they are few and do not bias the loss."""
    (batch, *_) = tiny.batches("heldout", length=512, sequences=3)
    for pattern in (Pattern.full(12), Pattern("FFSSSSSSSFSS"), Pattern("FFRRRRRRRFRR@8")):
        losses = []
        for fast in (False, True):
            handle = accelerate(tiny.module) if fast else None
            with use_pattern(tiny.module, pattern):
                losses.append(
                    token_losses(tiny.module, hidden_states(tiny.module, batch.ids), batch.ids)
                )
            if handle:
                handle.undo()
        assert (losses[0] - losses[1]).abs().mean() < 1e-3, str(pattern)
        assert abs(float(losses[0].mean() - losses[1].mean())) < 1e-4
