"""Test that the Decoder equals one pass, never waits for the device, and is timed by part."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from indexcache import ops, use_pattern
from indexcache.models.family import indexers
from indexcache.models.fast import accelerate as fast_path
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder, on_host, sample
from indexcache.models.fast.prefill import prefill
from indexcache.models.timing import PartTimer, timed
from tests.support import FAMILIES, PATTERNS, SHAPE, logits, make_model, refused, relative

LENGTHS = [41, 57]


@pytest.fixture
def fast(model):
    with accelerate(model):
        yield model


def ready(model, ids, lengths=LENGTHS, capacity=96):
    """Return (decoder, logits) after a prefill of rows of these lengths."""
    cache = FastCache(model, capacity, len(lengths))
    first = prefill(model, ids, cache, chunk=30, lengths=lengths)
    return Decoder(model, cache), first


def complete_passes(model, prompt, count):
    """Return (tokens, logits before each), from a pass over everything for each token."""
    tokens, seen = [], []
    for _ in range(count):
        seen.append(logits(model, prompt)[:, -1])
        tokens.append(seen[-1].argmax(-1))
        prompt = torch.cat([prompt, tokens[-1][:, None]], 1)
    return torch.stack(tokens, 1), torch.stack(seen, 1)


@pytest.mark.parametrize("pattern", ["FFFFFF", *PATTERNS])
def test_steps_equal_complete_passes(fast, ids, pattern):
    """Sequences of unequal length, stepped together, give what each gives alone."""
    with use_pattern(fast, pattern):
        decoder, first = ready(fast, ids)
        seen, tokens = [first], []
        for _ in range(6):
            tokens.append(sample(seen[-1]))
            seen.append(decoder.step(tokens[-1]))
        assert decoder.cache.lengths == [n + 6 for n in LENGTHS]
        for b, n in enumerate(LENGTHS):
            expected, exact = complete_passes(fast, ids[b : b + 1, :n], 6)
            assert torch.equal(torch.stack(tokens, 1)[b], expected[0])
            assert relative(torch.stack(seen[:6], 1)[b], exact[0]) < 1e-5
        again, start = ready(fast, ids)
        assert torch.equal(again.generate(start, 6), torch.stack(tokens, 1))


def test_generate_equals_transformers(fast, ids):
    with use_pattern(fast, "FSFRSS@2"):
        decoder, first = ready(fast, ids, [40, 40])
        mask = torch.ones_like(ids[:, :40])
        stock = fast.generate(
            ids[:, :40],
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert torch.equal(decoder.generate(first, 8), stock[:, 40:])


@pytest.mark.parametrize("index_dtype", ["bf16", "fp8"])
def test_narrow_indexer_keys(model, ids, index_dtype):
    with accelerate(model, index_dtype=index_dtype), use_pattern(model, "FSFRSS@2"):
        decoder, first = ready(model, ids)
        tokens = decoder.generate(first, 5)
        for b, n in enumerate(LENGTHS):
            assert torch.equal(tokens[b], complete_passes(model, ids[b : b + 1, :n], 5)[0][0])


def test_sampling(fast, ids):
    decoder, first = ready(fast, ids)
    cold = decoder.generate(first, 5, temperature=1e-4)
    again, first = ready(fast, ids)
    assert torch.equal(cold, again.generate(first, 5))  # A cold draw is greedy.
    runs = []
    for seed in (1, 1, 2):
        decoder, first = ready(fast, ids)
        runs.append(decoder.generate(first, 8, temperature=5.0, seed=seed))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    drawn = sample(
        torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3), 0.5, torch.Generator().manual_seed(0)
    )
    expected = torch.tensor([0.0, 2.0, -2.0]).softmax(-1)
    assert (torch.bincount(drawn, minlength=3) / 20000 - expected).abs().max() < 0.02


class NoHostReads(TorchFunctionMode):
    """Refuse operations that bring a value to the host, except inside this package's operations."""

    NAMES = (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
        "unique",
        "masked_select",
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            raise AssertionError(f"{func.__name__} reads device memory on the host")
        return func(*args, **(kwargs or {}))


class NoDataDependence(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            name in str(func)
            for name in (
                "_local_scalar_dense",
                "nonzero",
                "unique",
                "masked_select",
                "aten.equal",
                "is_nonzero",
            )
        ):
            raise AssertionError(f"{func} reads device memory on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("index_dtype", ["auto", "fp8"])
def test_a_step_reads_nothing_on_the_host(model, ids, index_dtype, monkeypatch):
    """A CUDA graph needs steps that read nothing back; this checks it without a GPU.

    The definitions run in place of the kernels of ops/, and they may read.
    """
    for name in ("index_topk", "sparse_mla", "quantize_index_keys", "quantize_index_queries"):

        def opaque(*args, _call=getattr(ops, name), **kwargs):
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return _call(*args, **kwargs)

        monkeypatch.setattr(ops, name, opaque)
    monkeypatch.setattr(fast_path, "on_gpu", lambda _: True)
    model.set_experts_implementation("eager")
    try:
        with accelerate(model, index_dtype=index_dtype), use_pattern(model, "FSFRSS@2"):
            decoder, first = ready(model, ids)
            token = sample(first)
            with NoHostReads(), NoDataDependence():
                for _ in range(3):
                    token = sample(decoder.step(token), 1.0)
            with pytest.raises(AssertionError, match="reads"), NoHostReads(), NoDataDependence():
                token.tolist()
        assert model.config._experts_implementation == "eager"
        with accelerate(model), pytest.raises(AssertionError, match="reads"):
            # Stock loops over experts, which the grouped products replace.
            model.set_experts_implementation("eager")
            with NoHostReads(), NoDataDependence():
                model.model.layers[5].mlp(torch.zeros(1, 1, SHAPE["hidden_size"]))
    finally:
        model.set_experts_implementation("grouped_mm")


def test_the_cache_may_change_between_steps(fast, ids):
    decoder, first = ready(fast, ids, [41, 41])
    decoder.step(sample(first))
    decoder.cache.crop(-1)
    logits(fast, ids[:, 41:45], past_key_values=decoder.cache)
    got = decoder.step(ids[:, 45])
    assert relative(got, logits(fast, ids[:, :46])[:, -1]) < 1e-5


def test_the_pattern_may_change_where_the_cache_allows_it(fast, ids):
    with use_pattern(fast, "FFSFSS"):
        decoder, _ = ready(fast, ids, [41, 41])
    with use_pattern(fast, "FSSFSS"):
        before = logits(fast, ids[:, :41], past_key_values=(check := FastCache(fast, 96, 2)))
        assert torch.isfinite(before).all() and check.pattern == "FSSFSS"
        decoder.step(ids[:, 41])
    with use_pattern(fast, "FFSFSS"):
        refused(
            lambda: decoder.step(ids[:, 42]), "Layer 1 runs its indexer now", "start a new cache"
        )
    refused(lambda: decoder.step(ids[:, 42]), "runs its indexer now")


def test_refusals(model, ids):
    from transformers import DynamicCache

    with accelerate(model):
        refused(
            lambda: Decoder(model, DynamicCache(config=model.config)), "FastCache", "DynamicCache"
        )
        refused(lambda: Decoder(model, FastCache(model)), "fixed size")
        refused(lambda: Decoder(model, FastCache(model, 9)), "empty")
        cache = FastCache(model, 96, 2)
        mask = torch.ones_like(ids[:, :20])
        mask[0, :3] = 0
        logits(model, ids[:, :20], attention_mask=mask, past_key_values=cache)
        refused(lambda: Decoder(model, cache), "begin at position 0")
        decoder, first = ready(model, ids, capacity=58)
        refused(lambda: Decoder(model, decoder.cache, graph=True), "needs a GPU")
        refused(lambda: decoder.step(ids[:1, 0]), "one token for each of 2")
        refused(lambda: decoder.generate(first, 0), "count")
        refused(lambda: next(decoder.stream(first, temperature=-1)), "temperature")
        decoder.step(sample(first))
        refused(lambda: decoder.step(sample(first)), "full", "58")


# The timer of parts.


def test_parts_add_up(fast, ids):
    with use_pattern(fast, "FSFRSS@2"):
        decoder, first = ready(fast, ids)
        with PartTimer() as timer:
            refused(lambda: PartTimer().__enter__(), "open already")
            refused(timer.milliseconds, "after the context")
            decoder.step(sample(first))
        ms = timer.milliseconds()
    assert set(ms) == {
        "indexer",
        "index_topk",
        "linears",
        "attention",
        "mlp",
        "head",
        "rest",
        "total",
    }
    assert all(v > 0 for v in ms.values())
    assert sum(v for k, v in ms.items() if k != "total") == pytest.approx(ms["total"])


def test_parts_cost_nothing_without_a_timer():
    assert timed("a") is timed("b")
    with PartTimer() as timer:
        for _ in range(2):
            with timed("a"):
                time.sleep(0.01)
    assert 20 <= timer.milliseconds()["a"] <= timer.milliseconds()["total"]
    with pytest.raises(RuntimeError), PartTimer():
        raise RuntimeError
    assert timed("a") is timed("b")


# Tests that need a GPU.


def test_tokens_are_read_one_step_behind():
    """The stream is one step ahead of what is read, but does not run past its end."""
    begun = []

    def stream():
        for i in range(4):
            begun.append(i)
            yield torch.tensor([i, 10 * i])

    ahead = []
    for values in on_host(stream()):
        ahead.append((len(begun), values))
    assert ahead == [(1, [0, 0]), (3, [1, 10]), (4, [2, 20]), (4, [3, 30])]
    assert list(on_host(iter(()))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGraph:
    """The captured step equals the eager one, on shapes that the kernels take."""

    CHANGES = {  # noqa: RUF012
        "hidden_size": 256,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "index_topk": 64,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "max_position_embeddings": 4096,
    }

    @pytest.fixture(params=FAMILIES)
    def large(self, request):
        model = make_model(request.param, **self.CHANGES).to("cuda", torch.bfloat16)
        with torch.no_grad():  # The weights get a scale that bf16 resolves.
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(0.3)
        return model

    @pytest.mark.parametrize(
        ("index_dtype", "compile"), [("auto", False), ("fp8", False), ("fp8", True)]
    )
    @pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS", "FSFRSS@2"])
    def test_replay_equals_eager(self, large, pattern, index_dtype, compile):
        ids = torch.randint(0, SHAPE["vocab_size"], (2, 900), device="cuda")
        lengths = [900, 613]
        with (
            accelerate(large, index_dtype=index_dtype, compile=compile),
            use_pattern(large, pattern),
        ):
            runs = []
            for graph in (False, True):
                cache = FastCache(large, 1024, 2)
                first = prefill(large, ids, cache, chunk=500, lengths=lengths)
                decoder = Decoder(large, cache, graph=graph)
                tokens = ids[:, :20].T  # Both runs decode these tokens.
                runs.append(torch.stack([first, *(decoder.step(t).clone() for t in tokens)]))
            assert relative(runs[1].float(), runs[0].float()) < 1e-3
            with torch.no_grad():  # Both agree with one pass over everything.
                for b, n in enumerate(lengths):
                    text = torch.cat([ids[b, :n], ids[b, :20]])[None]
                    one_pass = large(text).logits[0, n - 1 :]
                    rows = (runs[1][:, b] - one_pass).float().norm(dim=-1) / one_pass.float().norm(
                        dim=-1
                    )
                    assert rows.median() < 0.1

    @pytest.mark.parametrize(("index_dtype", "topk"), [("auto", 64), ("fp8", 64), ("auto", 1024)])
    def test_compiled_step_of_one_sequence(self, large, index_dtype, topk):
        """A compiled step is as near to fp32 as an eager one, whose products round differently.

        Rounding decides which experts a token goes to and, if k is less than the context, which
        tokens are selected.
        """
        ids = torch.randint(0, SHAPE["vocab_size"], (4, 900), device="cuda")

        def steps(model, compiled):
            for indexer in indexers(model):
                indexer.index_topk = topk
            with (
                accelerate(model, index_dtype=index_dtype, compile=compiled),
                use_pattern(model, "FSFRSS@2"),
            ):
                outputs = []
                for text in ids:
                    cache = FastCache(model, 1024, 1)
                    prefill(model, text[None], cache, chunk=500)
                    # No kernel takes an indexer in fp32.
                    decoder = Decoder(model, cache, graph=model.dtype != torch.float32)
                    outputs += [decoder.step(t).clone() for t in text[:15, None]]
                return torch.cat(outputs).float()

        runs = [steps(large, False), steps(large, True), steps(copy.deepcopy(large).float(), False)]
        plain, compiled = (
            (run - runs[2]).norm(dim=-1).median() / runs[2].norm(dim=-1).median()
            for run in runs[:2]
        )
        assert compiled < 1.2 * plain

    def test_tokens_are_read_while_the_next_step_runs(self, large):
        ids = torch.randint(0, SHAPE["vocab_size"], (2, 900), device="cuda")
        with accelerate(large), use_pattern(large, "FSSFSS"):
            caches = [FastCache(large, 1024, 2) for _ in range(2)]
            first = [prefill(large, ids, cache) for cache in caches]
            want = Decoder(large, caches[0]).generate(first[0], 12)
            assert (
                list(on_host(itertools.islice(Decoder(large, caches[1]).stream(first[1]), 12)))
                == want.T.tolist()
            )

    def test_replays_do_not_wait(self, large):
        ids = torch.randint(0, SHAPE["vocab_size"], (1, 900), device="cuda")
        with accelerate(large), use_pattern(large, "FSSFSS"):
            cache = FastCache(large, 1024, 1)
            first = prefill(large, ids, cache)
            decoder = Decoder(large, cache)
            tokens = decoder.stream(first)
            next(tokens), next(tokens)  # The graph is captured here.
            torch.cuda.set_sync_debug_mode("error")
            try:
                drawn = list(itertools.islice(tokens, 20))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.stack(drawn).shape == (20, 1)

    def test_a_new_pattern_is_captured_anew(self, large):
        ids = torch.randint(0, SHAPE["vocab_size"], (1, 900), device="cuda")
        with accelerate(large):
            cache = FastCache(large, 1024, 1)
            first = prefill(large, ids, cache)
            decoder = Decoder(large, cache)
            decoder.step(sample(first))
            graph = decoder._graph
            with use_pattern(large, "FSSFSS"):
                decoder.step(sample(first))
            assert decoder._graph is not graph
            assert cache.pattern == "FSSFSS"

    def test_adapters_are_captured_anew(self, large):
        """After `set_adapter` and merging, the next step runs the adapter that is now active."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj", "o_proj"])
        ids = torch.randint(0, SHAPE["vocab_size"], (1, 900), device="cuda")
        model = peft.get_peft_model(large, config, "one").eval()
        model.add_adapter("two", config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        changes = [
            lambda: model.set_adapter("one"),
            lambda: model.set_adapter("two"),
            model.base_model.disable_adapter_layers,
            model.base_model.enable_adapter_layers,
            model.merge_adapter,
        ]
        seen = []
        with accelerate(large), use_pattern(large, "FSSFSS"):
            cache = FastCache(large, 1024, 1)
            prefill(large, ids, cache)
            decoders = [Decoder(large, cache, graph=graph) for graph in (True, False)]
            for change in changes:
                change()
                runs = []
                for decoder in decoders:
                    runs.append(decoder.step(ids[:, 3]).float().clone())
                    cache.crop(-1)
                assert relative(*runs) < 1e-3
                seen.append(runs[0])
        for a, b in itertools.pairwise(seen[:4]):
            assert relative(a, b) > 1e-2
        assert relative(seen[4], seen[3]) < 0.1

    @pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
    def test_generation_equals_stock(self, large, more):
        ids = torch.randint(1, SHAPE["vocab_size"], (2, 60), device="cuda")
        large.float()
        greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        want = large.generate(ids, **greedy, **more)
        with accelerate(large):
            assert torch.equal(large.generate(ids, **greedy, **more), want)

    def test_query_groups_and_parts(self, large, monkeypatch):
        made = []
        group = ops.group_queries
        monkeypatch.setattr(ops, "group_queries", lambda ids, n: made.append(n) or group(ids, n))
        ids = torch.randint(0, SHAPE["vocab_size"], (1, 900), device="cuda")
        with accelerate(large), use_pattern(large, "FSSFSS"), PartTimer() as timer:
            prefill(large, ids, FastCache(large, 1024, 1))
        assert made == [3, 3]
        ms = timer.milliseconds()
        assert (
            min(
                ms[k]
                for k in ("indexer", "index_topk", "plan", "attention", "linears", "mlp", "total")
            )
            > 0
        )
