"""Multiply one token's vectors with weights: the products of a decoder layer in one step.

Such a product takes as long as reading its weights, so each program loads a tile of weights with
wide loads, multiplies it with the vector in fp32 and adds up its rows once at the end. A layer is a
chain of launches of which each reads what the one before wrote. With PDL a launch starts while the
one before still runs, loads its weights, which nothing writes, and only then waits. Every program
of every kernel waits, so all that was launched before the last kernel has ended as well.

RoPE rotates neighbouring dims and leaves them half-split, as transformers does it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from indexcache.ops.primitives import ones, sort_key

NEVER = tl.constexpr(-(2**63))


@triton.jit
def products(
    p_x,
    p_norm,
    p_w0,
    p_w1,
    p_w2,
    p_w3,
    p_add,
    p_out,
    p_normed,
    eps,
    n_1,
    n_2,
    n_3,
    s_head,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute out = [w0; w1; w2; w3] @ norm(x) + add. grid (rows / BN,).

    Rows from n_1 on are those of w1 (None: there is none), and so on; BN divides these numbers.
    p_norm None: no RMSNorm; otherwise p_normed, unless None, gets norm(x).
    HEAD > 0: weights are blocks of HEAD rows, s_head apart, and each block has an x of its own.
    """
    if PDL:
        gdc_launch_dependents()
    i_out = tl.program_id(0) * BN
    i_row = i_out
    p_w = p_w0
    if p_w1 is not None:  # noqa: SIM102 - Triton drops this branch, but not half a condition.
        if i_out >= n_1:
            p_w = p_w1
            i_row = i_out - n_1
    if p_w2 is not None:  # noqa: SIM102 - Triton drops this branch, but not half a condition.
        if i_out >= n_2:
            p_w = p_w2
            i_row = i_out - n_2
    if p_w3 is not None:  # noqa: SIM102 - Triton drops this branch, but not half a condition.
        if i_out >= n_3:
            p_w = p_w3
            i_row = i_out - n_3
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, KP)
    if HEAD > 0:
        i_head = i_row // HEAD
        p_w += i_head.to(tl.int64) * s_head + (i_row % HEAD) * K
        p_x += i_head * K
    else:
        p_w += i_row.to(tl.int64) * K
    p_tile = p_w + (o_n * K)[:, None] + o_k[None, :]
    acc = tl.zeros((BN, KP), tl.float32)
    square = tl.zeros((KP,), tl.float32)
    for c in tl.static_range(0, K, KP):
        m = o_k < K - c
        w = tl.load(p_tile + c, mask=m[None, :], other=0.0)
        if p_norm is not None:
            g = tl.load(p_norm + c + o_k, mask=m, other=0.0).to(tl.float32)
        if c == 0:
            if PDL:
                gdc_wait()
            if p_add is not None:
                add = tl.load(p_add + i_out + o_n).to(tl.float32)
        x = tl.load(p_x + c + o_k, mask=m, other=0.0).to(tl.float32)
        if p_norm is not None:
            square += x * x
            x *= g
        acc += w.to(tl.float32) * x[None, :]
    out = tl.sum(acc, 1)
    if p_norm is not None:
        scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
        out *= scale
        if p_normed is not None:  # noqa: SIM102
            if i_out == 0:
                if KP >= K:
                    tl.store(p_normed + o_k, x * scale, mask=o_k < K)
                else:
                    for c in tl.static_range(0, K, KP):
                        m = o_k < K - c
                        y = tl.load(p_x + c + o_k, mask=m, other=0.0).to(tl.float32) * scale
                        y *= tl.load(p_norm + c + o_k, mask=m, other=0.0).to(tl.float32)
                        tl.store(p_normed + c + o_k, y, mask=m)
    if p_add is not None:
        out += add
    tl.store(p_out + i_out + o_n, out)


@triton.jit
def _rotate(p_from, p_to, p_cos, p_sin, mask, half: tl.constexpr):
    """Rotate pairs of neighbours, and write them `half` apart."""
    even = tl.load(p_from, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(p_from + 1, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(p_cos).to(tl.float32)
    sin = tl.load(p_sin).to(tl.float32)
    tl.store(p_to, even * cos - odd * sin, mask=mask)
    tl.store(p_to + half, odd * cos + even * sin, mask=mask)


@triton.jit
def absorb(
    p_q,
    p_wk,
    p_kv,
    p_norm,
    p_cos,
    p_sin,
    p_position,
    p_out,
    p_latent,
    eps,
    s_head,
    s_token,
    H: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    HP: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Make the queries of attention, and write the token's latent. grid (H C / BC + 2,).

    q [H, N + R] times w_k [H, N, C] (heads s_head apart) and its rotated end make out [H, C + R].
    kv [C + R], its first part normed and its end rotated, becomes row `position` of the latents.
    NP, HP: N and H rounded up to powers of two.
    """
    if PDL:
        gdc_launch_dependents()
    i_p = tl.program_id(0)
    blocks: tl.constexpr = C // BC
    o_r = tl.arange(0, R // 2)
    o_c = tl.arange(0, C)
    if i_p < H * blocks:
        i_h = i_p // blocks
        o_n = tl.arange(0, NP)
        o_b = (i_p % blocks) * BC + tl.arange(0, BC)
        p_tile = p_wk + i_h.to(tl.int64) * s_head + (o_n * C)[:, None] + o_b[None, :]
        w = tl.load(p_tile, mask=(o_n < N)[:, None], other=0.0).to(tl.float32)
        if PDL:
            gdc_wait()
        q = tl.load(p_q + i_h * (N + R) + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        tl.store(p_out + i_h * (C + R) + o_b, tl.sum(w * q[:, None], 0))
    else:
        if PDL:
            gdc_wait()
        if i_p == H * blocks:  # the rotated ends of the queries
            o_h = tl.arange(0, HP)[:, None]
            p_end = p_q + o_h * (N + R) + N + 2 * o_r[None, :]
            p_to = p_out + o_h * (C + R) + C + o_r[None, :]
            _rotate(p_end, p_to, p_cos + o_r[None, :], p_sin + o_r[None, :], o_h < H, R // 2)
        else:
            p_row = p_latent + tl.load(p_position) * s_token
            x = tl.load(p_kv + o_c).to(tl.float32)
            g = tl.load(p_norm + o_c).to(tl.float32)
            tl.store(p_row + o_c, x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * g)
            _rotate(p_kv + C + 2 * o_r, p_row + C + o_r, p_cos + o_r, p_sin + o_r, o_r < R, R // 2)


@triton.jit
def values(
    p_part,
    p_plse,
    p_w,
    p_out,
    s_head,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the splits of attention, and multiply with the values' weights. grid (H V / BN,).

    part [SPLITS, H, C] and plse [SPLITS, H] are those of `mla.forward.attend`; w [H, V, C], heads
    s_head apart; out [H V]. SP: SPLITS rounded up to a power of two, CHUNK of which load at a time.
    """
    if PDL:
        gdc_launch_dependents()
    i_h = tl.program_id(0) // (V // BN)
    i_v = (tl.program_id(0) % (V // BN)) * BN
    o_n = tl.arange(0, BN)
    o_c = tl.arange(0, C)
    p_tile = p_w + i_h.to(tl.int64) * s_head + ((i_v + o_n) * C)[:, None] + o_c[None, :]
    w = tl.load(p_tile)
    if PDL:
        gdc_wait()
    o_s = tl.arange(0, SP)
    lse = tl.load(p_plse + o_s * H + i_h, mask=o_s < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.exp2(lse - top), 0)
    acc = tl.zeros((CHUNK, C), tl.float32)
    for first in tl.static_range(0, SP, CHUNK):
        o_k = first + tl.arange(0, CHUNK)
        m = o_k < SPLITS
        weight = tl.exp2(tl.load(p_plse + o_k * H + i_h, mask=m, other=float("-inf")) - top)
        p_row = p_part + ((o_k * H + i_h) * C)[:, None] + o_c[None, :]
        acc += tl.load(p_row, mask=m[:, None], other=0.0) * weight[:, None]
    out = tl.sum(acc, 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(p_out + i_h * V + i_v + o_n, tl.sum(w.to(tl.float32) * out[None, :], 1))


@triton.jit
def _choose(p_logits, p_bias, i_slot, X: tl.constexpr, XP: tl.constexpr):
    """Return the number of the expert that is best but for i_slot others.

    Of equal ones the first is better. A warp holds all keys, so a search is a few instructions.
    """
    o_x = tl.arange(0, XP)
    m = o_x < X
    choice = tl.sigmoid(tl.load(p_logits + o_x, mask=m, other=0.0))
    choice += tl.load(p_bias + o_x, mask=m, other=0.0)
    key = (sort_key(choice).to(tl.int64) << 32) | (XP - 1 - o_x).to(tl.int64)
    key = tl.where(m, key, NEVER)
    best = tl.max(key, 0)
    for _ in range(i_slot):
        key = tl.where(key == best, NEVER, key)
        best = tl.max(key, 0)
    return tl.minimum(XP - 1 - (best & (XP - 1)), X - 1).to(tl.int32)


@triton.jit
def experts_up(
    p_y,
    p_logits,
    p_bias,
    p_experts,
    p_gate,
    p_up,
    p_out,
    p_id,
    p_weight,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    XP: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute silu(gate @ y) * (up @ y) of the shared and the chosen experts.

    grid ((SHARED + k INNER) / BN,): the shared ones come first and load their weights before they
    wait. experts [X, 2 INNER, K] has the gates first; out [SHARED + k INNER]. The first program of
    a chosen expert writes its number and its sigmoid.
    """
    if PDL:
        gdc_launch_dependents()
    i_out = tl.program_id(0) * BN
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, KP)
    p_g = p_gate
    p_u = p_up
    i_row = i_out
    if i_out >= SHARED:
        if PDL:
            gdc_wait()
        i_slot = (i_out - SHARED) // INNER
        i_row = (i_out - SHARED) % INNER
        i_x = _choose(p_logits, p_bias, i_slot, X, XP)
        if i_row == 0:
            tl.store(p_id + i_slot, i_x)
            tl.store(p_weight + i_slot, tl.sigmoid(tl.load(p_logits + i_x)))
        p_g = p_experts + i_x.to(tl.int64) * (2 * INNER * K)
        p_u = p_g + INNER * K
    at = (i_row + o_n).to(tl.int64)[:, None] * K + o_k[None, :]
    gate = tl.zeros((BN, KP), tl.float32)
    up = tl.zeros((BN, KP), tl.float32)
    for c in tl.static_range(0, K, KP):
        m = o_k < K - c
        g = tl.load(p_g + at + c, mask=m[None, :], other=0.0)
        u = tl.load(p_u + at + c, mask=m[None, :], other=0.0)
        if c == 0 and PDL:
            gdc_wait()
        y = tl.load(p_y + c + o_k, mask=m, other=0.0).to(tl.float32)
        gate += g.to(tl.float32) * y[None, :]
        up += u.to(tl.float32) * y[None, :]
    a = tl.sum(gate, 1)
    tl.store(p_out + i_out + o_n, a * tl.sigmoid(a) * tl.sum(up, 1))


@triton.jit
def experts_down(
    p_h,
    p_id,
    p_weight,
    p_experts,
    p_shared,
    p_add,
    p_out,
    factor,
    E: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    TOPK: tl.constexpr,
    NORM: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute out = add + shared @ h + sum over the chosen of weight * expert @ h. grid (E / BN,).

    shared [E, SHARED], experts [X, E, INNER], h [SHARED + TOPK INNER] as `experts_up` wrote it. An
    expert's weight is its sigmoid / (sum of all chosen, if NORM) * factor.
    """
    if PDL:
        gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, KP)
    acc = tl.zeros((BN, KP), tl.float32)
    at = (o_n * SHARED)[:, None] + o_k[None, :]
    for c in tl.static_range(0, SHARED, KP):
        m = o_k < SHARED - c
        w = tl.load(p_shared + at + c, mask=m[None, :], other=0.0)
        if c == 0:
            if PDL:
                gdc_wait()
            add = tl.load(p_add + o_n).to(tl.float32)
        h = tl.load(p_h + c + o_k, mask=m, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * h[None, :]
    at = (o_n * INNER)[:, None] + o_k[None, :]
    total = 1.0
    if NORM:
        total = 1e-20
        for i_slot in tl.static_range(TOPK):
            total += tl.load(p_weight + i_slot)
    for i_slot in tl.static_range(TOPK):
        p_w = p_experts + tl.load(p_id + i_slot).to(tl.int64) * (E * INNER)
        one = tl.zeros((BN, KP), tl.float32)
        for c in tl.static_range(0, INNER, KP):
            m = o_k < INNER - c
            w = tl.load(p_w + at + c, mask=m[None, :], other=0.0)
            h = tl.load(p_h + SHARED + i_slot * INNER + c + o_k, mask=m, other=0.0).to(tl.float32)
            one += w.to(tl.float32) * h[None, :]
        acc += one * (tl.load(p_weight + i_slot) / total * factor)
    tl.store(p_out + o_n, tl.sum(acc, 1) + add)


@triton.jit
def index_rows(
    p_q,
    p_k,
    p_x,
    p_w,
    p_norm,
    p_bias,
    p_cos,
    p_sin,
    p_position,
    p_q_out,
    p_w_out,
    p_keys,
    p_scales,
    eps,
    factor,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate and quantise one token's index queries [J, D] and its key [D]. grid (J + 1,).

    The key passes LayerNorm first, and is written to row `position` of the cached keys and scales.
    The weight of a head, w [J, K] @ x times factor, takes the scale of its query. R: rotary dims;
    NORM = D^-0.5.
    """
    if PDL:
        gdc_launch_dependents()
    i_p = tl.program_id(0)
    weight = 0.0
    if i_p < J:
        o_k = tl.arange(0, KP)
        dot = tl.zeros((KP,), tl.float32)
        for c in tl.static_range(0, K, KP):
            w = tl.load(p_w + i_p * K + c + o_k, mask=o_k < K - c, other=0.0).to(tl.float32)
            if c == 0 and PDL:
                gdc_wait()
            dot += w * tl.load(p_x + c + o_k, mask=o_k < K - c, other=0.0).to(tl.float32)
        weight = tl.sum(dot, 0)
    if PDL:
        gdc_wait()
    half: tl.constexpr = R // 2
    o_d = tl.arange(0, D)
    o_pair = o_d % half
    second = o_d >= half
    if INTERLEAVED:
        o_a = tl.where(second, 2 * o_pair + 1, 2 * o_pair)
        o_b = tl.where(second, 2 * o_pair, 2 * o_pair + 1)
    else:
        o_a = o_d
        o_b = tl.where(second, o_pair, o_pair + half)
    rotated = o_d < R
    o_a = tl.where(rotated, o_a, o_d)
    o_b = tl.where(rotated, o_b, o_d)
    cos = tl.load(p_cos + o_pair, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(p_sin + o_pair, mask=rotated, other=0.0).to(tl.float32)
    sin = tl.where(second, sin, -sin)
    p_row = p_q + i_p * D
    if i_p == J:
        p_row = p_k
    a = tl.load(p_row + o_a).to(tl.float32)
    b = tl.load(p_row + o_b).to(tl.float32)
    if i_p == J:
        mean = tl.sum(a, 0) / D
        scale = tl.rsqrt(tl.sum((a - mean) * (a - mean), 0) / D + eps)
        a = (a - mean) * scale * tl.load(p_norm + o_a).to(tl.float32)
        b = (b - mean) * scale * tl.load(p_norm + o_b).to(tl.float32)
        a = (a + tl.load(p_bias + o_a).to(tl.float32)).to(p_k.dtype.element_ty).to(tl.float32)
        b = (b + tl.load(p_bias + o_b).to(tl.float32)).to(p_k.dtype.element_ty).to(tl.float32)
    x = (a * cos + b * sin).to(p_k.dtype.element_ty).to(tl.float32)  # transformers rounds here too
    o_i = tl.arange(0, D)
    odd = ones(o_d[:, None] & o_i[None, :]) & 1
    # The matrix is symmetric; down its columns a thread adds up registers.
    y = tl.sum(tl.where(odd == 1, -x[:, None], x[:, None]), 0) * NORM
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 0)
    amax = tl.where(amax < float("inf"), tl.max(tl.abs(y), 0), amax)
    scale = tl.where(amax == 0.0, 1.0, amax / 448.0)
    scale = tl.where(amax == float("inf"), float("nan"), scale)
    y = tl.maximum(y / scale, -448.0, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    if i_p == J:
        i_t = tl.load(p_position)
        tl.store(p_keys + i_t * D + o_i, y)
        tl.store(p_scales + i_t, scale)
    else:
        tl.store(p_q_out + i_p * D + o_i, y)
        tl.store(p_w_out + i_p, weight * factor * scale)
