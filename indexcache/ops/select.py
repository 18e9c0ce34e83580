"""Exact top-k of long rows in one pass over them, deterministic, ids ascending.

  threshold   ranks a sample of each row (one score in STRIDE) and takes a value a little below the wanted rank
  compact     one pass: every (key, position) at or above that value goes to a bounded list, a list per row and segment; the
              segments are walked in order, so lists are ascending by construction and nothing is atomic
  pick        finds the exact k-th key among the ~1.9 k listed and writes the ids; a row whose lists overflowed or hold
              fewer than k is flagged
  rescue      flagged rows only: bisection over the whole row. The sample decides speed, never the result

Scores travel as int32 keys (`bits.sort_key`); the key NONE marks what is no candidate. The fused score kernels
(ops/scores.py) write the same lists without a row of scores in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.bits import NONE, kth_key, rows_visible, sort_key


@triton.jit
def _as_keys(x, FLOAT: tl.constexpr):
    if FLOAT:
        return sort_key(x)
    else:
        return x


@triton.jit
def threshold(
    p_score, p_offset, p_thr, s_row, s_col, n_queries, n_keys, wanted, slack, limit,
    STRIDE: tl.constexpr, SAMPLE: tl.constexpr, FLOAT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """grid (rows,). Sample i of a row lies at column i * s_col and stands for key i * STRIDE. Rows of at most `limit` keys take all."""
    i_row = tl.program_id(0).to(tl.int64)
    seen = n_keys
    if CAUSAL:
        seen = rows_visible(tl.load(p_offset + i_row // n_queries), i_row % n_queries, n_keys).to(tl.int32)
    found = NONE
    if seen > limit:
        o = tl.arange(0, SAMPLE)
        keep = o < (seen + STRIDE - 1) // STRIDE
        x = tl.load(p_score + i_row * s_row + o.to(tl.int64) * s_col, mask=keep, other=0)
        keys = tl.where(keep, _as_keys(x, FLOAT), NONE)
        found = kth_key(keys, tl.min(tl.where(keep, keys, 0x7FFFFFFF), 0), wanted, slack)
    tl.store(p_thr + i_row, found)


@triton.jit
def compact(
    p_score, p_offset, p_thr, p_key, p_id, p_count, s_row, n_queries, n_keys, segment,
    CAP: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """grid (rows, segments). Lists are [rows, segments, CAP]; the count goes on past CAP, which is how `pick` sees an overflow."""
    i_row = tl.program_id(0).to(tl.int64)
    i_list = i_row * tl.num_programs(1) + tl.program_id(1)
    seen = n_keys
    if CAUSAL:
        seen = rows_visible(tl.load(p_offset + i_row // n_queries), i_row % n_queries, n_keys).to(tl.int32)
    start = tl.program_id(1) * segment
    end = tl.minimum(start + segment, seen)
    least = tl.load(p_thr + i_row)
    count = 0
    for base in range(start, end, BLOCK):
        o = base + tl.arange(0, BLOCK)
        x = tl.load(p_score + i_row * s_row + o, mask=o < end, other=0)
        key = _as_keys(x, FLOAT)
        keep = (o < end) & (key >= least) & (key != NONE)
        slot = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        fits = keep & (slot < CAP)
        tl.store(p_key + i_list * CAP + slot, key, mask=fits)
        tl.store(p_id + i_list * CAP + slot, o, mask=fits)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(p_count + i_list, count)


@triton.jit
def _emit(keys, ids, low, k, p_out, i_row, WIDTH: tl.constexpr, FILL: tl.constexpr):
    """Writes the k best of (keys, ids), in order of slots, and -1 up to WIDTH. Requires count(keys >= low) >= k, or k = 0."""
    edge = kth_key(keys, low, k, 0)
    above = (keys > edge) & (k > 0)
    equal = (keys == edge) & (k > 0) & (keys != NONE)
    missing = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(p_out + i_row * WIDTH + slot, ids, mask=chosen)
    o = tl.arange(0, FILL)
    tl.store(p_out + i_row * WIDTH + o, tl.full((FILL,), -1, tl.int32), mask=(o >= k) & (o < WIDTH))


@triton.jit
def pick(
    p_key, p_id, p_count, p_thr, p_map, p_out, p_pool, p_flag, s_map,
    TOPK: tl.constexpr, POOL: tl.constexpr, FILL: tl.constexpr, SEGMENTS: tl.constexpr, CAP: tl.constexpr, ALL: tl.constexpr,
    MAPPED: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """grid (rows,). LOG is log2 SEGMENTS. ALL slots in registers. A threshold of NONE means that the lists hold every candidate there is.

    MAPPED: ids are slots of a pool, the output is p_map[row, slot].
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_seg = tl.arange(0, SEGMENTS)
    counts = tl.load(p_count + i_row * SEGMENTS + o_seg)
    total = tl.sum(counts, 0)
    ends = tl.cumsum(counts, 0)
    least = tl.load(p_thr + i_row)
    most: tl.constexpr = POOL if POOL > TOPK else TOPK
    fits = (tl.max(counts, 0) <= CAP) & (total <= ALL) & ((least == NONE) | (total >= most))
    tl.store(p_flag + i_row, 1 - fits.to(tl.int32))
    if fits:
        slot = tl.arange(0, ALL)
        if SEGMENTS == 1:
            where = slot
        else:
            # the segment of a slot: how many segments end at or before it
            begin = tl.zeros((ALL,), tl.int32)
            for i_bit in tl.static_range(LOG):
                begin = tl.where(tl.gather(ends, begin + (1 << (LOG - 1 - i_bit)) - 1, 0) <= slot, begin + (1 << (LOG - 1 - i_bit)), begin)
            begin = tl.minimum(begin, SEGMENTS - 1)
            where = begin * CAP + slot - tl.gather(ends - counts, begin, 0)
        keep = slot < total
        i_at = i_row * SEGMENTS * CAP + where
        keys = tl.load(p_key + i_at, mask=keep, other=NONE)
        ids = tl.load(p_id + i_at, mask=keep, other=-1)
        if MAPPED:
            ids = tl.load(p_map + i_row * s_map + ids, mask=keep, other=-1)
        least = tl.maximum(least, tl.min(tl.where(keep, keys, 0x7FFFFFFF), 0))
        _emit(keys, ids, least, tl.minimum(total, TOPK), p_out, i_row, TOPK, FILL)
        if POOL > 0:
            _emit(keys, ids, least, tl.minimum(total, POOL), p_pool, i_row, POOL, FILL)


@triton.jit
def _count_lists(p_key, p_count, least, SEGMENTS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for i_seg in range(SEGMENTS):
        n = tl.load(p_count + i_seg)
        for base in range(0, n, BLOCK):
            o = base + tl.arange(0, BLOCK)
            total += (tl.load(p_key + i_seg * CAP + o, mask=o < n, other=NONE) >= least).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _emit_lists(p_key, p_id, p_count, p_map, p_out, low, high, total, K: tl.constexpr, SEGMENTS: tl.constexpr, CAP: tl.constexpr,
                BLOCK: tl.constexpr, MAPPED: tl.constexpr):  # fmt: skip
    """As `_emit`, passing over the lists again for each step of the bisection; returns the edge."""
    k = tl.minimum(total, K)
    lo, hi = low.to(tl.int64), high.to(tl.int64)
    while lo < hi:
        mid = lo + (hi - lo + 1) // 2
        count = _count_lists(p_key, p_count, mid.to(tl.int32), SEGMENTS, CAP, BLOCK)
        enough = count >= k
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, tl.where(count == k, mid, hi), mid - 1)
    edge = lo.to(tl.int32)
    missing = k - _count_lists(p_key, p_count, edge + 1, SEGMENTS, CAP, BLOCK)
    written = 0
    ties = 0
    for i_seg in range(SEGMENTS):
        n = tl.load(p_count + i_seg)
        for base in range(0, n, BLOCK):
            o = base + tl.arange(0, BLOCK)
            key = tl.load(p_key + i_seg * CAP + o, mask=o < n, other=NONE)
            equal = (key == edge) & (o < n)
            chosen = ((key > edge) & (o < n)) | (equal & (ties + tl.cumsum(equal.to(tl.int32), 0) <= missing))
            ids = tl.load(p_id + i_seg * CAP + o, mask=chosen, other=-1)
            if MAPPED:
                ids = tl.load(p_map + ids, mask=chosen, other=-1)
            tl.store(p_out + written + tl.cumsum(chosen.to(tl.int32), 0) - 1, ids, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), 0)
            ties += tl.sum(equal.to(tl.int32), 0)
    for base in range(0, K, BLOCK):
        o = base + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.full((BLOCK,), -1, tl.int32), mask=(o >= k) & (o < K))
    return edge


@triton.jit
def pick_long(
    p_key, p_id, p_count, p_thr, p_map, p_out, p_pool, p_flag, s_map,
    TOPK: tl.constexpr, POOL: tl.constexpr, SEGMENTS: tl.constexpr, CAP: tl.constexpr, ALL: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As `pick`, for lists too long for registers (pools): they stay in the caches and are passed over for each step."""
    i_row = tl.program_id(0).to(tl.int64)
    p_count += i_row * SEGMENTS
    p_key += i_row * SEGMENTS * CAP
    p_id += i_row * SEGMENTS * CAP
    total = 0
    longest = 0
    for i_seg in range(SEGMENTS):
        n = tl.load(p_count + i_seg)
        total += n
        longest = tl.maximum(longest, n)
    least = tl.load(p_thr + i_row)
    most: tl.constexpr = POOL if POOL > TOPK else TOPK
    fits = (longest <= CAP) & (total <= ALL) & ((least == NONE) | (total >= most))
    tl.store(p_flag + i_row, 1 - fits.to(tl.int32))
    if fits:
        top = tl.full((BLOCK,), NONE, tl.int32)
        low = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for i_seg in range(SEGMENTS):
            n = tl.load(p_count + i_seg)
            for base in range(0, n, BLOCK):
                o = base + tl.arange(0, BLOCK)
                key = tl.load(p_key + i_seg * CAP + o, mask=o < n, other=NONE)
                top = tl.maximum(top, key)
                low = tl.minimum(low, tl.where(o < n, key, 0x7FFFFFFF))
        high = tl.max(top, 0)
        start = tl.minimum(tl.min(low, 0), high)
        p_map += i_row * s_map
        if POOL > 0:
            edge = _emit_lists(p_key, p_id, p_count, p_map, p_pool + i_row * POOL, start, high, total, POOL, SEGMENTS, CAP, BLOCK, MAPPED)
            if POOL >= TOPK:
                start = edge
        _emit_lists(p_key, p_id, p_count, p_map, p_out + i_row * TOPK, start, high, total, TOPK, SEGMENTS, CAP, BLOCK, MAPPED)


@triton.jit
def _count_row(p_row, end, mid, BLOCK: tl.constexpr, FLOAT: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for base in range(0, end, BLOCK):
        o = base + tl.arange(0, BLOCK)
        key = _as_keys(tl.load(p_row + o, mask=o < end, other=0), FLOAT)
        total += ((o < end) & (key >= mid) & (key != NONE)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def select_row(p_row, end, p_map, p_out, K: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, MAPPED: tl.constexpr):
    """One row of scores by bisection over its values, a pass for each step; writes K ids, -1 padded."""
    lo = tl.full((), -(2**31) + 1, tl.int64)
    hi = tl.full((), 2**31 - 1, tl.int64)
    total = _count_row(p_row, end, lo.to(tl.int32), BLOCK, FLOAT)
    k = tl.minimum(total, K)
    while lo < hi:
        mid = lo + (hi - lo + 1) // 2
        count = _count_row(p_row, end, mid.to(tl.int32), BLOCK, FLOAT)
        enough = count >= k
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, tl.where(count == k, mid, hi), mid - 1)
    edge = lo.to(tl.int32)
    # edge is never the largest int32: that is a NaN's pattern, and sort_key makes none
    missing = k - _count_row(p_row, end, edge + 1, BLOCK, FLOAT)
    written = 0
    ties = 0
    for base in range(0, end, BLOCK):
        o = base + tl.arange(0, BLOCK)
        key = tl.where(o < end, _as_keys(tl.load(p_row + o, mask=o < end, other=0), FLOAT), NONE)
        equal = (key == edge) & (key != NONE)
        chosen = (key > edge) | (equal & (ties + tl.cumsum(equal.to(tl.int32), 0) <= missing))
        ids = o
        if MAPPED:
            ids = tl.load(p_map + o, mask=chosen, other=-1)
        tl.store(p_out + written + tl.cumsum(chosen.to(tl.int32), 0) - 1, ids, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
        ties += tl.sum(equal.to(tl.int32), 0)
    for base in range(0, K, BLOCK):
        o = base + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.full((BLOCK,), -1, tl.int32), mask=(o >= k) & (o < K))


@triton.jit
def rescue(
    p_score, p_offset, p_flag, p_map, p_out, p_pool, s_row, s_map, n_queries, n_keys,
    TOPK: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, CAUSAL: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """grid (rows,). Does nothing in rows that are not flagged."""
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(p_flag + i_row) != 0:
        seen = n_keys
        if CAUSAL:
            seen = rows_visible(tl.load(p_offset + i_row // n_queries), i_row % n_queries, n_keys).to(tl.int32)
        select_row(p_score + i_row * s_row, seen, p_map + i_row * s_map, p_out + i_row * TOPK, TOPK, BLOCK, FLOAT, MAPPED)
        if POOL > 0:
            select_row(p_score + i_row * s_row, seen, p_map + i_row * s_map, p_pool + i_row * POOL, POOL, BLOCK, FLOAT, MAPPED)
