"""Host side of distill/kernels.py: the warm-up's loss and gradients of one indexer on one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from indexcache.distill import kernels

if TYPE_CHECKING:
    from indexcache.distill.loss import Teacher

LOG2E = kernels.LOG2E.value


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


def runs(q_SJD: Tensor, teachers: Sequence[Teacher]) -> bool:
    """On a GPU, for dtypes and dims that the kernels know."""
    return q_SJD.is_cuda and refuse(q_SJD, teachers) is None if FORCED is None else FORCED


def refuse(q_SJD: Tensor, teachers: Sequence[Teacher]) -> str | None:
    """Why these tensors cannot go through the kernels; None: they can."""
    dtypes = {q_SJD.dtype, *(t.q_SHn.dtype for t in teachers)}
    if dtypes - {torch.bfloat16, torch.float16, torch.float32} or len(dtypes) > 1:
        return f"dtypes {', '.join(sorted(str(d) for d in dtypes))}"
    width = max(q_SJD.shape[-1], *(t.q_SHn.shape[-1] for t in teachers))
    return f"rows of {width} numbers are longer than 256" if width > 256 else None


def warm_up(
    q_SJD: Tensor, k_TD: Tensor, w_SJ: Tensor, teachers: Sequence[Teacher], weights: Sequence[float], multi: bool,
    grads: list[Tensor] | None, block_bytes: int,
) -> Tensor:  # fmt: skip
    """fp64 scalar: the loss of `loss.distill_loss` without ids; `grads` (fp32, of q, k and w, zeros) are filled in where given."""
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, heads, dim = q.shape
    s, device = SETTINGS, q.device
    taught = [(t.q_SHn.contiguous(), t.keys().contiguous(), t.scale * LOG2E) for t in teachers]
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
            kernels.normalise[(blocks, each)](some, keys, lse, scale2, *steps, start, stop, each, **shape)
            kernels.teach[entropy.shape](
                some, keys, lse, target, entropy, scale2, weight, *steps, target.stride(0), start, stop, each, ADD=i > 0, **shape
            )
            if multi:
                total += weight * entropy.sum(dtype=torch.float64)
        inputs = (q[start:], k, w[start:])
        strides = (q.stride(0), q.stride(1), k.stride(0), w.stride(0), scores.stride(0))
        kernels.score[(blocks, columns)](*inputs, scores, *strides, start, stop, heads, **wide, **tile)
        value = torch.empty(stop - start, dtype=torch.float32, device=device)
        kernels.compare[(stop - start,)](
            scores, target, value, scores.stride(0), target.stride(0), start, MULTI=multi, BN=1024, num_warps=4
        )
        total += value.sum(dtype=torch.float64)
        if grads is not None:
            dq, dk, dw = grads
            grid = triton.cdiv(stop - start, back["BM"]), heads
            kernels.grad_queries[grid](*inputs, scores, dq[start:], dw[start:], *strides, dw.stride(0), start, stop, heads, **wide, **back)
            kernels.grad_keys[(triton.cdiv(stop, back["BN"]),)](*inputs, scores, dk, *strides, start, stop, heads, **wide, **back)
    return total
