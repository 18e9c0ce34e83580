"""Host side of ops/distill.py: the warm-up's loss and gradients of one indexer on one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from indexcache.ops import distill

LOG2E = distill.LOG2E.value
Taught = tuple[Tensor, Callable[[], Tensor], float]  # of a layer: queries [S, H, n], its keys [T, H, n] or [T, 1, n], scale


@dataclass
class Settings:
    """What the speed depends on and the result does not."""

    queries: int = 128  # of a tile of scores
    keys: int = 128
    part: int = 64  # dims of a teacher's product at a time
    back: int = 64  # queries or keys of a tile of gradients
    rows: int = 2048  # most queries of a chunk
    programs: int = 264  # that fill a device: short documents share the heads of a block of keys among several


SETTINGS = Settings()


def refuse(*queries: Tensor) -> str | None:
    """Why these queries, the indexer's and all layers', cannot go through the kernels; None: they can."""
    dtypes = {q.dtype for q in queries}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"the dtypes are {', '.join(sorted(map(str, dtypes)))}"
    width = max(q.shape[-1] for q in queries)
    return f"rows of {width} numbers are longer than 256" if width > 256 else None


def warm_up(
    q_SJD: Tensor, k_TD: Tensor, w_SJ: Tensor, layers: Sequence[Taught], weights: Sequence[float], multi: bool,
    grads: list[Tensor] | None, block_bytes: int,
) -> Tensor:  # fmt: skip
    """As `ops.warm_up`."""
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, heads, dim = q.shape
    s, device = SETTINGS, q.device
    rows = min(max(block_bytes // (8 * length) // s.queries, 1) * s.queries, s.rows)
    # rows begin at multiples of 64 bytes
    target, scores = (torch.empty(min(rows, length), -(-length // 16) * 16, dtype=torch.float32, device=device) for _ in range(2))
    total = torch.zeros((), dtype=torch.float64, device=device)
    less = 2 if q.dtype == torch.float32 else 1  # twice the bytes
    tile = {"BM": s.queries // less, "BN": s.keys // less, "num_warps": 8 // less, "num_stages": 2}
    wide = {"D": dim, "DP": max(triton.next_power_of_2(dim), 16)}
    # copies ahead of narrow tiles make ptxas wait for every wgmma (C7515)
    back = {"BM": s.back // less, "BN": s.back // less, "num_warps": 8 // less, "num_stages": 2 if dim > 128 else 1}
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        tiles = triton.cdiv(stop - start, tile["BM"]), triton.cdiv(stop, tile["BN"])
        for i, ((queries, keys_of, scale), weight) in enumerate(zip(layers, weights, strict=True)):
            some, keys, each = queries[start:stop].contiguous(), keys_of().contiguous(), queries.shape[1]
            scale2 = scale * LOG2E
            shape = {"E": some.shape[2], "BE": s.part, **tile}
            if some.shape[2] > 192:  # two stages of a query and a key tile fill the shared memory
                shape["BN"] //= 2
            entropy = torch.empty(tiles[0], triton.cdiv(stop, shape["BN"]), dtype=torch.float32, device=device)
            lse = torch.empty(stop - start, each, dtype=torch.float32, device=device)
            steps = (some.stride(0), some.stride(1), keys.stride(0), 0 if keys.shape[1] == 1 else keys.stride(1))
            distill.normalise[(tiles[0], each)](some, keys, lse, scale2, *steps, start, stop, each, **shape)
            distill.teach[entropy.shape](
                some, keys, lse, target, entropy, scale2, weight, *steps, target.stride(0), start, stop, each, ADD=i > 0, **shape
            )
            if multi:
                total += weight * entropy.sum(dtype=torch.float64)
        inputs = (q[start:], k, w[start:])
        strides = (q.stride(0), q.stride(1), k.stride(0), w.stride(0), scores.stride(0))
        distill.score[tiles](*inputs, scores, *strides, start, stop, heads, **wide, **tile)
        value = torch.empty(stop - start, dtype=torch.float32, device=device)
        distill.compare[(stop - start,)](
            scores, target, value, scores.stride(0), target.stride(0), start, MULTI=multi, BN=1024, num_warps=4
        )
        total += value.sum(dtype=torch.float64)
        if grads is not None:
            dq, dk, dw = grads
            grid = triton.cdiv(stop - start, back["BM"]), heads
            distill.grad_queries[grid](*inputs, scores, dq[start:], dw[start:], *strides, dw.stride(0), start, stop, heads, **wide, **back)
            blocks = triton.cdiv(stop, back["BN"])
            each = triton.cdiv(heads, min(triton.cdiv(s.programs, blocks), heads))  # heads of a program
            parts = torch.empty(triton.cdiv(heads, each), stop, dim, dtype=torch.float32, device=device)
            distill.grad_keys[(blocks, len(parts))](*inputs, scores, parts, *strides, start, stop, heads, each, **wide, **back)
            dk[:stop] += parts.sum(0)
    return total
