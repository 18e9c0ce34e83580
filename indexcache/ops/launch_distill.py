"""Host side of ops/distill.py: the warm-up's loss and gradients of one indexer on one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from indexcache.ops import distill

LOG2E = distill.LOG2E.value
Taught = tuple[Tensor, Tensor, float]  # of a layer: queries [S, H, n], keys [T, H, n] or [T, 1, n], scale


@dataclass
class Settings:
    """What the speed depends on and the result does not."""

    queries: int = 128  # of a tile of scores
    keys: int = 128
    part: int = 64  # dims of a teacher's product at a time
    back: int = 64  # queries or keys of a tile of gradients
    rows: int = 2048  # most queries of a chunk


SETTINGS = Settings()
FORCED: bool | None = None  # tests: run the kernels (in Triton's interpreter), or never


def runs(*queries: Tensor) -> bool:
    """The kernels know these: the indexer's and all layers' queries, on a GPU, of one dtype, in rows of at most 256."""
    if FORCED is not None:
        return FORCED
    one = len({q.dtype for q in queries}) == 1 and queries[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
    return one and all(q.is_cuda and q.shape[-1] <= 256 for q in queries)


def warm_up(
    q_SJD: Tensor, k_TD: Tensor, w_SJ: Tensor, layers: Sequence[Taught], weights: Sequence[float], multi: bool,
    grads: list[Tensor] | None, block_bytes: int,
) -> Tensor:  # fmt: skip
    """L_multi or L_avg (method: section 4), fp64 scalar; `grads` (fp32, of q, k and w, zeros) are filled in where given.

    q_SJD, k_TD, w_SJ: the indexer's. weights: of the layers. block_bytes: memory of the two matrices [queries of a chunk, T].
    """
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, heads, dim = q.shape
    s, device = SETTINGS, q.device
    taught = [(queries.contiguous(), keys.contiguous(), scale * LOG2E) for queries, keys, scale in layers]
    rows = min(max(block_bytes // (8 * length) // s.queries, 1) * s.queries, s.rows)
    target, scores = (torch.empty(min(rows, length), length, dtype=torch.float32, device=device) for _ in range(2))
    total = torch.zeros((), dtype=torch.float64, device=device)
    less = 2 if q.dtype == torch.float32 else 1  # twice the bytes
    tile = {"BM": s.queries // less, "BN": s.keys // less, "num_warps": 8 // less, "num_stages": 2}
    wide = {"D": dim, "DP": max(triton.next_power_of_2(dim), 16)}
    # copies ahead of narrow tiles make ptxas wait for every wgmma (C7515)
    back = {"BM": s.back // less, "BN": s.back // less, "num_warps": 8 // less, "num_stages": 2 if dim > 128 else 1}
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        blocks, columns = triton.cdiv(stop - start, tile["BM"]), triton.cdiv(stop, tile["BN"])
        for i, ((some, keys, scale2), weight) in enumerate(zip(taught, weights, strict=True)):
            some, each = some[start:stop], some.shape[1]
            shape = {"E": some.shape[2], "BE": s.part, **tile}
            if some.shape[2] > 192:  # two stages of a query and a key tile fill the shared memory
                shape["BN"] //= 2
            entropy = torch.empty(blocks, triton.cdiv(stop, shape["BN"]), dtype=torch.float32, device=device)
            lse = torch.empty(stop - start, each, dtype=torch.float32, device=device)
            steps = (some.stride(0), some.stride(1), keys.stride(0), 0 if keys.shape[1] == 1 else keys.stride(1))
            distill.normalise[(blocks, each)](some, keys, lse, scale2, *steps, start, stop, each, **shape)
            distill.teach[entropy.shape](
                some, keys, lse, target, entropy, scale2, weight, *steps, target.stride(0), start, stop, each, ADD=i > 0, **shape
            )
            if multi:
                total += weight * entropy.sum(dtype=torch.float64)
        inputs = (q[start:], k, w[start:])
        strides = (q.stride(0), q.stride(1), k.stride(0), w.stride(0), scores.stride(0))
        distill.score[(blocks, columns)](*inputs, scores, *strides, start, stop, heads, **wide, **tile)
        value = torch.empty(stop - start, dtype=torch.float32, device=device)
        distill.compare[(stop - start,)](
            scores, target, value, scores.stride(0), target.stride(0), start, MULTI=multi, BN=1024, num_warps=4
        )
        total += value.sum(dtype=torch.float64)
        if grads is not None:
            dq, dk, dw = grads
            grid = triton.cdiv(stop - start, back["BM"]), heads
            distill.grad_queries[grid](*inputs, scores, dq[start:], dw[start:], *strides, dw.stride(0), start, stop, heads, **wide, **back)
            distill.grad_keys[(triton.cdiv(stop, back["BN"]),)](*inputs, scores, dk, *strides, start, stop, heads, **wide, **back)
    return total
