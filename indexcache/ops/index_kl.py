"""The distillation warm-up's loss and gradients on a GPU: one indexer learns the attention of the layers it serves, all of it dense.

Queries come in chunks of R rows against the N keys before the chunk's end; two fp32 matrices [R, N] are held, and one teacher's
keys at a time.

  normalise    a teacher's log-sum-exp of each query and head, where the attention's own kernel did not give it
  teach        target += weight * p, p = mean_h exp(logit - normaliser), and the sum of p log p
  score        the student's scores I
  compare      a row at a time: log q = I - logsumexp I, the loss, and d = q - target in the place of I
  grad_queries dq and dw: for a head, over the keys, products again from q and k
  grad_keys    dk: a program owns its keys and walks the chunk's queries and some heads; parts are added up in order, nothing is atomic

Products are of the inputs' dtype with fp32 sums. Tiles after the diagonal are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    """a[o_m] @ b[o_n].T, fp32 [BM, BN]; rows of E numbers, BE at a time."""
    total = tl.zeros((BM, BN), tl.float32)
    for e in tl.static_range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        a = tl.load(
            p_a + o_m[:, None].to(tl.int64) * s_a + o_e[None, :],
            mask=m_m[:, None] & (o_e < E)[None, :],
            other=0.0,
        )
        b = tl.load(
            p_b + o_n[None, :].to(tl.int64) * s_b + o_e[:, None],
            mask=m_n[None, :] & (o_e < E)[:, None],
            other=0.0,
        )
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
    """grid (blocks of BM queries of start..stop, heads). p_q and p_lse, fp32 [queries, heads] of base 2, begin at `start`. scale2: the
    scale times log2 e."""
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = start + o_m < stop
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for base in range(0, tl.minimum(start + (i_m + 1) * BM, stop), BN):
        o_n = base + tl.arange(0, BN)
        x = (
            _product(
                p_q + i_h * s_qh,
                p_k + i_h * s_kh,
                o_m,
                o_n,
                m_m,
                o_n < stop,
                s_qt,
                s_kt,
                E,
                BE,
                BM,
                BN,
            )
            * scale2
        )
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
    """grid (blocks of BM queries of start..stop, blocks of BN keys). p_q and p_lse begin at `start`. ADD: to what the target holds.
    p_entropy fp32, one number a program: the sum of p log p, nats."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = start + o_m < stop, o_n < stop
    value = 0.0
    if i_n * BN < start + (i_m + 1) * BM:
        p = tl.zeros((BM, BN), tl.float32)
        seen = (o_n[None, :] <= start + o_m[:, None]) & m_m[:, None]
        for i_h in range(n_heads):
            lse = tl.load(p_lse + o_m * n_heads + i_h, mask=m_m, other=0.0)
            x = (
                _product(
                    p_q + i_h * s_qh,
                    p_k + i_h * s_kh,
                    o_m,
                    o_n,
                    m_m,
                    m_n,
                    s_qt,
                    s_kt,
                    E,
                    BE,
                    BM,
                    BN,
                )
                * scale2
            )
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
    """The rows first..first + N of D numbers [N, DP], zeros after D and from `stop` on."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, DP)
    at = p + tl.cast(first, tl.int64) * s + o_n[:, None] * s + o_d[None, :]
    keep = (first + o_n < stop)[:, None]
    if D < DP:
        keep = keep & (o_d < D)[None, :]
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def _tile(p, first, s, o_n, BM: tl.constexpr):
    """Pointers to the rows first..first + BM and the columns o_n of a matrix in memory."""
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
    """grid as `teach`. p_q and p_w begin at `start`. D numbers in a row, DP a power of two."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m = start + o_m < stop
    if i_n * BN < start + (i_m + 1) * BM:
        k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
        total = tl.zeros((BM, BN), tl.float32)
        for i_h in range(n_heads):
            w = tl.load(p_w + o_m * s_w + i_h, mask=m_m, other=0.0)
            x = tl.dot(
                _rows(p_q + i_h * s_qh, i_m * BM, stop - start, s_qt, BM, D, DP),
                tl.trans(k),
                input_precision="ieee",
            )
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
    far,
    MULTI: tl.constexpr,
    BN: tl.constexpr,
):
    """grid (rows,). p_value fp32 [queries]: the loss less what `teach` adds for MULTI. d is zero for `far` columns after the last visible
    key, and in whole rows after the last query, so that tiles of gradients need no masks. Rows are s_score and s_target long."""
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
        whole = tl.sum(mass, 0)
        value = tl.zeros((BN,), tl.float32)
        for base in range(0, tl.minimum(end + far, s_score), BN):
            o_n = base + tl.arange(0, BN)
            log_q = tl.where(
                o_n < end, tl.load(p_score + o_n, mask=o_n < s_score) - norm, float("-inf")
            )
            target = tl.where(o_n < end, tl.load(p_target + o_n, mask=o_n < s_target), 0.0)
            some = target > 0
            inside = tl.where(some, -log_q, 0.0)
            if not MULTI:
                inside += tl.log2(tl.where(some, target, 1.0)) * LN2
            value += target * inside
            tl.store(p_score + o_n, tl.exp2(log_q * LOG2E) * whole - target, mask=o_n < s_score)
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
    p_d,
    p_dq,
    p_dw,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_d,
    s_dw,
    start,
    stop,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """grid (blocks of BM queries, heads). p_dq fp32 [queries, heads, D] and p_dw fp32 begin at `start`, as p_q and p_w do."""
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
        d = tl.load(_tile(p_d, i_m * BM, s_d, o_n, BM))
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
    p_d,
    p_dk,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_d,
    start,
    stop,
    n_heads,
    n_each,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """grid (blocks of BN keys, parts of n_each heads). p_dk fp32 [parts, stop, D]: what the queries start..stop give."""
    i_n = tl.program_id(0)
    i_first = tl.program_id(1) * n_each
    p_dk += tl.program_id(1).to(tl.int64) * stop * D
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, DP)
    m_n = o_n < stop
    k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
    dk = tl.zeros((BN, DP), tl.float32)
    first = tl.maximum(i_n * BN - start, 0) // BM * BM
    i_h, base = i_first, first
    for _ in range(tl.minimum(n_each, n_heads - i_first) * tl.cdiv(stop - start - first, BM)):
        o_m = base + tl.arange(0, BM)
        q = _rows(p_q + i_h * s_qh, base, stop - start, s_qt, BM, D, DP)
        d = tl.trans(tl.load(_tile(p_d, base, s_d, o_n, BM)))
        w = tl.load(p_w + o_m * s_w + i_h, mask=start + o_m < stop, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        dk = tl.dot(tl.where(x > 0, d * w[None, :], 0.0).to(q.dtype), q, dk, input_precision="ieee")
        base += BM
        i_h += tl.where(start + base < stop, 0, 1)
        base = tl.where(start + base < stop, base, first)
    p_at = p_dk + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(p_at, dk, mask=m_n[:, None] & (o_d < D)[None, :])
