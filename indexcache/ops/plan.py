"""The group plan: the sorted union of neighbouring queries' ids with a bit for each query, by binary search in sorted lists.

A row owns an id if no earlier row of its group has it. `own` finds owners and keeps a running count of them in each row;
`place` gives each owned id its slot: the number of owned ids below it, added up over the rows of the group. Nothing is
sorted, and nothing is atomic.
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
