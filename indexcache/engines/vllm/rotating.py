"""Turn vLLM's queries in tiles of rows, where a step has many tokens.

`fused_q` of vLLM 0.32 and 0.33 starts a program for each head of each token, more than a million
for 8,192 tokens of an F layer. `ops.rotary` takes tiles of rows and gives the same bits.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from indexcache.engines.vllm.selecting import USER
from indexcache.ops import rotary

LEAST_TOKENS = 256  # Steps with fewer, decoding among them, stay vLLM's.


def install() -> None:
    """Put it before vLLM's in the layers' module; calling it twice is safe."""
    module: Any = importlib.import_module(USER)
    stock = getattr(module, "fused_q", None)
    if stock is not None and not hasattr(stock, "_indexcache"):
        module.fused_q = rotating(stock)


def rotating(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's `fused_q`: (indexer's queries in e4m3, its weights, attention's rotary dims)."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def fused_q(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not takeable(given):
            return stock(*args, **kwargs)
        q, positions = given["q_pe"], given["positions"]
        turned = rotary.rotate_queries(q, positions, given["q_pe_cos_sin_cache"], interleaved=True)
        if not given["has_indexer"]:  # No one reads the other two then.
            return q.new_empty(1, 1, 1, dtype=rotary.FP8), q.new_empty(1, 1).float(), turned
        scales = given["index_weights_softmax_scale"], given["index_weights_head_scale"]
        index_q, weights = rotary.rotate_index_queries(
            given["index_q"],
            given["index_weights"],
            positions,
            given["index_q_cos_sin_cache"],
            scales,
            interleaved=given["index_rope_interleave"],
        )
        return index_q, weights, turned

    fused_q._indexcache = True  # type: ignore[attr-defined]
    return fused_q


def takeable(given: dict[str, Any]) -> bool:
    """Say whether `ops.rotary` takes these arguments of `fused_q`, by name."""
    q = given["q_pe"]
    if len(q) < LEAST_TOKENS or given["quantize_mqa"]:
        return False
    # A step of many tokens is not captured by vLLM; a graph keeps the kernels it knows.
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    queries = [(q, given["q_pe_cos_sin_cache"])]
    if given["has_indexer"]:
        queries.append((given["index_q"], given["index_q_cos_sin_cache"]))
    return all(
        x.stride(-1) == 1
        and _power_of_two(x.shape[-1])
        and _power_of_two(table.shape[-1])
        and table.shape[-1] <= x.shape[-1]
        for x, table in queries
    )


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
