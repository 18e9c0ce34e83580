"""Test use_pattern on both families against stock transformers."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from indexcache import Pattern, use_pattern
from indexcache.models.family import families, family_of, indexers
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.prefix import LEAST_BYTES, PrefixCache, memory_for_outputs
from indexcache.ops import index_scores
from tests.support import PATTERNS, SHAPE, logits, make_model, relative


def shared_stock(model, pattern: str, **changes):
    """Build stock GLM with `indexer_types` and the same weights."""
    types = [{"F": "full", "S": "shared"}[c] for c in pattern]
    other = make_model("glm_moe_dsa", indexer_types=types, **changes)
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def test_all_full_is_bitwise_stock(model, ids):
    stock = logits(model, ids)
    for capture in (False, True):
        with use_pattern(model, "FFFFFF", capture=capture):
            assert torch.equal(logits(model, ids), stock)


@pytest.mark.parametrize("pattern", ["FSSFSS", "FFSSSS", "FSFSFS", "FSSSSS", "FFFFFF"])
def test_glm_is_bitwise_stock_with_the_same_indexer_types(glm, ids, pattern):
    with use_pattern(glm, pattern):
        ours = logits(glm, ids)
    assert torch.equal(ours, logits(shared_stock(glm, pattern), ids))


def test_glm_sharing_is_bitwise_stock_in_bf16_and_with_padding(glm, ids):
    half = copy.deepcopy(glm).to(torch.bfloat16)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    with use_pattern(half, "FSSFSS"):
        ours = logits(half, ids, attention_mask=mask)
    assert torch.equal(
        ours, logits(shared_stock(half, "FSSFSS").to(torch.bfloat16), ids, attention_mask=mask)
    )


def test_v32_sharing_hands_the_same_ids_to_the_shared_layers(ids):
    model = make_model("deepseek_v32")
    seen = {}
    # The hooks read the ids that attention receives, independently of the seam.
    for i, layer in enumerate(model.model.layers):
        forward = layer.self_attn.indexer.forward
        layer.self_attn.indexer.register_forward_hook(
            lambda m, a, out, i=i: seen.__setitem__(i, out)
        )
        assert forward.__self__ is layer.self_attn.indexer
    with use_pattern(model, "FSSFSS", capture=True) as seam:
        logits(model, ids)
        selections = seam.selections
    for i in range(6):
        source = Pattern("FSSFSS").source(i)
        assert torch.equal(seen[i], seen[source])
        assert torch.equal(selections[i], seen[i])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stock_is_restored_bitwise(model, ids, pattern):
    before, keys = logits(model, ids), list(model.state_dict())
    with use_pattern(model, pattern):
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(RuntimeError, match="in the middle"), use_pattern(model, pattern):
        logits(model, ids)
        raise RuntimeError("in the middle")
    gc.collect()  # Else a cache of an earlier test may keep the guard's hook in place.
    assert torch.equal(logits(model, ids), before)
    assert all("forward" not in m.__dict__ for m in indexers(model))
    assert not model.model._forward_pre_hooks


def test_contexts_nest(model, ids):
    with use_pattern(model, "FSSFSS"):
        outer = logits(model, ids)
        with use_pattern(model, "FFFFFF"):
            inner = logits(model, ids)
        assert torch.equal(logits(model, ids), outer)
    assert torch.equal(inner, logits(model, ids))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_decoding_equals_one_pass(model, ids, pattern):
    with use_pattern(model, pattern):
        one_pass = logits(model, ids)
        outputs, cache = [], None
        for start, stop in [(0, 41), (41, 42), (42, 60), *((t, t + 1) for t in range(60, 96))]:
            with torch.no_grad():
                out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out.logits)
    assert relative(torch.cat(outputs, 1), one_pass) < 1e-5


def test_generate_under_a_pattern(model, ids):
    with use_pattern(model, "FSSFSS"):
        new = model.generate(
            ids[:1, :40], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        greedy = ids[:1, :40]
        for _ in range(6):
            greedy = torch.cat([greedy, logits(model, greedy)[:, -1:].argmax(-1)], 1)
    assert torch.equal(new, greedy)


def test_static_cache_is_checked_too(model, ids):
    from transformers import StaticCache

    def cache():
        return StaticCache(config=model.config, max_cache_len=96)

    with use_pattern(model, "FSSFSS"):
        shared = cache()
        a = logits(model, ids[:, :50], past_key_values=shared)
        b = logits(model, ids[:, 50:60], past_key_values=shared)
        assert relative(torch.cat([a, b], 1), logits(model, ids[:, :60])) < 1e-5
    with (
        use_pattern(model, "FFFFFF"),
        pytest.raises(ValueError, match="Layer 1 runs its indexer now"),
    ):
        logits(model, ids[:, 60:61], past_key_values=shared)


@pytest.mark.parametrize("after", ["FFFFFF", "FSFFSS", "FRRFRR@2"])
def test_shared_layer_cannot_become_full_while_its_cache_lives(model, ids, after):
    with use_pattern(model, "FSSFSS"), torch.no_grad():
        cache = model(ids[:, :50], use_cache=True).past_key_values
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    with use_pattern(model, after), pytest.raises(ValueError, match="start a new cache"):
        logits(model, ids[:, 50:51], past_key_values=cache)
    # The refusal came before anything was written.
    assert [int(layer.get_seq_length()) for layer in cache.layers] == lengths
    with use_pattern(model, "FSSFSS"):  # The cache still works under the pattern that filled it.
        one_pass = logits(model, ids[:, :51])[:, -1]
        continued = logits(model, ids[:, 50:51], past_key_values=cache)[:, -1]
        assert relative(continued, one_pass) < 1e-5


@pytest.mark.parametrize("static", [False, True])
def test_leaving_the_context_is_watched_as_well(ids, static):
    """Stock would continue static caches silently, and dynamic ones with a shape error."""
    from transformers import StaticCache

    model = make_model("glm_moe_dsa")
    cache = StaticCache(config=model.config, max_cache_len=96) if static else None
    with use_pattern(model, "FSSFSS"), torch.no_grad():
        cache = model(ids[:, :50], past_key_values=cache, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Layer 1 runs its indexer now"):
        logits(model, ids[:, 50:51], past_key_values=cache)
    with use_pattern(model, "FSSFSS"):
        logits(model, ids[:, 50:51], past_key_values=cache)
    logits(model, ids)  # Passes without that cache are allowed.
    with torch.no_grad():
        fresh = model(ids[:, :50], use_cache=True).past_key_values
    logits(model, ids[:, 50:51], past_key_values=fresh)
    assert model.model._forward_pre_hooks
    del cache
    import gc

    gc.collect()
    logits(model, ids)
    assert not model.model._forward_pre_hooks  # The hook goes with the cache.


def test_full_layer_may_become_shared_while_its_cache_lives(model, ids):
    with torch.no_grad():
        cache = model(ids[:, :50], use_cache=True).past_key_values
    with use_pattern(model, "FSSFSS"):
        logits(model, ids[:, 50:51], past_key_values=cache)


def test_natively_shared_layers_cannot_be_full(glm, ids):
    native = shared_stock(glm, "FSSFSS")
    for wrong in ("FFSFSS", "FRSFSS", "FFFFFF"):
        with pytest.raises(ValueError, match="no indexer weights"), use_pattern(native, wrong):
            pass
    with use_pattern(native, "FSSSSS"):  # A full layer may become shared.
        fewer = logits(native, ids)
    assert torch.equal(fewer, logits(shared_stock(glm, "FSSSSS"), ids))


@pytest.mark.parametrize("bad", ["FSS", "FSSFSSS", "SFFFFF", "fssfss", "FSSFSX", ""])
def test_wrong_patterns_are_refused(model, bad):
    with pytest.raises(ValueError, match=r"^[^\n]+$"), use_pattern(model, bad):
        pass


def test_unknown_family_is_refused():
    import transformers as t

    llama = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(ValueError, match="llama"), use_pattern(llama, "F"):
        pass


# -- the R role


def own_scores(model, ids):
    """Compute every layer's indexer scores in an all-full pass: fp32 [B, T, T] per layer."""
    scores = {}

    def hook(i):
        def read(module, args, kwargs, out):
            x, q_resid, rope, mask = args[:4]
            q, k, w = family_of(model).project(module, x, q_resid, rope)
            scores[i] = (
                index_scores(q, k, w) + mask
                if mask.dtype != torch.bool
                else index_scores(q, k, w).masked_fill(~mask, -torch.inf)
            )

        return read

    handles = [
        m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(indexers(model))
    ]
    logits(model, ids)
    for h in handles:
        h.remove()
    return scores


def test_projection_reproduces_the_stock_selection(model, ids):
    """An id that only one of two selections has must score like the k-th."""
    scores = own_scores(model, ids)
    with use_pattern(model, "FFFFFF", capture=True) as seam:
        logits(model, ids)
        for i, selection in seam.selections.items():
            s, k = scores[i], SHAPE["index_topk"]
            worst = (
                s.gather(-1, selection[..., :k].long())
                .masked_fill(selection > torch.arange(96)[:, None], torch.inf)
                .amin(-1)
            )
            best = s.topk(k, -1).values[..., -1]
            rows = torch.arange(96) >= k
            assert ((worst - best).abs() <= 1e-5 * best.abs().clamp_min(1))[:, rows].all()


def test_a_pool_that_holds_everything_is_full(model, ids):
    with use_pattern(model, "FRRFRR@12"):
        pooled = logits(model, ids)
    assert relative(pooled, full(model, ids)) < 1e-5


def full(model, ids):
    with use_pattern(model, "FFFFFF"):
        return logits(model, ids)


def test_reindex_selects_the_best_of_the_pool(model, ids):
    """Layer 1 as R selects, by its own scores, the top k of the top 2 k of layer 0."""
    k = SHAPE["index_topk"]
    scores = own_scores(model, ids)
    with use_pattern(model, "FRFFFF@2", capture=True) as seam:
        logits(model, ids)
        picked = seam.selections
    assert torch.equal(
        picked[0][:, k:].sort(-1).values, scores[0].topk(k, -1).indices[:, k:].sort(-1).values.int()
    )
    # Layer 0 is full in both passes, so layer 1 has the same input.
    pool = scores[0].topk(2 * k, -1).indices
    best = pool.gather(-1, scores[1].gather(-1, pool).topk(k, -1).indices)
    for b in range(2):
        for t in range(2 * k, 96):
            assert set(picked[1][b, t].tolist()) == set(best[b, t].tolist())


def test_larger_pools_come_closer(model, ids):
    reference = full(model, ids)
    far = []
    for factor in (1, 2, 4, 8, 12):
        with use_pattern(model, f"FRRRRR@{factor}"):
            far.append(relative(logits(model, ids), reference))
    assert far[-1] < 1e-5
    assert far[0] > far[2] > far[-1]
    with use_pattern(model, "FSSSSS"):
        # A pool of k leaves an R layer no choice, as if it were shared.
        assert relative(logits(model, ids), reference) == pytest.approx(far[0], rel=1e-4)


# -- prefix reuse, losses


@pytest.mark.parametrize("stride", [1, 2, 4, 6])
def test_prefix_reuse_is_bitwise(model, ids, stride):
    cache = PrefixCache(model, [ids, ids.flip(1)])
    cache.stride = stride
    for trunk in ("FFFSFF", "FFFSFS", "FSFSFS"):
        cache.rebase(Pattern(trunk))
        for pattern in ("FFFSFF", "FFFSFS", "FSFSFF", "FFRSFF@2", "FRRRRR@2", "FSSSSS"):
            for i, x in enumerate((ids, ids.flip(1))):
                with use_pattern(model, pattern):
                    expected = hidden_states(model, x)
                assert torch.equal(cache.hidden(i, Pattern(pattern)), expected), (trunk, pattern)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_prefix_cache_computes_only_the_layers_after_the_flip(model, ids):
    runs = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: runs.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        cache = PrefixCache(model, [ids])
        cache.rebase(Pattern("FFFFFF"))
        runs.clear()
        cache.hidden(0, Pattern("FFFFSF"))
        assert runs == [4, 5]
        runs.clear()
        cache.rebase(Pattern("FFSFFF"))
        assert runs == [2, 3, 4, 5]
    finally:
        for h in handles:
            h.remove()


def test_prefix_cache_bounds_its_memory(model, ids):
    assert PrefixCache(model, [ids], limit_bytes=1).stride == 6
    assert PrefixCache(model, [ids]).stride == 1
    assert memory_for_outputs(model) == LEAST_BYTES  # on a CPU


def test_token_losses_are_stock_losses(model, ids):
    with torch.no_grad():
        stock = float(model(ids, labels=ids).loss)
    assert float(token_losses(model, hidden_states(model, ids), ids).mean()) == pytest.approx(
        stock, rel=1e-6
    )


def test_the_seam_keeps_no_model_alive(ids):
    model = make_model("glm_moe_dsa")
    with use_pattern(model, "FSSFSS"):
        logits(model, ids)
    ref = weakref.ref(model)
    del model
    import gc

    gc.collect()
    assert ref() is None


def test_registry_finds_the_families():
    assert set(families()) >= {"deepseek_v32", "glm_moe_dsa"}
