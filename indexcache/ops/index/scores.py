"""Indexer scores: I[t, s] = k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s]).

`scores_tiles`: prefill. A program owns BM queries and a segment of the keys; for each tile of BN keys, held in shared memory, it
loops over the heads, so the sum over heads stays in registers. It either stores a row of int32 keys (`bits.sort_key`) or
appends what reaches the row's threshold to the lists of ops/select.py, and then no [L, L] exists.
`scores_rows`: decode and pools. A program owns one query and BN keys (contiguous, or gathered by candidate ids); the heads
are columns of one product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.index.topk import select_row
from indexcache.ops.primitives import NONE, rows_visible, sort_key


@triton.jit
def scores_tiles(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_thr,
    p_score,
    p_key,
    p_id,
    p_count,
    s_kb,
    s_kt,
    s_scale,
    s_row,
    n_queries,
    n_columns,
    n_keys,
    segment,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STRIDE: tl.constexpr,
    CAP: tl.constexpr,
    APPEND: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (segments, query blocks, batch). Column c is key c * STRIDE: a sample where STRIDE > 1; n_columns of them."""
    i_seg, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # late rows see most: start them first, the short ones fill the tail
    i_m = tl.num_programs(1) - 1 - tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_row = o_m < n_queries
    i_row = i_b * n_queries + o_m.to(tl.int64)
    seen = rows_visible(tl.load(p_offset + i_b), o_m, n_keys).to(tl.int32)
    seen = tl.where(m_row, (seen + STRIDE - 1) // STRIDE, 0)
    start = i_seg * segment
    end = tl.minimum(tl.minimum(start + segment, n_columns), tl.max(seen, 0))
    o_d = tl.arange(0, D)
    if APPEND:
        least = tl.load(p_thr + i_row, mask=m_row, other=0x7FFFFFFF)
        count = tl.zeros((BM,), tl.int32)
        i_list = i_row * tl.num_programs(0) + i_seg
    for base in range(start, end, BN):
        o_n = base + tl.arange(0, BN)
        m_n = o_n < n_columns
        at_k = i_b * s_kb + o_n.to(tl.int64) * STRIDE * s_kt
        k = tl.load(p_k + at_k[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
        total = tl.zeros((BM, BN), tl.float32)
        for h in tl.range(0, H, num_stages=STAGES):
            at_q = i_row * H + h
            q = tl.load(p_q + at_q[:, None] * D + o_d[None, :], mask=m_row[:, None], other=0.0)
            w = tl.load(p_w + at_q, mask=m_row, other=0.0)
            dot = tl.dot(q, tl.trans(k), input_precision="ieee")
            total += tl.maximum(dot, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[:, None]
        if SCALED:
            total *= tl.load(p_scale + i_b * s_scale + o_n * STRIDE, mask=m_n, other=0.0)[None, :]
        inside = o_n[None, :] < tl.minimum(seen, end)[:, None]
        if APPEND:
            key = sort_key(total)
            keep = inside & (key >= least[:, None])
            slot = count[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            fits = keep & (slot < CAP)
            at = i_list[:, None] * CAP + slot
            tl.store(p_key + at, key, mask=fits)
            tl.store(p_id + at, tl.broadcast_to(o_n[None, :], (BM, BN)), mask=fits)
            count += tl.sum(keep.to(tl.int32), 1)
        else:
            tl.store(p_score + i_row[:, None] * s_row + o_n[None, :], total, mask=inside)
    if APPEND:
        tl.store(p_count + i_list, count, mask=m_row)


@triton.jit
def row_tile(
    p_q,
    p_k,
    p_w,
    p_scale,
    o_key,
    m_key,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    s_kt,
    SCALED: tl.constexpr,
):
    """Scores of one query against the keys o_key, fp32; where m_key is false the value has no meaning."""
    o_h, o_d = tl.arange(0, HP), tl.arange(0, D)
    q = tl.load(p_q + o_h[:, None] * D + o_d[None, :], mask=o_h[:, None] < H, other=0.0)
    w = tl.load(p_w + o_h, mask=o_h < H, other=0.0)
    k = tl.load(
        p_k + o_key[:, None].to(tl.int64) * s_kt + o_d[None, :], mask=m_key[:, None], other=0.0
    )
    dot = tl.dot(k, tl.trans(q), input_precision="ieee")
    score = tl.sum(tl.maximum(dot, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :], 1)
    if SCALED:
        score *= tl.load(p_scale + o_key, mask=m_key, other=0.0)
    return score


@triton.jit
def scores_rows(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_ids,
    p_score,
    p_clear,
    s_kb,
    s_kt,
    s_scale,
    s_ids,
    s_row,
    n_rows,
    n_queries,
    n_columns,
    n_keys,
    n_clear,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    GATHER: tl.constexpr,
    SCALED: tl.constexpr,
):
    """grid (rows x column blocks,), rows first. GATHER: column c of a row is key p_ids[row, c]; what is not visible gets the key NONE.

    Clears n_clear integers of p_clear for the kernel that comes next: a launch less.
    """
    for at in range(tl.program_id(0) * BN, n_clear, tl.num_programs(0) * BN):
        o_clear = at + tl.arange(0, BN)
        tl.store(p_clear + o_clear, tl.zeros((BN,), tl.int32), mask=o_clear < n_clear)
    i_row = (tl.program_id(0) % n_rows).to(tl.int64)
    base = tl.program_id(0) // n_rows * BN
    o_n = base + tl.arange(0, BN)
    i_b = i_row // n_queries
    seen = rows_visible(tl.load(p_offset + i_b), i_row % n_queries, n_keys)
    p_row = p_score + i_row * s_row
    lowest = base
    if GATHER:
        lowest = tl.load(p_ids + i_row * s_ids + base)
    if (lowest >= 0) & (
        lowest < seen
    ):  # ids are ascending, and -1 only at their end: else no key of the block is visible
        o_key = o_n
        if GATHER:
            o_key = tl.load(p_ids + i_row * s_ids + o_n, mask=o_n < n_columns, other=-1)
        m_key = (o_key >= 0) & (o_key < seen)
        at_q = i_row * H
        p_at = p_scale + i_b * s_scale
        score = row_tile(
            p_q + at_q * D, p_k + i_b * s_kb, p_w + at_q, p_at, o_key, m_key, H, HP, D, s_kt, SCALED
        )
        tl.store(p_row + o_n, tl.where(m_key, sort_key(score), NONE), mask=o_n < n_columns)
    elif GATHER:
        tl.store(p_row + o_n, tl.full((BN,), NONE, tl.int32), mask=o_n < n_columns)


@triton.jit
def rescue_fused(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_flag,
    p_ids,
    p_work,
    p_out,
    p_pool,
    s_kb,
    s_kt,
    s_scale,
    s_ids,
    s_work,
    n_rows,
    n_queries,
    n_keys,
    n_columns,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    SCALED: tl.constexpr,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    """grid (workers,). The workers share the flagged of n_rows rows: all scores of a row into a worker's row of p_work, then bisection.

    GATHER: column c of a row is key p_ids[row, c].
    """
    i_work = tl.program_id(0).to(tl.int64)
    p_row = p_work + i_work * s_work
    for i_at in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        if tl.load(p_flag + i_at) != 0:
            i_row = i_work * 0 + i_at  # 64 bits, also where the loop counts in Python (interpreter)
            i_b = i_row // n_queries
            seen = rows_visible(tl.load(p_offset + i_b), i_row % n_queries, n_keys).to(tl.int32)
            end = seen
            if GATHER:
                end = n_columns
            at_q = i_row * H
            p_row_ids = p_ids + i_row * s_ids
            for base in range(0, end, BN):
                o_n = base + tl.arange(0, BN)
                o_key = o_n
                if GATHER:
                    o_key = tl.load(p_row_ids + o_n, mask=o_n < end, other=-1)
                seen_n = (o_key >= 0) & (o_key < seen)
                p_at, p_keys = p_scale + i_b * s_scale, p_k + i_b * s_kb
                score = row_tile(
                    p_q + at_q * D, p_keys, p_w + at_q, p_at, o_key, seen_n, H, HP, D, s_kt, SCALED
                )
                tl.store(p_row + o_n, tl.where(seen_n, sort_key(score), NONE), mask=o_n < end)
            tl.debug_barrier()  # other threads of this program read what these wrote
            select_row(p_row, end, p_row_ids, p_out + i_row * TOPK, TOPK, BLOCK, False, GATHER)
            if POOL > 0:
                select_row(p_row, end, p_row_ids, p_pool + i_row * POOL, POOL, BLOCK, False, GATHER)
            tl.debug_barrier()
