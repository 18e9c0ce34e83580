"""Exact top-k of one or few rows by the whole device in one launch: decoding.

Each program holds a segment of a row's keys in registers.
  1. All look at the same sample of the row, and drop what is below a safe rank of it.
  2. The keys left are counted in bins of their value, over all programs; all meet, and each reads off the bin of the k-th key.
  3. The keys of that bin go to a list, in any order, with the number of their program; all meet again.
  4. Each finds the k-th key in the list, and how many ids the programs before it write; then it writes its own, in order.
A bin with more keys than the list holds is divided again, and a sample that misled costs one more round: the sample decides speed,
never the result. Integers only, and no result depends on the order in the list, so deterministic.

The programs wait for each other, so all of a launch must fit on the device at once; the host launches no more than that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import INTERPRETED, NONE, kth_key, put, rows_visible, sort_key

BINS = tl.constexpr(1024)
ROUNDS = tl.constexpr(
    5
)  # one that the sample misled, then 2^32, 2^23, 2^13 and 2^3 values in question
GROUPS = tl.constexpr(32)  # of samples
LIST = tl.constexpr(512)
CURSOR, COUNTS = (
    tl.constexpr(32),
    tl.constexpr(64),
)  # in the workspace of a row: the arrivals, the end of the list, the bins
WORK = tl.constexpr(64 + 5 * 1024)


@triton.jit
def _meet(p_sync, arrivals):
    """Returns when `arrivals` calls have been made by the programs of a row; what they wrote before is then visible."""
    if not INTERPRETED:  # there a row has one program
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 n;
            mov.u32 n, %tid.x;
            setp.ne.u32 p, n, 0;
            @p bra MET;
            red.release.gpu.global.add.u32 [$1], 1;
            AWAIT:
            ld.acquire.gpu.global.u32 n, [$1];
            setp.lt.u32 p, n, $2;
            @p bra AWAIT;
            MET:
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [p_sync.to(tl.int64), arrivals],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()


@triton.jit
def _count(pointer, mask):
    """Adds one at each pointer. tl.atomic_add would move the pointers to another layout first, as tl.store does (`bits.put`)."""
    if INTERPRETED:
        tl.atomic_add(pointer, 1, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p red.relaxed.gpu.global.add.u32 [$1], 1; mov.u32 $0, 0; }",
            "=r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _append(p_end, p_list, key, owner, mask):
    """Appends (owner, key) to a list, in any order."""
    if INTERPRETED:
        at = tl.atomic_add(p_end + tl.zeros_like(key), 1, mask=mask) * 2
        tl.store(p_list + at, tl.zeros_like(key) + owner, mask=mask)
        tl.store(p_list + at + 1, key, mask=mask)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 n;
            .reg .b64 a;
            setp.ne.s32 p, $5, 0;
            @p atom.relaxed.gpu.global.add.u32 n, [$1], 1;
            @p mad.wide.u32 a, n, 8, $2;
            @p st.global.v2.b32 [a], {$3, $4};
            mov.u32 $0, 0;
            }""",
            "=r,l,l,r,r,r",
            [p_end.to(tl.int64), p_list.to(tl.int64), owner, key, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _sampled(sample, rank, SAMPLE: tl.constexpr):
    """(the rank-th of the groups' best samples, NONE + 1 if there are fewer; the best; whether too many are equal to count them singly)."""
    best = tl.max(tl.reshape(sample, (SAMPLE // GROUPS, GROUPS)), 0)
    reach = tl.sum((best[None, :] >= best[:, None]).to(tl.int32), 1)
    least = tl.max(tl.where(reach >= rank, best, NONE), 0)
    tied = tl.sum((best >= least).to(tl.int32), 0) > rank + 4
    least = tl.maximum(least, NONE + 1)
    return least, tl.maximum(tl.max(best, 0), least), tied | (least == NONE + 1)


@triton.jit
def select_grid(
    p_score,
    p_offset,
    p_map,
    p_work,
    p_count,
    p_list,
    p_out,
    s_row,
    s_map,
    n_queries,
    n_keys,
    stride,
    rank,
    TOPK: tl.constexpr,
    FILL: tl.constexpr,
    SEGMENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SAMPLE: tl.constexpr,
    FLOAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """grid (segments, rows). Rows of fp32 or int32 keys. p_work [rows, WORK] holds zeros; p_count [rows, PROGRAMS]; p_list [rows, LIST, 2].

    MAPPED: column c of a row has the id p_map[row, c]. PROGRAMS: a power of two, at least the segments. Sample i is one of the keys from
    i * stride to (i + 1) * stride, a scattered one, so that no period of the row misleads.
    """
    i_seg, n_seg = tl.program_id(0), tl.num_programs(0)
    i_row = tl.program_id(1).to(tl.int64)
    p_row = p_score + i_row * s_row
    p_sync = p_work + i_row * WORK
    p_bins = p_sync + COUNTS
    p_count += i_row * PROGRAMS
    p_list += i_row * (2 * LIST)
    o_sample = tl.arange(0, SAMPLE)
    o_sample = o_sample * stride + ((((o_sample * 40503) & 0xFFFF) * stride) >> 16)
    o = i_seg * SEGMENT + tl.arange(0, SEGMENT)
    sample = tl.load(p_row + o_sample, mask=o_sample < n_keys, other=0)
    key = tl.load(p_row + o, mask=o < n_keys, other=0)
    seen = n_keys
    if CAUSAL:
        seen = rows_visible(tl.load(p_offset + i_row // n_queries), i_row % n_queries, n_keys).to(
            tl.int32
        )
    if FLOAT:
        sample, key = sort_key(sample), sort_key(key)
    key = tl.where(o < seen, key, NONE)
    # the k-th key lies in [lo, hi]; `inside` keys do, `above` lie above, `wanted` is its rank inside; the bins divide [lo, top]
    lo, top, crowded = _sampled(tl.where(o_sample < seen, sample, NONE), rank, SAMPLE)
    hi = 0x7FFFFFFF
    inside = LIST + 1
    above = 0
    wanted = TOPK
    met = 0
    o_bin = tl.arange(0, BINS)
    while (inside > LIST) & (lo < hi):
        span = (top - lo).to(tl.uint32, bitcast=True)
        # in the first round keys better than any sample go to the last bin
        shift = tl.maximum((span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126 - 10, 0).to(
            tl.uint32
        )
        i_bin = tl.minimum((key - lo).to(tl.uint32, bitcast=True) >> shift, BINS - 1).to(tl.int32)
        alive = (key >= lo) & (key <= hi)
        if crowded:
            count = tl.histogram(tl.where(alive, i_bin, 0), BINS, mask=alive)
            tl.atomic_add(p_bins + o_bin, count, mask=count > 0, sem="relaxed")
        else:
            _count(p_bins + i_bin, alive)
        met += n_seg
        _meet(p_sync, met)
        reach = tl.cumsum(tl.load(p_bins + o_bin, cache_modifier=".cg"), 0, reverse=True)
        total = tl.max(reach, 0)
        if (total < wanted) & (met == n_seg) & (lo > NONE + 1):  # the sample misled
            above = total
            wanted -= total
            hi = lo - 1
            top = hi
            lo = NONE + 1
        else:
            wanted = tl.minimum(wanted, total)
            at = tl.where(wanted > 0, tl.sum((reach >= wanted).to(tl.int32), 0) - 1, 0)
            better = tl.max(tl.where(reach < wanted, reach, 0), 0)
            inside = tl.min(tl.where(reach >= wanted, reach, total), 0) - better
            above += better
            wanted -= better
            if at < BINS - 1:  # the last one ends at hi, wherever that is
                ends = ((at + 1).to(tl.uint32) << shift) - 1
                hi = lo + tl.minimum((hi - lo).to(tl.uint32, bitcast=True), ends).to(
                    tl.int32, bitcast=True
                )
            lo += (at.to(tl.uint32) << shift).to(tl.int32, bitcast=True)
            top = hi
        crowded = True
        p_bins += BINS
    listed = inside <= LIST  # else all inside are equal
    within = (key >= lo) & (key <= hi)
    if listed:
        _append(p_sync + CURSOR, p_list, key, i_seg, within)
    tl.store(p_count + i_seg, tl.sum(tl.where(key > hi, 65536, 0) + tl.where(within, 1, 0), 0))
    _meet(p_sync, met + n_seg)
    o_seg = tl.arange(0, PROGRAMS)
    before = tl.load(p_count + o_seg, mask=o_seg < i_seg, other=0, cache_modifier=".cg")
    better_before = tl.sum(before >> 16, 0)
    edge, missing = lo, wanted
    if listed:
        o_list = tl.arange(0, LIST)
        owner = tl.load(
            p_list + o_list * 2, mask=o_list < inside, other=PROGRAMS, cache_modifier=".cg"
        )
        near = tl.load(
            p_list + o_list * 2 + 1, mask=o_list < inside, other=NONE, cache_modifier=".cg"
        )
        edge, reached, better = kth_key(near, lo, hi, inside, wanted, 0)
        missing = tl.where(reached > wanted, wanted - better, inside)
        both = tl.sum(
            tl.where(owner < i_seg, tl.where(near > edge, 65536, tl.where(near == edge, 1, 0)), 0),
            0,
        )
        better_before += both >> 16
        equal_before = both & 0xFFFF
    else:
        equal_before = tl.sum(before & 0xFFFF, 0)
    left = tl.maximum(missing - equal_before, 0)
    better_here = key > edge
    equal_here = (key == edge) & (key != NONE)
    rank_both = tl.cumsum(tl.where(better_here, 65536, tl.where(equal_here, 1, 0)), 0)
    rank_equal = rank_both & 0xFFFF
    slot = (
        better_before
        + tl.minimum(equal_before, missing)
        + (rank_both >> 16)
        + tl.minimum(rank_equal, left)
        - 1
    )
    taken = better_here | (equal_here & (rank_equal <= left))
    ids = o
    if MAPPED:
        ids = tl.load(p_map + i_row * s_map + o, mask=taken, other=0)
    put(p_out + i_row * TOPK + slot, ids, taken)
    if i_seg == 0:
        o_fill = tl.arange(0, FILL)
        tl.store(
            p_out + i_row * TOPK + o_fill,
            tl.full((FILL,), -1, tl.int32),
            mask=(o_fill >= above + wanted) & (o_fill < TOPK),
        )
