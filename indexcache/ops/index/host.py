"""Host side of the selection: chunks, workspace and launches of ops/scores.py and ops/select.py. Called by the dispatch, which has
checked shapes. No step reads device memory on the host, so a whole call can be captured in a CUDA graph when T and S are fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from indexcache.ops.groups import group_queries
from indexcache.ops.index import scores
from indexcache.ops.index import topk as select
from indexcache.ops.index.scores_host import (
    Inputs,
    pool_group,
    query_blocks,
    score_pools,
    score_rows,
    score_tiles,
    tiles_in_gluon,
)
from indexcache.ops.index.topk_host import Lists, Sampling, grid_work, outputs, topk_rows, warps
from indexcache.ops.reference import FP8, QueryGroups, Selection
from indexcache.ops.tuning import current, power, segments

DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)


def refuse(q: Tensor, k: Tensor, topk: int, pool: int) -> str | None:
    heads, dim = q.shape[2:]
    if q.dtype not in DTYPES:
        return f"the indexer's dtype is {q.dtype}"
    if dim & (dim - 1) or not 16 <= dim <= 256:
        return f"the index dim {dim} is not a power of two from 16 to 256"
    if heads > 128:
        return f"{heads} index heads are more than 128"
    if max(topk, pool) > 16384:
        return f"topk {topk} or pool {pool} exceeds 16384"
    return None


def _prefill(x: Inputs, out: Tensor, pool: Tensor | None) -> None:
    """One chunk of one batch entry, fused: no row of scores is stored, but the sample's."""
    rows, topk, device = x.queries, out.shape[-1], x.q.device
    sampling = Sampling.of(x.keys, topk if pool is None else max(topk, pool.shape[-1]))
    count, segment = segments(
        query_blocks(x), x.keys, 2 * current().index.workers, 8 * current().index.keys
    )
    lists = Lists(rows, count, segment, sampling.listed, device)
    if x.keys > sampling.listed:
        sampled = torch.empty(
            rows, -(-x.keys // sampling.stride), dtype=torch.float32, device=device
        )
        score_tiles(x, stride=sampling.stride, out=sampled)
        select.threshold[(rows,)](
            sampled,
            x.offset,
            lists.thr,
            sampled.stride(0),
            1,
            rows,
            x.keys,
            sampling.wanted,
            sampling.slack,
            sampling.listed,
            STRIDE=sampling.stride,
            SAMPLE=sampling.sample,
            FLOAT=True,
            CAUSAL=True,
            PAIRS=False,
            num_warps=warps(rows, sampling.sample),
        )
    else:
        lists.thr.fill_(-(2**31))
    score_tiles(x, lists=lists)
    lists.pick(out, pool)
    _rescue(x, lists.flag, None, out, pool)


def _rescue(x: Inputs, flag: Tensor, ids: Tensor | None, out: Tensor, pool: Tensor | None) -> None:
    """Redoes the flagged rows of one batch entry, of all keys or inside pools (ids [S, columns])."""
    rows, columns = x.queries, x.keys if ids is None else ids.shape[1]
    workers = min(current().index.workers, rows)
    work = torch.empty(workers, columns, dtype=torch.int32, device=x.q.device)
    scores.rescue_fused[(workers,)](
        x.q,
        x.k,
        x.w,
        x.scale_or_any,
        x.offset,
        flag,
        out if ids is None else ids,
        work,
        out,
        out if pool is None else pool,
        x.k.stride(0),
        x.k.stride(1),
        x.keys,
        0 if ids is None else ids.stride(0),
        work.stride(0),
        rows,
        rows,
        x.keys,
        columns,
        H=x.heads,
        HP=power(x.heads, 16),
        D=x.dim,
        BN=128,
        SCALED=x.scale is not None,
        TOPK=out.shape[-1],
        POOL=0 if pool is None else pool.shape[-1],
        BLOCK=4096,
        GATHER=ids is not None,
        num_warps=8,
    )


def index_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    k_scale: Tensor | None,
    topk: int,
    offset: int | Tensor,
    candidates: Tensor | None,
    *,
    pool: int,
    groups: QueryGroups | None,
) -> Selection:
    batch, queries = q.shape[:2]
    out, wide = outputs(batch * queries, topk, pool, q.device)
    x = Inputs(q, k, w, k_scale, offset)
    columns = x.keys if candidates is None else candidates.shape[-1]
    if not out.shape[0] or not columns or not x.keys:
        out.fill_(-1)
        if wide is not None:
            wide.fill_(-1)
    elif candidates is not None and pool_group(x.q, x.k) > 1:
        _pools(x, candidates.int(), groups, out, wide)
    elif candidates is not None or queries < current().index.rows_below:
        _rows(x, candidates, out, wide)
    else:
        listed = Sampling.of(x.keys, max(topk, pool)).listed
        # lists take their capacity for each row and segment, at 200K keys 0.5 GB (1.1 with a pool); of the plain kernel, whose tiles are
        # larger and segments therefore more, 2.1 GB: with rows for its 8,192, a pool of 16,384 would take 4.3
        rows = current().index.chunk if tiles_in_gluon(x) else current().index.chunk // 2
        chunk = (
            max(rows * current().index.listed // listed // current().index.queries, 1)
            * current().index.queries
        )
        for b in range(batch):
            for start in range(0, queries, chunk):
                end = min(start + chunk, queries)
                part = slice(b * queries + start, b * queries + end)
                _prefill(x.chunk(b, start, end), out[part], None if wide is None else wide[part])
    out = out.view(batch, queries, topk)
    return Selection(out, None if wide is None else wide.view(batch, queries, pool))


def _rows(x: Inputs, candidates: Tensor | None, out: Tensor, pool: Tensor | None) -> None:
    """Few queries, or pools: rows of keys, then the selection over them."""
    columns = x.keys if candidates is None else candidates.shape[-1]
    chunk = max(current().index.workspace // (4 * columns), 1)
    topk, wide = out.shape[-1], 0 if pool is None else pool.shape[-1]
    step = x.queries if chunk >= x.batch * x.queries else min(chunk, x.queries)
    entries = [None] if step == x.queries else list(range(x.batch))
    for b in entries:
        for start in range(0, x.queries, step):
            end = min(start + step, x.queries)
            part = x if b is None else x.chunk(b, start, end)
            at = slice(None) if b is None else slice(b * x.queries + start, b * x.queries + end)
            ids = None
            if candidates is not None:
                ids = (
                    (candidates if b is None else candidates[b : b + 1, start:end])
                    .int()
                    .reshape(-1, columns)
                )
            keys = torch.empty(
                part.batch * part.queries, columns, dtype=torch.int32, device=out.device
            )
            work = grid_work(len(keys), columns, out.device) if pool is None else None
            score_rows(part, ids, keys, work)
            topk_rows(
                keys,
                topk,
                pool=wide,
                offset=part.offset if ids is None else None,
                queries=part.queries,
                mapped_RT=ids,
                out=(out[at], None if pool is None else pool[at]),
                work=work,
            )


def _pools(
    x: Inputs, candidates: Tensor, groups: QueryGroups | None, out: Tensor, pool: Tensor | None
) -> None:
    """Neighbouring queries score the union of their pools together, each with a list of its own; a sample sets the thresholds."""
    group, columns, candidates = pool_group(x.q, x.k), candidates.shape[-1], candidates.contiguous()
    if groups is None or groups.group != group:
        groups = group_queries(candidates, group)
    sampling = Sampling.of(columns, max(out.shape[-1], 0 if pool is None else pool.shape[-1]))
    # odd, so that pools that take turns in the union are all met; finer and safer than for all keys: redoing one row delays a chunk
    stride, wanted = max(sampling.stride // 2 - 1, 1), 17 * sampling.wanted // 8
    width = power(5 * columns // (4 * stride))
    step = (
        max(current().index.workspace // (8 * min(power(columns), sampling.listed)) // group, 1)
        * group
    )
    for b in range(x.batch):
        for start in range(0, x.queries, step):
            end = min(start + step, x.queries)
            taken, at = (
                slice(start // group, -(-end // group)),
                slice(b * x.queries + start, b * x.queries + end),
            )
            part, rows = x.chunk(b, start, end), end - start
            some = QueryGroups(
                groups.union_BGU[b, taken],
                groups.mask_BGU[b, taken],
                groups.count_BG[b, taken],
                group,
            )
            lists = Lists(rows, 1, columns, sampling.listed, out.device)
            if columns > sampling.listed:
                sampled = torch.empty(rows, width, dtype=torch.int32, device=out.device)
                score_pools(part, some, stride=stride, out=sampled)
                select.threshold[(rows,)](
                    sampled,
                    part.offset,
                    lists.thr,
                    width,
                    1,
                    rows,
                    width,
                    wanted,
                    wanted // 16,
                    0,
                    STRIDE=1,
                    SAMPLE=width,
                    FLOAT=False,
                    CAUSAL=False,
                    PAIRS=False,
                    num_warps=warps(rows, width),
                )
            else:
                lists.thr.fill_(-(2**31))
            score_pools(part, some, lists=lists)
            wide = None if pool is None else pool[at]
            lists.pick(out[at], wide)
            _rescue(part, lists.flag, candidates[b, start:end], out[at], wide)
