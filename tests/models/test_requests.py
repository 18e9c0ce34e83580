"""Test that passes with masks, documents, caches and odd requests are right or refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from math import cos, sin
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer

from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder
from indexcache.models.fast.selector import FastSelector
from indexcache.models.fast.visible import Visible, visible_of
from indexcache.models.patch import state_of
from indexcache.models.seam import use_pattern
from tests.support import FAMILIES, logits, make_model, refused, relative

SHORT = {"num_hidden_layers": 3, "first_k_dense_replace": 2}
PATTERNS = ["FFF", "FSF", "FRR@2"]
T = 40
PIECES = ((0, 20), (20, 21), (21, T))
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "fast": lambda model: FastCache(model, 64, 2),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param, **SHORT)


@pytest.fixture(scope="module")
def glm():
    return make_model("glm_moe_dsa", **SHORT)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 128, (2, T), generator=torch.Generator().manual_seed(5))


def mask_of(*hidden):
    """Return a mask [len(hidden), T] of ones, with zeros at the positions of each row."""
    mask = torch.ones(len(hidden), T, dtype=torch.long)
    for row, positions in enumerate(hidden):
        mask[row, list(positions)] = 0
    return mask


MASKS = {
    "left": mask_of(range(11), ()),
    "right": mask_of(range(29, T), ()),
    "both": mask_of([*range(5), *range(33, T)], range(5)),
    "holes": mask_of([5, 9, 10, 11], [0, 20, 39]),
    "holes in both rows": mask_of([7, 8], [7, 8]),
}


def positions_of(mask):
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def in_pieces(model, ids, cache, mask=None):
    """Return the logits of a pass in pieces, at the positions that generation gives."""
    parts = []
    with torch.no_grad():
        for a, b in PIECES:
            given = {}
            if mask is not None:
                given = {"attention_mask": mask[:, :b], "position_ids": positions_of(mask)[:, a:b]}
            parts.append(model(ids[:, a:b], past_key_values=cache, **given).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_equal_stock(model, ids, pattern):
    """Also the outputs of padding are stock's, because generation may start from them."""
    with use_pattern(model, pattern):
        stock = {k: in_pieces(model, ids, CACHES["dynamic"](model), m) for k, m in MASKS.items()}
        plain = logits(model, ids)
    with accelerate(model), use_pattern(model, pattern):
        for name, mask in MASKS.items():
            for make in CACHES.values():
                got = in_pieces(model, ids, make(model), mask)
                # A row of stock that sees nothing averages over everything, and nobody reads it.
                seen = mask.cumsum(-1) > 0
                assert relative(got[seen], stock[name][seen]) < 1e-5, name
            assert relative(stock[name][seen], plain[seen]) > 1e-3, name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents(model, ids, pattern):
    cuts = [0, 13, 33, T]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])
    given = {"use_cache": False, "position_ids": positions[None]}
    with use_pattern(model, pattern):
        stock = logits(model, ids, **given)
    dense = torch.ones(T, T, dtype=torch.bool).tril() & (
        torch.arange(T) >= torch.arange(T)[:, None] - positions[:, None]
    )
    with accelerate(model), use_pattern(model, pattern):
        assert relative(logits(model, ids, **given), stock) < 1e-5
        alone = [logits(model, ids[:, a:b], use_cache=False) for a, b in pairwise(cuts)]
        assert relative(torch.cat(alone, 1), stock) < 1e-5
        for mask in (dense, torch.zeros(T, T).masked_fill(~dense, torch.finfo(torch.float32).min)):
            got = logits(model, ids, attention_mask=mask[None, None], **given)
            assert relative(got, stock) < 1e-5
        assert relative(logits(model, ids), stock) > 1e-3


def test_dense_masks(model, ids):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    masks = {
        "causal": causal[None, None],
        "holes": (causal & MASKS["holes"].bool()[:, None])[:, None],
        "window": causal.triu(-9)[None, None],
    }
    stock = {k: logits(model, ids, attention_mask=m) for k, m in masks.items()}
    with accelerate(model):
        for name, mask in masks.items():
            got = logits(model, ids, attention_mask=mask, use_cache=False)
            assert relative(got, stock[name]) < 1e-5, name
            got = logits(model, ids, attention_mask={"indexed_attention": mask})
            assert relative(got, stock[name]) < 1e-5, name


def test_forms_of_masks():
    def of(mask, queries=3, total=3, batch=1):
        return visible_of(mask, queries, total, batch)

    assert of(None).spans is None
    assert of(torch.ones(1, 3)).spans is None
    (span,) = of(torch.tensor([[0, 1, 1]])).spans
    assert (span.queries, span.keys, span.offset) == (slice(1, 3), slice(1, 3), 0)
    spans = of(torch.tensor([[1, 1, 0]])).spans  # Padding sees the tokens before it.
    assert [(s.queries, s.keys, s.offset) for s in spans] == [
        (slice(0, 2), slice(0, 2), 0),
        (slice(2, 3), slice(0, 2), 1),
    ]
    for bad in (
        torch.zeros(1, 3),
        torch.ones(1, 2),
        torch.ones(2, 3),
        torch.ones(3),
        "mask",
        torch.ones(1, 1, 3, 3),  # Summands of 1.
        torch.ones(1, 2, 3, 3, dtype=torch.bool),
        torch.ones(1, 1, 2, 3, dtype=torch.bool),
        torch.ones(1, 1, 3, 3, dtype=torch.bool),  # The future is visible.
        torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1]]).bool()[None, None],
    ):
        refused(lambda bad=bad: of(bad), "mask")


def test_every_cache_continues_what_stock_filled(model, ids):
    """Also the other way round. Where stock caches expanded keys (5.17), both refuse."""
    stock = logits(model, ids)
    logits(model, ids, past_key_values=(cache := CACHES["dynamic"](model)))
    latents = cache.layers[0].keys.shape[1] == 1
    for name, make in CACHES.items():
        for fast in ((True, False, True), (False, True, False)):
            handle = accelerate(model)
            cache = make(model)
            handle.undo()

            def run(cache=cache, fast=fast):
                parts = []
                for (a, b), accelerated in zip(PIECES, fast, strict=True):
                    with accelerate(model) if accelerated else nullcontext():
                        parts.append(logits(model, ids[:, a:b], past_key_values=cache))
                return torch.cat(parts, 1)

            if latents:
                assert relative(run(), stock) < 1e-5, (name, fast)
            elif name == "fast" or fast[1]:
                refused(run)


def test_caches_that_are_changed_between_passes(glm, ids):
    stock = logits(glm, ids)
    with accelerate(glm):
        for name, make in CACHES.items():
            if name == "static" and not hasattr(StaticLayer, "crop"):
                continue  # Transformers 5.17.
            logits(glm, ids[:, :30], past_key_values=(cache := make(glm)))
            cache.crop(-10)
            got = logits(glm, ids[:, 20:], past_key_values=cache)
            assert relative(got, stock[:, 20:]) < 1e-5, name
            if name == "static":
                continue  # Transformers gives it none of the methods below.
            logits(glm, ids[:, :30], past_key_values=(cache := make(glm)))
            cache.batch_select_indices(torch.tensor([1]))
            cache.batch_repeat_interleave(3)
            cache.reorder_cache(torch.tensor([2, 0]))
            if name == "fast":
                cache.layers[0].batch_size = 2
                for layer in cache.layers:
                    layer.batch_size = 2
            got = logits(glm, ids[1:, 30:].expand(2, -1), past_key_values=cache)
            assert relative(got, stock[1:, 30:].expand(2, -1, -1)) < 1e-5, name


def test_caches_that_are_refused(glm, ids):
    other = make_model("glm_moe_dsa", seed=1, **SHORT)
    wide = make_model("glm_moe_dsa", **SHORT, kv_lora_rank=24)
    half = make_model("glm_moe_dsa", **SHORT)
    small = StaticCache(config=glm.config, max_cache_len=T - 1)
    with accelerate(glm), accelerate(other), accelerate(wide), accelerate(half):
        filled = {name: make(glm) for name, make in CACHES.items()}
        for cache in filled.values():
            logits(glm, ids[:, :20], past_key_values=cache)

        def run(cache, model=glm, rows=2):
            return lambda: logits(model, ids[:rows, 20:], past_key_values=cache)

        for cache in (
            DynamicCache(),
            EncoderDecoderCache(DynamicCache(config=glm.config), DynamicCache(config=glm.config)),
            ((ids, ids),),
            SimpleNamespace(get_seq_length=lambda: 0),
        ):
            refused(run(cache), "config=model.config", type(cache).__name__)
        refused(lambda: logits(glm, ids, past_key_values=small), "full", str(T - 1))
        refused(run(filled["fast"], other), "another model")
        refused(run(filled["dynamic"], wide), "16", "24")
        refused(run(filled["static"], wide), "16", "24")
        for name, make in CACHES.items():
            refused(run(filled[name], rows=1), "2", "1")
            logits(half, ids[:, :20], past_key_values=(cache := make(half)))
            half.to(torch.bfloat16)
            refused(run(cache, half), "float32", "bfloat16")
            half.to(torch.float32)
            if name != "static":
                cache.layers[0].crop(-1)  # As after a pass that failed in a later layer.
                refused(run(cache, half), "halfway")


def test_a_decoder_refuses_a_cache_with_padding(glm, ids):
    with accelerate(glm):
        for name, mask in MASKS.items():
            logits(glm, ids, attention_mask=mask, past_key_values=(cache := FastCache(glm, 64, 2)))
            refused(lambda cache=cache: Decoder(glm, cache), "padding"), name


def test_documents_that_nobody_keeps_apart_are_refused(glm, ids):
    positions = torch.cat([torch.arange(13), torch.arange(T - 13)])[None]
    ones = torch.ones_like(ids)
    with accelerate(glm):
        refused(lambda: logits(glm, ids, position_ids=positions), "use_cache=False")
        refused(
            lambda: logits(glm, ids, position_ids=positions, attention_mask=ones, use_cache=False),
            "mask",
        )
        cuts = torch.tensor([0, 13, T])
        refused(lambda: logits(glm, ids, cu_seq_lens_q=cuts, use_cache=False), "cu_seq_lens_q")
        far = torch.arange(T)[None] + 100  # These are one document.
        assert logits(glm, ids, position_ids=far).isfinite().all()


def test_requests_that_are_refused(glm, ids):
    embeds = glm.get_input_embeddings()(ids).detach()
    with accelerate(glm):
        refused(lambda: logits(glm, ids, output_attentions=True), "output_attentions")
        refused(lambda: torch.export.export(glm, (ids,)), "torch.export")
        for parameter in glm.parameters():
            parameter.requires_grad_(False)
        glm(inputs_embeds=embeds)
        refused(lambda: glm(inputs_embeds=embeds.clone().requires_grad_(True)), "no_grad")
        glm.requires_grad_(True)
        refused(lambda: glm(ids), "no_grad")
        with torch.no_grad():
            whole = torch.compile(glm, backend="eager", fullgraph=True)
            with pytest.raises(RuntimeError, match="fast path cannot be traced"):
                whole(ids)
            torch._dynamo.reset()
            got = torch.compile(glm, backend="eager")(ids).logits
        torch._dynamo.reset()
    assert relative(got, logits(glm, ids)) < 1e-5


def test_outputs_beside_logits(model, ids):
    asked = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        stock = model(ids, **asked)
        with accelerate(model):
            fast = model(ids, **asked)
    assert fast.keys() == stock.keys()
    for name, length in (("hidden_states", 4), ("router_logits", 1)):
        if name not in stock:
            continue  # Transformers 5.17 has no logits of routers.
        assert len(fast[name]) == len(stock[name]) == length
        for a, b in zip(fast[name], stock[name], strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_near_to_fp32_as_stock_is(dtype, ids):
    """Without experts and with all keys selected, because choices flip by rounding."""
    for family in FAMILIES:
        model = make_model(family, **(SHORT | {"first_k_dense_replace": 3, "index_topk": T}))
        exact = logits(model, ids)
        with torch.autocast("cpu", dtype=dtype):
            stock = logits(model, ids)
            with accelerate(model):
                fast = logits(model, ids)
                logits(model, ids, past_key_values=FastCache(model, T, 2))
        assert relative(fast.float(), exact) < 1.1 * relative(stock.float(), exact)


def test_layers_on_two_devices_have_rotary_embeddings_of_their_own(glm):
    """A pass remembers cos and sin for the quantised indexer, and of what they were made."""
    selector = FastSelector(glm, "fp8")
    indexer = indexers(glm)[0]
    call = SimpleNamespace(mask=Visible(), indexer=indexer)
    for angle in (0.0, 1.0, 2.0):
        rope = tuple(torch.full((1, 3, indexer.qk_rope_head_dim), f(angle)) for f in (cos, sin))
        for _ in range(2):
            got = selector._quantiser_rope(SimpleNamespace(**call.__dict__, rope=rope))
            assert [float(x.mean()) for x in got] == pytest.approx([cos(angle), sin(angle)])


GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_generation_from_padded_prompts_equals_stock(model, ids):
    inside, right, left = ids.clone(), ids.clone(), ids.clone()
    inside[0, 7] = inside[1, 30] = right[1, 29:] = left[1, :11] = 0
    ones = torch.ones_like(ids)
    runs = [
        {"inputs": prompt, **mask}
        for prompt in (inside, right, left)
        for mask in ({}, {"attention_mask": ones}, {"attention_mask": prompt.ne(0).long()})
    ]
    more = [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 16},
        {"cache": "fast"},
    ]
    runs += [{"inputs": right, **x} for x in more] + [{"inputs": inside, **x} for x in more]
    runs += [{"inputs": ids[:1], "prompt_lookup_num_tokens": 3}]

    def run(given):
        given = dict(given)
        if given.pop("cache", None) and state_of(model).accelerated:
            given["past_key_values"] = FastCache(model, None, 2)
        return model.generate(**given, **GREEDY)

    stock = [run(given) for given in runs]
    with accelerate(model):
        for given, expected in zip(runs, stock, strict=True):
            assert torch.equal(run(given), expected), given.keys()


def test_a_prompt_continues_the_cache_of_the_last(glm, ids):
    """Two turns of a conversation in one cache."""
    with accelerate(glm):
        for make in CACHES.values():
            cache = make(glm)
            first = glm.generate(ids, past_key_values=cache, **GREEDY)
            prompt = torch.cat([first, ids[:, :9]], 1)
            again = glm.generate(prompt, past_key_values=cache, **GREEDY)
            assert torch.equal(again, glm.generate(prompt, **GREEDY))


@pytest.mark.parametrize("index_dtype", ["auto", "fp8"])
def test_eight_threads_on_one_model(glm, index_dtype):
    texts = [
        torch.randint(1, 128, (1, 30 + i), generator=torch.Generator().manual_seed(i))
        for i in range(8)
    ]

    def run(text):
        cache = FastCache(glm, 64)
        return torch.cat(
            [logits(glm, x, past_key_values=cache) for x in (text[:, :20], text[:, 20:])], 1
        )

    with accelerate(glm, index_dtype=index_dtype):
        alone = [run(text) for text in texts]
        with ThreadPoolExecutor(8) as pool:
            for got, expected in zip(pool.map(run, texts * 3), alone * 3, strict=True):
                assert torch.equal(got, expected)
