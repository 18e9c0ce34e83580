"""Unite the ids of neighbouring queries of a batch of requests, whose tokens lie in pages.

An engine gives ids in any order, as positions in a query's own request, and a table of each
request's pages. `unite_pages` writes each row as a bitmap by atomic OR, so nothing is sorted, and
reads the bitmaps of the rows of one request together. A word of a bitmap is 32 neighbouring
positions, which lie in one page: the table is read once a word, not once an id.

The union is in order of position, wherever the pages lie, so attention over it adds up in the same
order in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from indexcache.ops.groups import BLOCK, REGISTERS, WORDS, _pad
from indexcache.ops.primitives import ones, put
from indexcache.ops.reference import QueryGroups
from indexcache.ops.tuning import current, power

SLICE = 512  # words at a time


@triton.jit
def unite_pages(
    p_ids,
    p_requests,
    p_table,
    p_work,
    p_union,
    p_bits,
    p_count,
    n_queries,
    n_groups,
    n_pages,
    s_id,
    s_table,
    page_rows,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Unite the rows of each group, request by request. grid (programs,), which share the groups.

    p_ids int32 [queries, K] with row stride s_id; p_requests int32 [queries], ascending; p_table
    int32 [requests, n_pages] with row stride s_table. Both are None where all queries are of one
    request whose positions are the rows of its cache; ids are below n_pages PAGE then too. p_work
    int32 [programs, GROUP, WORDS] is zero before and after. Positions come in windows of WORDS
    words of 32.
    """
    p_work += tl.program_id(0).to(tl.int64) * (GROUP * WORDS)
    o_block = tl.arange(0, BLOCK)
    for i_at in range(tl.program_id(0), n_groups, tl.num_programs(0)):
        i_first = i_at * GROUP
        n_rows = tl.minimum(n_queries - i_first, GROUP)
        i_out = tl.full((), GROUP * K, tl.int64) * i_at
        written, i_row = 0, 0
        while i_row < n_rows:
            i_end = n_rows  # the rows from i_row to i_end are of one request
            if p_requests is not None:
                request = tl.load(p_requests + i_first + i_row)
                i_end = i_row
                for i in tl.static_range(GROUP):
                    other = tl.load(p_requests + i_first + i, mask=i < n_rows, other=-1)
                    i_end = tl.where((i < n_rows) & (other == request), i + 1, i_end)
            window, words = 0, WORDS
            while words == WORDS:  # positions beyond this window may follow
                top = tl.full((BLOCK,), -1, tl.int32)
                for i_member in range(i_row, i_end):
                    p_row = p_ids + (i_first + i_member).to(tl.int64) * s_id
                    for base in range(0, K, BLOCK):
                        x = tl.load(p_row + base + o_block, mask=base + o_block < K, other=-1)
                        x = tl.where(x < n_pages * PAGE, x, -1)
                        at = (x >> 5) - window
                        tl.atomic_or(
                            p_work + i_member * WORDS + at,
                            1 << (x & 31),
                            mask=(x >= 0) & (at >= 0) & (at < WORDS),
                            sem="relaxed",
                        )
                        top = tl.maximum(top, x)
                words = tl.minimum(((tl.max(top, 0) >> 5) - window + 16) // 16 * 16, WORDS)
                tl.debug_barrier()  # other threads read the words
                for base in range(0, words, SLICE):
                    o = base + tl.arange(0, SLICE)
                    rows = ()
                    left = tl.zeros_like(o)
                    for i in tl.static_range(GROUP):
                        # Atomics write past a multiprocessor's own cache.
                        row = tl.load(
                            p_work + i * WORDS + o, mask=o < words, other=0, cache_modifier=".cg"
                        )
                        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
                        left |= row
                    tl.debug_barrier()  # a word may be read by a thread that does not clear it
                    for i in tl.static_range(GROUP):
                        tl.store(p_work + i * WORDS + o, tl.zeros_like(o), mask=o < words)
                    place = (window + o) * 32
                    if p_table is not None:
                        p_page = p_table + request.to(tl.int64) * s_table + place // PAGE
                        page = tl.load(p_page, mask=left != 0, other=0)
                        place = page * page_rows + place % PAGE
                    n = ones(left)
                    slot = i_out + (written + tl.cumsum(n, 0) - n)
                    for i_step in range(tl.max(n, 0)):  # each word gives its lowest bit
                        lowest = left & -left
                        bits = tl.zeros_like(left)
                        for i in tl.static_range(GROUP):
                            bits |= tl.where((rows[i] & lowest) != 0, 1 << i, 0)
                        put(p_union + (slot + i_step), place + ones(lowest - 1), left != 0)
                        put(p_bits + (slot + i_step), bits, left != 0)
                        left &= left - 1
                    written += tl.sum(n, 0)
                tl.debug_barrier()  # the next window needs words that are zero
                window += WORDS
            i_row = i_end
        tl.store(p_count + i_at, written)
        _pad(p_union + i_out, p_bits + i_out, written, GROUP * K, BLOCK)


def group_pages(
    ids: Tensor, requests: Tensor, table: Tensor, group: int, page: int, page_rows: int
) -> QueryGroups:
    """Run `ops.group_pages` on the kernel."""
    queries, k = ids.shape
    n_groups = -(-queries // group)
    device = ids.device
    ids = ids if ids.stride(-1) == 1 else ids.contiguous()
    table = table if table.stride(-1) == 1 else table.contiguous()
    count = torch.empty(1, n_groups, dtype=torch.int32, device=device)
    union = torch.empty(1, n_groups, group * k, dtype=torch.int32, device=device)
    bits = torch.empty(1, n_groups, group * k, dtype=torch.uint8, device=device)
    if not ids.numel() or not table.numel():
        return QueryGroups(union.fill_(-1), bits.zero_(), count.zero_(), group)
    arguments = {"p_requests": requests.contiguous(), "p_table": table, "page_rows": page_rows}
    arguments |= {"n_pages": table.shape[1], "s_table": table.stride(0)}
    _launch(ids, QueryGroups(union, bits, count, group), page, arguments)
    return QueryGroups(union, bits, count, group)


def group_rows(ids: Tensor, out: QueryGroups) -> None:
    """Unite the rows of one sequence through bitmaps, into groups that hold anything.

    Args:
        ids: int32 [S, K], in any order, -1 anywhere for none.
        out: groups of one batch entry.
    """
    arguments: dict[str, Any] = {"p_requests": None, "p_table": None, "page_rows": 32}
    # Ids are below 2^30; windows go on while ids do.
    arguments |= {"n_pages": 1 << 25, "s_table": 0}
    _launch(ids, out, 32, arguments)


def _launch(ids: Tensor, out: QueryGroups, page: int, arguments: dict[str, Any]) -> None:
    """Launch `unite_pages`; `arguments` are those of the requests and their table."""
    queries, k = ids.shape
    n_groups = out.count_BG.shape[1]
    words = min(power(-(-arguments["n_pages"] * page // 32), 16), WORDS)
    programs = min(n_groups, 4 * current().index.workers)
    work = torch.zeros(programs, out.group, words, dtype=torch.int32, device=ids.device)
    unite_pages[(programs,)](
        p_ids=ids,
        p_work=work,
        p_union=out.union_BGU,
        p_bits=out.mask_BGU,
        p_count=out.count_BG,
        n_queries=queries,
        n_groups=n_groups,
        s_id=ids.stride(0),
        **arguments,
        GROUP=out.group,
        K=k,
        PAGE=page,
        BLOCK=min(BLOCK, power(k, 16)),
        SLICE=SLICE,
        WORDS=words,
        num_warps=4,
        maxnreg=REGISTERS,
    )
