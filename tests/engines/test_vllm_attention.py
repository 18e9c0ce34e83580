"""Check the attention backend over stand-ins of vLLM's classes, in Triton's interpreter."""

import importlib
import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip(
        "these tests interpret the kernels; tests/ops runs them on a GPU", allow_module_level=True
    )
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops
from indexcache.engines.vllm import plugin, rotating, selecting
from indexcache.ops import pages, tuning
from tests.stand_ins import install_modules

PAGE, STRIDE, VALUE, ROPE, HEADS, K = 32, 64, 32, 16, 5, 16
FOLDER = "vllm.v1.attention.backends.mla"


class Backend:
    """Stand in for FlashAttnMLASparseBackend."""

    refusal = None

    @classmethod
    def supports_combination(cls, *arguments):
        return cls.refusal


class Impl:
    """Stand in for FlashAttnMLASparseImpl, which attends with FA3."""

    def __init__(self, buffer, heads=HEADS):
        self.topk_indices_buffer, self.num_heads = buffer, heads
        self.scale, self.kv_lora_rank = 0.2, VALUE

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        return "FA3", None

    def _forward_mqa_kernel(self, q, kv_cache, topk_indices, valid_counts, **named):
        return "FA3", None


def row_view(cache, block_size):
    rows = cache.stride(0) // cache.shape[-1]
    count = (len(cache) - 1) * rows + block_size
    return cache.as_strided((count, cache.shape[-1]), (cache.shape[-1], 1)), rows


@pytest.fixture
def attention(monkeypatch):
    """Import the backend over the stand-ins, with kernels in the interpreter."""
    installed = []
    config = SimpleNamespace(attention_config=SimpleNamespace(hisparse_config=None))
    parts = {
        f"{FOLDER}.flashattn_mla_sparse": {
            "FlashAttnMLASparseBackend": Backend,
            "FlashAttnMLASparseImpl": Impl,
        },
        f"{FOLDER}.sparse_utils": {"flat_kv_row_view": row_view},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: config},
    }
    names = {".".join(name.split(".")[:i]) for name in parts for i in range(1, 9)}
    install_modules(monkeypatch, {name: parts.get(name, {}) for name in sorted(names)})
    monkeypatch.delitem(sys.modules, "indexcache.engines.vllm.attention", raising=False)
    monkeypatch.setattr(ops, "query_group", lambda ids, heads: 3 if heads <= 32 else 1)
    monkeypatch.setattr(pages, "SLICE", 4)
    monkeypatch.setattr(selecting, "install", lambda: installed.append("selecting"))
    monkeypatch.setattr(rotating, "install", lambda: installed.append("rotating"))
    module = importlib.import_module("indexcache.engines.vllm.attention")
    module.config, module.installed = config, installed
    with ops.tuned(backend="triton", mla={"keys": 16}):
        yield module
    sys.modules.pop("indexcache.engines.vllm.attention", None)


class Step:
    """A step of three requests: a decoding one, a whole prompt, and a later chunk of a prompt."""

    def __init__(self, queries=(1, 3, 2), contexts=(50, 3, 70), decodes=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens, width = sum(queries), 3
        self.buffer = torch.full((self.tokens + 2, K), -1, dtype=torch.int32)
        requests = [r for r, n in enumerate(queries) for _ in range(n)]
        blocks = torch.randperm(len(queries) * width, generator=generator)
        self.metadata = SimpleNamespace(
            num_decode_tokens=decodes,
            req_id_per_token=torch.tensor([*requests, 7], dtype=torch.int32),
            block_table=blocks.view(len(queries), width).int(),
            block_size=PAGE,
            max_seq_len=max(contexts),
        )
        self.seen = [
            c - n + s + 1 for n, c in zip(queries, contexts, strict=True) for s in range(n)
        ]
        self.generator = generator
        self.select()

    def select(self):
        """Write new ids, as an F layer's indexer does."""
        for s, seen in enumerate(self.seen):
            ids = torch.randperm(seen, generator=self.generator)[:K].int()
            self.buffer[s] = -1
            self.buffer[s, K - len(ids) :] = ids

    def cache(self):
        """Make the cache of a layer, between whose blocks those of another layer lie."""
        memory = torch.randn(9, STRIDE, VALUE + ROPE, generator=self.generator).half()
        memory[:, PAGE:] = torch.nan
        return memory[:, :PAGE]

    def queries(self, heads=HEADS):
        absorbed = torch.randn(heads, self.tokens, VALUE, generator=self.generator).half()
        rotary = torch.randn(self.tokens, heads, ROPE, generator=self.generator).half()
        return absorbed.transpose(0, 1), rotary  # as vLLM's product leaves it

    def slots(self):
        """Return ids as vLLM looks them up in decoding: rows of the cache."""
        return torch.tensor(
            [
                [
                    int(self.metadata.block_table[r, i // PAGE]) * STRIDE + i % PAGE
                    if i >= 0
                    else i
                    for i in row
                ]
                for row, r in zip(
                    self.buffer.tolist(), self.metadata.req_id_per_token, strict=False
                )
                if r < len(self.metadata.block_table)
            ],
            dtype=torch.int32,
        )

    def expected(self, q, cache):
        """Attend from each query by itself."""
        rows, _ = row_view(cache, PAGE)
        out = []
        for s, slots in enumerate(self.slots().tolist()):
            latent = rows[[i for i in slots if i >= 0]].float()
            logits = 0.2 * torch.cat([q[0][s], q[1][s]], -1).float() @ latent.T
            out.append(logits.softmax(-1) @ latent[:, :VALUE])
        return torch.stack(out)


FULL = SimpleNamespace(indexer=object(), skip_topk=False)
SHARED = SimpleNamespace(indexer=None, skip_topk=False)
FLIPPED = SimpleNamespace(indexer=object(), skip_topk=True)


def close(got, want):
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


def test_layers_share_the_plan_of_their_full_layer(attention, monkeypatch):
    plans = []
    make = ops.group_pages
    monkeypatch.setattr(
        ops, "group_pages", lambda *a, **k: plans.append(make(*a, **k)) or plans[-1]
    )
    step = Step()
    made = []
    for layer in (FULL, SHARED, FLIPPED, FULL):
        if layer is FULL:
            step.select()
        q, cache = step.queries(), step.cache()
        impl = attention.IndexCacheImpl(step.buffer)
        out, lse = impl.forward_mqa(q, cache, step.metadata, layer)
        assert lse is None and out.shape == (step.tokens, HEADS, VALUE)
        close(out, step.expected(q, cache))
        made.append(len(plans))
    assert made == [1, 1, 1, 2]


def test_a_plan_serves_its_own_step_only(attention):
    """A layer makes its own where another step, or another number of queries, made the last."""
    first = Step()
    impl = attention.IndexCacheImpl(first.buffer)
    impl.forward_mqa(first.queries(), first.cache(), first.metadata, FULL)
    later = Step(seed=1)
    later.buffer = first.buffer
    later.select()
    q, cache = later.queries(), later.cache()
    close(impl.forward_mqa(q, cache, later.metadata, SHARED)[0], later.expected(q, cache))
    fewer = tuple(x[:5] for x in q)
    got = impl.forward_mqa(fewer, cache, later.metadata, SHARED)[0]
    close(got, later.expected(q, cache)[:5])


def test_flash_attention_keeps_the_rest(attention):
    step = Step()
    impl = attention.IndexCacheImpl(step.buffer)
    q, cache = step.queries(), step.cache()
    packed = torch.cat(q, -1)
    assert impl.forward_mqa(packed, cache, step.metadata, FULL) == ("FA3", None)
    step.metadata.num_decode_tokens = step.tokens
    assert impl.forward_mqa(q, cache, step.metadata, FULL) == ("FA3", None)
    many = attention.IndexCacheImpl(step.buffer, heads=64)
    step.metadata.num_decode_tokens = 0
    assert many.forward_mqa(q, cache, step.metadata, FULL) == ("FA3", None)


def test_decoding(attention, monkeypatch):
    step = Step((1, 1), (50, 70), 2)
    impl = attention.IndexCacheImpl(step.buffer)
    q, cache = step.queries(), step.cache()
    named = {"layer": FULL, "block_size": PAGE}
    call = (q, cache, step.slots(), torch.tensor([K, K]))
    assert impl._forward_mqa_kernel(*call, **named, is_decode=True) == ("FA3", None)
    monkeypatch.setattr(attention.IndexCacheImpl, "decode_queries", 2)
    close(impl._forward_mqa_kernel(*call, **named, is_decode=True)[0], step.expected(q, cache))
    assert impl._forward_mqa_kernel(*call, **named, is_decode=False) == ("FA3", None)


def test_refusals(attention, monkeypatch):
    cls = attention.IndexCacheBackend
    rest = (torch.bfloat16, "auto", 64, True, False, True, False, None)
    monkeypatch.setattr(tuning, "gluon_refusal", lambda: None)
    assert cls.supports_combination(576, *rest) is None
    assert "512 + 64 dims, this model's have 192" in cls.supports_combination(192, *rest)
    monkeypatch.setattr(Backend, "refusal", "does not support DCP")
    assert cls.supports_combination(576, *rest) == "does not support DCP"
    monkeypatch.setattr(Backend, "refusal", None)
    attention.config.attention_config.hisparse_config = object()
    assert "HiSparse cannot be on" in cls.supports_combination(576, *rest)
    monkeypatch.setattr(tuning, "gluon_refusal", lambda: "of triton 9")
    assert "because of triton 9" in cls.supports_combination(576, *rest)
    assert cls.supported_dtypes == [torch.bfloat16]
    assert cls.supported_kv_cache_dtypes == ["auto", "bfloat16"]  # fp8 caches are refused
    assert not cls.get_impl_cls().supports_pcp


def test_an_older_vllm_is_named(attention, monkeypatch):
    del sys.modules["indexcache.engines.vllm.attention"]
    monkeypatch.delattr(sys.modules[f"{FOLDER}.sparse_utils"], "flat_kv_row_view")
    with pytest.raises(ImportError, match=r"of vLLM 0.32 and 0.33, which this vLLM lacks"):
        importlib.import_module("indexcache.engines.vllm.attention")


def test_it_selects_where_that_is_not_turned_off(attention, monkeypatch):
    attention.IndexCacheImpl(torch.zeros(1, K))
    monkeypatch.setattr(attention.IndexCacheImpl, "selects", False)
    attention.IndexCacheImpl(torch.zeros(1, K))
    assert attention.installed == ["selecting", "rotating", "rotating"]


def test_the_plugin_registers_it(attention, caplog):
    paths = {}
    custom = SimpleNamespace(
        is_overridden=lambda: "CUSTOM" in paths, get_path=lambda: paths["CUSTOM"]
    )
    module = SimpleNamespace(
        AttentionBackendEnum=SimpleNamespace(CUSTOM=custom),
        register_backend=lambda backend, path: paths.update({"CUSTOM": path}),
    )
    plugin._register_attention(module)
    plugin._register_attention(module)
    folder, name = paths["CUSTOM"].rsplit(".", 1)
    assert getattr(importlib.import_module(folder), name).get_name() == "CUSTOM"
    paths["CUSTOM"] = "other.Backend"
    with caplog.at_level(logging.WARNING, "vllm.indexcache"):
        plugin._register_attention(module)
    assert paths["CUSTOM"] == "other.Backend" and "cannot be chosen" in caplog.text
    plugin._register_attention(SimpleNamespace())  # an older vLLM has no such place
