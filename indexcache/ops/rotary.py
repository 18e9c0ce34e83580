"""Apply RoPE to queries and keys, as transformers does or as an engine lays them out.

A program takes a tile of rows, a row being one head of one token. Interleaved partners are
(2 i, 2 i + 1), others (i, i + half).

  turn_pairs  gives the bits of transformers' function, which takes seven launches
  turn_rows   turns the first dims of a step's queries inside an engine, and quantises those of the
              indexer. Positions index a table of cosines, then sines. All arithmetic is in fp32, in
              the order of vLLM's kernel, whose bits it gives
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from indexcache.ops.reference import FP8
from indexcache.ops.tuning import power

PAIR_ROWS = 16
ROWS = 8  # A tile that is not quantised has so many.
QUANTISED_ROWS = 16


@triton.jit
def turn_pairs(
    p_x,
    p_out,
    p_cos,
    p_sin,
    s_xb,
    s_xs,
    s_xh,
    s_cb,
    s_cs,
    n_rows,
    n_queries,
    H: tl.constexpr,
    HALF: tl.constexpr,
    W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn rows of 2 HALF dims and leave their partners HALF dims apart. grid (tiles,).

    W is HALF, rounded up to a power of two. Every product is rounded before the sum, as torch does.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    i_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o = tl.arange(0, W)
    mask = (i_row < n_rows)[:, None] & (o < HALF)[None, :]
    head, token = i_row % H, i_row // H
    i_b, i_s = token // n_queries, token % n_queries
    p_row = p_x + (i_b * s_xb + i_s * s_xs + head * s_xh)[:, None]
    p_angle = (i_b * s_cb + i_s * s_cs)[:, None] + o[None, :]
    if INTERLEAVED:
        o_a, o_b = 2 * o, 2 * o + 1
    else:
        o_a, o_b = o, o + HALF
    a = tl.load(p_row + o_a[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_row + o_b[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(p_cos + p_angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(p_sin + p_angle, mask=mask, other=0.0).to(tl.float32)
    first = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    second = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    p_to = p_out + (i_row * (2 * HALF))[:, None] + o[None, :]
    tl.store(p_to, first.to(dtype), mask=mask)
    tl.store(p_to + HALF, second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def turn_rows(
    p_x,
    p_out,
    p_positions,
    p_table,
    p_weights,
    p_weights_out,
    s_xt,
    s_xh,
    s_ot,
    s_oh,
    s_table,
    s_w,
    softmax_scale,
    head_scale,
    n_rows,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTISED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn the first 2 HALF dims of rows (token, head). grid (tiles,).

    With QUANTISED a row becomes e4m3 with one scale, a power of two, which goes into the weight.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < n_rows
    token, head = (i_row // H).to(tl.int64), i_row % H
    position = tl.load(p_positions + token, mask=m_row, other=0)
    o_d = tl.arange(0, D)
    turned = o_d < 2 * HALF
    if INTERLEAVED:
        o_angle = o_d // 2
        o_other = tl.where(turned, o_d ^ 1, o_d)
        sign = tl.where(o_d % 2 == 0, -1.0, 1.0)
    else:
        o_angle = o_d % HALF
        o_other = tl.where(turned, o_d ^ HALF, o_d)
        sign = tl.where(o_d < HALF, -1.0, 1.0)
    p_row = p_x + (token * s_xt + head * s_xh)[:, None]
    mask = m_row[:, None]
    x = tl.load(p_row + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(p_row + o_other[None, :], mask=mask, other=0.0).to(tl.float32)
    p_angle = p_table + (position * s_table)[:, None] + o_angle[None, :]
    cos = tl.load(p_angle, mask=mask & turned[None, :], other=1.0).to(tl.float32)
    sin = tl.load(p_angle + HALF, mask=mask & turned[None, :], other=0.0).to(tl.float32)
    x = tl.where(turned[None, :], x * cos + sign[None, :] * other * sin, x)
    p_to = p_out + (token * s_ot + head * s_oh)[:, None] + o_d[None, :]
    if QUANTISED:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 1e-4), 448.0)
        scale = tl.math.exp2(tl.math.ceil(tl.math.log2(scale)))
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        tl.store(p_to, x.to(p_out.dtype.element_ty), mask=mask)
        w = tl.load(p_weights + token * s_w + head, mask=m_row, other=0.0).to(tl.float32)
        tl.store(p_weights_out + i_row, w * scale * softmax_scale * head_scale, mask=m_row)
    else:
        tl.store(p_to, x.to(p_out.dtype.element_ty), mask=mask)


def rotate_pairs(x_BSHr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, *, interleaved: bool) -> Tensor:
    """Apply RoPE as transformers' functions do, to the bit, in bf16 or fp16.

    Args:
        x_BSHr: queries or keys with contiguous rotary dims.
        cos_BSr, sin_BSr: cosines and sines in x's dtype, whose second halves repeat the first; B
            may be 1.
        interleaved: the pairs are (2 i, 2 i + 1), not (i, i + r / 2). The result has the partners
            r / 2 dims apart in either case.

    Returns:
        [B, S, H, r], contiguous.
    """
    batch, queries, heads, dim = x_BSHr.shape
    out = torch.empty(x_BSHr.shape, dtype=x_BSHr.dtype, device=x_BSHr.device)
    if not out.numel():
        return out
    cos, sin = (t.expand(batch, queries, dim) for t in (cos_BSr, sin_BSr))
    rows = batch * queries * heads
    turn_pairs[(triton.cdiv(rows, PAIR_ROWS),)](
        x_BSHr,
        out,
        cos,
        sin,
        *x_BSHr.stride()[:3],
        *cos.stride()[:2],
        rows,
        queries,
        H=heads,
        HALF=dim // 2,
        W=power(dim // 2),
        INTERLEAVED=interleaved,
        ROWS=PAIR_ROWS,
        num_warps=4,
    )
    return out


def rotate_queries(
    q_SHD: Tensor, positions_S: Tensor, table_PR: Tensor, *, interleaved: bool
) -> Tensor:
    """Return queries [S, H, D] with the first R dims turned, in their dtype and contiguous.

    Args:
        q_SHD: the queries; D is a power of two and the last dim contiguous.
        positions_S: int, rows of the table.
        table_PR: R / 2 cosines, then R / 2 sines, for each position; R / 2 is a power of two.
        interleaved: the pairs are (2 i, 2 i + 1), not (i, i + R / 2).
    """
    out = torch.empty(q_SHD.shape, dtype=q_SHD.dtype, device=q_SHD.device)
    _turn(q_SHD, out, positions_S, table_PR, interleaved, None, None, (0.0, 0.0))
    return out


def rotate_index_queries(
    q_SHD: Tensor,
    w_SH: Tensor,
    positions_S: Tensor,
    table_PR: Tensor,
    scales: tuple[float, float],
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Turn and quantise an indexer's queries: (e4m3 [S, H, D], fp32 weights [S, H]).

    The arguments are those of `rotate_queries`. The scale of a vector is the power of two at or
    above amax / 448; the weight is multiplied by it and by both `scales`.
    """
    out = torch.empty(q_SHD.shape, dtype=FP8, device=q_SHD.device)
    weights = torch.empty(w_SH.shape, dtype=torch.float32, device=w_SH.device)
    _turn(q_SHD, out, positions_S, table_PR, interleaved, w_SH, weights, scales)
    return out, weights


def _turn(
    q: Tensor,
    out: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    weights: Tensor | None,
    weights_out: Tensor | None,
    scales: tuple[float, float],
) -> None:
    tokens, heads, dim = q.shape
    quantised = weights is not None
    rows = QUANTISED_ROWS if quantised else ROWS
    if not tokens:
        return
    turn_rows[(triton.cdiv(tokens * heads, rows),)](
        q,
        out,
        positions,
        table,
        weights,
        weights_out,
        *q.stride()[:2],
        *out.stride()[:2],
        table.stride(0),
        weights.stride(0) if weights is not None else 0,
        *scales,
        tokens * heads,
        H=heads,
        D=dim,
        HALF=table.shape[-1] // 2,
        INTERLEAVED=interleaved,
        QUANTISED=quantised,
        ROWS=rows,
        num_warps=4,
    )
