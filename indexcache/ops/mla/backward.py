"""Compute the gradients of sparse attention over selected latents.

With P the weights, o the output, g its gradient and delta = sum_v o g, for every row (query and
head) and selected latent: dS = scale P (g . value - delta); dq = sum dS latent;
dlatent = sum_rows dS q, and P g on the value dims.

A program owns the same rows as in `attend`, so one product sums over a group's rows before
anything is written. The sum is written by fp32 atomics or, when the result must be deterministic,
as a row for each slot of the groups, which `gather_rows` adds up for each latent in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import LOG2E


@triton.jit
def _write(p, x, m, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(p, x, mask=m, sem="relaxed")
    else:
        tl.store(p, x, mask=m)


@triton.jit
def backward(
    p_q,
    p_latent,
    p_ids,
    p_bits,
    p_count,
    p_out,
    p_lse,
    p_grad,
    p_dq,
    p_dlatent,
    s_lb,
    s_lt,
    scale,
    n_queries,
    n_groups,
    n_slots,
    n_keys,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    SLICE: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Compute the gradients. grid (groups, batch).

    p_dlatent fp32: [batch, keys, V + R] of zeros (ATOMIC), or [groups, n_slots, V + R].
    """
    i_group, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, M)
    o_q = i_group * GROUP + o_m // H
    m_row = (o_m < GROUP * H) & (o_q < n_queries)
    i_row = (i_b * n_queries + o_q) * H + o_m % H
    o_v, o_r = tl.arange(0, V), tl.arange(0, RP)
    m_r = o_r < R
    at_q = (i_row * (V + R))[:, None]
    q = tl.load(p_q + at_q + o_v[None, :], mask=m_row[:, None], other=0.0)
    q_rope = tl.load(p_q + at_q + V + o_r[None, :], mask=m_row[:, None] & m_r[None, :], other=0.0)
    grad = tl.load(p_grad + i_row[:, None] * V + o_v[None, :], mask=m_row[:, None], other=0.0)
    out = tl.load(p_out + i_row[:, None] * V + o_v[None, :], mask=m_row[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(p_lse + i_row, mask=m_row, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
    i_list = (i_b * n_groups + i_group) * n_slots
    total = tl.load(p_count + i_b * n_groups + i_group)
    p_latent += i_b * s_lb
    dq = tl.zeros((M, V), tl.float32)
    dq_rope = tl.zeros((M, RP), tl.float32)
    for base in tl.range(0, total, N, num_stages=1):
        o_n = base + tl.arange(0, N)
        ids = tl.load(p_ids + i_list + o_n, mask=o_n < total, other=-1)
        m_n = ids >= 0
        at = tl.maximum(ids, 0).to(tl.int64)
        kv = tl.load(p_latent + at[:, None] * s_lt + o_v[None, :], mask=m_n[:, None], other=0.0)
        k_rope = tl.load(
            p_latent + at[:, None] * s_lt + V + o_r[None, :],
            mask=m_n[:, None] & m_r[None, :],
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(kv), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
        bits = tl.load(p_bits + i_list + o_n, mask=o_n < total, other=0).to(tl.int32)
        seen = (((bits[None, :] >> (o_m // H)[:, None]) & 1) != 0) & m_row[:, None]
        weight = tl.exp2(tl.where(seen, logits * (scale * LOG2E) - lse[:, None], float("-inf")))
        pull = tl.dot(grad, tl.trans(kv), input_precision="ieee")
        ds = (weight * (pull - delta[:, None]) * scale).to(q.dtype)
        dq = tl.dot(ds, kv, dq, input_precision="ieee")
        dq_rope = tl.dot(ds, k_rope, dq_rope, input_precision="ieee")
        weight16 = weight.to(q.dtype)
        if ATOMIC:
            at_row = (i_b * n_keys + at) * (V + R)
        else:
            at_row = (i_list + o_n) * (V + R)
        drope = tl.dot(tl.trans(ds), q_rope, input_precision="ieee")
        _write(
            p_dlatent + at_row[:, None] + V + o_r[None, :],
            drope,
            m_n[:, None] & m_r[None, :],
            ATOMIC,
        )
        # One slice of the value dims at a time: all of them and dq do not fit into the registers.
        # q is read from L2 again.
        for i_slice in tl.static_range(V // SLICE):
            o_p = i_slice * SLICE + tl.arange(0, SLICE)
            q_slice = tl.load(p_q + at_q + o_p[None, :], mask=m_row[:, None], other=0.0)
            grad_slice = tl.load(
                p_grad + i_row[:, None] * V + o_p[None, :], mask=m_row[:, None], other=0.0
            )
            dkv = tl.dot(tl.trans(ds), q_slice, input_precision="ieee")
            dkv = tl.dot(tl.trans(weight16), grad_slice, dkv, input_precision="ieee")
            _write(p_dlatent + at_row[:, None] + o_p[None, :], dkv, m_n[:, None], ATOMIC)
    tl.store(p_dq + at_q + o_v[None, :], dq, mask=m_row[:, None])
    tl.store(p_dq + at_q + V + o_r[None, :], dq_rope, mask=m_row[:, None] & m_r[None, :])


@triton.jit
def gather_rows(p_rows, p_order, p_start, p_dlatent, E: tl.constexpr, EP: tl.constexpr):
    """Sum rows p_order[p_start[i] : p_start[i + 1]] into dlatent[i]. grid (batch x keys,)."""
    i_key = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, EP)
    total = tl.zeros((EP,), tl.float32)
    for i in range(tl.load(p_start + i_key), tl.load(p_start + i_key + 1)):
        total += tl.load(p_rows + tl.load(p_order + i) * E + o, mask=o < E, other=0.0)
    tl.store(p_dlatent + i_key * E + o, total, mask=o < E)
