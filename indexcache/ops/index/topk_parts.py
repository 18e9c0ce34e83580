"""Hold the pieces that the kernels which select from rows and lists share.

topk.py says what rows, lists and keys are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import NONE, kth_key, put, rows_visible, sort_key


@triton.jit
def as_keys(x):
    """Turn fp32 scores into sort keys. Keys stay as they are."""
    if x.dtype == tl.float32:
        return sort_key(x)
    else:
        return x


@triton.jit
def visible_keys(p_offset, i_row, n_queries, n_keys):
    """Return the number of keys that row i_row sees: all of them where p_offset is None."""
    if p_offset is not None:
        offset = tl.load(p_offset + i_row // n_queries)
        return rows_visible(offset, i_row % n_queries, n_keys).to(tl.int32)
    else:
        return n_keys


@triton.jit
def _place(slot, p_count, SEGMENTS: tl.constexpr, CAP: tl.constexpr, LOG: tl.constexpr):
    """Locate the slot-th entry of a row's lists when they are read one after the other."""
    if SEGMENTS == 1:
        return slot
    elif SEGMENTS <= 8:
        at = slot
        before = 0
        for i_seg in tl.static_range(SEGMENTS - 1):
            n = tl.load(p_count + i_seg)
            before += n
            at = tl.where(slot >= before, at + (CAP - n), at)
        return at
    else:
        # The entry's segment is the number of segments that end at or before the slot.
        counts = tl.load(p_count + tl.arange(0, SEGMENTS))
        ends = tl.cumsum(counts, 0)
        i_seg = tl.zeros_like(slot)
        for i_bit in tl.static_range(LOG):
            middle = i_seg + (1 << (LOG - 1 - i_bit))
            i_seg = tl.where(tl.gather(ends, middle - 1, 0) <= slot, middle, i_seg)
        i_seg = tl.minimum(i_seg, SEGMENTS - 1)
        return i_seg * CAP + slot - tl.gather(ends - counts, i_seg, 0)


@triton.jit
def write(
    p_key,
    p_id,
    p_count,
    p_map,
    p_out,
    end,
    cut,
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr = 1,
    CAP: tl.constexpr = 0,
    LOG: tl.constexpr = 0,
    limit=None,
):
    """Write the ids of the k best of `end` entries in order, then -1 up to K.

    The entries are a row (p_id is None: ids are columns) or its lists. Where `limit` is given, they
    are those columns of a row below it that p_map names. cut: the result of `kth_key`.
    """
    edge, reach, above = cut
    written = 0
    ties = 0
    for base in range(0, end, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        inside = slot < end
        at = slot
        if SEGMENTS > 1:
            at = _place(slot, p_count, SEGMENTS, CAP, LOG)
        if limit is not None:
            at = tl.load(p_map + slot, mask=inside, other=-1)
            inside = (at >= 0) & (at < limit)
        key = tl.where(inside, as_keys(tl.load(p_key + at, mask=inside, other=0)), NONE)
        chosen = (key >= edge) & (k > 0)
        if reach > k:
            equal = key == edge
            chosen = (key > edge) | (equal & (ties + tl.cumsum(equal.to(tl.int32), 0) <= k - above))
            ties += tl.sum(equal.to(tl.int32), 0)
        if p_id is not None:
            at = tl.load(p_id + at, mask=chosen, other=-1)
        if p_map is not None and limit is None:
            at = tl.load(p_map + at, mask=chosen, other=-1)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        put(p_out + written + rank - 1, at, chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
    for base in range(k // BLOCK * BLOCK, K, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        tl.store(p_out + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot >= k) & (slot < K))


@triton.jit
def cuts(keys, min_key, total, wanted, TOPK: tl.constexpr, POOL: tl.constexpr):
    """Return `kth_key` for the selection and for the pool; the keys of no candidate are NONE.

    min_key: a lower bound of the candidates' keys; NONE makes this find the smallest one.
    wanted: the number of ids in this row's pool, at least TOPK where POOL is greater.
    """
    low = min_key
    if min_key == NONE:
        low = tl.min(tl.where(keys == NONE, 0x7FFFFFFF, keys))
    high = tl.max(keys)
    if POOL > TOPK:
        pool_cut = kth_key(keys, low, high, total, tl.minimum(total, wanted), 0)
        cut = kth_key(keys, pool_cut[0], high, pool_cut[1], tl.minimum(total, TOPK), 0)
    else:
        cut = kth_key(keys, low, high, total, tl.minimum(total, TOPK), 0)
        pool_cut = cut
        if POOL > 0:
            pool_cut = kth_key(keys, cut[0], high, cut[1], tl.minimum(total, wanted), 0)
    return cut, pool_cut


@triton.jit
def cuts_of_lists(
    p_key,
    p_count,
    min_key,
    total,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Return `cuts` of the entries of a row's lists, at most SLOTS of them, in registers."""
    slot = tl.arange(0, SLOTS)
    at = _place(slot, p_count, SEGMENTS, CAP, LOG)
    keys = as_keys(tl.load(p_key + at, mask=slot < total, other=0))
    return cuts(tl.where(slot < total, keys, NONE), min_key, total, POOL, TOPK, POOL)


@triton.jit
def _ranks(flag):
    """Return the 1-based ranks of the flags set in [lists, entries], counted list by list."""
    flag = flag.to(tl.int32)
    counts = tl.sum(flag, 1)
    return (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(flag, 1)


@triton.jit
def write_tile(keys, ids, p_map, p_out, cut, k, K: tl.constexpr, FILL: tl.constexpr):
    """Write the ids of the k best of [lists, entries] in order, then -1 up to K."""
    edge, reach, above = cut
    chosen = (keys >= edge) & (k > 0)
    if reach > k:
        chosen = (keys > edge) | ((keys == edge) & (_ranks(keys == edge) <= k - above))
    if p_map is not None:
        ids = tl.load(p_map + ids, mask=chosen, other=-1)
    put(p_out + _ranks(chosen) - 1, ids, chosen)
    if k < K:
        slot = tl.arange(0, FILL)
        tl.store(p_out + slot, tl.full((FILL,), -1, tl.int32), mask=(slot >= k) & (slot < K))


@triton.jit
def _count_from(p_row, end, key, BLOCK: tl.constexpr):
    """Count the candidates of a row whose keys are at least `key`."""
    total = tl.zeros((BLOCK,), tl.int32)
    for base in range(0, end, BLOCK):
        o = base + tl.arange(0, BLOCK)
        keys = as_keys(tl.load(p_row + o, mask=o < end, other=0))
        total += ((o < end) & (keys >= key) & (keys != NONE)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def select_row(p_row, end, p_map, p_out, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write the best K ids of one row, -1 padded, by bisection over the values of its keys.

    Each step of the bisection reads the row once.
    """
    lo = tl.full((), -(2**31) + 1, tl.int64)
    hi = tl.full((), 2**31 - 1, tl.int64)
    reach = _count_from(p_row, end, lo.to(tl.int32), BLOCK)
    k = tl.minimum(reach, K)
    above = 0
    hi = tl.where(reach == k, lo, hi)
    while lo < hi:
        mid = lo + (hi - lo + 1) // 2
        count = _count_from(p_row, end, mid.to(tl.int32), BLOCK)
        reach = tl.where(count >= k, count, reach)
        above = tl.where(count >= k, above, count)
        lo = tl.where(count >= k, mid, lo)
        hi = tl.where(count >= k, tl.where(count == k, mid, hi), mid - 1)
    write(p_row, None, None, p_map, p_out, end, (lo.to(tl.int32), reach, above), k, K, BLOCK)
