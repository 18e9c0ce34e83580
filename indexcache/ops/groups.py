"""Unite the sorted ids of neighbouring queries, and set a bit for each query that has an id.

The lists ascend, so no kernel sorts; none uses atomics either.

`join` takes short lists, by binary search: a row owns an id if no earlier row of its group has
it, and an id's slot is the number of owned ids below it, added up over the rows of the group.
`unite` takes long lists: it writes each row as a bitmap and reads the group's bitmaps together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from indexcache.ops.primitives import ones, put, take
from indexcache.ops.reference import QueryGroups
from indexcache.ops.tuning import current, interpreted, power

LONG = 4096  # ids; lists from this length on go through bitmaps
WORDS = 8192  # words of a bitmap at a time, 32 keys each
BLOCK = 1024  # ids of a row at a time
SLICE = 64  # words at a time
# Registers of a thread in `unite`: four programs of 4 warps on a multiprocessor hide their waits.
REGISTERS = 128


def search(k: int) -> str:
    """Write the PTX of `_rank` among k entries, a power of two.

    It searches four ids ($8 to $11) in the lists at $4 to $7 and returns rank | (1 if it
    is an entry) << 16 of each in $0 to $3. A thread searches for four ids at a time, with half the
    instructions of compiled code.
    """
    steps = [1 << i for i in reversed(range(k.bit_length() - 1))] + [1]
    lines = ["mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"]
    for n in steps:  # the last step reads the entry at the rank: it is smaller only if all are
        lines += [f"cvt.u64.u32 p{i}, ${i}; add.s64 p{i}, p{i}, $4;" for i in range(4)]
        lines += [f"ld.global.nc.u32 e{i}, [p{i}+{4 * n - 4}];" for i in range(4)]
        lines += [f"setp.lt.u32 q{i}, e{i}, ${8 + i};" for i in range(4)]
        lines += [f"@q{i} add.u32 ${i}, ${i}, {4 * n};" for i in range(4)]
    lines += [
        f"shr.u32 ${i}, ${i}, 2; setp.eq.u32 q{i}, e{i}, ${8 + i}; @q{i} or.b32 ${i}, ${i}, 65536;"
        for i in range(4)
    ]
    return "{ .reg .pred q<4>; .reg .u32 e<4>; .reg .u64 p<4>; " + " ".join(lines) + " }"


@triton.jit
def _rank(p_list, x, K: tl.constexpr, STEPS: tl.constexpr, SEARCH: tl.constexpr):
    """Count the entries of a list that are smaller than x; the second result is 1 if x is an entry.

    The list has K entries, ascending, -1 padded at the end. x = -1 is never an entry.
    """
    if SEARCH is None:
        below = tl.zeros_like(x)
        unsigned = x.to(tl.uint32, bitcast=True)  # makes -1 the largest of all
        for i_bit in tl.static_range(STEPS):
            ahead = below + (1 << (STEPS - 1 - i_bit))
            entry = tl.load(p_list + ahead - 1, mask=ahead <= K, other=-1)
            below = tl.where(entry.to(tl.uint32, bitcast=True) < unsigned, ahead, below)
        has = tl.load(p_list + below, mask=below < K, other=-2) == x
    else:
        p = p_list.to(tl.int64) + tl.zeros_like(x)
        packed = tl.inline_asm_elementwise(
            SEARCH, "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r", [p, x], dtype=tl.int32, is_pure=False, pack=4
        )
        below, has = packed & 0xFFFF, packed >> 16 != 0
    return below, ((x >= 0) & has).to(tl.int32)


@triton.jit
def _pad(p_union, p_bits, written, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Fill a group's slots from `written` on with -1 and no bits."""
    for base in range(written // BLOCK * BLOCK, SLOTS, BLOCK):
        o = base + tl.arange(0, BLOCK)
        m = (o >= written) & (o < SLOTS)
        tl.store(p_union + o, tl.full((BLOCK,), -1, tl.int32), mask=m)
        tl.store(p_bits + o, tl.zeros((BLOCK,), tl.uint8), mask=m)


@triton.jit
def join(
    p_ids,
    p_work,
    p_union,
    p_bits,
    p_count,
    n_queries,
    n_groups,
    n_all,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Unite short lists. grid (programs,), which share the groups of all batch entries.

    K <= BLOCK, K < 4096, GROUP <= 8. p_work int32 [programs, GROUP, K + 1] holds how many ids each
    row owns before each place. From the search to its use an id keeps a word for each two other
    rows, cyclically, with 12 bits for its rank in each; the last word has the id's bits on top, 0
    where another row owns it.
    """
    PAIRS: tl.constexpr = max(GROUP // 2, 1)
    p_work += tl.program_id(0).to(tl.int64) * (GROUP * (K + 1))
    o = tl.arange(0, BLOCK)
    for i_at in range(tl.program_id(0), n_all, tl.num_programs(0)):
        i_first = i_at % n_groups * GROUP
        n_rows = n_queries - i_first
        p_rows = p_ids + ((i_at // n_groups).to(tl.int64) * n_queries + i_first) * K
        i_out = tl.full((), GROUP * K, tl.int64) * i_at
        ids, words = (), ()
        total = 0
        # All rows are loaded first: a search in a row still in flight would wait in every step.
        for i in tl.static_range(GROUP):
            x = take(p_rows + i * K + o, (o < K) & (i < n_rows))
            ids = ids + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
        for i in tl.static_range(GROUP):
            x = ids[i]
            owned = x >= 0
            bits = tl.full((BLOCK,), 1 << i, tl.int32)
            word = tl.zeros_like(x)
            for n in tl.static_range(1, GROUP):
                other = (i + n) % GROUP < n_rows  # a row beyond the last query owns nothing
                at, has = _rank(
                    p_rows + tl.where(other, (i + n) % GROUP * K, 0), x, K, STEPS, SEARCH
                )
                has = tl.where(other, has, 0)
                word |= at << (n - 1) % 2 * 12
                bits |= has << (i + n) % GROUP
                if (i + n) % GROUP < i:
                    owned = owned & (has == 0)
                if n % 2 == 0 and n < GROUP - 1:
                    words = words + (word,)  # type: ignore[assignment]  # noqa: RUF005
                    word = tl.zeros_like(x)
            word |= tl.where(owned, bits, 0) << 24
            words = words + (word,)  # type: ignore[assignment]  # noqa: RUF005
            count = tl.where(owned, 1, 0)
            put(p_work + i * (K + 1) + o, tl.cumsum(count, 0) - count, o < K)
            owns = tl.sum(count, 0)
            tl.store(p_work + i * (K + 1) + K, owns)
            total += owns
        tl.debug_barrier()  # other threads read the ranks
        for i in tl.static_range(GROUP):
            bits = (words[i * PAIRS + PAIRS - 1] >> 24) & 255
            x = take(p_rows + i * K + o, bits != 0)
            slot = take(p_work + i * (K + 1) + o, bits != 0)
            for n in tl.static_range(1, GROUP):
                at = (words[i * PAIRS + (n - 1) // 2] >> (n - 1) % 2 * 12) & 4095
                slot += take(p_work + (i + n) % GROUP * (K + 1) + at, bits != 0)
            put(p_union + (i_out + slot), x, bits != 0)
            put(p_bits + (i_out + slot), bits, bits != 0)
        tl.store(p_count + i_at, total)
        _pad(p_union + i_out, p_bits + i_out, total, GROUP * K, BLOCK)
        tl.debug_barrier()  # the next group overwrites the ranks


@triton.jit
def _runs(word, bits, next_word, next_bits):
    """Combine two ids of a scan: the bits of ids in one word flow to the last of them."""
    return next_word, tl.where(word == next_word, bits | next_bits, next_bits)


@triton.jit
def unite(
    p_ids,
    p_work,
    p_union,
    p_bits,
    p_count,
    n_queries,
    n_groups,
    n_all,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Unite long lists. grid (programs,), which share the groups of all batch entries.

    p_work int32 [programs, GROUP, WORDS] is zero before and after. Ids come in windows of WORDS
    words of 32. A row's ids ascend, so those of one word are neighbours: a scan brings their bits
    together and the last one stores the word. A block begins 32 ids early, so it holds all of
    every run that ends in it.
    """
    p_work += tl.program_id(0).to(tl.int64) * (GROUP * WORDS)
    o_block = tl.arange(0, BLOCK)
    for i_at in range(tl.program_id(0), n_all, tl.num_programs(0)):
        i_b = (i_at // n_groups).to(tl.int64)
        i_first = i_at % n_groups * GROUP
        p_rows = p_ids + (i_b * n_queries + i_first) * K
        i_out = tl.full((), GROUP * K, tl.int64) * i_at
        written, window, words = 0, 0, WORDS
        while words == WORDS:  # ids beyond this window may follow
            top = tl.full((BLOCK,), -1, tl.int32)
            for i in tl.static_range(GROUP):
                if i_first + i < n_queries:
                    p_row = p_rows + i * K + o_block - 32
                    next_x = tl.load(p_row, mask=(o_block >= 32) & (o_block < K + 32), other=-1)
                    next_after = tl.load(
                        p_row + 1, mask=(o_block >= 31) & (o_block < K + 31), other=-1
                    )
                    for base in range(0, K, BLOCK - 32):
                        x, after = next_x, next_after
                        o = base + (BLOCK - 64) + o_block  # the next block is loaded meanwhile
                        next_x = tl.load(p_row + base + (BLOCK - 32), mask=o < K, other=-1)
                        next_after = tl.load(p_row + base + (BLOCK - 31), mask=o < K - 1, other=-1)
                        word = x >> 5
                        _, bits = tl.associative_scan((word, 1 << (x & 31)), 0, _runs)
                        last = (x >= 0) & (word != after >> 5) & (o_block >= 32)
                        put(
                            p_work + i * WORDS + word - window,
                            bits,
                            last & (word >= window) & (word < window + WORDS),
                        )
                        top = tl.maximum(top, x)
            words = tl.minimum(((tl.max(top, 0) >> 5) - window + 16) // 16 * 16, WORDS)
            tl.debug_barrier()  # other threads read the words
            for base in range(0, words, SLICE):
                o = base + tl.arange(0, SLICE)
                rows = ()
                union = tl.zeros_like(o)
                for i in tl.static_range(GROUP):
                    row = tl.load(p_work + i * WORDS + o, mask=o < words, other=0)
                    rows = rows + (row[:, None],)  # type: ignore[assignment]  # noqa: RUF005
                    union |= row
                tl.debug_barrier()  # a word is read by several warps, and cleared by one
                for i in tl.static_range(GROUP):
                    tl.store(p_work + i * WORDS + o, tl.zeros_like(o), mask=o < words)
                n = ones(union)
                first = written + tl.cumsum(n, 0) - n
                # A word's bits lie side by side in a warp, and so do the slots that they go to.
                i_bit = tl.arange(0, 32)[None, :]
                slot = i_out + (first[:, None] + ones(union[:, None] & ((1 << i_bit) - 1)))
                has = (union[:, None] >> i_bit) & 1
                bits = tl.zeros_like(has)
                for i in tl.static_range(GROUP):
                    bits |= ((rows[i] >> i_bit) & 1) << i
                put(p_union + slot, (window + o)[:, None] * 32 + i_bit, has != 0)
                put(p_bits + slot, bits, has != 0)
                written += tl.sum(n, 0)
            tl.debug_barrier()  # the next window needs words that are zero
            window += WORDS
        tl.store(p_count + i_at, written)
        _pad(p_union + i_out, p_bits + i_out, written, GROUP * K, BLOCK)


# ---- host side


def group_queries(ids: Tensor, group: int) -> QueryGroups:
    """Run `ops.group_queries` on the kernels."""
    batch, queries, k = ids.shape
    ids = ids.contiguous()
    n_groups = -(-queries // group)
    device = ids.device
    count = torch.empty(batch, n_groups, dtype=torch.int32, device=device)
    union = torch.empty(batch, n_groups, group * k, dtype=torch.int32, device=device)
    bits = torch.empty(batch, n_groups, group * k, dtype=torch.uint8, device=device)
    if not ids.numel():
        return QueryGroups(union.fill_(-1), bits.zero_(), count.zero_(), group)
    n_all, workers = batch * n_groups, current().index.workers
    if k < LONG and group >= current().index.bitmaps_from:
        from indexcache.ops.pages import group_rows

        for b in range(batch):
            one = slice(b, b + 1)
            group_rows(ids[b], QueryGroups(union[one], bits[one], count[one], group))
        return QueryGroups(union, bits, count, group)
    arguments: dict[str, Any] = {"p_ids": ids, "p_union": union, "p_bits": bits, "p_count": count}
    arguments |= {"n_queries": queries, "n_groups": n_groups, "n_all": n_all}
    arguments |= {"GROUP": group, "K": k}
    if k >= LONG:
        programs = min(n_all, 4 * workers)
        bitmaps = torch.zeros(programs, group, WORDS, dtype=torch.int32, device=device)
        constants: dict[str, Any] = {"BLOCK": BLOCK, "SLICE": SLICE, "WORDS": WORDS}
        unite[(programs,)](**arguments, p_work=bitmaps, **constants, num_warps=4, maxnreg=REGISTERS)
    else:
        programs = min(n_all, 8 * workers)
        ranks = torch.empty(programs, group, k + 1, dtype=torch.int32, device=device)
        block = power(k, 16)
        code = search(k) if k == block >= 512 and not interpreted() else None
        constants = {"BLOCK": block, "STEPS": k.bit_length(), "SEARCH": code}
        warps = min(max(block // 128, 4), 16)
        join[(programs,)](**arguments, p_work=ranks, **constants, num_warps=warps)
    return QueryGroups(union, bits, count, group)
