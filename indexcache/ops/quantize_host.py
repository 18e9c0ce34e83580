"""Host side of ops/quantize.py."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from indexcache.ops import quantize as kernel
from indexcache.ops.reference import FP8, hadamard, half_split
from indexcache.ops.tuning import SETTINGS

BLOCK = 64  # rows of a program at a time: what a product of one warpgroup has; of few rows 32


def refuse(x: Tensor) -> str | None:
    dim = x.shape[-1]
    return (
        None
        if dim & (dim - 1) == 0 and 16 <= dim <= 256
        else f"the index dim {dim} is not a power of two from 16 to 256"
    )


@functools.cache
def _signs(dim: int, paired: int, device: torch.device) -> Tensor:
    """Of the Hadamard matrix, its first 2 `paired` rows in the order of interleaved dims that are half-split afterwards."""
    order = half_split(torch.arange(dim, device=device), paired).argsort()
    return hadamard(torch.eye(dim, device=device)).sign().half()[order].contiguous()


def quantize(
    x_BSHD: Tensor, rotate: bool, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, dim = x_BSHD.shape
    x = x_BSHD.contiguous()
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if not x.numel():
        return out, scale
    half = 0
    if cos is not None and sin is not None:
        half = cos.shape[-1]
        cos, sin = (t.float().expand(batch, tokens, half).contiguous() for t in (cos, sin))
    rows = batch * tokens * heads
    block = BLOCK if rows >= BLOCK * SETTINGS.workers else BLOCK // 2
    kernel.quantize[(min(triton.cdiv(rows, block), 2 * SETTINGS.workers),)](
        x,
        scale if cos is None else cos,
        scale if sin is None else sin,
        _signs(dim, half if interleaved else 0, x.device) if rotate else scale,
        out,
        scale,
        rows,
        heads,
        D=dim,
        r=half,
        INTERLEAVED=interleaved,
        ROTATE=rotate,
        NORM=dim**-0.5,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return out, scale
