"""Host side of ops/select.py: samples, candidate lists and launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from indexcache.ops import tuning as settings
from indexcache.ops.index import topk as select
from indexcache.ops.index import topk_grid as select_grid
from indexcache.ops.primitives import INTERPRETED
from indexcache.ops.tuning import current, power

REGISTERS = 16384  # longest rows that one program selects from registers
LISTS = 256  # most lists of a row
GRID_ROWS = 10  # most rows that `select_grid` was measured with


@dataclass
class Sampling:
    """How one row length is sampled: what `threshold` needs."""

    stride: int
    sample: int  # slots, a power of two
    wanted: int  # rank among the samples
    slack: int
    listed: int  # capacity of a row's lists; rows of at most this many keys are listed whole

    @classmethod
    def of(cls, length: int, most: int, sparse: int = 1) -> Sampling:
        """`sparse` times the stride of the settings: rows in memory are read by sectors, and a wider stride reads fewer."""
        listed = max(current().index.listed, power(2 * most))
        stride = sparse * max(current().index.stride, power(-(-length // current().index.sample)))
        # r samples above the threshold mean r * stride +- sqrt(r) * stride keys: want `most` even on the low side
        z = current().index.deviations
        root = (z + (z * z + 4 * most / stride) ** 0.5) / 2
        wanted = int(root * root) + 1
        return cls(stride, power(-(-length // stride), 16), wanted, wanted // 16, listed)


class Lists:
    """The candidate lists of one chunk of rows."""

    def __init__(self, rows: int, segments: int, segment: int, listed: int, device: torch.device):
        self.rows, self.segments, self.segment = rows, segments, segment
        self.cap, self.listed = min(listed, power(segment)), listed
        self.key = torch.empty(rows, segments, self.cap, dtype=torch.int32, device=device)
        self.id = torch.empty_like(self.key)
        self.count = torch.empty(rows, segments, dtype=torch.int32, device=device)
        self.thr = torch.empty(rows, dtype=torch.int32, device=device)
        self.flag = torch.empty(rows, dtype=torch.int32, device=device)

    def as_scores(self) -> Tensor:
        """The keys' place as fp32, for a kernel that lists scores as they are: `pick` makes keys of the few."""
        self.key = self.key.view(torch.float32)
        return self.key

    def pick(self, out: Tensor, pool: Tensor | None, rows: Rows | None = None) -> None:
        """`rows`: where flagged rows are redone at once; without them the flags are left to the caller."""
        topk, wide = out.shape[-1], 0 if pool is None else pool.shape[-1]
        every = min(self.listed, power(self.segments * self.cap))
        source = rows or Rows(self.key.view(self.rows, -1), None, 1, None)
        select.pick[(self.rows,)](
            self.key,
            self.id,
            self.count,
            self.thr,
            source.map_or_any,
            out,
            out if pool is None else pool,
            self.flag,
            source.scores,
            source.offset_or_any,
            source.map_stride,
            source.scores.stride(0),
            source.queries,
            source.length,
            TOPK=topk,
            POOL=wide,
            SEGMENTS=self.segments,
            CAP=self.cap,
            LOG=self.segments.bit_length() - 1,
            ALL=max(every, 32),
            BLOCK=min(power(max(every // 2, topk, wide), 16), 4096),
            FILL=power(max(topk, wide), 16),
            MAPPED=source.mapped is not None,
            RESCUE=rows is not None,
            FLOAT=source.floating,
            CAUSAL=source.offset is not None,
            **_limited(warps(self.rows, every), self.key.is_cuda),
        )


@dataclass
class Rows:
    """Rows of fp32 scores or int32 keys, and what `topk_rows` says of its arguments."""

    scores: Tensor
    offset: Tensor | None
    queries: int
    mapped: Tensor | None

    @property
    def length(self) -> int:
        return self.scores.shape[1]

    @property
    def floating(self) -> bool:
        return self.scores.dtype == torch.float32

    @property
    def map_stride(self) -> int:
        return 0 if self.mapped is None else self.mapped.stride(0)

    @property
    def map_or_any(self) -> Tensor:
        return self.scores if self.mapped is None else self.mapped

    @property
    def offset_or_any(self) -> Tensor:
        return self.scores if self.offset is None else self.offset


def warps(rows: int, slots: int, keys: int = 32) -> int:
    """Of a program with a row in registers: so many keys a thread where there are rows enough, 16 at most where a row is waited for."""
    return min(max(slots // (32 * (keys if rows >= current().index.workers else 16)), 4), 32)


def _limited(n: int, cuda: bool) -> dict[str, int]:
    """Registers such that two programs of 8 warps fit a multiprocessor; the interpreter does not know the option."""
    return {"num_warps": n} | ({"maxnreg": 128} if n <= 8 and cuda else {})


def topk_rows(
    scores_RT: Tensor,
    topk: int,
    *,
    pool: int = 0,
    offset: Tensor | None = None,
    queries: int = 1,
    mapped_RT: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    work: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact top-k of rows of fp32 scores, or of int32 keys; see `select.py`.

    Row r sees all columns, or with `offset` (int64 [R / queries]) what query r % queries of entry r // queries sees. mapped_RT: ids to
    return in place of columns. out: where to, contiguous int32 [R, topk] and [R, pool]. work: `grid_work`, cleared.
    """
    rows, length = scores_RT.shape
    got, wide = out or outputs(rows, topk, pool, scores_RT.device)
    if not rows or not length:
        return got.fill_(-1), None if wide is None else wide.fill_(-1)
    source = Rows(scores_RT, offset, queries, mapped_RT)
    if wide is None and (segment := grid_segment(rows, length, scores_RT.device)):
        launch_grid(source, got, segment, work)
    elif length <= min(REGISTERS, 2 * current().index.listed):
        _pick_row(source, got, wide)
    else:
        _lists(source, got, wide)
    return got, wide


def grid_segment(rows: int, length: int, device: torch.device) -> int:
    """Keys of one program of `select_grid`, so that all programs of these rows are on the device at once; 0: they do not fit."""
    # measured on Hopper; the interpreter runs one program after another. `pick_row` is faster for short rows
    if (
        not current().index.grid
        or not settings.gluon_runs(device)
        or length <= current().index.listed
        or rows > GRID_ROWS
    ):
        return 0
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else current().index.workers
    )
    for segment in (2048, 4096, 8192):
        if (
            rows * -(-length // segment) <= 2 * processors
        ):  # 8 warps, at most 128 registers: two fit a multiprocessor
            return segment
    return 0


def grid_work(rows: int, length: int, device: torch.device) -> Tensor | None:
    """What `select_grid` finds cleared, for the kernel before it to clear; None where it is not used."""
    if not grid_segment(rows, length, device):
        return None
    return torch.empty(rows, select_grid.WORK.value, dtype=torch.int32, device=device)


def launch_grid(source: Rows, out: Tensor, segment: int, work: Tensor | None = None) -> None:
    """Launches `select_grid`, with `grid_work` that an earlier kernel cleared or its own."""
    (rows, length), device, topk = source.scores.shape, out.device, out.shape[-1]
    groups = select_grid.GROUPS.value
    samples = min(power(5 * length // topk, groups), 16 * groups)
    stride = -(-length // samples)
    # of the groups of samples, how many have one of the topk best: so many +- the deviations
    share = 1 - math.exp(-topk / stride / groups)
    rank = (
        int(groups * share + current().index.deviations * (groups * share * (1 - share)) ** 0.5) + 2
    )
    programs = -(-length // segment)
    places = power(programs, 16)
    select_grid.select_grid[(programs, rows)](
        source.scores,
        source.offset_or_any,
        source.map_or_any,
        torch.zeros(rows, select_grid.WORK.value, dtype=torch.int32, device=device)
        if work is None
        else work,
        torch.empty(rows, places, dtype=torch.int32, device=device),
        torch.empty(rows, select_grid.LIST.value, 2, dtype=torch.int32, device=device),
        out,
        source.scores.stride(0),
        source.map_stride,
        source.queries,
        length,
        stride,
        rank,
        TOPK=topk,
        FILL=power(topk, 16),
        SEGMENT=segment,
        PROGRAMS=places,
        SAMPLE=samples,
        FLOAT=source.floating,
        CAUSAL=source.offset is not None,
        MAPPED=source.mapped is not None,
        num_warps=8,
        **({} if INTERPRETED.value else {"maxnreg": 128, "launch_cooperative_grid": True}),
    )


def _pick_row(source: Rows, out: Tensor, pool: Tensor | None) -> None:
    every = power(source.length, 32)
    select.pick_row[(source.scores.shape[0],)](
        source.scores,
        source.offset_or_any,
        source.map_or_any,
        out,
        out if pool is None else pool,
        source.scores.stride(0),
        source.map_stride,
        source.queries,
        source.length,
        TOPK=out.shape[-1],
        POOL=0 if pool is None else pool.shape[-1],
        ALL=every,
        BLOCK=min(every, 4096),
        FLOAT=source.floating,
        CAUSAL=source.offset is not None,
        MAPPED=source.mapped is not None,
        num_warps=warps(source.scores.shape[0], every, 64),
    )


def _lists(source: Rows, out: Tensor, pool: Tensor | None) -> None:
    (rows, length), device = source.scores.shape, source.scores.device
    sampling = Sampling.of(length, max(out.shape[-1], 0 if pool is None else pool.shape[-1]), 2)
    block, count = 1024, 1
    while count < LISTS and rows * count < 12 * current().index.workers and length > count * block:
        count *= 2
    segment = -(-length // (count * block)) * block
    lists = Lists(rows, count, segment, sampling.listed, device)
    select.threshold[(rows,)](
        source.scores,
        source.offset_or_any,
        lists.thr,
        source.scores.stride(0),
        sampling.stride,
        source.queries,
        length,
        sampling.wanted,
        sampling.slack,
        sampling.listed,
        STRIDE=sampling.stride,
        SAMPLE=sampling.sample,
        FLOAT=source.floating,
        CAUSAL=source.offset is not None,
        PAIRS=True,
        num_warps=warps(rows, sampling.sample),
    )
    select.compact[(rows, count)](
        source.scores,
        source.offset_or_any,
        lists.thr,
        lists.key,
        lists.id,
        lists.count,
        source.scores.stride(0),
        source.queries,
        length,
        segment,
        CAP=lists.cap,
        FLOAT=source.floating,
        CAUSAL=source.offset is not None,
        num_warps=1,
    )
    lists.pick(out, pool, source)


def outputs(rows: int, topk: int, pool: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(rows, topk, dtype=torch.int32, device=device)
    return out, torch.empty(rows, pool, dtype=torch.int32, device=device) if pool else None
