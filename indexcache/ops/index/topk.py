"""Exact top-k of long rows in one pass over them, deterministic, ids ascending.

  threshold   ranks a sample of each row and takes a value a little below the wanted rank
  compact     one pass: every (key, position) at or above that value goes to a bounded list, a list per row and segment; the
              segments are walked in order, so lists are ascending by construction and nothing is atomic
  pick        finds the exact k-th key among the listed and writes the ids; a row whose lists overflowed or hold fewer than k is
              flagged, and selected by bisection over the whole row. The sample decides speed, never the result
  pick_row    rows short enough for registers (pools): the same without lists

Scores are compared as int32 keys (`bits.sort_key`); the key NONE marks what is no candidate. Lists hold keys, or scores as they
are. The fused score kernels (ops/scores.py) write the same lists without a row of scores in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import LOWEST, NONE, kth_key, put, rows_visible, sort_key


@triton.jit
def _as_keys(x, FLOAT: tl.constexpr):
    if FLOAT:
        return sort_key(x)
    else:
        return x


@triton.jit
def _seen(p_offset, i_row, n_queries, n_keys, CAUSAL: tl.constexpr):
    if CAUSAL:
        return rows_visible(tl.load(p_offset + i_row // n_queries), i_row % n_queries, n_keys).to(
            tl.int32
        )
    else:
        return n_keys


@triton.jit
def threshold(
    p_score,
    p_offset,
    p_thr,
    s_row,
    s_col,
    n_queries,
    n_keys,
    wanted,
    slack,
    limit,
    STRIDE: tl.constexpr,
    SAMPLE: tl.constexpr,
    FLOAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """grid (rows,). Sample i of a row lies at column i * s_col and stands for key i * STRIDE. Rows of at most `limit` keys take all.

    PAIRS: samples of unsampled rows, two in each 64 bytes that memory gives at once, 8 columns apart.
    """
    i_row = tl.program_id(0).to(tl.int64)
    seen = _seen(p_offset, i_row, n_queries, n_keys, CAUSAL)
    found = NONE
    if seen > limit:
        o = tl.arange(0, SAMPLE)
        if PAIRS:
            total = seen // (2 * STRIDE) * 2 + tl.minimum((seen % (2 * STRIDE) + 7) // 8, 2)
            o_col = (o // 2 * (2 * STRIDE) + o % 2 * 8).to(tl.int64)
        else:
            total = (seen + STRIDE - 1) // STRIDE
            o_col = o.to(tl.int64) * s_col
        keep = o < total
        x = tl.load(p_score + i_row * s_row + o_col, mask=keep, other=0)
        keys = tl.where(keep, _as_keys(x, FLOAT), NONE)
        low = tl.min(tl.where(keep, keys, 0x7FFFFFFF), 0)
        found, _, _ = kth_key(keys, low, tl.max(keys, 0), total, tl.minimum(wanted, total), slack)
    tl.store(p_thr + i_row, found)


@triton.jit
def _wide(x):
    """The four bytes of x as the four 16-bit fields of an int64."""
    x = x.to(tl.int64)
    x = (x | (x << 16)) & 0x0000FFFF0000FFFF
    return (x | (x << 8)) & 0x00FF00FF00FF00FF


@triton.jit
def compact(
    p_score,
    p_offset,
    p_thr,
    p_key,
    p_id,
    p_count,
    s_row,
    n_queries,
    n_keys,
    segment,
    CAP: tl.constexpr,
    FLOAT: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """grid (rows, segments), one warp. Lists are [rows, segments, CAP]; the count goes on past CAP: so `pick` sees an overflow.

    A tile is 8 groups of 32 lanes x 4 keys. Few keys pass, so a lane makes them the bits of one word: only words are scanned (a
    byte a group, all groups at once), and only set bits are stored.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_list = i_row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1) * segment
    end = tl.minimum(start + segment, _seen(p_offset, i_row, n_queries, n_keys, CAUSAL))
    least = tl.maximum(tl.load(p_thr + i_row), NONE + 1)
    edge = (least ^ ((least >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    p_row = p_score + i_row * s_row
    p_key += i_list * CAP
    p_id += i_list * CAP
    o_group, o_lane, o_4 = tl.arange(0, 8), tl.arange(0, 32), tl.arange(0, 4)
    o_tile = o_lane[:, None, None] * 4 + o_group[None, :, None] * 128 + o_4[None, None, :]
    bit = (1 << (o_group[:, None] * 4 + o_4[None, :])).to(tl.uint32, bitcast=True)[None, :, :]
    ones: tl.constexpr = 0x0001000100010001
    count = 0
    for base in range(start, end, 1024):
        if base + 1024 <= end:
            x = tl.load(p_row + base + o_tile)
        elif FLOAT:
            x = tl.load(p_row + base + o_tile, mask=o_tile < end - base, other=float("nan"))
        else:
            x = tl.load(p_row + base + o_tile, mask=o_tile < end - base, other=NONE)
        if FLOAT:
            keep = x >= edge
            if least <= LOWEST:  # everything, NaN too
                keep = o_tile < end - base
        else:
            keep = x >= least
        word = tl.sum(tl.sum(tl.where(keep, bit, 0), 2), 1)
        n = word - ((word >> 1) & 0x55555555)
        n = (n & 0x33333333) + ((n >> 2) & 0x33333333)  # bits set in each group of 4
        n_0, n_4 = n & 0xFFFF, n >> 16  # of the groups from 0 and from 4: a byte each
        n_0 = (n_0 | (n_0 << 8)) & 0x00FF00FF
        n_0 = (n_0 | (n_0 << 4)) & 0x0F0F0F0F
        n_4 = (n_4 | (n_4 << 8)) & 0x00FF00FF
        n_4 = (n_4 | (n_4 << 4)) & 0x0F0F0F0F
        all_0, all_4 = _wide(tl.sum(n_0, 0)) * ones, _wide(tl.sum(n_4, 0)) * ones
        # the next slot of each group and lane within the tile, 16 bits each
        slot_0 = _wide(tl.cumsum(n_0, 0) - n_0) + (all_0 << 16)
        slot_4 = _wide(tl.cumsum(n_4, 0) - n_4) + ((all_4 << 16) + (all_0 >> 48) * ones)
        left = tl.max((((n_0 + n_4) * 0x01010101) >> 24).to(tl.int32), 0)
        while left > 0:
            lowest = word & (0 - word)
            i_bit = tl.maximum((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, 0)
            i_group = i_bit >> 2
            shift = ((i_group & 3) * 16).to(tl.int64)
            slot = count + ((tl.where(i_group < 4, slot_0, slot_4) >> shift) & 0xFFFF).to(tl.int32)
            one = tl.full((32,), 1, tl.int64) << shift
            slot_0 += tl.where(i_group < 4, one, 0)
            slot_4 += tl.where(i_group < 4, 0, one)
            at = base + i_group * 128 + o_lane * 4 + (i_bit & 3)
            fits = (word != 0) & (slot < CAP)
            tl.store(
                p_key + slot, _as_keys(tl.load(p_row + at, mask=fits, other=0), FLOAT), mask=fits
            )
            tl.store(p_id + slot, at, mask=fits)
            word = word & (word - 1)
            left -= 1
        count += ((all_0 >> 48) + (all_4 >> 48)).to(tl.int32)
    tl.store(p_count + i_list, count)


@triton.jit
def _place(slot, p_count, SEGMENTS: tl.constexpr, CAP: tl.constexpr, LOG: tl.constexpr):
    """Where the slot-th entry of a row's lists, one behind the other, lies."""
    if SEGMENTS == 1:
        return slot
    elif SEGMENTS <= 8:
        where = slot
        before = 0
        for i_seg in tl.static_range(SEGMENTS - 1):
            n = tl.load(p_count + i_seg)
            before += n
            where = tl.where(slot >= before, where + (CAP - n), where)
        return where
    else:
        # the segment: how many end at or before the slot
        counts = tl.load(p_count + tl.arange(0, SEGMENTS))
        ends = tl.cumsum(counts, 0)
        begin = tl.zeros_like(slot)
        for i_bit in tl.static_range(LOG):
            middle = begin + (1 << (LOG - 1 - i_bit))
            begin = tl.where(tl.gather(ends, middle - 1, 0) <= slot, middle, begin)
        begin = tl.minimum(begin, SEGMENTS - 1)
        return begin * CAP + slot - tl.gather(ends - counts, begin, 0)


@triton.jit
def _write(
    p_key,
    p_id,
    p_count,
    p_map,
    p_out,
    end,
    edge,
    reach,
    above,
    k,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """The ids of the k best in order, then -1 up to K. `edge`, `reach`, `above`: what `kth_key` returned. SEGMENTS 0: a row, no lists."""
    written = 0
    ties = 0
    for base in range(0, end, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        inside = slot < end
        at = slot
        if SEGMENTS > 1:
            at = _place(slot, p_count, SEGMENTS, CAP, LOG)
        key = tl.where(inside, _as_keys(tl.load(p_key + at, mask=inside, other=0), FLOAT), NONE)
        chosen = (key >= edge) & (k > 0)
        if reach > k:
            equal = key == edge
            chosen = (key > edge) | (equal & (ties + tl.cumsum(equal.to(tl.int32), 0) <= k - above))
            ties += tl.sum(equal.to(tl.int32), 0)
        if SEGMENTS > 0:
            at = tl.load(p_id + at, mask=chosen, other=-1)
        if MAPPED:
            at = tl.load(p_map + at, mask=chosen, other=-1)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        put(p_out + written + rank - 1, at, chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
    for base in range(k // BLOCK * BLOCK, K, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        tl.store(p_out + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot >= k) & (slot < K))


@triton.jit
def _edges(keys, least, total, TOPK: tl.constexpr, POOL: tl.constexpr):
    """`kth_key` for the selection, then for the pool; keys of no candidate are NONE. least: no other is below it, or NONE."""
    low = least
    if least == NONE:
        low = tl.min(tl.where(keys == NONE, 0x7FFFFFFF, keys))
    high = tl.max(keys)
    if POOL > TOPK:
        p_edge, p_reach, p_above = kth_key(keys, low, high, total, tl.minimum(total, POOL), 0)
        edge, reach, above = kth_key(keys, p_edge, high, p_reach, tl.minimum(total, TOPK), 0)
    else:
        edge, reach, above = kth_key(keys, low, high, total, tl.minimum(total, TOPK), 0)
        p_edge, p_reach, p_above = edge, reach, above
        if POOL > 0:
            p_edge, p_reach, p_above = kth_key(keys, edge, high, reach, tl.minimum(total, POOL), 0)
    return edge, reach, above, p_edge, p_reach, p_above


@triton.jit
def _edges_lists(
    p_key,
    p_count,
    least,
    total,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    ALL: tl.constexpr,
):
    slot = tl.arange(0, ALL)
    at = _place(slot, p_count, SEGMENTS, CAP, LOG)
    keys = _as_keys(
        tl.load(p_key + at, mask=slot < total, other=0), p_key.dtype.element_ty == tl.float32
    )
    return _edges(tl.where(slot < total, keys, NONE), least, total, TOPK, POOL)


@triton.jit
def _ranks(flag):
    """1-based ranks of the set flags of [lists, entries], list by list."""
    flag = flag.to(tl.int32)
    here = tl.sum(flag, 1)
    return (tl.cumsum(here, 0) - here)[:, None] + tl.cumsum(flag, 1)


@triton.jit
def _write_tile(
    keys,
    ids,
    p_map,
    p_out,
    edge,
    reach,
    above,
    k,
    K: tl.constexpr,
    FILL: tl.constexpr,
    MAPPED: tl.constexpr,
):
    chosen = (keys >= edge) & (k > 0)
    if reach > k:
        chosen = (keys > edge) | ((keys == edge) & (_ranks(keys == edge) <= k - above))
    if MAPPED:
        ids = tl.load(p_map + ids, mask=chosen, other=-1)
    put(p_out + _ranks(chosen) - 1, ids, chosen)
    if k < K:
        slot = tl.arange(0, FILL)
        tl.store(p_out + slot, tl.full((FILL,), -1, tl.int32), mask=(slot >= k) & (slot < K))


@triton.jit
def _pick_tile(
    keys,
    ids,
    p_map,
    p_out,
    p_pool,
    least,
    total,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    FILL: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """A row whose lists are short: a tile [lists, entries] in registers, and no search for an entry's list."""
    edge, reach, above, p_edge, p_reach, p_above = _edges(keys, least, total, TOPK, POOL)
    _write_tile(
        keys, ids, p_map, p_out, edge, reach, above, tl.minimum(total, TOPK), TOPK, FILL, MAPPED
    )
    if POOL > 0:
        _write_tile(
            keys,
            ids,
            p_map,
            p_pool,
            p_edge,
            p_reach,
            p_above,
            tl.minimum(total, POOL),
            POOL,
            FILL,
            MAPPED,
        )


@triton.jit
def pick(
    p_key,
    p_id,
    p_count,
    p_thr,
    p_map,
    p_out,
    p_pool,
    p_flag,
    p_score,
    p_offset,
    s_map,
    s_row,
    n_queries,
    n_keys,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
    MAPPED: tl.constexpr,
    RESCUE: tl.constexpr,
    FLOAT: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """grid (rows,). LOG is log2 SEGMENTS. A threshold of NONE means that the lists hold every candidate there is.

    ALL slots at most, their keys in registers while the edges are sought. MAPPED: ids are slots of a pool, the output is
    p_map[row, slot]. RESCUE: flagged rows are selected here, from p_score; else the flag says that somebody must.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_count += i_row * SEGMENTS
    p_key += i_row * SEGMENTS * CAP
    p_id += i_row * SEGMENTS * CAP
    p_map += i_row * s_map
    p_out += i_row * TOPK
    p_pool += i_row * POOL
    few: tl.constexpr = SEGMENTS > 8 and CAP >= 32
    scores: tl.constexpr = p_key.dtype.element_ty == tl.float32  # listed as they are
    counts = tl.load(p_count + tl.arange(0, SEGMENTS))
    if few:  # in parallel with the counts, hence past them too
        o_each = tl.arange(0, 32)
        o_at = (tl.arange(0, SEGMENTS) * CAP)[:, None] + o_each[None, :]
        keys, ids = tl.load(p_key + o_at), tl.load(p_id + o_at)
        keys = tl.where(o_each[None, :] < counts[:, None], _as_keys(keys, scores), NONE)
    total = tl.sum(counts, 0)
    least = tl.load(p_thr + i_row)
    most: tl.constexpr = POOL if POOL > TOPK else TOPK
    longest = tl.max(counts, 0)
    fits = (longest <= CAP) & (total <= ALL) & ((least == NONE) | (total >= most))
    tl.store(p_flag + i_row, 1 - fits.to(tl.int32))
    if fits & few & (longest <= 32):
        if few:
            _pick_tile(keys, ids, p_map, p_out, p_pool, least, total, TOPK, POOL, FILL, MAPPED)
    elif fits:
        if total <= ALL // 2:
            edge, reach, above, p_edge, p_reach, p_above = _edges_lists(
                p_key, p_count, least, total, TOPK, POOL, SEGMENTS, CAP, LOG, ALL // 2
            )
        else:
            edge, reach, above, p_edge, p_reach, p_above = _edges_lists(
                p_key, p_count, least, total, TOPK, POOL, SEGMENTS, CAP, LOG, ALL
            )
        k = tl.minimum(total, TOPK)
        _write(
            p_key,
            p_id,
            p_count,
            p_map,
            p_out,
            total,
            edge,
            reach,
            above,
            k,
            TOPK,
            SEGMENTS,
            CAP,
            LOG,
            BLOCK,
            scores,
            MAPPED,
        )
        if POOL > 0:
            k = tl.minimum(total, POOL)
            _write(
                p_key,
                p_id,
                p_count,
                p_map,
                p_pool,
                total,
                p_edge,
                p_reach,
                p_above,
                k,
                POOL,
                SEGMENTS,
                CAP,
                LOG,
                BLOCK,
                scores,
                MAPPED,
            )
    elif RESCUE:
        end = _seen(p_offset, i_row, n_queries, n_keys, CAUSAL)
        select_row(p_score + i_row * s_row, end, p_map, p_out, TOPK, BLOCK, FLOAT, MAPPED)
        if POOL > 0:
            select_row(p_score + i_row * s_row, end, p_map, p_pool, POOL, BLOCK, FLOAT, MAPPED)


@triton.jit
def pick_row(
    p_score,
    p_offset,
    p_map,
    p_out,
    p_pool,
    s_row,
    s_map,
    n_queries,
    n_keys,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """grid (rows,). As `pick`, from rows of at most ALL scores or keys."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_score + i_row * s_row
    p_map += i_row * s_map
    end = _seen(p_offset, i_row, n_queries, n_keys, CAUSAL)
    slot = tl.arange(0, ALL)
    keys = tl.where(
        slot < end, _as_keys(tl.load(p_row + slot, mask=slot < end, other=0), FLOAT), NONE
    )
    total = tl.sum((keys != NONE).to(tl.int32), 0)
    edge, reach, above, p_edge, p_reach, p_above = _edges(keys, NONE, total, TOPK, POOL)
    k = tl.minimum(total, TOPK)
    _write(
        p_row,
        p_row,
        p_row,
        p_map,
        p_out + i_row * TOPK,
        end,
        edge,
        reach,
        above,
        k,
        TOPK,
        0,
        0,
        0,
        BLOCK,
        FLOAT,
        MAPPED,
    )
    if POOL > 0:
        k = tl.minimum(total, POOL)
        p_wide = p_pool + i_row * POOL
        _write(
            p_row,
            p_row,
            p_row,
            p_map,
            p_wide,
            end,
            p_edge,
            p_reach,
            p_above,
            k,
            POOL,
            0,
            0,
            0,
            BLOCK,
            FLOAT,
            MAPPED,
        )


@triton.jit
def _count_row(p_row, end, mid, BLOCK: tl.constexpr, FLOAT: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for base in range(0, end, BLOCK):
        o = base + tl.arange(0, BLOCK)
        key = _as_keys(tl.load(p_row + o, mask=o < end, other=0), FLOAT)
        total += ((o < end) & (key >= mid) & (key != NONE)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def select_row(
    p_row,
    end,
    p_map,
    p_out,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """One row of scores by bisection over its values, a pass for each step; writes K ids, -1 padded."""
    lo = tl.full((), -(2**31) + 1, tl.int64)
    hi = tl.full((), 2**31 - 1, tl.int64)
    reach = _count_row(p_row, end, lo.to(tl.int32), BLOCK, FLOAT)
    k = tl.minimum(reach, K)
    above = 0
    hi = tl.where(reach == k, lo, hi)
    while lo < hi:
        mid = lo + (hi - lo + 1) // 2
        count = _count_row(p_row, end, mid.to(tl.int32), BLOCK, FLOAT)
        reach = tl.where(count >= k, count, reach)
        above = tl.where(count >= k, above, count)
        lo = tl.where(count >= k, mid, lo)
        hi = tl.where(count >= k, tl.where(count == k, mid, hi), mid - 1)
    _write(
        p_row,
        p_row,
        p_row,
        p_map,
        p_out,
        end,
        lo.to(tl.int32),
        reach,
        above,
        k,
        K,
        0,
        0,
        0,
        BLOCK,
        FLOAT,
        MAPPED,
    )
