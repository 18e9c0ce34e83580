"""Select in vLLM's prefill with this package's scores and top-k.

vLLM scores a prefill in pieces of at most 512 MB of logits, 671 queries at 200,000 keys, and then
selects from them. Here the whole step of a request is scored and selected at once; no logits lie
in memory, ids ascend, and ties go to the lower position, so the selection repeats. Keys are
gathered from vLLM's pages, 128 e4m3 values and an fp32 scale each, by vLLM's own kernel.

Several short requests that vLLM scores together stay vLLM's, and so do decoding, prompts of at most
k tokens, and rows that tensor parallel divides among its ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from indexcache import ops

USER = "vllm.models.deepseek_v32.attention"
"""The module whose layers call `sparse_attn_indexer`, by that name."""

LEAST_QUERIES = 64  # fewer, in a step of a request, are left to vLLM


def install() -> None:
    """Put the selection before vLLM's in the layers' module; calling it twice is safe."""
    module: Any = importlib.import_module(USER)
    if not hasattr(module.sparse_attn_indexer, "_indexcache"):
        module.sparse_attn_indexer = selecting(module.sparse_attn_indexer)


def selecting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's `sparse_attn_indexer`, which writes ids into `topk_indices_buffer`."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def select(*args: Any, **kwargs: Any) -> Any:
        context = importlib.import_module("vllm.forward_context").get_forward_context()
        steps = context.attn_metadata
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        prefix = given["k_cache_prefix"]
        step: Any = None
        if isinstance(steps, dict) and isinstance(prefix, str):
            step = steps.get(prefix)
        runs = takeable(step, given) if step is not None else []
        if not runs:
            return stock(*args, **kwargs)
        taken = {id(chunk) for run in runs for chunk in run}
        rest = [chunk for chunk in step.prefill.chunks if id(chunk) not in taken]
        prefill = dataclasses.replace(step.prefill, chunks=rest)
        steps[prefix] = dataclasses.replace(step, prefill=prefill)
        try:  # vLLM decodes, and selects for the requests that are left to it
            result = stock(*args, **kwargs)
        finally:
            steps[prefix] = step
        for run in runs:
            _select(run, given)
        return result

    select._indexcache = True  # type: ignore[attr-defined]
    return select


def takeable(step: Any, given: dict[str, Any]) -> list[list[Any]]:
    """Return the pieces of each request of a step whose prefill is selected here.

    Args:
        step: the indexer's metadata of a step.
        given: the arguments of `sparse_attn_indexer` by name.
    """
    prefill = step.prefill
    if (
        prefill is None
        or prefill.row_shard_sizes is not None
        or given["use_fp4_cache"]
        or given["use_pcp"]
        or given["dcp_world_size"] > 1
        or given["candidate_blocks"] is not None
        or not given["skip_k_cache_insert"]
    ):
        return []
    runs: list[list[Any]] = []
    for chunk in prefill.chunks:
        if chunk.skip_kv_gather and runs:
            runs[-1].append(chunk)  # a later piece of the same request
        else:
            runs.append([chunk])
    return [run for run in runs if _fits(run, given["topk_tokens"])]


def _fits(run: Sequence[Any], topk: int) -> bool:
    first, last = run[0], run[-1]
    return (
        all(chunk.num_reqs == 1 for chunk in run)
        and not first.skip_kv_gather
        and first.total_seq_lens > topk
        and last.token_end - first.token_start >= LEAST_QUERIES
    )


def _select(run: Sequence[Any], given: dict[str, Any]) -> None:
    """Write the ids of one request's queries into the buffer, counted from its first token."""
    first, rows = run[0], slice(run[0].token_start, run[-1].token_end)
    device, length, dim = given["kv_cache"].device, first.total_seq_lens, given["head_dim"]
    keys = torch.empty(length, dim, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(length, 4, dtype=torch.uint8, device=device)
    gather = importlib.import_module("vllm._custom_ops").cp_gather_indexer_k_quant_cache
    gather(given["kv_cache"], keys, scales, first.block_table, first.local_cu_seq_lens)
    buffer: Tensor = given["topk_indices_buffer"]
    topk = given["topk_tokens"]
    selection = ops.index_topk(
        given["q_quant"][rows][None],
        keys[None],
        given["weights"][rows].float()[None],
        scales.view(torch.float32).view(1, length),
        topk,
        length - (rows.stop - rows.start),  # the step's queries end the request's tokens
    )
    buffer[rows, :topk] = selection.ids[0]


@functools.cache
def compile_kernels(heads: int, dim: int, k: int, device: torch.device) -> None:
    """Run the selection for lengths that Triton compiles in different ways."""
    for queries, keys in ((512, 16384), (513, 20001)):
        fp8: dict[str, Any] = {"dtype": torch.float8_e4m3fn, "device": device}
        q, key = torch.zeros(1, queries, heads, dim, **fp8), torch.zeros(1, keys, dim, **fp8)
        w, scale = torch.ones(1, queries, heads, device=device), torch.ones(1, keys, device=device)
        ops.index_topk(q, key, w, scale, k, keys - queries)
