"""Indexer keys and queries on their way to fp8, in one pass: RoPE, Hadamard, scale of a vector, e4m3."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(
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
    """RoPE on the first 2 r dims. Partners by split and join, or by loads said to be contiguous: else each lane would read another row."""
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
        turned = m & (o_d < 2 * r)[None, :]
        other = tl.load(
            p_x + o_row.to(tl.int64)[:, None] * D + o_other[None, :], mask=turned, other=0.0
        ).to(tl.float32)
        cos = tl.load(p_cos + at + o_angle[None, :], mask=turned, other=1.0)
        sin = tl.load(p_sin + at + o_angle[None, :], mask=turned, other=0.0)
        return tl.where(turned, x * cos + tl.where((o_d < r)[None, :], -other, other) * sin, x)


@triton.jit
def quantize(
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
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grid (workers,), blocks of rows in turn: the signs are read once a worker.

    Rows are (batch, token, head); cos and sin fp32 [batch, tokens, r]; r = 0: no RoPE. p_signs [D, D] fp16: +-1, NORM = D^-0.5.
    Interleaved dims leave half-split.
    """
    o_d = tl.arange(0, D)
    if ROTATE:
        signs = tl.load(p_signs + o_d[:, None] * D + o_d[None, :])
    for first in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        o_row = first + tl.arange(0, BLOCK)
        m = (o_row < n_rows)[:, None]
        at = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
        if r > 0:
            x = _turned(x, p_x, p_cos, p_sin, o_row, m, n_heads, D, r, INTERLEAVED, BLOCK)
            x = x.to(p_x.dtype.element_ty).to(tl.float32)  # as transformers leaves it
        amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
        if ROTATE:
            # signs are exact in fp16, and so is a bf16 number over a power of two (below 2^-14 of the largest to 2^-24 of it); an fp32
            # number is two halves to 22 bits: a product or two instead of a slow one in fp32
            up = (
                amax.to(tl.int32, bitcast=True) + 0x7FFFFF
            ) & 0x7F800000  # the next power of two, as bits
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
        if INTERLEAVED and not ROTATE:  # else the signs are in this order
            at = (
                o_row.to(tl.int64)[:, None] * D
                + tl.where(o_d < 2 * r, o_d % 2 * r + o_d // 2, o_d)[None, :]
            )
        tl.store(p_out + at, y.to(tl.float8e4nv), mask=m)
        tl.store(p_scale + o_row, scale, mask=o_row < n_rows)
