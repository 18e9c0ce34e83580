"""Compute the distillation loss of one indexer, which learns the dense attention of its layers.

Queries are processed in chunks of R rows against the N keys before the chunk's end. Memory holds
two fp32 matrices [R, N], and the keys of one layer at a time.

  normalise     computes a layer's log-sum-exp of each query and head, where its attention kernel
                did not give it
  teach         adds weight * p to the target, p = mean_h exp(logit - normaliser), and sums p log p
  score         computes the indexer's scores I
  compare       takes a row at a time: log q = I - logsumexp I and the loss; it overwrites I with
                its gradient d = q - target
  grad_queries  computes dq and dw of a head over the keys, with the products again from q and k
  grad_keys     computes dk: a program owns its keys and walks the chunk's queries and some heads.
                Partial results are added up in order; nothing is atomic.

Products are of the inputs' dtype with fp32 sums. Tiles after the diagonal are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import LN2, LOG2E


@triton.jit
def _product(
    p_a,
    p_b,
    o_m,
    o_n,
    m_m,
    m_n,
    s_a,
    s_b,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute a[o_m] @ b[o_n].T, fp32 [BM, BN], of rows of E numbers, BE at a time."""
    total = tl.zeros((BM, BN), tl.float32)
    for e in tl.static_range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        m_a, m_b = m_m[:, None] & (o_e < E)[None, :], m_n[None, :] & (o_e < E)[:, None]
        p_rows = p_a + o_m[:, None].to(tl.int64) * s_a
        p_columns = p_b + o_n[None, :].to(tl.int64) * s_b
        a = tl.load(p_rows + o_e[None, :], mask=m_a, other=0.0)
        b = tl.load(p_columns + o_e[:, None], mask=m_b, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def normalise(
    p_q,
    p_k,
    p_lse,
    scale2,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    start,
    stop,
    n_heads,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute log-sum-exps. grid (blocks of BM queries of start..stop, heads).

    p_q and p_lse, fp32 [queries, heads] in base 2, begin at `start`. scale2 is the scale times
    log2 e.
    """
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = start + o_m < stop
    p_q += i_h * s_qh
    p_k += i_h * s_kh
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for base in range(0, tl.minimum(start + (i_m + 1) * BM, stop), BN):
        o_n = base + tl.arange(0, BN)
        m_n = o_n < stop
        x = _product(p_q, p_k, o_m, o_n, m_m, m_n, s_qt, s_kt, E, BE, BM, BN) * scale2
        x = tl.where(o_n[None, :] <= start + o_m[:, None], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher
    tl.store(p_lse + o_m * n_heads + i_h, top + tl.log2(mass), mask=m_m)


@triton.jit
def teach(
    p_q,
    p_k,
    p_lse,
    p_target,
    p_entropy,
    scale2,
    weight,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_target,
    start,
    stop,
    n_heads,
    ADD: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write weight * p into the target. grid (blocks of BM queries, blocks of BN keys).

    The queries are start..stop. p_q and p_lse begin at `start`. ADD: add to the attention of other
    layers in the target. p_entropy fp32: the sum of p log p of each program, nats.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = start + o_m < stop, o_n < stop
    value = 0.0
    if i_n * BN < start + (i_m + 1) * BM:
        p = tl.zeros((BM, BN), tl.float32)
        seen = (o_n[None, :] <= start + o_m[:, None]) & m_m[:, None]
        for i_h in range(n_heads):
            lse = tl.load(p_lse + o_m * n_heads + i_h, mask=m_m, other=0.0)
            p_a, p_b = p_q + i_h * s_qh, p_k + i_h * s_kh
            x = _product(p_a, p_b, o_m, o_n, m_m, m_n, s_qt, s_kt, E, BE, BM, BN) * scale2
            p += tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)
        p /= n_heads
        value = tl.sum(tl.sum(p * tl.log2(tl.where(p > 0, p, 1.0)), 1), 0) * LN2
        p_at = _tile(p_target, i_m * BM, s_target, o_n, BM)
        p *= weight
        if ADD:
            p += tl.load(p_at)
        tl.store(p_at, p)
    tl.store(p_entropy + i_m * tl.num_programs(1) + i_n, value)


@triton.jit
def _rows(p, first, stop, s, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Load the rows first..first + N of D numbers as [N, DP], zeros after D and from `stop` on."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, DP)
    at = p + tl.cast(first, tl.int64) * s + o_n[:, None] * s + o_d[None, :]
    keep = (first + o_n < stop)[:, None]
    if D < DP:
        keep = keep & (o_d < D)[None, :]
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def _tile(p, first, s, o_n, BM: tl.constexpr):
    """Compute pointers to the rows first..first + BM and the columns o_n of a matrix."""
    return p + tl.cast(first, tl.int64) * s + tl.arange(0, BM)[:, None] * s + o_n[None, :]


@triton.jit
def score(
    p_q,
    p_k,
    p_w,
    p_score,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    start,
    stop,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute index scores. grid as `teach`. p_q and p_w begin at `start`; DP is 2^n >= D."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m = start + o_m < stop
    if i_n * BN < start + (i_m + 1) * BM:
        k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
        total = tl.zeros((BM, BN), tl.float32)
        for i_h in range(n_heads):
            w = tl.load(p_w + o_m * s_w + i_h, mask=m_m, other=0.0)
            q = _rows(p_q + i_h * s_qh, i_m * BM, stop - start, s_qt, BM, D, DP)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            total += tl.maximum(x, 0.0) * w[:, None]
        tl.store(_tile(p_score, i_m * BM, s_score, o_n, BM), total)


@triton.jit
def compare(
    p_score,
    p_target,
    p_value,
    s_score,
    s_target,
    start,
    n_queries,
    margin,
    MULTI: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the loss of each row and overwrite its scores with their gradient d. grid (rows,).

    p_value fp32 [queries]: the loss without the entropies of `teach`, which belong to MULTI. d is
    zero in `margin` columns after the last visible key and in the rows after the last query, so
    that tiles of gradients need no masks. Rows are s_score and s_target long.
    """
    i_m = tl.program_id(0)
    p_score += i_m.to(tl.int64) * s_score
    p_target += i_m.to(tl.int64) * s_target
    end = start + i_m + 1
    if i_m < n_queries:
        top = tl.full((), float("-inf"), tl.float32)
        sums = tl.zeros((BN,), tl.float32)
        mass = tl.zeros((BN,), tl.float32)
        for base in range(0, end, BN):
            o_n = base + tl.arange(0, BN)
            x = tl.where(o_n < end, tl.load(p_score + o_n, mask=o_n < s_score), float("-inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp2((top - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
            mass += tl.where(o_n < end, tl.load(p_target + o_n, mask=o_n < s_target), 0.0)
            top = higher
        norm = top + tl.log2(tl.sum(sums, 0)) * LN2
        total = tl.sum(mass, 0)
        value = tl.zeros((BN,), tl.float32)
        for base in range(0, tl.minimum(end + margin, s_score), BN):
            o_n = base + tl.arange(0, BN)
            log_q = tl.where(
                o_n < end, tl.load(p_score + o_n, mask=o_n < s_score) - norm, float("-inf")
            )
            target = tl.where(o_n < end, tl.load(p_target + o_n, mask=o_n < s_target), 0.0)
            positive = target > 0
            nats = tl.where(positive, -log_q, 0.0)
            if not MULTI:
                nats += tl.log2(tl.where(positive, target, 1.0)) * LN2
            value += target * nats
            tl.store(p_score + o_n, tl.exp2(log_q * LOG2E) * total - target, mask=o_n < s_score)
        tl.store(p_value + i_m, tl.sum(value, 0))
    else:
        for base in range(0, s_score, BN):
            o_n = base + tl.arange(0, BN)
            tl.store(p_score + o_n, tl.zeros((BN,), tl.float32), mask=o_n < s_score)


@triton.jit
def grad_queries(
    p_q,
    p_k,
    p_w,
    p_score,
    p_dq,
    p_dw,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    s_dw,
    start,
    stop,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dq and dw of a head. grid (blocks of BM queries, heads).

    p_dq fp32 [queries, heads, D] and p_dw fp32 begin at `start`, as p_q and p_w do.
    """
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, DP)
    m_m = start + o_m < stop
    q = _rows(p_q + i_h * s_qh, i_m * BM, stop - start, s_qt, BM, D, DP)
    w = tl.load(p_w + o_m * s_w + i_h, mask=m_m, other=0.0)
    dq = tl.zeros((BM, DP), tl.float32)
    dw = tl.zeros((BM,), tl.float32)
    for base in range(0, tl.minimum(start + (i_m + 1) * BM, stop), BN):
        o_n = base + tl.arange(0, BN)
        k = _rows(p_k, base, stop, s_kt, BN, D, DP)
        d = tl.load(_tile(p_score, i_m * BM, s_score, o_n, BM))
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        d = tl.where(x > 0, d, 0.0)
        dw += tl.sum(x * d, 1)
        dq = tl.dot((d * w[:, None]).to(k.dtype), k, dq, input_precision="ieee")
    at = (o_m[:, None].to(tl.int64) * n_heads + i_h) * D + o_d[None, :]
    tl.store(p_dq + at, dq, mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(p_dw + o_m * s_dw + i_h, dw, mask=m_m)


@triton.jit
def grad_keys(
    p_q,
    p_k,
    p_w,
    p_score,
    p_dk,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    start,
    stop,
    n_heads,
    n_share,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute partial sums of dk over the queries start..stop. grid (blocks of BN keys, shares).

    A share is n_share heads. p_dk fp32 [shares, stop, D].
    """
    i_n = tl.program_id(0)
    i_first = tl.program_id(1) * n_share
    p_dk += tl.program_id(1).to(tl.int64) * stop * D
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, DP)
    m_n = o_n < stop
    k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
    dk = tl.zeros((BN, DP), tl.float32)
    first = tl.maximum(i_n * BN - start, 0) // BM * BM
    i_h, base = i_first, first
    for _ in range(tl.minimum(n_share, n_heads - i_first) * tl.cdiv(stop - start - first, BM)):
        o_m = base + tl.arange(0, BM)
        q = _rows(p_q + i_h * s_qh, base, stop - start, s_qt, BM, D, DP)
        d = tl.trans(tl.load(_tile(p_score, base, s_score, o_n, BM)))
        w = tl.load(p_w + o_m * s_w + i_h, mask=start + o_m < stop, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        dk = tl.dot(tl.where(x > 0, d * w[None, :], 0.0).to(q.dtype), q, dk, input_precision="ieee")
        base += BM
        i_h += tl.where(start + base < stop, 0, 1)
        base = tl.where(start + base < stop, base, first)
    p_at = p_dk + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(p_at, dk, mask=m_n[:, None] & (o_d < D)[None, :])
