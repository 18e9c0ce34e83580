"""Compute sparse attention over selected latents, in plain Triton.

A program of `attend` owns GROUP queries x H heads as the rows of one product, query i_m // H and
head i_m % H, so 20 heads of 3 queries fill 60 of 64 rows. It walks the union of the group's ids,
masked by the queries' bits, or the ids of one query where there are no groups. A tile of latents is
gathered once and serves as keys and values.

In decoding the ids are split over programs: each writes a partial result, and `combine` adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from indexcache.ops.primitives import LN2, prefetch


@triton.jit
def attend(
    p_q,
    p_latent,
    p_ids,
    p_bits,
    p_count,
    p_out,
    p_lse,
    s_lb,
    s_lt,
    scale2,
    n_queries,
    n_groups,
    n_slots,
    per_split,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend to selected latents. grid (groups x row blocks, splits, batch).

    p_ids and p_bits [groups, n_slots] and p_count [groups] are those of `QueryGroups`. Without
    groups p_bits and p_count are None and p_ids [queries, n_slots] has -1 anywhere.
    scale2 = scale * log2(e). SPLIT: out and lse are fp32 partial results [splits, rows, ..], each
    normalised and with a base-2 log-sum; otherwise they are final.
    """
    blocks: tl.constexpr = (GROUP * H + M - 1) // M
    i_group, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i_split, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PDL:
        # In a step of decoding the next kernel may start now, and this one waits. No kernel that
        # lets the next one start writes ids, so they can be read before; latents are only brought
        # to the L2 cache, because the newest one may not be written yet.
        gdc_launch_dependents()
        o_first = i_split * per_split + tl.arange(0, N)
        p_first = p_ids + (i_b * n_groups + i_group) * n_slots + o_first
        ids = tl.load(p_first, mask=o_first < n_slots, other=-1)
        o_line = tl.arange(0, 16) * (1024 // p_latent.dtype.element_ty.primitive_bitwidth)
        p_row = p_latent + i_b * s_lb + tl.maximum(ids, 0).to(tl.int64)[:, None] * s_lt
        prefetch(p_row + o_line[None, :], (ids >= 0)[:, None] & (o_line < V + R)[None, :])
        gdc_wait()
    o_m = i_block * M + tl.arange(0, M)
    o_q = i_group * GROUP + o_m // H
    m_row = (o_m < GROUP * H) & (o_q < n_queries)
    i_row = (i_b * n_queries + o_q) * H + o_m % H
    o_v, o_r = tl.arange(0, V), tl.arange(0, RP)
    p_row = p_q + (i_row * (V + R))[:, None]
    m_rope = m_row[:, None] & (o_r[None, :] < R)
    q = tl.load(p_row + o_v[None, :], mask=m_row[:, None], other=0.0)
    q_rope = tl.load(p_row + V + o_r[None, :], mask=m_rope, other=0.0)
    i_list = (i_b * n_groups + i_group) * n_slots
    total = n_slots
    if p_count is not None:
        total = tl.load(p_count + i_b * n_groups + i_group)
    start = i_split * per_split
    end = tl.minimum(start + per_split, total)
    p_latent += i_b * s_lb
    top = tl.full((M,), float("-inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, V), tl.float32)
    for base in tl.range(start, end, N, num_stages=STAGES):
        o_n = base + tl.arange(0, N)
        ids = tl.load(p_ids + i_list + o_n, mask=o_n < end, other=-1)
        m_n = ids >= 0
        at = tl.maximum(ids, 0).to(tl.int64)
        p_at = p_latent + at[:, None] * s_lt
        kv = tl.load(p_at + o_v[None, :], mask=m_n[:, None], other=0.0)
        m_k = m_n[:, None] & (o_r[None, :] < R)
        k_rope = tl.load(p_at + V + o_r[None, :], mask=m_k, other=0.0)
        logits = tl.dot(q, tl.trans(kv), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
        if p_bits is not None:
            bits = tl.load(p_bits + i_list + o_n, mask=o_n < end, other=0).to(tl.int32)
            seen = ((bits[None, :] >> (o_m // H)[:, None]) & 1) != 0
        else:
            seen = tl.broadcast_to(m_n[None, :], (M, N))
        logits = tl.where(seen, logits * scale2, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
        mass = mass * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(q.dtype), kv, out * fade[:, None], input_precision="ieee")
        top = higher
    out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
    lse = tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass))
    if SPLIT:
        i_row += i_split.to(tl.int64) * tl.num_programs(2) * n_queries * H
    else:
        lse *= LN2
    tl.store(p_out + i_row[:, None] * V + o_v[None, :], out, mask=m_row[:, None])
    tl.store(p_lse + i_row, lse, mask=m_row)


@triton.jit
def combine(
    p_part,
    p_plse,
    p_out,
    p_lse,
    n_rows,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the partial results of `attend` up, always in the same order. grid (rows, V / BLOCK)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, SP)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(
        p_plse + o_s.to(tl.int64) * n_rows + i_row, mask=o_s < SPLITS, other=float("-inf")
    )
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    mass = tl.sum(weight, 0)
    at = (o_s.to(tl.int64) * n_rows + i_row) * V
    partial = tl.load(p_part + at[:, None] + o_v[None, :], mask=(o_s < SPLITS)[:, None], other=0.0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(p_out + i_row * V + o_v, out)
    tl.store(
        p_lse + i_row,
        tl.where(mass == 0.0, float("-inf"), (top + tl.log2(mass)) * LN2),
        mask=tl.program_id(1) == 0,
    )
