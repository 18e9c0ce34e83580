"""Quantise indexer keys and queries to fp8 in one pass: RoPE, Hadamard, scale of a vector, e4m3."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from indexcache.ops.reference import FP8, hadamard, half_split
from indexcache.ops.tuning import current

BLOCK = 64  # rows of a program at a time, as in a product of one warpgroup; half for few rows


@triton.jit
def _rotate(
    x,
    p_x,
    p_cos,
    p_sin,
    o_row,
    m,
    n_heads,
    D: tl.constexpr,
    r: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply RoPE to the first 2 r dims of rows x [BLOCK, D].

    Interleaved partners come by split and join. Half-split ones are loaded again, with a promise
    that the loads are contiguous: otherwise each lane would read another row.
    """
    at = (o_row // n_heads).to(tl.int64)[:, None] * r
    if INTERLEAVED:
        o_pair = tl.arange(0, D // 2)[None, :]
        even, odd = tl.split(tl.reshape(x, (BLOCK, D // 2, 2)))
        cos = tl.load(p_cos + at + o_pair, mask=m & (o_pair < r), other=1.0)
        sin = tl.load(p_sin + at + o_pair, mask=m & (o_pair < r), other=0.0)
        return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (BLOCK, D))
    else:
        o_d = tl.arange(0, D)
        o_other = tl.where(o_d < r, o_d + r, o_d - r)
        o_angle = tl.where(o_d < r, o_d, o_d - r)
        if r % 16 == 0:
            o_other = tl.max_contiguous(tl.multiple_of(o_other, 16), 16)
            o_angle = tl.max_contiguous(tl.multiple_of(o_angle, 16), 16)
        rotated = m & (o_d < 2 * r)[None, :]
        other = tl.load(
            p_x + o_row.to(tl.int64)[:, None] * D + o_other[None, :], mask=rotated, other=0.0
        ).to(tl.float32)
        cos = tl.load(p_cos + at + o_angle[None, :], mask=rotated, other=1.0)
        sin = tl.load(p_sin + at + o_angle[None, :], mask=rotated, other=0.0)
        return tl.where(rotated, x * cos + tl.where((o_d < r)[None, :], -other, other) * sin, x)


@triton.jit
def quantize_rows(
    p_x,
    p_cos,
    p_sin,
    p_signs,
    p_out,
    p_scale,
    n_rows,
    n_heads,
    D: tl.constexpr,
    r: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise rows (batch, token, head). grid (workers,): each takes blocks of rows in turn.

    p_cos, p_sin: fp32 [batch, tokens, r], or None with r = 0: no RoPE. p_signs: the Hadamard
    matrix's signs, fp16 [D, D], read once per worker, or None: no rotation; NORM = D^-0.5.
    Interleaved dims are written half-split.
    """
    o_d = tl.arange(0, D)
    if p_signs is not None:
        signs = tl.load(p_signs + o_d[:, None] * D + o_d[None, :])
    for first in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        o_row = first + tl.arange(0, BLOCK)
        m = (o_row < n_rows)[:, None]
        at = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
        if r > 0:
            x = _rotate(x, p_x, p_cos, p_sin, o_row, m, n_heads, D, r, INTERLEAVED, BLOCK)
            x = x.to(p_x.dtype.element_ty).to(tl.float32)  # transformers rounds here too
        amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
        if p_signs is not None:
            # Signs are exact in fp16, and so is a bf16 number divided by a power of two (numbers
            # below 2^-14 of the largest are exact to 2^-24 of it). An fp32 number is two halves
            # to 22 bits. So one or two products of halves replace a slow one in fp32.
            bits = amax.to(tl.int32, bitcast=True)
            up = (bits + 0x7FFFFF) & 0x7F800000  # the bits of the next power of two
            up = tl.minimum(tl.maximum(up, 0x00800000), 0x7E000000)
            down = 0x7F000000 - up
            y = x * down.to(tl.float32, bitcast=True)[:, None]
            high = y.to(tl.float16)
            x = tl.dot(high, signs)
            if p_x.dtype.element_ty != tl.bfloat16:
                low = (y - high.to(tl.float32)).to(tl.float16)
                x = tl.dot(low, signs, x)
            x *= (up.to(tl.float32, bitcast=True) * NORM)[:, None]
            amax = tl.where(amax < float("inf"), tl.max(tl.abs(x), 1), amax)
        scale = tl.where(amax == 0.0, 1.0, amax / 448.0)
        scale = tl.where(amax == float("inf"), float("nan"), scale)
        y = tl.maximum(x / scale[:, None], -448.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERLEAVED and p_signs is None:  # The order of the signs does this.
            at = (
                o_row.to(tl.int64)[:, None] * D
                + tl.where(o_d < 2 * r, o_d % 2 * r + o_d // 2, o_d)[None, :]
            )
        tl.store(p_out + at, y.to(tl.float8e4nv), mask=m)
        tl.store(p_scale + o_row, scale, mask=o_row < n_rows)


# ---- host side


def refuse(x: Tensor) -> str | None:
    """Return why the kernel cannot take x [..., D]; None: it can."""
    dim = x.shape[-1]
    if dim & (dim - 1) == 0 and 16 <= dim <= 256:
        return None
    return f"the index dim {dim} is not a power of two from 16 to 256"


def quantize(
    x_BSHD: Tensor, cos: Tensor | None, sin: Tensor | None, *, rotate: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Run `reference.quantize_index` on the kernel."""
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
    signs = _signs(dim, half if interleaved else 0, x.device) if rotate else None
    rows, workers = batch * tokens * heads, current().index.workers
    block = BLOCK if rows >= BLOCK * workers else BLOCK // 2
    tensors = {"p_x": x, "p_cos": cos, "p_sin": sin, "p_signs": signs}
    shape = {"n_rows": rows, "n_heads": heads, "D": dim, "r": half, "BLOCK": block}
    constants = {"INTERLEAVED": interleaved, "NORM": dim**-0.5, "num_warps": 4, "num_stages": 1}
    quantize_rows[(min(triton.cdiv(rows, block), 2 * workers),)](
        **tensors, p_out=out, p_scale=scale, **shape, **constants
    )
    return out, scale


@functools.cache
def _signs(dim: int, half: int, device: torch.device) -> Tensor:
    """Return the signs of the Hadamard matrix, fp16 [D, D].

    Its first 2 `half` rows are in the order of interleaved dims, which it leaves half-split.
    """
    order = half_split(torch.arange(dim, device=device), half).argsort()
    return hadamard(torch.eye(dim, device=device)).sign().half()[order].contiguous()
