"""Host side of the selection: chunks, workspace and launches of ops/scores.py and ops/select.py. Called by the dispatch, which has
checked shapes. No step reads device memory on the host, so a whole call can be captured in a CUDA graph when T and S are fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from indexcache.ops import scores, select
from indexcache.ops.reference import FP8


@dataclass
class Settings:
    """What the kernels' speed depends on and their result does not. Figures: docs/kernels.md."""

    queries: int = 64  # of a prefill tile; more warps or larger tiles lost
    keys: int = 128
    stages: int = 3
    registers: int = 168  # most registers of a thread of the plain prefill kernel: three programs a multiprocessor; 0: no limit
    hopper: bool = False  # the Gluon kernel where it fits; off: measured slower than the plain one so far (docs/kernels.md)
    hopper_stages: int = 8
    hopper_unroll: int = 8
    stride: int = 32  # a sample stands for this many keys
    listed: int = 8192  # least capacity of the lists of a row, at most 4 x the wanted count above that
    registered: int = 8192  # longest lists that are picked from registers
    sample: int = 32768  # most samples of a row; longer rows take a wider stride
    deviations: float = 5.0  # the threshold is set this many standard deviations to the safe side
    neighbours: int = 8  # queries of one program over pools
    chunk: int = 4096  # prefill queries at a time
    workspace: int = 1 << 29  # bytes of rows of scores at a time, for decode and pools
    rows_below: int = 32  # fewer queries than this use the row kernel
    workers: int = 132  # programs that redo rows whose sample misled


SETTINGS = Settings()
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


def _power(n: int, least: int = 1) -> int:
    return max(triton.next_power_of_2(max(n, 1)), least)


@dataclass
class Sampling:
    """How one row length is sampled: what `threshold` needs."""

    stride: int
    sample: int  # slots, a power of two
    wanted: int  # rank among the samples
    slack: int
    listed: int  # capacity of a row's lists; rows of at most this many keys are listed whole

    @classmethod
    def of(cls, length: int, most: int) -> Sampling:
        listed = max(SETTINGS.listed, _power(2 * most))
        stride = max(SETTINGS.stride, _power(-(-length // SETTINGS.sample)))
        # r samples above the threshold mean r * stride +- sqrt(r) * stride keys: want `most` even on the low side
        z = SETTINGS.deviations
        root = (z + (z * z + 4 * most / stride) ** 0.5) / 2
        wanted = int(root * root) + 1
        return cls(stride, _power(-(-length // stride), 16), wanted, wanted // 8, listed)


def _segments(rows: int, length: int, programs: int, block: int) -> tuple[int, int]:
    """(segments, a power of two; their length): enough programs to fill the device, none shorter than a block."""
    count = 1
    while count < 64 and rows * count < programs and length // (2 * count) >= block:
        count *= 2
    return count, triton.cdiv(triton.cdiv(length, count), block) * block


class Lists:
    """The candidate lists of one chunk of rows."""

    def __init__(self, rows: int, segments: int, segment: int, listed: int, device: torch.device):
        self.rows, self.segments, self.segment = rows, segments, segment
        self.cap, self.listed = min(listed, _power(segment)), listed
        self.key = torch.empty(rows, segments, self.cap, dtype=torch.int32, device=device)
        self.id = torch.empty_like(self.key)
        self.count = torch.empty(rows, segments, dtype=torch.int32, device=device)
        self.thr = torch.empty(rows, dtype=torch.int32, device=device)
        self.flag = torch.empty(rows, dtype=torch.int32, device=device)

    def pick(self, out: Tensor, pool: Tensor | None, mapped: Tensor | None) -> None:
        topk, wide = out.shape[-1], 0 if pool is None else pool.shape[-1]
        every = min(self.listed, _power(self.segments * self.cap))
        lists = (self.key, self.id, self.count, self.thr, self.key if mapped is None else mapped)
        outputs = (out, out if pool is None else pool, self.flag, 0 if mapped is None else mapped.stride(0))
        constants = {"TOPK": topk, "POOL": wide, "SEGMENTS": self.segments, "CAP": self.cap, "ALL": every, "MAPPED": mapped is not None}
        if every > SETTINGS.registered:
            select.pick_long[(self.rows,)](*lists, *outputs, **constants, BLOCK=min(every, 4096), num_warps=8)
        else:
            constants |= {"FILL": _power(max(topk, wide)), "LOG": self.segments.bit_length() - 1}
            select.pick[(self.rows,)](*lists, *outputs, **constants, num_warps=min(max(every // 1024, 4), 16))


def topk_rows(
    scores_RT: Tensor, topk: int, *, pool: int = 0, offset: Tensor | None = None, queries: int = 1, mapped_RT: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Exact top-k of rows of fp32 scores, or of int32 keys; see `select.py`.

    Row r sees all columns, or with `offset` (int64 [R / queries]) what query r % queries of entry r // queries sees. mapped_RT: ids to
    return in place of columns.
    """
    rows, length = scores_RT.shape
    out, wide = _outputs(rows, topk, pool, scores_RT.device)
    if not rows or not length:
        return out.fill_(-1), None if wide is None else wide.fill_(-1)
    floating, causal = scores_RT.dtype == torch.float32, offset is not None
    sampling = Sampling.of(length, max(topk, pool))
    block = min(_power(length, 16), 2048)
    count, segment = _segments(rows, length, 4 * SETTINGS.workers, block)
    lists = Lists(rows, count, segment, sampling.listed, scores_RT.device)
    start = scores_RT if offset is None else offset
    select.threshold[(rows,)](
        scores_RT,
        start,
        lists.thr,
        scores_RT.stride(0),
        sampling.stride,
        queries,
        length,
        sampling.wanted,
        sampling.slack,
        sampling.listed,
        STRIDE=sampling.stride,
        SAMPLE=sampling.sample,
        FLOAT=floating,
        CAUSAL=causal,
        num_warps=8,
    )
    select.compact[(rows, count)](
        scores_RT,
        start,
        lists.thr,
        lists.key,
        lists.id,
        lists.count,
        scores_RT.stride(0),
        queries,
        length,
        segment,
        CAP=lists.cap,
        BLOCK=block,
        FLOAT=floating,
        CAUSAL=causal,
        num_warps=4,
    )
    lists.pick(out, wide, mapped_RT)
    select.rescue[(rows,)](
        scores_RT,
        start,
        lists.flag,
        scores_RT if mapped_RT is None else mapped_RT,
        out,
        out if wide is None else wide,
        scores_RT.stride(0),
        0 if mapped_RT is None else mapped_RT.stride(0),
        queries,
        length,
        TOPK=topk,
        POOL=pool,
        BLOCK=4096,
        FLOAT=floating,
        CAUSAL=causal,
        MAPPED=mapped_RT is not None,
        num_warps=8,
    )
    return out, wide


def _outputs(rows: int, topk: int, pool: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(rows, topk, dtype=torch.int32, device=device)
    return out, torch.empty(rows, pool, dtype=torch.int32, device=device) if pool else None


class Inputs:
    """Tensors as the kernels want them: contiguous but for the strides that they take."""

    def __init__(self, q: Tensor, k: Tensor, w: Tensor, scale: Tensor | None, offset: int | Tensor):
        self.q, self.w = q.contiguous(), w.float().contiguous()
        self.k = k if k.stride(-1) == 1 else k.contiguous()
        self.scale = None if scale is None else scale.float().contiguous()
        start = offset if isinstance(offset, Tensor) else torch.full((), offset, dtype=torch.int64, device=q.device)
        self.offset = start.to(q.device, torch.int64).expand(q.shape[0]).contiguous()
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.keys = k.shape[1]

    @property
    def scale_or_any(self) -> Tensor:
        return self.w if self.scale is None else self.scale

    def chunk(self, b: int, start: int, end: int) -> Inputs:
        scale = None if self.scale is None else self.scale[b : b + 1]
        return Inputs(self.q[b : b + 1, start:end], self.k[b : b + 1], self.w[b : b + 1, start:end], scale, self.offset[b : b + 1] + start)


def _hopper(x: Inputs) -> bool:
    """The Gluon kernel fits: Gluon is experimental, so it is used with the versions of triton it was measured with."""
    fits = x.q.dtype == FP8 and x.dim == 128 and x.heads % SETTINGS.hopper_unroll == 0 and x.heads >= SETTINGS.hopper_stages
    device = x.q.is_cuda and torch.cuda.get_device_capability(x.q.device)[0] == 9
    return SETTINGS.hopper and fits and device and triton.__version__.startswith("3.6.")


def score_tiles(x: Inputs, *, stride: int = 1, lists: Lists | None = None, out: Tensor | None = None) -> None:
    """Launches `scores_tiles`, plain or Hopper's: into the lists, or into rows of keys `out` (int32 [B S, columns])."""
    columns = -(-x.keys // stride)
    blocks = triton.cdiv(x.queries, SETTINGS.queries)
    if lists is None:
        count, segment = _segments(x.batch * blocks, columns, 3 * SETTINGS.workers, 4 * SETTINGS.keys)
    else:
        count, segment = lists.segments, lists.segment
    unused = x.offset
    constants: dict = {"H": x.heads, "D": x.dim, "BM": SETTINGS.queries, "STRIDE": stride, "SCALED": x.scale is not None}
    constants |= {"CAP": 1 if lists is None else lists.cap, "APPEND": lists is not None}
    if _hopper(x):
        from indexcache.ops import scores_hopper

        kernel = scores_hopper.scores_tiles
        constants |= {"BN": 256, "STAGES": SETTINGS.hopper_stages, "UNROLL": SETTINGS.hopper_unroll, "num_warps": 8}
    else:
        kernel = scores.scores_tiles
        constants |= {"BN": SETTINGS.keys, "STAGES": SETTINGS.stages, "num_warps": 4}
        if SETTINGS.registers and x.q.is_cuda:
            constants["maxnreg"] = SETTINGS.registers
    kernel[(count, blocks, x.batch)](
        x.q,
        x.k,
        x.w,
        x.scale_or_any,
        x.offset,
        unused if lists is None else lists.thr,
        unused if out is None else out,
        unused if lists is None else lists.key,
        unused if lists is None else lists.id,
        unused if lists is None else lists.count,
        x.k.stride(0),
        x.k.stride(1),
        x.keys,
        0 if out is None else out.stride(0),
        x.queries,
        columns,
        x.keys,
        segment,
        **constants,
    )


def score_rows(x: Inputs, ids: Tensor | None, out: Tensor) -> None:
    """Launches `scores.scores_rows` into rows of keys `out` (int32 [B S, columns])."""
    columns, block = out.shape[1], 128
    together = SETTINGS.neighbours if ids is not None and x.queries > 1 else 1
    scores.scores_rows[(triton.cdiv(out.shape[0], together), triton.cdiv(columns, block))](
        x.q,
        x.k,
        x.w,
        x.scale_or_any,
        x.offset,
        x.offset if ids is None else ids,
        out,
        x.k.stride(0),
        x.k.stride(1),
        x.keys,
        0 if ids is None else ids.stride(0),
        out.stride(0),
        out.shape[0],
        x.queries,
        columns,
        x.keys,
        H=x.heads,
        HP=_power(x.heads, 16),
        D=x.dim,
        BN=block,
        GATHER=ids is not None,
        QUERIES=together,
        SCALED=x.scale is not None,
        num_warps=4,
    )


def _prefill(x: Inputs, out: Tensor, pool: Tensor | None) -> None:
    """One chunk of one batch entry, fused: no row of scores is stored, but the sample's."""
    rows, topk, device = x.queries, out.shape[-1], x.q.device
    sampling = Sampling.of(x.keys, topk if pool is None else max(topk, pool.shape[-1]))
    blocks = triton.cdiv(rows, SETTINGS.queries)
    count, segment = _segments(blocks, x.keys, 2 * SETTINGS.workers, 8 * SETTINGS.keys)
    lists = Lists(rows, count, segment, sampling.listed, device)
    if x.keys > sampling.listed:
        sampled = torch.empty(rows, -(-x.keys // sampling.stride), dtype=torch.int32, device=device)
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
            FLOAT=False,
            CAUSAL=True,
            num_warps=4,
        )
    else:
        lists.thr.fill_(-(2**31))
    score_tiles(x, lists=lists)
    lists.pick(out, pool, None)
    workers = min(SETTINGS.workers, rows)
    work = torch.empty(workers, x.keys, dtype=torch.int32, device=device)
    scores.rescue_fused[(workers,)](
        x.q,
        x.k,
        x.w,
        x.scale_or_any,
        x.offset,
        lists.flag,
        work,
        out,
        out if pool is None else pool,
        x.k.stride(0),
        x.k.stride(1),
        x.keys,
        work.stride(0),
        rows,
        rows,
        x.keys,
        H=x.heads,
        HP=_power(x.heads, 16),
        D=x.dim,
        BN=128,
        SCALED=x.scale is not None,
        TOPK=topk,
        POOL=0 if pool is None else pool.shape[-1],
        BLOCK=4096,
        num_warps=8,
    )


def index_topk(
    q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None, topk: int, offset: int | Tensor, candidates: Tensor | None, *, pool: int
) -> Tensor | tuple[Tensor, Tensor]:
    batch, queries = q.shape[:2]
    out, wide = _outputs(batch * queries, topk, pool, q.device)
    x = Inputs(q, k, w, k_scale, offset)
    columns = x.keys if candidates is None else candidates.shape[-1]
    if not out.shape[0] or not columns or not x.keys:
        out.fill_(-1)
        if wide is not None:
            wide.fill_(-1)
    elif candidates is not None or queries < SETTINGS.rows_below:
        _rows(x, candidates, out, wide)
    else:
        listed = Sampling.of(x.keys, max(topk, pool)).listed
        # lists take 64 rows x their capacity for each program, 2 GB at the settings above, whatever the chunk
        chunk = max(SETTINGS.chunk * SETTINGS.listed // listed // SETTINGS.queries, 1) * SETTINGS.queries
        for b in range(batch):
            for start in range(0, queries, chunk):
                end = min(start + chunk, queries)
                part = slice(b * queries + start, b * queries + end)
                _prefill(x.chunk(b, start, end), out[part], None if wide is None else wide[part])
    out = out.view(batch, queries, topk)
    return out if wide is None else (out, wide.view(batch, queries, pool))


def _rows(x: Inputs, candidates: Tensor | None, out: Tensor, pool: Tensor | None) -> None:
    """Few queries, or pools: rows of keys, then the selection over them."""
    columns = x.keys if candidates is None else candidates.shape[-1]
    chunk = max(SETTINGS.workspace // (4 * columns), 1)
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
                ids = (candidates if b is None else candidates[b : b + 1, start:end]).int().reshape(-1, columns)
            keys = torch.empty(part.batch * part.queries, columns, dtype=torch.int32, device=out.device)
            score_rows(part, ids, keys)
            got, got_wide = topk_rows(
                keys, topk, pool=wide, offset=part.offset if ids is None else None, queries=part.queries, mapped_RT=ids
            )
            out[at] = got
            if pool is not None and got_wide is not None:
                pool[at] = got_wide
