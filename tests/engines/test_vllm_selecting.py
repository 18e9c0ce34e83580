"""Check the selection before vLLM's `sparse_attn_indexer`, over a stand-in of it."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from indexcache.engines.vllm import selecting
from tests.stand_ins import install_modules

K, HEADS, DIM, PAGE = 8, 2, 16, 4
NAME = "layers.0.self_attn.indexer.k_cache"


@dataclass
class Chunk:
    token_start: int
    token_end: int
    total_seq_lens: int
    block_table: torch.Tensor
    num_reqs: int = 1
    skip_kv_gather: bool = False
    local_cu_seq_lens: torch.Tensor = field(default_factory=lambda: torch.zeros(2))


@dataclass
class Prefill:
    chunks: list
    row_shard_sizes: list | None = None


@dataclass
class Metadata:
    prefill: Prefill | None
    decode: object = "decode"


@pytest.fixture
def vllm(monkeypatch):
    """Stand in for vLLM's modules; return what its function saw and the metadata of the step."""
    seen = SimpleNamespace(chunks=[], steps={}, fails=False)

    def stock(
        hidden_states,
        k_cache_prefix,
        kv_cache,
        q_quant,
        q_scale,
        k,
        weights,
        topk_tokens,
        head_dim,
        topk_indices_buffer,
        skip_k_cache_insert,
        use_pcp=False,
        use_fp4_cache=False,
        dcp_world_size=1,
        candidate_blocks=None,
    ):
        step = seen.steps and seen.steps.get(k_cache_prefix)
        if seen.fails:
            raise RuntimeError("out of memory")
        for chunk in step.prefill.chunks if step and step.prefill else []:
            seen.chunks.append(chunk)
            topk_indices_buffer[chunk.token_start : chunk.token_end] = -5
        return topk_indices_buffer

    def gather(cache, keys, scales, table, lengths):
        pages = cache[table[0].long()].flatten(0, 1)[: len(keys)]
        keys.copy_(pages[:, :DIM].view(torch.float8_e4m3fn))
        scales.copy_(pages[:, DIM:])

    parts = {
        "vllm": {},
        "vllm._custom_ops": {"cp_gather_indexer_k_quant_cache": gather},
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(attn_metadata=seen.steps)
        },
        "vllm.models": {},
        "vllm.models.deepseek_v32": {},
        selecting.USER: {"sparse_attn_indexer": stock},
    }
    install_modules(monkeypatch, parts)
    seen.module = sys.modules[selecting.USER]
    selecting.install()
    selecting.install()  # twice is safe
    return seen


def inputs(tokens, seed=0):
    """Make a cache of 40 pages, the queries of a step, and the buffer of ids."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(40, PAGE, DIM, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(40, PAGE, 1, generator=generator) + 0.5
    cache = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], -1)
    q = torch.randn(tokens, HEADS, DIM, generator=generator).to(torch.float8_e4m3fn)
    w = torch.randn(tokens, HEADS, generator=generator)
    return {
        "kv_cache": cache,
        "q_quant": q,
        "weights": w,
        "topk_indices_buffer": torch.full((tokens + 3, K), -9, dtype=torch.int32),
        "topk_tokens": K,
        "head_dim": DIM,
        "skip_k_cache_insert": True,
    }


def call(vllm, given, **changes):
    return vllm.module.sparse_attn_indexer(None, NAME, q_scale=None, k=None, **(given | changes))


def test_a_step_of_several_requests(vllm, monkeypatch):
    """Long requests are selected here, in all their pieces; short ones and decoding stay."""
    monkeypatch.setattr(selecting, "LEAST_QUERIES", 5)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    table = pages[:36].view(3, 12)
    long, later, brief = table[:1], table[1:2], table[2:]
    step = Metadata(
        Prefill(
            [
                Chunk(2, 6, 45, long),  # one request, of which vLLM scores 4 and 3 queries
                Chunk(6, 9, 45, long, skip_kv_gather=True),
                Chunk(9, 15, 7, brief),  # sees no more than k
                Chunk(15, 25, 60, table, num_reqs=2),
                Chunk(25, 27, 30, brief),  # few queries
                Chunk(27, 33, 20, later),
            ]
        )
    )
    vllm.steps[NAME] = step
    given = inputs(33)
    got = call(vllm, given)
    assert got is given["topk_indices_buffer"] and vllm.steps[NAME] is step
    assert [c.token_start for c in vllm.chunks] == [9, 15, 25]
    assert got[9:27].eq(-5).all() and got[:2].eq(-9).all() and got[33:].eq(-9).all()
    for start, end, length, pages in ((2, 9, 45, long), (27, 33, 20, later)):
        cache = given["kv_cache"][pages[0]].flatten(0, 1)[:length]
        keys = cache[:, :DIM].contiguous().view(torch.float8_e4m3fn)
        scales = cache[:, DIM:].contiguous().view(torch.float32)[:, 0]
        for s in range(start, end):  # the definition, one query at a time
            seen = length - (end - start) + (s - start) + 1
            dots = given["q_quant"][s].float() @ keys[:seen].float().T
            scores = (given["weights"][s][:, None] * dots.relu()).sum(0) * scales[:seen]
            order = (-scores).sort(stable=True).indices[:K]  # of equal scores the lower ids
            want = order.sort().values.tolist()
            assert got[s].tolist() == want + [-1] * (K - len(want))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_fp4_cache": True},
        {"use_pcp": True},
        {"dcp_world_size": 2},
        {"candidate_blocks": torch.zeros(1)},
        {"skip_k_cache_insert": False},
    ],
)
def test_what_stays_with_vllm(vllm, changes, monkeypatch):
    monkeypatch.setattr(selecting, "LEAST_QUERIES", 1)
    vllm.steps[NAME] = Metadata(Prefill([Chunk(0, 4, 30, torch.arange(12)[None])]))
    assert call(vllm, inputs(4), **changes)[:4].eq(-5).all()


def test_steps_without_a_prefill(vllm, monkeypatch):
    monkeypatch.setattr(selecting, "LEAST_QUERIES", 1)
    chunk = Chunk(0, 4, 30, torch.arange(12)[None])
    vllm.steps[NAME] = Metadata(None)
    assert call(vllm, inputs(4)).eq(-9).all()
    vllm.steps[NAME] = Metadata(Prefill([chunk], row_shard_sizes=[2, 2]))
    assert call(vllm, inputs(4))[:4].eq(-5).all()
    vllm.steps = None  # a profiling run
    assert call(vllm, inputs(4)).eq(-9).all()


def test_a_failure_leaves_the_step_as_it_was(vllm, monkeypatch):
    monkeypatch.setattr(selecting, "LEAST_QUERIES", 1)
    step = Metadata(Prefill([Chunk(0, 4, 30, torch.arange(12)[None])]))
    vllm.steps[NAME], vllm.fails = step, True
    with pytest.raises(RuntimeError, match="out of memory"):
        call(vllm, inputs(4))
    assert vllm.steps[NAME] is step
