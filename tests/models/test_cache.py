"""Test that FastCache and prefill equal a plain cache, take less memory, and refuse early."""

from __future__ import annotations

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from indexcache import use_pattern
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder
from indexcache.models.fast.prefill import prefill
from tests.support import FAMILIES, PATTERNS, SHAPE, logits, make_model, refused, relative

WIDTH = SHAPE["kv_lora_rank"] + SHAPE["qk_rope_head_dim"]
CHUNKS = [(41, 1, 18, 36), (96,), (23, 23, 23, 23, 4)]


@pytest.fixture
def fast(model):
    with accelerate(model):
        yield model


def chunked(model, ids, chunks, cache, **kwargs):
    outputs, start = [], 0
    for n in chunks:
        outputs.append(
            logits(
                model, ids[:, start : start + n], past_key_values=cache, use_cache=True, **kwargs
            )
        )
        start += n
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("pattern", ["FFFFFF", *PATTERNS])
def test_chunks_equal_one_pass_of_stock(model, ids, pattern):
    with use_pattern(model, pattern):
        stock = logits(model, ids)
    with accelerate(model), use_pattern(model, pattern):
        for chunks, capacity in zip(CHUNKS, (None, 96, 130), strict=True):
            cache = FastCache(model, capacity, 2)
            assert relative(chunked(model, ids, chunks, cache), stock) < 1e-5
            assert cache.lengths == [96, 96]
            for i, layer in enumerate(cache.layers):
                assert layer.latents.shape == (2, capacity or 256, WIDTH)
                assert (layer.indexer_keys is None) == (pattern[i] == "S")
            assert cache.pattern == pattern[:6].replace("R", "F")


def test_bf16_is_as_near_to_fp32_as_stock_is(ids):
    """It holds in chunks, too; the bound is how far stock is from one pass over everything."""
    for family in FAMILIES:
        for pattern in ("FFFFFF", "FSFRSS@2"):
            single, half = make_model(family), make_model(family).to(torch.bfloat16)
            with use_pattern(single, pattern), use_pattern(half, pattern):
                exact, stock = logits(single, ids), logits(half, ids)
            with accelerate(half), use_pattern(half, pattern):
                got = chunked(half, ids, CHUNKS[0], FastCache(half, 96, 2))
            assert relative(got.float(), exact) < 1.1 * relative(stock.float(), exact)


def test_memory_is_written_in_place(fast, ids):
    cache = FastCache(fast, 96, 2)
    with use_pattern(fast, "FSSFSS"):
        logits(fast, ids[:, :50], past_key_values=cache)
        addresses = [layer.latents.data_ptr() for layer in cache.layers]
        logits(fast, ids[:, 50:], past_key_values=cache)
    assert [layer.latents.data_ptr() for layer in cache.layers] == addresses
    assert cache.nbytes == 4 * 2 * 96 * (6 * WIDTH + 2 * SHAPE["index_head_dim"])


def test_growth_keeps_what_was_there(fast, ids, monkeypatch):
    monkeypatch.setattr("indexcache.models.fast.cache.BLOCK", 4)
    cache = FastCache(fast, batch=2)
    got = chunked(fast, ids, CHUNKS[2], cache)
    assert relative(got, logits(fast, ids)) < 1e-5
    assert 96 <= cache.layers[0].latents.shape[1] < 96 * 1.5 + 4


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSFRSS@2"])
def test_padding_at_the_left(fast, ids, pattern):
    mask = torch.ones_like(ids)
    mask[1, :29] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = FastCache(fast, 96, 2)
    with use_pattern(fast, pattern):
        a = logits(
            fast,
            ids[:, :80],
            attention_mask=mask[:, :80],
            position_ids=positions[:, :80],
            past_key_values=cache,
        )
        b = logits(
            fast,
            ids[:, 80:],
            attention_mask=mask,
            position_ids=positions[:, 80:],
            past_key_values=cache,
        )
        got = torch.cat([a, b], 1)
        assert relative(got[0], logits(fast, ids[:1])[0]) < 1e-5
        assert relative(got[1, 29:], logits(fast, ids[1:, 29:])[0]) < 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(fast, ids, beams):
    mask = torch.ones_like(ids[:, :40])
    mask[0, :7] = 0
    kwargs = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "num_beams": beams,
        "attention_mask": mask,
    }
    with use_pattern(fast, "FSSFSS"):
        plain = fast.generate(ids[:, :40], **kwargs)
        for capacity in (None, 64):
            got = fast.generate(
                ids[:, :40], past_key_values=FastCache(fast, capacity, 2 * beams), **kwargs
            )
            assert torch.equal(got, plain)


def test_crop_select_and_reset(fast, ids):
    cache = FastCache(fast, batch=2)
    one_pass = logits(fast, ids)
    logits(fast, ids[:, :60], past_key_values=cache)
    cache.crop(-20)
    assert cache.lengths == [40, 40]
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    got = logits(fast, ids[1:, 40:].expand(2, -1), past_key_values=cache)
    assert relative(got, one_pass[1:, 40:].expand(2, -1, -1)) < 1e-5
    cache.reset()
    assert cache.pattern is None
    assert relative(logits(fast, ids, past_key_values=cache), one_pass) < 1e-5


@pytest.mark.parametrize("index_dtype", ["bf16", "fp8"])
def test_narrow_indexer_keys(model, ids, index_dtype):
    """The fp8 cache has the keys of one pass, in fp8; only the edge of a selection moves."""
    for pattern in ("FFFFFF", "FRSFRR@2"):
        with accelerate(model, index_dtype=index_dtype), use_pattern(model, pattern):
            one_pass = logits(model, ids)
            cache = FastCache(model, 96, 2)
            assert relative(chunked(model, ids, CHUNKS[0], cache), one_pass) < 1e-5
            assert relative(chunked(model, ids, CHUNKS[0], _plain(model)), one_pass) < 1e-5
        size = {"bf16": 2, "fp8": 1}[index_dtype]
        assert cache.layers[0].indexer_keys.element_size() == size
        assert (cache.layers[0].indexer_scales is not None) == (index_dtype == "fp8")


def _plain(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@pytest.mark.parametrize("pattern", ["F" * 12, "FFSSSSSSSFSS", "FFRRRRRRRFRR@8"])
def test_tiny_on_real_text(tiny, pattern):
    """Uneven chunks, unequal lengths and decoding match one stock pass."""
    # In the second sequence two keys have scores that are equal but for rounding.
    ids = torch.cat([b.ids for b in tiny.batches("heldout", length=300, sequences=3)])[[0, 2]]
    model, lengths = tiny.module, [211, 290]
    with use_pattern(model, pattern):
        stock = logits(model, ids)
    with accelerate(model), use_pattern(model, pattern):
        assert relative(chunked(model, ids, (130, 130, 40), FastCache(model, 300, 2)), stock) < 1e-5
        cache = FastCache(model, 300, 2)
        got = [prefill(model, ids, cache, chunk=190, lengths=lengths)]
        decoder = Decoder(model, cache)
        got += [
            decoder.step(torch.stack([ids[b, n + i] for b, n in enumerate(lengths)]))
            for i in range(8)
        ]
    for b, n in enumerate(lengths):
        assert relative(torch.stack(got)[:, b], stock[b, n - 1 : n + 8]) < 1e-5


def test_fp8_on_tiny(tiny):
    """The fp8 indexer costs little overlap and held-out loss; pytest -s prints both."""
    from indexcache.models.lm import hidden_states, token_losses

    ids = torch.cat([b.ids for b in tiny.batches("heldout", length=384, sequences=4)])
    k = tiny.topk
    selections, losses = [], []
    for index_dtype in ("auto", "fp8"):
        with (
            accelerate(tiny.module, index_dtype=index_dtype),
            use_pattern(tiny.module, "F" * 12, capture=True) as seam,
        ):
            losses.append(token_losses(tiny.module, hidden_states(tiny.module, ids), ids))
            selections.append(dict(seam.selections))
    overlaps = []
    for i in range(12):
        a, b = (s[i][:, k:].long() for s in selections)
        one, two = (
            torch.zeros(*x.shape[:2], 384, dtype=torch.bool).scatter_(-1, x, True) for x in (a, b)
        )
        overlaps.append(float((one & two).sum(-1).float().mean() / k))
    difference = (losses[1] - losses[0]).mean(-1)
    error = float(difference.std() / len(difference) ** 0.5)
    print(
        f"\nfp8 indexer on tiny: overlap {sum(overlaps) / 12:.4f} "
        f"(worst layer {min(overlaps):.4f}), loss {float(difference.mean()):+.5f} "
        f"+- {1.96 * error:.5f} nats"
    )
    assert min(overlaps) > 0.94
    assert abs(float(difference.mean())) < 0.005


# Prefill.


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_prefill_gives_the_last_logits(fast, ids, chunk):
    with use_pattern(fast, "FSFRSS@2"):
        one_pass = logits(fast, ids)
        for cache in (FastCache(fast, 96, 2), FastCache(fast, batch=2), _plain(fast)):
            first = prefill(fast, ids[:, :61], cache, chunk=chunk)
            second = prefill(fast, ids[:, 61:], cache, chunk=chunk)
            assert relative(first, one_pass[:, 60]) < 1e-5
            assert relative(second, one_pass[:, -1]) < 1e-5


def test_prefill_of_unequal_lengths(fast, ids):
    garbage = ids.clone()
    garbage[0, 50:] = -100
    for chunk in (9, 1000):
        cache = FastCache(fast, 96, 2)
        got = prefill(fast, garbage, cache, chunk=chunk, lengths=[50, 83])
        assert cache.lengths == [50, 83]
        for b, n in enumerate(cache.lengths):
            assert relative(got[b], logits(fast, ids[b : b + 1, :n])[0, -1]) < 1e-5
        refused(
            lambda cache=cache: prefill(fast, ids[:, :1], cache), "different lengths", "Decoder"
        )


def test_rows_of_unequal_lengths_move_with_their_lengths(fast, ids):
    cache = FastCache(fast, 96, 2)
    prefill(fast, ids, cache, lengths=[50, 83])
    cache.batch_repeat_interleave(2)
    assert cache.lengths == [50, 50, 83, 83]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.lengths == [83, 50]
    got = Decoder(fast, cache).step(ids[[1, 0], [83, 50]])
    for row, (b, n) in zip(got, [(1, 84), (0, 51)], strict=True):
        assert relative(row, logits(fast, ids[b : b + 1, :n])[0, -1]) < 1e-5


def test_prefill_shows_progress(fast, ids, capsys):
    prefill(fast, ids, FastCache(fast, 96, 2), chunk=50, progress=True)
    assert "192/192" in capsys.readouterr().err


# Refusals.


def test_refusals(model, ids):
    refused(lambda: FastCache(model, 96), "accelerate(model)")
    refused(lambda: accelerate(model, index_dtype="int4"), "index_dtype", "int4")
    with accelerate(model):
        for bad in ((0, 1), (96, 0)):
            refused(lambda bad=bad: FastCache(model, *bad), "at least 1")
        cache = FastCache(model, 60, 2)
        refused(lambda: logits(model, ids, past_key_values=cache), "60 tokens", "96 are needed")
        refused(lambda: prefill(model, ids, cache), "60 tokens", "96 are needed")
        refused(lambda: logits(model, ids[:1, :9], past_key_values=cache), "batch of 2", "got 1")
        assert cache.lengths == [0, 0]
        refused(lambda: prefill(model, ids[0], cache), "[batch, tokens]")
        refused(lambda: prefill(model, ids, cache, chunk=0), "at least one token")
        for lengths in ([5], [0, 5], [5, 97]):
            refused(
                lambda lengths=lengths: prefill(model, ids, cache, lengths=lengths),
                "lengths must be 2 numbers",
            )
        refused(lambda: prefill(model, ids, _plain(model), lengths=[5, 6]), "FastCache")
        logits(model, ids[:, :50], past_key_values=cache)
        refused(lambda: cache.crop(3), "negative")
    with accelerate(model, index_dtype="fp8"):
        refused(lambda: logits(model, ids[:, 50:51], past_key_values=cache), "index_dtype")


@pytest.mark.parametrize("after", ["FFFFFF", "FSFFSS", "FRRFRR@2", None])
def test_a_cache_is_not_continued_without_its_indexer_keys(fast, ids, after):
    cache = FastCache(fast, 96, 2)
    with use_pattern(fast, "FSSFSS"):
        logits(fast, ids[:, :50], past_key_values=cache)

    def go_on():
        if after is None:  # The context was left, so the model runs without a pattern.
            return logits(fast, ids[:, 50:51], past_key_values=cache)
        with use_pattern(fast, after):
            return logits(fast, ids[:, 50:51], past_key_values=cache)

    refused(go_on, "runs its indexer now", "start a new cache")
    assert [layer.length for layer in cache.layers] == [50] * 6
    with use_pattern(fast, "FSSFSS"):
        got = logits(fast, ids[:, 50:60], past_key_values=cache)
        assert relative(got, logits(fast, ids[:, :60])[:, 50:]) < 1e-5


def by_place(model, ids, cache):
    return model.model(ids, None, None, cache)


def by_name(name):
    return lambda model, ids, cache: model.model(input_ids=ids, **{name: cache})


@pytest.mark.parametrize("name", [None, "past_key_values", "cache"])
def test_a_cache_may_come_by_any_name(model, ids, name):
    """Transformers renamed `past_key_values` to `cache` in 5.24; the fast path takes both."""
    give = by_name(name) if name else by_place
    stock = name != "cache" or "cache" in inspect.signature(type(model.model).forward).parameters
    with torch.no_grad():
        one_pass = model.model(ids[:, :60]).last_hidden_state
        with accelerate(model):
            cache = FastCache(model, 96, 2)
            got = torch.cat(
                [
                    give(model, split, cache).last_hidden_state
                    for split in (ids[:, :50], ids[:, 50:60])
                ],
                1,
            )
            assert relative(got, one_pass) < 1e-5
            assert [layer.length for layer in cache.layers] == [60] * 6
            with use_pattern(model, "FSSFSS"):
                give(model, ids[:, 60:61], cache)
            refused(lambda: give(model, ids[:, 61:62], cache), "runs its indexer now")
        if stock:
            cache = DynamicCache(config=model.config)
            with use_pattern(model, "FSSFSS"):
                give(model, ids[:, :50], cache)
                give(model, ids[:, 50:51], cache)
            assert cache.get_seq_length() == 51
            refused(lambda: give(model, ids[:, 51:52], cache), "runs its indexer now")
            with use_pattern(model, "FRRFRR@2"):
                cache = DynamicCache(config=model.config)
                outputs = [
                    give(model, split, cache).last_hidden_state
                    for split in (ids[:, :50], ids[:, 50:60])
                ]
                assert (
                    relative(torch.cat(outputs, 1), model.model(ids[:, :60]).last_hidden_state)
                    < 1e-5
                )


def test_full_to_shared_and_back(fast, ids):
    cache = FastCache(fast, 96, 2)
    logits(fast, ids[:, :50], past_key_values=cache)
    with use_pattern(fast, "FSSFSS"):
        logits(fast, ids[:, 50:51], past_key_values=cache)
    assert cache.pattern == "FSSFSS"
    refused(
        lambda: logits(fast, ids[:, 51:52], past_key_values=cache),
        "runs its indexer now",
        "of 1 cached tokens",
    )


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("path", [accelerate, nullcontext])
def test_a_copy_of_a_cache_remembers_its_missing_keys(model, ids, path, kind):
    """A prompt's cache is copied for each continuation, or kept on disk."""
    size = {"max_cache_len": 96} if kind is StaticCache else {}
    cache = kind(config=model.config, **size)
    with path(model):
        with use_pattern(model, "FSSFSS"):
            logits(model, ids[:, :50], past_key_values=cache)
            stock = copy.deepcopy(cache)
            got = logits(model, ids[:, 50:60], past_key_values=stock)
            assert relative(got, logits(model, ids[:, :60])[:, 50:]) < 1e-5
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.copy(cache)):
            refused(
                lambda other=other: logits(model, ids[:, 50:60], past_key_values=other),
                "runs its indexer now",
                "start a new cache",
            )
        cache.reset()
        if cache.get_seq_length() == 0:  # In transformers 5.17 a DynamicCache keeps its length.
            got = logits(model, ids[:, :60], past_key_values=cache)
            assert relative(got, logits(model, ids[:, :60])) < 1e-5


def test_copies_of_a_fast_cache(fast, ids):
    cache = FastCache(fast, 96, 2)
    logits(fast, ids[:, :50], past_key_values=cache)
    own = copy.deepcopy(cache)
    expected = logits(fast, ids[:, 50:60], past_key_values=cache)
    assert torch.equal(logits(fast, ids[:, 50:60], past_key_values=own), expected)
    refused(lambda: pickle.dumps(cache), "FastCache", "cannot be pickled")


def test_a_cache_outlives_inference_mode(fast, ids):
    cache = FastCache(fast, 96, 2)
    with torch.inference_mode():
        first = prefill(fast, ids[:, :50], cache)
        decoder = Decoder(fast, cache)
    got = decoder.step(first.argmax(-1))
    text = torch.cat([ids[:, :50], first.argmax(-1)[:, None]], 1)
    assert relative(got, logits(fast, text)[:, -1]) < 1e-5


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17"),
    reason="transformers 5.17 cannot crop the cache of such an assistant, with stock models too",
)
def test_early_exit_as_assistant(model, ids):
    """Generation lowers the number of layers in the config, also for caches, for a while."""
    request = {"max_new_tokens": 4, "do_sample": False, "assistant_early_exit": 2}
    model = copy.deepcopy(model)  # A request that fails leaves its config changed.
    with use_pattern(model, "FSSFSS"):
        expected = model.generate(ids[:1, :20], **request)
    with accelerate(model), use_pattern(model, "FSSFSS"):
        assert torch.equal(model.generate(ids[:1, :20], **request), expected)
    assert model.config.num_hidden_layers == 6
