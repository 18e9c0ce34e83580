"""Select the exact top k of rows of scores, deterministically, with ids in ascending order.

  threshold   ranks a sample of each row and takes a value a little below the rank that is needed
  compact     reads the row once and appends every (key, position) at or above that value to bounded
              lists, one for each row and segment. A segment is walked in order, so its list is
              ascending by construction and nothing is atomic
  pick        finds the exact k-th key among the listed ones and writes the ids. It flags a row
              whose lists overflowed or hold fewer than k keys; bisection over all of the row then
              selects it. The sample decides the speed, never the result
  pick_row    does the same without lists for rows that fit into registers (pools)

Scores are compared as int32 keys (`primitives.sort_key`). The key NONE marks entries that are no
candidates. Rows and lists hold keys or fp32 scores, which become keys when they are read. The fused
kernels (scores.py, scores_hopper.py) write the same lists without a row of scores in between.

An optional pointer is None where it is not needed; Triton compiles a kernel for each case:
`p_offset` [batch entries] limits a row to the keys that its query sees, `p_map` [rows, columns]
holds the ids that are written instead of columns, `p_pool` [rows, POOL] receives the best POOL ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.index.topk_parts import (
    as_keys,
    cuts,
    cuts_of_lists,
    select_row,
    visible_keys,
    write,
    write_tile,
)
from indexcache.ops.primitives import LOWEST, NONE, kth_key, nibble_counts


@triton.jit
def threshold(
    p_score,
    p_offset,
    p_thr,
    s_row,
    s_col,
    n_queries,
    n_keys,
    rank,
    slack,
    limit,
    STRIDE: tl.constexpr,
    SAMPLE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Write the key that ranks about rank-th among a row's samples; grid (rows,).

    Sample i of a row lies at column i * s_col and stands for key i * STRIDE. A row of at most
    `limit` keys gets NONE: all of its keys pass. PAIRS: the rows are unsampled, and samples are
    taken 8 columns apart, two from each 64 bytes that memory delivers at once.
    """
    i_row = tl.program_id(0).to(tl.int64)
    visible = visible_keys(p_offset, i_row, n_queries, n_keys)
    key = NONE
    if visible > limit:
        o = tl.arange(0, SAMPLE)
        if PAIRS:
            total = visible // (2 * STRIDE) * 2
            total += tl.minimum((visible % (2 * STRIDE) + 7) // 8, 2)
            o_col = (o // 2 * (2 * STRIDE) + o % 2 * 8).to(tl.int64)
        else:
            total = (visible + STRIDE - 1) // STRIDE
            o_col = o.to(tl.int64) * s_col
        m_sample = o < total
        x = tl.load(p_score + i_row * s_row + o_col, mask=m_sample, other=0)
        keys = tl.where(m_sample, as_keys(x), NONE)
        low = tl.min(tl.where(m_sample, keys, 0x7FFFFFFF), 0)
        key, _, _ = kth_key(keys, low, tl.max(keys, 0), total, tl.minimum(rank, total), slack)
    tl.store(p_thr + i_row, key)


@triton.jit
def _widen(x):
    """Spread the four bytes of x over the four 16-bit fields of an int64."""
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
):
    """Append the keys that reach the row's threshold to lists; grid (rows, segments), one warp.

    Lists are [rows, segments, CAP]. The count goes on past CAP, so that `pick` sees an overflow.

    A tile is 8 groups of 32 lanes x 4 keys. Few keys pass. Each lane therefore packs its 32 keys
    into the bits of one word; only the counts of these words are scanned, all groups at once with a
    byte for each group, and only the bits that are set are stored.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_list = i_row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1) * segment
    end = tl.minimum(start + segment, visible_keys(p_offset, i_row, n_queries, n_keys))
    min_key = tl.maximum(tl.load(p_thr + i_row), NONE + 1)
    min_score = (min_key ^ ((min_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    p_row = p_score + i_row * s_row
    p_key += i_list * CAP
    p_id += i_list * CAP
    o_group = tl.arange(0, 8)
    o_lane = tl.arange(0, 32)
    o_4 = tl.arange(0, 4)
    o_tile = o_lane[:, None, None] * 4 + o_group[None, :, None] * 128 + o_4[None, None, :]
    bit = (1 << (o_group[:, None] * 4 + o_4[None, :])).to(tl.uint32, bitcast=True)[None, :, :]
    ones: tl.constexpr = 0x0001000100010001
    floats: tl.constexpr = p_score.dtype.element_ty == tl.float32
    count = 0
    for base in range(start, end, 1024):
        if base + 1024 <= end:
            x = tl.load(p_row + base + o_tile)
        elif floats:
            x = tl.load(p_row + base + o_tile, mask=o_tile < end - base, other=float("nan"))
        else:
            x = tl.load(p_row + base + o_tile, mask=o_tile < end - base, other=NONE)
        if floats:
            keep = x >= min_score
            if min_key <= LOWEST:  # Every key passes, NaN too.
                keep = o_tile < end - base
        else:
            keep = x >= min_key
        word = tl.sum(tl.sum(tl.where(keep, bit, 0), 2), 1)
        n = nibble_counts(word)
        # Groups 0 to 3 and groups 4 to 7 each get a byte for a group.
        n_0 = n & 0xFFFF
        n_4 = n >> 16
        n_0 = (n_0 | (n_0 << 8)) & 0x00FF00FF
        n_0 = (n_0 | (n_0 << 4)) & 0x0F0F0F0F
        n_4 = (n_4 | (n_4 << 8)) & 0x00FF00FF
        n_4 = (n_4 | (n_4 << 4)) & 0x0F0F0F0F
        all_0 = _widen(tl.sum(n_0, 0)) * ones
        all_4 = _widen(tl.sum(n_4, 0)) * ones
        # The next slot of each group and lane within the tile takes 16 bits.
        slot_0 = _widen(tl.cumsum(n_0, 0) - n_0) + (all_0 << 16)
        slot_4 = _widen(tl.cumsum(n_4, 0) - n_4) + ((all_4 << 16) + (all_0 >> 48) * ones)
        remaining = tl.max((((n_0 + n_4) * 0x01010101) >> 24).to(tl.int32), 0)
        while remaining > 0:
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
            tl.store(p_key + slot, as_keys(tl.load(p_row + at, mask=fits, other=0)), mask=fits)
            tl.store(p_id + slot, at, mask=fits)
            word = word & (word - 1)
            remaining -= 1
        count += ((all_0 >> 48) + (all_4 >> 48)).to(tl.int32)
    tl.store(p_count + i_list, count)


@triton.jit
def pick(
    p_key,
    p_id,
    p_count,
    p_thr,
    p_flag,
    p_out,
    p_pool,
    p_score,
    p_offset,
    p_map,
    s_row,
    s_map,
    n_queries,
    n_keys,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Select the top k of each row from its lists; grid (rows,).

    LOG is log2 SEGMENTS. A row's lists may hold SLOTS entries in all; their keys are in registers
    while the k-th is sought. A threshold of NONE means that the lists hold every candidate there
    is. A row whose lists do not suffice is flagged, and selected here from p_score. Where p_score
    is None the flag tells the caller to do that.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_count += i_row * SEGMENTS
    p_key += i_row * SEGMENTS * CAP
    p_id += i_row * SEGMENTS * CAP
    p_out += i_row * TOPK
    if POOL > 0:
        p_pool += i_row * POOL
    if p_map is not None:
        p_map += i_row * s_map
    # With many lists most are short: their first 32 entries make a tile of registers, and no
    # entry's list is searched for.
    tiled: tl.constexpr = SEGMENTS > 8 and CAP >= 32
    counts = tl.load(p_count + tl.arange(0, SEGMENTS))
    if tiled:  # These loads do not wait for the counts and hence read past the lists' ends.
        o_entry = tl.arange(0, 32)
        o_at = (tl.arange(0, SEGMENTS) * CAP)[:, None] + o_entry[None, :]
        keys = tl.load(p_key + o_at)
        ids = tl.load(p_id + o_at)
        keys = tl.where(o_entry[None, :] < counts[:, None], as_keys(keys), NONE)
    total = tl.sum(counts, 0)
    min_key = tl.load(p_thr + i_row)
    max_k: tl.constexpr = POOL if POOL > TOPK else TOPK
    longest = tl.max(counts, 0)
    fits = (longest <= CAP) & (total <= SLOTS) & ((min_key == NONE) | (total >= max_k))
    tl.store(p_flag + i_row, 1 - fits.to(tl.int32))
    k = tl.minimum(total, TOPK)
    if fits & tiled & (longest <= 32):
        if tiled:
            cut, pool_cut = cuts(keys, min_key, total, POOL, TOPK, POOL)
            write_tile(keys, ids, p_map, p_out, cut, k, TOPK, FILL)
            if POOL > 0:
                k = tl.minimum(total, POOL)
                write_tile(keys, ids, p_map, p_pool, pool_cut, k, POOL, FILL)
    elif fits:
        if total <= SLOTS // 2:
            cut, pool_cut = cuts_of_lists(
                p_key, p_count, min_key, total, TOPK, POOL, SEGMENTS, CAP, LOG, SLOTS // 2
            )
        else:
            cut, pool_cut = cuts_of_lists(
                p_key, p_count, min_key, total, TOPK, POOL, SEGMENTS, CAP, LOG, SLOTS
            )
        write(p_key, p_id, p_count, p_map, p_out, total, cut, k, TOPK, BLOCK, SEGMENTS, CAP, LOG)
        if POOL > 0:
            k = tl.minimum(total, POOL)
            write(
                p_key,
                p_id,
                p_count,
                p_map,
                p_pool,
                total,
                pool_cut,
                k,
                POOL,
                BLOCK,
                SEGMENTS,
                CAP,
                LOG,
            )
    elif p_score is not None:
        end = visible_keys(p_offset, i_row, n_queries, n_keys)
        select_row(p_score + i_row * s_row, end, p_map, p_out, TOPK, BLOCK)
        if POOL > 0:
            select_row(p_score + i_row * s_row, end, p_map, p_pool, POOL, BLOCK)


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
    n_map,
    TOPK: tl.constexpr,
    POOL: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Select the top k of rows of at most SLOTS scores or keys; grid (rows,).

    GATHER: only the n_map columns that p_map names are candidates, in place of all columns.
    SHARE / PARTS is the share of what a query sees that its pool holds, rounded up and at least
    TOPK ids; PARTS is 0 where every pool holds POOL.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_score + i_row * s_row
    if p_map is not None:
        p_map += i_row * s_map
    visible = visible_keys(p_offset, i_row, n_queries, n_keys)
    slot = tl.arange(0, SLOTS)
    if GATHER:
        end = n_map
        limit = visible
        at = tl.load(p_map + slot, mask=slot < end, other=-1)
        inside = (at >= 0) & (at < limit)
    else:
        end = visible
        limit = None
        at = slot
        inside = slot < end
    keys = tl.where(inside, as_keys(tl.load(p_row + at, mask=inside, other=0)), NONE)
    total = tl.sum((keys != NONE).to(tl.int32), 0)
    wanted = POOL
    if PARTS > 0:
        share = (visible.to(tl.int64) * SHARE + PARTS - 1) // PARTS
        wanted = tl.maximum(share, TOPK).to(tl.int32)
    cut, pool_cut = cuts(keys, NONE, total, wanted, TOPK, POOL)
    k = tl.minimum(total, TOPK)
    write(p_row, None, None, p_map, p_out + i_row * TOPK, end, cut, k, TOPK, BLOCK, limit=limit)
    if POOL > 0:
        k = tl.minimum(total, wanted)
        write(
            p_row,
            None,
            None,
            p_map,
            p_pool + i_row * POOL,
            end,
            pool_cut,
            k,
            POOL,
            BLOCK,
            limit=limit,
        )
