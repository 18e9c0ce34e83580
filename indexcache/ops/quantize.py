"""Indexer keys and queries on their way to fp8, in one pass: RoPE, Hadamard, scale of a vector, e4m3."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize(
    p_x, p_cos, p_sin, p_signs, p_out, p_scale, n_rows, n_heads, s_cb, n_tokens,
    D: tl.constexpr, r: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (row blocks,).

    Rows are (batch, token, head); cos and sin fp32 [batch, tokens, r]; r = 0: no RoPE. p_signs [D, D] fp16: +-1, NORM = D^-0.5.
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = (o_row < n_rows)[:, None]
    o_d = tl.arange(0, D)
    x = tl.load(p_x + o_row[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if r > 0:
        if INTERLEAVED:
            o_pair, o_angle = o_d ^ 1, o_d // 2
            first = o_d % 2 == 0
        else:
            o_pair = tl.where(o_d < r, o_d + r, o_d - r)
            o_angle = tl.where(o_d < r, o_d, o_d - r)
            first = o_d < r
        turned = (o_d < 2 * r)[None, :]
        other = tl.load(p_x + o_row[:, None] * D + o_pair[None, :], mask=m & turned, other=0.0).to(tl.float32)
        i_token = o_row // n_heads
        at = (i_token // n_tokens) * s_cb + (i_token % n_tokens) * r
        cos = tl.load(p_cos + at[:, None] + o_angle[None, :], mask=m & turned, other=1.0)
        sin = tl.load(p_sin + at[:, None] + o_angle[None, :], mask=m & turned, other=0.0)
        x = tl.where(turned, x * cos + tl.where(first[None, :], -other, other) * sin, x)
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    if ROTATE:
        # signs are exact in fp16, and a number between -1 and 1 is two halves to 22 bits: two products instead of a slow fp32 one
        unit = tl.where((amax > 0.0) & (amax < float("inf")), amax, 1.0)
        y = x / unit[:, None]
        high = y.to(tl.float16)
        low = (y - high.to(tl.float32)).to(tl.float16)
        signs = tl.load(p_signs + o_d[:, None] * D + o_d[None, :])
        x = tl.dot(low, signs, tl.dot(high, signs)) * (unit[:, None] * NORM)
        amax = tl.where(amax < float("inf"), tl.max(tl.abs(x), 1), amax)
    scale = tl.where(amax == 0.0, 1.0, amax / 448.0)
    scale = tl.where(amax == float("inf"), float("nan"), scale)
    y = tl.minimum(tl.maximum(x / scale[:, None], -448.0, propagate_nan=tl.PropagateNan.ALL), 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], y.to(tl.float8e4nv), mask=m)
    tl.store(p_scale + o_row, scale, mask=o_row < n_rows)
