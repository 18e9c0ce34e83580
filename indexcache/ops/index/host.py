"""Run the selection with kernels: split a call into chunks, allocate the workspace, launch.

The dispatch in ops/__init__.py calls `run_index_topk` after it has checked the shapes. There are
four ways: `_prefill` scores tiles and appends straight to lists; `_short` writes rows of scores of
all keys, where these are few; `_rows` writes rows of keys, for few queries and for pools; `_pools`
scores the pools of neighbouring queries together. No step reads device memory on the host, so a
call can be captured in a CUDA graph when T and S are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from indexcache.ops.groups import group_queries
from indexcache.ops.index.scores_host import (
    Inputs,
    neighbours,
    prefill_tile,
    query_blocks,
    rescue,
    score_pools,
    score_rows,
    score_tiles,
    tiles_in_gluon,
)
from indexcache.ops.index.topk_host import (
    REGISTERS,
    Lists,
    Rows,
    Sampling,
    grid_work,
    outputs,
    topk_rows,
)
from indexcache.ops.reference import FP8, QueryGroups, Selection
from indexcache.ops.shares import pool_width
from indexcache.ops.tuning import current, power, segments

DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)
MAX_K = 16384
SEGMENT = 1024  # min keys of a segment of a prefill


def refuse_index(q: Tensor, k: Tensor, topk: int, pool: int | Fraction) -> str | None:
    """Return why the kernels cannot run these arguments of `index_topk`, or None if they can."""
    heads, dim = q.shape[2:]
    if q.dtype not in DTYPES:
        return f"the indexer's dtype is {q.dtype}"
    if dim & (dim - 1) or not 16 <= dim <= 256:
        return f"the index dim {dim} is not a power of two from 16 to 256"
    if heads > 128:
        return f"{heads} index heads are more than 128"
    if isinstance(pool, Fraction) and k.shape[1] > REGISTERS:
        return f"a pool of {pool} of {k.shape[1]} keys: the kernels take shares of {REGISTERS}"
    if max(topk, pool) > MAX_K:
        return f"topk {topk} or pool {pool} exceeds {MAX_K}"
    return None


def run_index_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    k_scale: Tensor | None,
    topk: int,
    offset: int | Tensor,
    candidates: Tensor | None,
    *,
    pool: int | Fraction,
    groups: QueryGroups | None,
) -> Selection:
    """Run `indexcache.ops.index_topk`, whose docstring is the contract, with the kernels."""
    batch, queries = q.shape[:2]
    share = pool if isinstance(pool, Fraction) else None
    pool = pool_width(pool, k.shape[1], topk)
    out, pool_out = outputs(batch * queries, topk, pool, q.device)
    x = Inputs(q, k, w, k_scale, offset)
    columns = x.keys if candidates is None else candidates.shape[-1]
    if not out.shape[0] or not columns or not x.keys:
        out.fill_(-1)
        if pool_out is not None:
            pool_out.fill_(-1)
    elif queries >= current().index.rows_below and (share is not None or is_short(x, columns)):
        _short(x, candidates, out, pool_out, share)
    elif candidates is not None and neighbours(x.q, x.k) > 1:
        _pools(x, candidates.int(), groups, out, pool_out)
    elif candidates is not None or queries < current().index.rows_below:
        _rows(x, candidates, out, pool_out, share)
    else:
        step = _prefill_chunk(x, max(topk, pool))
        for b, start, end, rows in _chunks(x, step):
            _prefill(
                x.chunk(b, start, end), out[rows], None if pool_out is None else pool_out[rows]
            )
    ids = out.view(batch, queries, topk)
    return Selection(ids, None if pool_out is None else pool_out.view(batch, queries, pool))


def _chunks(x: Inputs, step: int) -> Iterator[tuple[int, int, int, slice]]:
    """Yield (batch entry, first query, end, rows of the output) of chunks of `step` queries."""
    for b in range(x.batch):
        for start in range(0, x.queries, step):
            end = min(start + step, x.queries)
            yield b, start, end, slice(b * x.queries + start, b * x.queries + end)


def _prefill_chunk(x: Inputs, max_k: int) -> int:
    """Return the number of queries of a chunk, which bounds the memory of the lists.

    Lists take their capacity for each row and segment. At 200K keys these are 0.5 GB, and 1.1 GB
    with a pool. The Triton kernel has larger tiles and hence more segments: 2.1 GB, and with
    chunks as long as Gluon's a pool of 16,384 would take 4.3 GB.
    """
    settings = current().index
    queries = settings.chunk if tiles_in_gluon(x) else settings.chunk // 2
    listed = Sampling.of(x.keys, max_k).listed
    tile = prefill_tile(x).queries
    return max(queries * settings.listed // listed // tile, 1) * tile


def _prefill(x: Inputs, out: Tensor, pool: Tensor | None) -> None:
    """Select for one chunk of one batch entry. No row of scores is stored, except the sample's."""
    settings = current().index
    device = x.q.device
    sampling = Sampling.of(x.keys, max(out.shape[-1], 0 if pool is None else pool.shape[-1]))
    count, segment = segments(query_blocks(x), x.keys, 2 * settings.workers, SEGMENT)
    lists = Lists(x.queries, count, segment, sampling.listed, device)
    if x.keys > sampling.listed:
        columns = -(-x.keys // sampling.stride)
        sampled = torch.empty(x.queries, columns, dtype=torch.float32, device=device)
        score_tiles(x, stride=sampling.stride, out=sampled)
        lists.set_thresholds(Rows(sampled, x.offset, x.queries), sampling, keys=x.keys)
    else:
        lists.take_all()
    score_tiles(x, lists=lists)
    lists.pick(out, pool)
    rescue(x, lists.flag, None, out, pool)


def is_short(x: Inputs, columns: int) -> bool:
    """Return whether `_short` is the fastest way for this number of keys and of candidates.

    It was not measured in fp8.
    """
    return x.q.dtype != FP8 and x.keys <= current().index.listed and columns <= REGISTERS


def _short(
    x: Inputs, candidates: Tensor | None, out: Tensor, pool: Tensor | None, share: Fraction | None
) -> None:
    """Select for many queries among few keys: rows of all scores, then the selection over them.

    A tile of neighbouring queries is scored so much faster than one query's candidates that all
    keys are scored, and the candidates' scores are picked out.
    """
    step = max(current().index.workspace // (4 * x.keys), 1)
    for b, start, end, rows in _chunks(x, step):
        chunk = x.chunk(b, start, end)
        scores = torch.empty(chunk.queries, x.keys, dtype=torch.float32, device=out.device)
        score_tiles(chunk, out=scores)
        ids = None if candidates is None else candidates[b, start:end].int().contiguous()
        for first, last, seen in _by_length(chunk):
            part = slice(rows.start + first, rows.start + last)
            topk_rows(
                scores[first:last, :seen],
                out.shape[-1],
                pool=0 if pool is None else pool.shape[-1],
                offset=chunk.offset + first if first else chunk.offset,
                queries=last - first,
                mapped_RT=None if ids is None else ids[first:last],
                out=(out[part], None if pool is None else pool[part]),
                gathered=ids is not None,
                share=share,
            )


def _by_length(x: Inputs) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end, keys that these see at most): they double from part to part.

    Where the position of the first query lies on the device only, there is one part.
    """
    start = 0
    while start < x.queries:
        seen, end = x.keys, x.queries
        if x.first is not None and power(x.first + start + 1, 2048) < seen:
            seen = power(x.first + start + 1, 2048)
            end = min(seen - x.first, end)
        yield start, end, seen
        start = end


def _rows(
    x: Inputs, candidates: Tensor | None, out: Tensor, pool: Tensor | None, share: Fraction | None
) -> None:
    """Select for few queries, or inside pools: rows of keys, then the selection over them."""
    columns = x.keys if candidates is None else candidates.shape[-1]
    step = max(current().index.workspace // (4 * columns), 1)
    if step >= x.queries:
        _rows_chunk(x, candidates, out, pool, share)
        return
    for b, start, end, rows in _chunks(x, step):
        ids = None if candidates is None else candidates[b : b + 1, start:end]
        part = None if pool is None else pool[rows]
        _rows_chunk(x.chunk(b, start, end), ids, out[rows], part, share)


def _rows_chunk(
    x: Inputs, candidates: Tensor | None, out: Tensor, pool: Tensor | None, share: Fraction | None
) -> None:
    rows = x.batch * x.queries
    columns = x.keys if candidates is None else candidates.shape[-1]
    ids = None if candidates is None else candidates.int().reshape(-1, columns)
    keys = torch.empty(rows, columns, dtype=torch.int32, device=out.device)
    work = grid_work(rows, columns, out.device) if pool is None else None
    score_rows(x, ids, keys, work)
    topk_rows(
        keys,
        out.shape[-1],
        pool=0 if pool is None else pool.shape[-1],
        offset=x.offset if ids is None else None,
        queries=x.queries,
        mapped_RT=ids,
        out=(out, pool),
        work=work,
        share=share,
    )


def _pools(
    x: Inputs, candidates: Tensor, groups: QueryGroups | None, out: Tensor, pool: Tensor | None
) -> None:
    """Select inside pools, where neighbouring queries score the union of their pools together.

    Each query has a separate list, and a sample of the union sets the thresholds.
    """
    group = neighbours(x.q, x.k)
    columns = candidates.shape[-1]
    candidates = candidates.contiguous()
    if groups is None or groups.group != group:
        groups = group_queries(candidates, group)
    sampling = Sampling.of(columns, max(out.shape[-1], 0 if pool is None else pool.shape[-1]))
    # The stride is odd, so that it meets every pool where pools alternate in the union. The sample
    # is finer and the threshold safer than for all keys, because selecting one row anew delays a
    # chunk.
    stride = max(sampling.stride // 2 - 1, 1)
    width = power(5 * columns // (4 * stride))
    union_sampling = Sampling(stride=1, slots=width, rank=17 * sampling.rank // 8, listed=0)
    bytes_per_row = 8 * min(power(columns), sampling.listed)
    step = max(current().index.workspace // bytes_per_row // group, 1) * group
    for b, start, end, rows in _chunks(x, step):
        chunk = x.chunk(b, start, end)
        at = slice(start // group, -(-end // group))
        chunk_groups = QueryGroups(
            groups.union_BGU[b, at], groups.mask_BGU[b, at], groups.count_BG[b, at], group
        )
        lists = Lists(chunk.queries, 1, columns, sampling.listed, out.device)
        if columns > sampling.listed:
            sampled = torch.empty(chunk.queries, width, dtype=torch.int32, device=out.device)
            score_pools(chunk, chunk_groups, stride=stride, out=sampled)
            lists.set_thresholds(Rows(sampled), union_sampling, keys=width)
        else:
            lists.take_all()
        score_pools(chunk, chunk_groups, lists=lists)
        pool_rows = None if pool is None else pool[rows]
        lists.pick(out[rows], pool_rows)
        rescue(chunk, lists.flag, candidates[b, start:end], out[rows], pool_rows)
