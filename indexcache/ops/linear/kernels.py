"""Multiply by weights that stay in FP8, and run gated experts.

`products` serves many tokens. A program owns a tile of outputs x tokens; tokens come sorted by
expert, through a list of rows, so none is copied before a product. Rows of the weights are those of
the matrix product, tokens its columns, because an operand that is converted in registers must be
the first one. A weight becomes its number times its block's scale, rounded once to the inputs'
dtype, as a dequantised copy would hold it. With quantised inputs both operands stay in FP8, and
each 128 inputs' product takes the scales of both.

`products_of_few` serves decoding, where a product takes as long as reading its weights: a program
reads a few rows of the weights once, and multiplies in fp32.

Gated experts: the first half of the rows gates the second, out = silu(gate) * up.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # rows and columns of the weights, or inputs, that have one scale


@triton.jit
def _silu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _tile_of(p_ends, i_tile, X: tl.constexpr, XP: tl.constexpr, BM: tl.constexpr):
    """Return (expert, first token, end of the expert's tokens) of a tile; the end is 0 behind all.

    p_ends int32 [X] holds where each expert's tokens end in the sorted order.
    """
    o = tl.arange(0, XP)
    ends = tl.load(p_ends + o, mask=o < X, other=0)
    starts = tl.load(p_ends + o - 1, mask=(o > 0) & (o < X), other=0)
    tiles = tl.where(o < X, (ends - starts + BM - 1) // BM, 0)
    through = tl.cumsum(tiles, 0)
    expert = tl.sum(tl.where((through <= i_tile) & (o < X), 1, 0), 0)
    here = o == expert
    first = tl.sum(tl.where(here, starts + (i_tile - through + tiles) * BM, 0), 0)
    return tl.minimum(expert, X - 1), first, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def products(
    p_x,
    p_x_scale,
    p_w,
    p_w_scale,
    p_out,
    p_source,
    p_target,
    p_factor,
    p_ends,
    n_tokens,
    N,
    K,
    s_expert,
    s_scale_expert,
    X: tl.constexpr,
    XP: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply tokens by their expert's weights. grid (tiles of outputs, tiles of tokens).

    p_x [rows, K] and p_x_scale fp32 [rows, ceil(K / 128)] or None; p_w [X, N, K] and p_w_scale fp32
    [X, blocks of outputs, ceil(K / 128)] or None. Place m of the sorted order reads row p_source[m]
    of x and writes row p_target[m] of out [rows, outputs], times p_factor[m]; a list that is None
    names its own place. p_ends None: one expert has all tokens. GATED: N = 2 outputs, whose halves
    have blocks of their own. EVEN: K is a multiple of BK. BK divides 128. DESCRIBED: p_w
    describes [X N, K] to the copy engine in tiles [outputs of a tile, BK]. An expert's weights, and
    x, have fewer than 2^31 elements.
    """
    i_n, i_tile = tl.program_id(0), tl.program_id(1)
    expert, first, end = 0, i_tile * BM, n_tokens
    if p_ends is not None:
        expert, first, end = _tile_of(p_ends, i_tile, X, XP, BM)
    if first >= end:
        return
    o_m = first + tl.arange(0, BM)
    m_m = o_m < end
    source = o_m
    if p_source is not None:
        source = tl.load(p_source + o_m, mask=m_m, other=0)
    source = tl.where(m_m, source, 0)
    OUT: tl.constexpr = BN // 2 if GATED else BN
    outputs = N // 2 if GATED else N
    o_k = tl.arange(0, BK)
    a_row = (K + BLOCK - 1) // BLOCK  # scales of a row
    # Weights that are converted are the first operand, which may lie in registers. A tile of theirs
    # is half gates, half what they gate. Otherwise there are two products, of gates and what they
    # gate, or of the halves of a tile whose inputs are quantised: the product of 128 inputs is held
    # beside the sum, and registers suffice for that of a half.
    CONVERT: tl.constexpr = p_w_scale is not None and p_x_scale is None
    TWO: tl.constexpr = not CONVERT and (GATED or p_x_scale is not None)
    WIDE: tl.constexpr = BN // 2 if TWO else BN
    o_r = tl.arange(0, WIDE)
    first_row = i_n * OUT
    to_other = outputs if GATED else WIDE  # rows from those of the first product to the second's
    if GATED:
        o_n = first_row + o_r % OUT
        row = tl.where(o_n < outputs, o_n, 0) + o_r // OUT * outputs
        other = row + outputs
    else:
        row = tl.minimum(first_row + o_r, N - 1)
        other = tl.minimum(first_row + WIDE + o_r, N - 1)
    i_row = expert * N + first_row
    if not DESCRIBED:
        p_w += tl.full((), s_expert, tl.int64) * expert
    if CONVERT:
        at_w, at_x = row[:, None] * K + o_k[None, :], source[None, :] * K + o_k[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        at_w, at_x = row[None, :] * K + o_k[:, None], source[:, None] * K + o_k[None, :]
        at_other = other[None, :] * K + o_k[:, None]
        acc = tl.zeros((BM, WIDE), tl.float32)
        acc_other = tl.zeros((BM, WIDE if TWO else 1), tl.float32)
    if p_w_scale is not None:
        blocks = (outputs + BLOCK - 1) // BLOCK  # The rows of a block have one scale.
        p_w_scale += tl.full((), s_scale_expert, tl.int64) * expert
        p_other_scale = p_w_scale
        if GATED:
            p_other_scale += (blocks + first_row // BLOCK) * a_row
        else:
            p_other_scale += tl.minimum((first_row + WIDE) // BLOCK, blocks - 1) * a_row
        p_w_scale += first_row // BLOCK * a_row
    if p_x_scale is not None:
        p_x_scale += source * a_row
    for base in tl.range(0, K, BK, num_stages=STAGES):
        left = o_k < K - base
        of_rows, of_columns = left[:, None], left[None, :]
        if EVEN:
            x = tl.load(p_x + base + at_x)
        else:
            x = tl.load(p_x + base + at_x, mask=of_rows if CONVERT else of_columns, other=0.0)
        if DESCRIBED:
            w = tl.trans(p_w.load([i_row, base]))
            if TWO:
                w_other = tl.trans(p_w.load([i_row + to_other, base]))
        elif EVEN:
            w = tl.load(p_w + base + at_w)
            if TWO:
                w_other = tl.load(p_w + base + at_other)
        else:
            m_w = of_columns if CONVERT else of_rows
            w = tl.load(p_w + base + at_w, mask=m_w, other=0.0)
            if TWO:
                w_other = tl.load(p_w + base + at_other, mask=m_w, other=0.0)
        if CONVERT:
            scale = tl.load(p_w_scale + base // BLOCK)
            if GATED:
                scale = tl.where(o_r < OUT, scale, tl.load(p_other_scale + base // BLOCK))
                w = (w.to(tl.float32) * scale[:, None]).to(x.dtype)
            else:
                w = (w.to(tl.float32) * scale).to(x.dtype)
            acc = tl.dot(w, x, acc)
        elif p_x_scale is None:
            acc = tl.dot(x, w, acc)
            if TWO:
                acc_other = tl.dot(x, w_other, acc_other)
        else:
            x_scale = tl.load(p_x_scale + base // BLOCK)
            scale = x_scale * tl.load(p_w_scale + base // BLOCK)
            acc += tl.dot(x, w) * scale[:, None]
            scale = x_scale * tl.load(p_other_scale + base // BLOCK)
            acc_other += tl.dot(x, w_other) * scale[:, None]
    if CONVERT:
        acc = tl.trans(acc)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, OUT)), (0, 2, 1)))
            acc = _silu(gate, up)
    elif GATED:
        acc = _silu(acc, acc_other)
    target = o_m
    if p_target is not None:
        target = tl.load(p_target + o_m, mask=m_m, other=0)
    factor = tl.full((BM,), 1.0, tl.float32)
    if p_factor is not None:
        factor = tl.load(p_factor + o_m, mask=m_m, other=0.0)
    p_out += target.to(tl.int64)[:, None] * outputs
    kind: tl.constexpr = p_out.dtype.element_ty
    o_n = first_row + tl.arange(0, OUT if GATED else WIDE)
    m_out = m_m[:, None] & (o_n < outputs)[None, :]
    tl.store(p_out + o_n[None, :], (acc * factor[:, None]).to(kind), mask=m_out)
    if TWO and not GATED:
        o_n += WIDE
        m_out = m_m[:, None] & (o_n < outputs)[None, :]
        tl.store(p_out + o_n[None, :], (acc_other * factor[:, None]).to(kind), mask=m_out)


@triton.jit
def products_of_few(
    p_x,
    p_w,
    p_w_scale,
    p_out,
    p_experts,
    p_factor,
    N,
    K,
    s_expert,
    s_scale_expert,
    SHARE: tl.constexpr,
    SUM: tl.constexpr,
    GATED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply a few rows of inputs by their expert's weights. grid (tiles of outputs, rows out).

    Row i of out is the sum over the places i SUM .. of p_factor[place] times the product of row
    place // SHARE of x with the weights of expert p_experts[place] (int64; None: of the only one).
    Other arguments are those of `products`.
    """
    i_n, i_row = tl.program_id(0), tl.program_id(1)
    outputs = N // 2 if GATED else N
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < outputs
    row = tl.where(m_n, o_n, 0)
    o_k = tl.arange(0, BK)
    a_row = (K + BLOCK - 1) // BLOCK  # scales of a row
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(SUM):
        place = i_row * SUM + i
        expert = tl.full((), 0, tl.int64)
        if p_experts is not None:
            expert = tl.load(p_experts + place).to(tl.int64)
        p_rows = p_w + expert * s_expert + row.to(tl.int64)[:, None] * K
        p_scales = p_w_scale
        if p_w_scale is not None:
            p_scales = p_w_scale + expert * s_scale_expert + i_n * BN // BLOCK * a_row
        acc = tl.zeros((BN, BK), tl.float32)
        acc_up = tl.zeros((BN, BK), tl.float32)
        for base in range(0, K, BK):
            at = base + o_k
            m_k = at < K
            m = m_n[:, None] & m_k[None, :]
            x = tl.load(p_x + (place // SHARE).to(tl.int64) * K + at, mask=m_k, other=0.0)
            x = x.to(tl.float32)
            w = tl.load(p_rows + at[None, :], mask=m, other=0.0)
            scaled = x
            if p_w_scale is not None:  # All rows of a program have the same scales: BN divides 128.
                scaled *= tl.load(p_scales + at // BLOCK, mask=m_k, other=0.0)
            acc += w.to(tl.float32) * scaled[None, :]
            if GATED:
                w = tl.load(p_rows + outputs.to(tl.int64) * K + at[None, :], mask=m, other=0.0)
                if p_w_scale is not None:
                    p_up = p_scales + (outputs + BLOCK - 1) // BLOCK * a_row
                    x *= tl.load(p_up + at // BLOCK, mask=m_k, other=0.0)
                acc_up += w.to(tl.float32) * x[None, :]
        product = tl.sum(acc, 1)
        if GATED:
            product = _silu(product, tl.sum(acc_up, 1))
        if p_factor is not None:
            product *= tl.load(p_factor + place)
        total += product
    tl.store(p_out + i_row.to(tl.int64) * outputs + o_n, total, mask=m_n)


@triton.jit
def quantize_groups(p_x, p_q, p_scale, n_groups, K, ROWS: tl.constexpr):
    """Quantise inputs in groups of 128 neighbours. grid (groups of all rows / ROWS,).

    p_x and p_q [rows, K]; p_scale fp32 [rows, ceil(K / 128)]; n_groups = scales of all rows.
    """
    a_row = (K + BLOCK - 1) // BLOCK
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = (i % a_row)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = (i // a_row).to(tl.int64)[:, None] * K + o
    m = (i < n_groups)[:, None] & (o < K)
    x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest == 0.0, 1.0, largest / 448.0)
    q = tl.minimum(tl.maximum(x / scale[:, None], -448.0), 448.0)
    tl.store(p_q + at, q.to(p_q.dtype.element_ty), mask=m)
    tl.store(p_scale + i, scale, mask=i < n_groups)
