"""Select the exact top k of a few rows in one launch of the whole device, for decoding.

Each program keeps a segment of a row's keys in registers.
  1. All programs read the same sample of the row and drop the keys below a safe rank of it.
  2. All programs count the keys that are left in bins of their value. They meet, and each reads off
     the bin that holds the k-th key.
  3. The keys of that bin go to a list, in any order, with the number of their program. They meet
     again.
  4. Each program finds the k-th key in the list and how many ids the programs before it write. Then
     it writes its own ids in order.
A bin with more keys than the list can hold is divided again, and a sample that misled costs one
more round: the sample decides the speed, never the result. All arithmetic is on integers, and no
result depends on the order in the list, so the kernel is deterministic.

The programs wait for each other, so all programs of a launch must fit on the device at once. The
host launches no more than that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.primitives import INTERPRETED, NONE, kth_key, put, rows_visible, sort_key

BINS = tl.constexpr(1024)
# One round may be misled by the sample. The others start with 2^32, 2^23, 2^13 and 2^3 values in
# question.
ROUNDS = tl.constexpr(5)
GROUPS = tl.constexpr(32)  # number of groups of samples
LIST = tl.constexpr(512)  # capacity of the list of keys of one bin
# The workspace of a row holds the number of arrivals, the end of the list, and the bins of each
# round.
CURSOR = tl.constexpr(32)
COUNTS = tl.constexpr(64)
WORK = tl.constexpr(COUNTS.value + ROUNDS.value * BINS.value)


@triton.jit
def _meet(p_sync, arrivals):
    """Wait until the programs of a row have called this `arrivals` times in all.

    Their earlier writes are then visible.
    """
    if not INTERPRETED:  # The interpreter runs one program for each row.
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
    """Add one at each pointer.

    tl.atomic_add would first move the pointers to another layout, as tl.store does (`put`).
    """
    if INTERPRETED:
        tl.atomic_add(pointer, 1, mask=mask)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.s32 p, $2, 0;
            @p red.relaxed.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _append(p_end, p_list, key, owner, mask):
    """Append pairs (owner, key) to a list, in any order."""
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
def _sampled_range(sample, rank, SAMPLE: tl.constexpr):
    """Return the range in which the k-th key lies according to the sample.

    Returns the rank-th of the groups' best samples (NONE + 1 if there are fewer), the best sample,
    and whether too many keys are equal to be counted one by one.
    """
    best = tl.max(tl.reshape(sample, (SAMPLE // GROUPS, GROUPS)), 0)
    reach = tl.sum((best[None, :] >= best[:, None]).to(tl.int32), 1)
    low = tl.max(tl.where(reach >= rank, best, NONE), 0)
    tied = tl.sum((best >= low).to(tl.int32), 0) > rank + 4
    low = tl.maximum(low, NONE + 1)
    return low, tl.maximum(tl.max(best, 0), low), tied | (low == NONE + 1)


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
):
    """Select the top k of rows of fp32 scores or int32 keys; grid (segments, rows).

    p_work [rows, WORK] must hold zeros; p_count [rows, PROGRAMS] and p_list [rows, LIST, 2] may
    hold anything. PROGRAMS is a power of two, not below the number of segments. p_offset, p_map:
    as in topk.py.

    Sample i is one of the keys from i * stride to (i + 1) * stride. It is a scattered one, so that
    no period of the row misleads.
    """
    i_seg = tl.program_id(0)
    n_seg = tl.num_programs(0)
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
    visible = n_keys
    if p_offset is not None:
        offset = tl.load(p_offset + i_row // n_queries)
        visible = rows_visible(offset, i_row % n_queries, n_keys).to(tl.int32)
    if p_score.dtype.element_ty == tl.float32:
        sample = sort_key(sample)
        key = sort_key(key)
    key = tl.where(o < visible, key, NONE)
    # The k-th key lies in [lo, hi]. `inside` keys lie there too, `above` keys lie above. The k-th
    # key is the needed-th best of those inside. The bins divide [lo, top].
    lo, top, crowded = _sampled_range(tl.where(o_sample < visible, sample, NONE), rank, SAMPLE)
    hi = 0x7FFFFFFF
    inside = LIST + 1
    above = 0
    needed = TOPK
    arrivals = 0
    o_bin = tl.arange(0, BINS)
    while (inside > LIST) & (lo < hi):
        span = (top - lo).to(tl.uint32, bitcast=True)
        # In the first round keys better than any sample go to the last bin.
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
        arrivals += n_seg
        _meet(p_sync, arrivals)
        reach = tl.cumsum(tl.load(p_bins + o_bin, cache_modifier=".cg"), 0, reverse=True)
        total = tl.max(reach, 0)
        if (total < needed) & (arrivals == n_seg) & (lo > NONE + 1):  # The sample misled.
            above = total
            needed -= total
            hi = lo - 1
            top = hi
            lo = NONE + 1
        else:
            needed = tl.minimum(needed, total)
            at = tl.where(needed > 0, tl.sum((reach >= needed).to(tl.int32), 0) - 1, 0)
            better = tl.max(tl.where(reach < needed, reach, 0), 0)
            inside = tl.min(tl.where(reach >= needed, reach, total), 0) - better
            above += better
            needed -= better
            if at < BINS - 1:  # The last bin ends at hi, wherever that is.
                ends = ((at + 1).to(tl.uint32) << shift) - 1
                hi = lo + tl.minimum((hi - lo).to(tl.uint32, bitcast=True), ends).to(
                    tl.int32, bitcast=True
                )
            lo += (at.to(tl.uint32) << shift).to(tl.int32, bitcast=True)
            top = hi
        crowded = True
        p_bins += BINS
    listed = inside <= LIST  # Otherwise all keys inside are equal.
    within = (key >= lo) & (key <= hi)
    if listed:
        _append(p_sync + CURSOR, p_list, key, i_seg, within)
    # Two counts share an integer, here and below: the upper half counts better keys.
    tl.store(p_count + i_seg, tl.sum(tl.where(key > hi, 65536, 0) + tl.where(within, 1, 0), 0))
    _meet(p_sync, arrivals + n_seg)
    o_seg = tl.arange(0, PROGRAMS)
    before = tl.load(p_count + o_seg, mask=o_seg < i_seg, other=0, cache_modifier=".cg")
    better_before = tl.sum(before >> 16, 0)
    edge = lo
    ties = needed
    if listed:
        o_list = tl.arange(0, LIST)
        p_pair = p_list + o_list * 2
        m_pair = o_list < inside
        owner = tl.load(p_pair, mask=m_pair, other=PROGRAMS, cache_modifier=".cg")
        near = tl.load(p_pair + 1, mask=m_pair, other=NONE, cache_modifier=".cg")
        edge, reached, better = kth_key(near, lo, hi, inside, needed, 0)
        ties = tl.where(reached > needed, needed - better, inside)
        near_count = tl.where(near > edge, 65536, tl.where(near == edge, 1, 0))
        both = tl.sum(tl.where(owner < i_seg, near_count, 0), 0)
        better_before += both >> 16
        equal_before = both & 0xFFFF
    else:
        equal_before = tl.sum(before & 0xFFFF, 0)
    ties_here = tl.maximum(ties - equal_before, 0)
    is_better = key > edge
    is_equal = (key == edge) & (key != NONE)
    rank_both = tl.cumsum(tl.where(is_better, 65536, tl.where(is_equal, 1, 0)), 0)
    rank_equal = rank_both & 0xFFFF
    slot = better_before + tl.minimum(equal_before, ties)
    slot = slot + (rank_both >> 16) + tl.minimum(rank_equal, ties_here) - 1
    chosen = is_better | (is_equal & (rank_equal <= ties_here))
    ids = o
    if p_map is not None:
        ids = tl.load(p_map + i_row * s_map + o, mask=chosen, other=0)
    put(p_out + i_row * TOPK + slot, ids, chosen)
    if i_seg == 0:
        o_fill = tl.arange(0, FILL)
        m_fill = (o_fill >= above + needed) & (o_fill < TOPK)
        tl.store(p_out + i_row * TOPK + o_fill, tl.full((FILL,), -1, tl.int32), mask=m_fill)
