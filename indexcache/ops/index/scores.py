"""Compute indexer scores in Triton: I[t, s] = k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s]).

  scores_tiles   prefill. A program owns BM queries and a segment of the keys. It loops over the
                 heads for each tile of BN keys, which stays in shared memory, so the sum over heads
                 stays in registers. It stores rows of fp32 scores, or appends the keys that reach
                 the row's threshold to the lists of topk.py; then no [S, T] exists
  scores_rows    decoding and pools. A program owns one query and BN keys, consecutive ones or those
                 of candidate ids. The heads are the columns of one product
  rescue_fused   computes all scores of a row that `pick` flagged and selects from them

An optional pointer is None where it is not needed; Triton compiles a kernel for each case:
`p_scale` are the scales of the keys, `p_ids` [rows, columns] the ids of the keys of each row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from indexcache.ops.index.topk_parts import select_row
from indexcache.ops.primitives import NONE, prefetch, rows_visible, sort_key


@triton.jit
def scores_tiles(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_score,
    p_thr,
    p_key,
    p_id,
    p_count,
    s_kb,
    s_kt,
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
    STAGES: tl.constexpr,
):
    """Store rows of scores, or append to lists where p_score is None.

    The grid is (segments, blocks of BM queries, batch). Column c of n_columns is key c * STRIDE: a
    sample where STRIDE > 1.
    """
    i_seg = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    # Late rows see the most keys. They start first, and the short ones fill the tail.
    i_m = tl.num_programs(1) - 1 - tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_row = o_m < n_queries
    i_row = i_b * n_queries + o_m.to(tl.int64)
    visible = rows_visible(tl.load(p_offset + i_b), o_m, n_keys).to(tl.int32)
    visible = tl.where(m_row, (visible + STRIDE - 1) // STRIDE, 0)
    start = i_seg * segment
    end = tl.minimum(tl.minimum(start + segment, n_columns), tl.max(visible, 0))
    o_d = tl.arange(0, D)
    if p_score is None:
        min_key = tl.load(p_thr + i_row, mask=m_row, other=0x7FFFFFFF)
        count = tl.zeros((BM,), tl.int32)
        i_list = i_row * tl.num_programs(0) + i_seg
    for base in range(start, end, BN):
        o_n = base + tl.arange(0, BN)
        m_n = o_n < n_columns
        at_k = i_b * s_kb + o_n.to(tl.int64) * STRIDE * s_kt
        k = tl.load(p_k + at_k[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
        score = tl.zeros((BM, BN), tl.float32)
        for h in tl.range(0, H, num_stages=STAGES):
            at_q = i_row * H + h
            q = tl.load(p_q + at_q[:, None] * D + o_d[None, :], mask=m_row[:, None], other=0.0)
            w = tl.load(p_w + at_q, mask=m_row, other=0.0)
            dot = tl.dot(q, tl.trans(k), input_precision="ieee")
            score += tl.maximum(dot, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[:, None]
        if p_scale is not None:
            at_scale = p_scale + i_b * n_keys + o_n * STRIDE
            score *= tl.load(at_scale, mask=m_n, other=0.0)[None, :]
        inside = o_n[None, :] < tl.minimum(visible, end)[:, None]
        if p_score is None:
            key = sort_key(score)
            keep = inside & (key >= min_key[:, None])
            slot = count[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            fits = keep & (slot < CAP)
            at = i_list[:, None] * CAP + slot
            tl.store(p_key + at, key, mask=fits)
            tl.store(p_id + at, tl.broadcast_to(o_n[None, :], (BM, BN)), mask=fits)
            count += tl.sum(keep.to(tl.int32), 1)
        else:
            tl.store(p_score + i_row[:, None] * s_row + o_n[None, :], score, mask=inside)
    if p_score is None:
        tl.store(p_count + i_list, count, mask=m_row)


@triton.jit
def _score_keys(
    p_q, p_k, p_w, p_scale, o_key, m_key, s_kt, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr
):
    """Return the fp32 scores of one query against the keys o_key; meaningless where m_key is false.

    HP: number of heads, padded to the minimum of a product.
    """
    o_h = tl.arange(0, HP)
    o_d = tl.arange(0, D)
    q = tl.load(p_q + o_h[:, None] * D + o_d[None, :], mask=o_h[:, None] < H, other=0.0)
    w = tl.load(p_w + o_h, mask=o_h < H, other=0.0)
    at_k = o_key[:, None].to(tl.int64) * s_kt + o_d[None, :]
    k = tl.load(p_k + at_k, mask=m_key[:, None], other=0.0)
    dot = tl.dot(k, tl.trans(q), input_precision="ieee")
    score = tl.sum(tl.maximum(dot, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :], 1)
    if p_scale is not None:
        score *= tl.load(p_scale + o_key, mask=m_key, other=0.0)
    return score


@triton.jit
def _score_row(
    p_q,
    p_k,
    p_w,
    p_scale,
    i_row,
    i_b,
    o_key,
    m_key,
    s_kb,
    s_kt,
    n_keys,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
):
    """Return the sort keys of query i_row of batch entry i_b; NONE where m_key is false."""
    at_q = i_row * H
    if p_scale is not None:
        p_scale += i_b * n_keys
    score = _score_keys(
        p_q + at_q * D, p_k + i_b * s_kb, p_w + at_q, p_scale, o_key, m_key, s_kt, H, HP, D
    )
    return tl.where(m_key, sort_key(score), NONE)


@triton.jit
def scores_rows(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_ids,
    p_key,
    p_clear,
    s_kb,
    s_kt,
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
    PDL: tl.constexpr,
):
    """Store rows of sort keys; grid (rows x column blocks,), rows first.

    Column c of a row is key p_ids[row, c], or key c where p_ids is None. What is not visible gets
    the key NONE, unless p_ids is None and nothing of a block is visible: then nothing is stored.

    This also clears the n_clear integers at p_clear for the next kernel, which saves a launch.
    PDL: keys come to the L2 cache while the kernel before still runs. Needs p_ids None.
    """
    if PDL:
        gdc_launch_dependents()
        o_early = tl.program_id(0) // n_rows * BN + tl.arange(0, BN)
        o_line = tl.arange(0, D * p_k.dtype.element_ty.primitive_bitwidth // 1024)
        o_line *= 1024 // p_k.dtype.element_ty.primitive_bitwidth
        p_early = p_k + ((tl.program_id(0) % n_rows) // n_queries).to(tl.int64) * s_kb
        p_early += o_early[:, None].to(tl.int64) * s_kt
        prefetch(p_early + o_line[None, :], (o_early < n_keys)[:, None] & (o_line[None, :] >= 0))
        gdc_wait()
    if p_clear is not None:
        for at in range(tl.program_id(0) * BN, n_clear, tl.num_programs(0) * BN):
            o_clear = at + tl.arange(0, BN)
            tl.store(p_clear + o_clear, tl.zeros((BN,), tl.int32), mask=o_clear < n_clear)
    i_row = (tl.program_id(0) % n_rows).to(tl.int64)
    base = tl.program_id(0) // n_rows * BN
    o_n = base + tl.arange(0, BN)
    i_b = i_row // n_queries
    visible = rows_visible(tl.load(p_offset + i_b), i_row % n_queries, n_keys)
    p_row = p_key + i_row * s_row
    # Ids are ascending, and -1 at the end only. If the block's first key is not visible, none is.
    first = base
    if p_ids is not None:
        first = tl.load(p_ids + i_row * s_ids + base)
    if (first >= 0) & (first < visible):
        o_key = o_n
        if p_ids is not None:
            o_key = tl.load(p_ids + i_row * s_ids + o_n, mask=o_n < n_columns, other=-1)
        m_key = (o_key >= 0) & (o_key < visible)
        key = _score_row(
            p_q, p_k, p_w, p_scale, i_row, i_b, o_key, m_key, s_kb, s_kt, n_keys, H, HP, D
        )
        tl.store(p_row + o_n, key, mask=o_n < n_columns)
    elif p_ids is not None:
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
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select again the rows that are flagged; grid (workers,), which share n_rows rows.

    A worker writes all keys of a row into its own row of p_work and bisects there. Column c of a
    row is key p_ids[row, c], or key c where p_ids is None.
    """
    i_work = tl.program_id(0).to(tl.int64)
    p_row = p_work + i_work * s_work
    for i_at in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        if tl.load(p_flag + i_at) != 0:
            # This has 64 bits, also in the interpreter, where the loop counts in Python.
            i_row = i_work * 0 + i_at
            i_b = i_row // n_queries
            visible = rows_visible(tl.load(p_offset + i_b), i_row % n_queries, n_keys).to(tl.int32)
            end = visible
            p_map = p_ids
            if p_ids is not None:
                end = n_columns
                p_map = p_ids + i_row * s_ids
            for base in range(0, end, BN):
                o_n = base + tl.arange(0, BN)
                o_key = o_n
                if p_ids is not None:
                    o_key = tl.load(p_map + o_n, mask=o_n < end, other=-1)
                m_key = (o_key >= 0) & (o_key < visible)
                key = _score_row(
                    p_q, p_k, p_w, p_scale, i_row, i_b, o_key, m_key, s_kb, s_kt, n_keys, H, HP, D
                )
                tl.store(p_row + o_n, key, mask=o_n < end)
            tl.debug_barrier()  # Other threads of this program read these writes.
            select_row(p_row, end, p_map, p_out + i_row * TOPK, TOPK, BLOCK)
            if POOL > 0:
                select_row(p_row, end, p_map, p_pool + i_row * POOL, POOL, BLOCK)
            tl.debug_barrier()
