"""The group plan: the sorted union of neighbouring queries' ids with a bit for each query. Nothing is sorted, and nothing is atomic.

Short lists, by binary search: a row owns an id if no earlier row of its group has it. `own` finds owners and keeps a running
count of them in each row; `place` gives each owned id its slot: the number of owned ids below it, added up over the rows of
the group. Long lists: `unite` makes each row a bitmap and reads the group's bitmaps together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.bits import put


@triton.jit
def _below(p_list, x, length: tl.constexpr, STEPS: tl.constexpr):
    """How many entries of a sorted list (-1 padded at the end) are smaller than x >= 0. STEPS: bits of length."""
    below = tl.zeros_like(x)
    wanted = x.to(tl.uint32, bitcast=True)
    for i_bit in tl.static_range(STEPS):
        ahead = below + (1 << (STEPS - 1 - i_bit))
        entry = tl.load(p_list + ahead - 1, mask=ahead <= length, other=-1)
        below = tl.where(entry.to(tl.uint32, bitcast=True) < wanted, ahead, below)  # -1 is the largest of all
    return below


@triton.jit
def own(
    p_ids, p_owned, p_mask, p_below, n_queries, s_below,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grid (queries, batch). p_owned [rows, K + 1]: owned ids before each slot. p_mask [rows, K] uint8: the bits, 0 if not owned.

    p_below [GROUP, rows, K]: where each id would stand in the group's other rows.
    """
    i_q, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = i_b * n_queries + i_q
    i_first = i_q // GROUP * GROUP
    before = 0
    for base in range(0, K, BLOCK):
        o = base + tl.arange(0, BLOCK)
        x = tl.load(p_ids + i_row * K + o, mask=o < K, other=-1)
        owned = x >= 0
        bits = tl.full((BLOCK,), 0, tl.int32) + (1 << (i_q - i_first))
        for i in tl.static_range(GROUP):
            if (i_first + i < n_queries) & (i_first + i != i_q):
                p_list = p_ids + (i_b * n_queries + i_first + i) * K
                at = _below(p_list, x, K, STEPS)
                has = (x >= 0) & (at < K) & (tl.load(p_list + at, mask=at < K, other=-2) == x)
                bits += has.to(tl.int32) << i
                owned = owned & ((has == 0) | (i_first + i > i_q))
                tl.store(p_below + i * s_below + i_row * K + o, at.to(p_below.dtype.element_ty), mask=o < K)
        count = owned.to(tl.int32)
        tl.store(p_owned + i_row * (K + 1) + o, before + tl.cumsum(count, 0) - count, mask=o < K)
        tl.store(p_mask + i_row * K + o, tl.where(owned, bits, 0).to(tl.uint8), mask=o < K)
        before += tl.sum(count, 0)
    tl.store(p_owned + i_row * (K + 1) + K, before)


@triton.jit
def place(
    p_ids, p_owned, p_mask, p_below, p_union, p_bits, p_count, n_queries, n_groups, s_below,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (queries, batch). p_union and p_bits [groups, GROUP * K] hold -1 and 0 beforehand."""
    i_q, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row = i_b * n_queries + i_q
    i_first = i_q // GROUP * GROUP
    i_group = i_b * n_groups + i_q // GROUP
    for base in range(0, K, BLOCK):
        o = base + tl.arange(0, BLOCK)
        x = tl.load(p_ids + i_row * K + o, mask=o < K, other=-1)
        bits = tl.load(p_mask + i_row * K + o, mask=o < K, other=0)
        slot = tl.load(p_owned + i_row * (K + 1) + o, mask=bits != 0, other=0)
        for i in tl.static_range(GROUP):
            if (i_first + i < n_queries) & (i_first + i != i_q):
                i_list = i_b * n_queries + i_first + i
                at = tl.load(p_below + i * s_below + i_row * K + o, mask=bits != 0, other=0).to(tl.int32)
                slot += tl.load(p_owned + i_list * (K + 1) + at, mask=bits != 0, other=0)
        put(p_union + i_group * (GROUP * K) + slot, x, bits != 0)
        tl.store(p_bits + i_group * (GROUP * K) + slot, bits, mask=bits != 0)
    if i_q == i_first:
        total = 0
        for i in tl.static_range(GROUP):
            if i_first + i < n_queries:
                total += tl.load(p_owned + (i_row + i) * (K + 1) + K)
        tl.store(p_count + i_group, total)


@triton.jit
def _runs(word, bits, next_word, next_bits):
    """Bits of ids in one word flow to the last of them."""
    return next_word, tl.where(word == next_word, bits | next_bits, next_bits)


@triton.jit
def unite(
    p_ids, p_work, p_union, p_bits, p_count, n_queries, n_groups, n_all,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """grid (programs,), which share the groups of all batch entries. p_work [programs, GROUP, WORDS] int32 is zero before and after.

    Ids come in windows of WORDS words of 32. A row's ids ascend, so those of one word are neighbours: a scan brings their bits
    together and the last one stores the word. A block begins 32 ids early, so it holds every run that ends in it whole.
    """
    p_work += tl.program_id(0).to(tl.int64) * (GROUP * WORDS)
    o_block = tl.arange(0, BLOCK)
    for i_at in range(tl.program_id(0), n_all, tl.num_programs(0)):
        i_b = (i_at // n_groups).to(tl.int64)
        i_first = i_at % n_groups * GROUP
        p_rows = p_ids + (i_b * n_queries + i_first) * K
        i_out = tl.full((), GROUP * K, tl.int64) * i_at
        written, window, words = 0, 0, WORDS
        while words == WORDS:  # there may be more beyond
            top = tl.full((BLOCK,), -1, tl.int32)
            for i in tl.static_range(GROUP):
                if i_first + i < n_queries:
                    for base in range(0, K, BLOCK - 32):
                        o = base - 32 + o_block
                        x = tl.load(p_rows + i * K + o, mask=(o >= 0) & (o < K), other=-1)
                        after = tl.load(p_rows + i * K + o + 1, mask=(o >= -1) & (o < K - 1), other=-1)
                        word = x >> 5
                        _, bits = tl.associative_scan((word, 1 << (x & 31)), 0, _runs)
                        whole = (x >= 0) & (word != after >> 5) & (o_block >= 32)
                        put(p_work + i * WORDS + word - window, bits, whole & (word >= window) & (word < window + WORDS))
                        top = tl.maximum(top, x)
            words = tl.minimum(((tl.max(top, 0) >> 5) - window + 16) // 16 * 16, WORDS)
            tl.debug_barrier()  # other threads read the words
            for base in range(0, words, PART):
                o = base + tl.arange(0, PART)
                rows = ()
                every = tl.zeros_like(o)
                for i in tl.static_range(GROUP):
                    row = tl.load(p_work + i * WORDS + o, mask=o < words, other=0)
                    tl.store(p_work + i * WORDS + o, tl.zeros_like(o), mask=o < words)
                    rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no star here
                    every |= row
                left = every.to(tl.uint32, bitcast=True)
                n = left - ((left >> 1) & 0x55555555)
                n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
                n = ((((n + (n >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
                slot = i_out + (written + tl.cumsum(n, 0) - n)
                for _ in range(tl.max(n, 0)):
                    lowest = left & (0 - left)
                    i_bit = tl.maximum((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, 0)
                    bits = tl.zeros_like(o)
                    for i in tl.static_range(GROUP):
                        bits |= ((rows[i] >> i_bit) & 1) << i
                    put(p_union + slot, (window + o) * 32 + i_bit, left != 0)
                    put(p_bits + slot, bits, left != 0)
                    left &= left - 1
                    slot += 1
                written += tl.sum(n, 0)
            tl.debug_barrier()  # the words are zero for the next turn
            window += WORDS
        tl.store(p_count + i_at, written)
        for base in range(written // BLOCK * BLOCK, GROUP * K, BLOCK):
            rest = (base + o_block >= written) & (base + o_block < GROUP * K)
            tl.store(p_union + i_out + base + o_block, tl.full((BLOCK,), -1, tl.int32), mask=rest)
            tl.store(p_bits + i_out + base + o_block, tl.zeros((BLOCK,), tl.uint8), mask=rest)
