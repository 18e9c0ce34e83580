"""Plan samples, allocate candidate lists and launch the kernels in topk.py and topk_grid.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from indexcache.ops import tuning
from indexcache.ops.index import topk, topk_grid
from indexcache.ops.primitives import INTERPRETED
from indexcache.ops.tuning import current, power

REGISTERS = 16384  # max length of a row that one program selects from its registers
LISTS = 256  # max number of lists of a row
GRID_ROWS = 10  # max number of rows that `select_grid` was measured with


@dataclass
class Sampling:
    """The sampling of rows of one length.

    stride: a sample stands for this many keys.
    slots: number of samples that a program has room for, a power of two.
    rank: rank of the threshold among the samples.
    listed: capacity of a row's lists; a row of at most this many keys is listed without a sample.
    """

    stride: int
    slots: int
    rank: int
    listed: int

    @classmethod
    def of(cls, length: int, max_k: int, spread: int = 1) -> Sampling:
        """Plan the samples of rows of `length` keys whose best `max_k` are selected.

        spread: factor of the stride. Rows in memory are read by sectors, and a wider stride reads
            fewer of them.
        """
        settings = current().index
        listed = max(settings.listed, power(2 * max_k))
        stride = spread * max(settings.stride, power(-(-length // settings.sample)))
        # r samples above the threshold stand for r * stride +- sqrt(r) * stride keys. These must be
        # max_k keys even on the low side.
        z = settings.deviations
        root = (z + (z * z + 4 * max_k / stride) ** 0.5) / 2
        rank = int(root * root) + 1
        return cls(stride, power(-(-length // stride), 16), rank, listed)


@dataclass
class Rows:
    """Rows of fp32 scores or int32 keys; `topk_rows` describes the fields."""

    scores: Tensor
    offset: Tensor | None = None
    queries: int = 1
    mapped: Tensor | None = None

    @property
    def read_args(self) -> dict[str, Any]:
        """Arguments of every kernel that reads these rows."""
        tensors = {"p_score": self.scores, "p_offset": self.offset}
        sizes = {"n_queries": self.queries, "n_keys": self.scores.shape[1]}
        return tensors | sizes | {"s_row": self.scores.stride(0)}

    @property
    def map_args(self) -> dict[str, Any]:
        """Arguments of every kernel that writes the ids of these rows."""
        return {"p_map": self.mapped, "s_map": 0 if self.mapped is None else self.mapped.stride(0)}


NO_ROWS: dict[str, Any] = {
    "p_score": None,
    "p_offset": None,
    "s_row": 0,
    "n_queries": 1,
    "n_keys": 0,
}
NO_MAP: dict[str, Any] = {"p_map": None, "s_map": 0}


def output_args(out: Tensor, pool: Tensor | None) -> dict[str, Any]:
    """Arguments of every kernel that writes a selection and, where there is one, a pool."""
    widths = {"TOPK": out.shape[-1], "POOL": 0 if pool is None else pool.shape[-1]}
    return {"p_out": out, "p_pool": pool} | widths


class Lists:
    """The candidate lists of one chunk of rows."""

    def __init__(self, rows: int, segments: int, segment: int, listed: int, device: torch.device):
        self.rows = rows
        self.segments = segments
        self.segment = segment
        self.cap = min(listed, power(segment))
        self.listed = listed
        self.key = torch.empty(rows, segments, self.cap, dtype=torch.int32, device=device)
        self.id = torch.empty_like(self.key)
        self.count = torch.empty(rows, segments, dtype=torch.int32, device=device)
        self.thr = torch.empty(rows, dtype=torch.int32, device=device)
        self.flag = torch.empty(rows, dtype=torch.int32, device=device)

    @property
    def append_args(self) -> dict[str, Any]:
        """Arguments of every kernel that appends to the lists."""
        places = {"p_key": self.key, "p_id": self.id, "p_count": self.count}
        return places | {"p_thr": self.thr, "CAP": self.cap}

    def hold_scores(self) -> None:
        """Make the lists' keys fp32 for a kernel that lists scores; `pick` turns them into keys."""
        self.key = self.key.view(torch.float32)

    def set_thresholds(
        self, sampled: Rows, sampling: Sampling, *, keys: int, s_col: int = 1, pairs: bool = False
    ) -> None:
        """Launch `threshold`: rank the samples of each row.

        Args:
            sampled: the samples, s_col columns apart; or with `pairs` the rows themselves.
            keys: number of keys of a row.
        """
        arguments = sampled.read_args | {"n_keys": keys, "s_col": s_col, "p_thr": self.thr}
        arguments |= {"rank": sampling.rank, "slack": sampling.rank // 16}
        arguments |= {"limit": sampling.listed, "STRIDE": sampling.stride}
        arguments |= {"SAMPLE": sampling.slots, "PAIRS": pairs}
        topk.threshold[(self.rows,)](**arguments, num_warps=warps(self.rows, sampling.slots))

    def take_all(self) -> None:
        """Let every key of the rows pass."""
        self.thr.fill_(-(2**31))

    def pick(self, out: Tensor, pool: Tensor | None, rows: Rows | None = None) -> None:
        """Launch `pick`.

        rows: the rows from which flagged ones are selected again; None leaves that to the caller.
        """
        widest = max(out.shape[-1], 0 if pool is None else pool.shape[-1])
        slots = min(self.listed, power(self.segments * self.cap))
        arguments = self.append_args | output_args(out, pool)
        arguments |= NO_ROWS | NO_MAP if rows is None else rows.read_args | rows.map_args
        arguments |= {"SEGMENTS": self.segments, "LOG": self.segments.bit_length() - 1}
        arguments |= {"SLOTS": max(slots, 32), "FILL": power(widest, 16)}
        arguments |= {"BLOCK": min(power(max(slots // 2, widest), 16), 4096)}
        arguments |= _two_per_processor(warps(self.rows, slots), self.key.is_cuda)
        topk.pick[(self.rows,)](**arguments, p_flag=self.flag)


def warps(rows: int, slots: int, keys: int = 32) -> int:
    """Return the number of warps of a program that has a row of `slots` keys in its registers.

    keys: keys of a thread when rows fill the device. With fewer rows latency counts, and it has 16.
    """
    return min(max(slots // (32 * (keys if rows >= current().index.workers else 16)), 4), 32)


def _two_per_processor(warps: int, cuda: bool) -> dict[str, int]:
    """Limit the registers so that two programs of 8 warps fit on a multiprocessor.

    Triton's interpreter does not know the option.
    """
    return {"num_warps": warps} | ({"maxnreg": 128} if warps <= 8 and cuda else {})


def topk_rows(
    scores_RT: Tensor,
    k: int,
    *,
    pool: int = 0,
    offset: Tensor | None = None,
    queries: int = 1,
    mapped_RT: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    work: Tensor | None = None,
    gathered: bool = False,
    share: Fraction | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Select the exact top k of rows of fp32 scores or of int32 keys; topk.py says how.

    Args:
        scores_RT: the rows, with columns that follow one another in memory.
        k, pool: ids to return; pool 0 returns none.
        offset: int64 [R / queries]. Row r then sees what query r % queries of entry r // queries
            sees. None: it sees all columns.
        mapped_RT: int32, ids to return in place of columns.
        out: where to write, contiguous int32 [R, k] and [R, pool].
        work: the workspace of `grid_work`, cleared.
        gathered: the columns that mapped_RT names, ascending and -1 padded at the end, are the
            candidates, in place of all columns; at most REGISTERS of them.
        share: the share of what a row sees that its pool holds, rounded up and at least k; `pool`
            is the largest. Rows have at most REGISTERS columns then.

    Returns:
        int32 [R, k], and [R, pool] or None.
    """
    rows, length = scores_RT.shape
    ids, pool_ids = out or outputs(rows, k, pool, scores_RT.device)
    if not rows or not length:
        return ids.fill_(-1), None if pool_ids is None else pool_ids.fill_(-1)
    source = Rows(scores_RT, offset, queries, mapped_RT)
    if gathered or share is not None:
        _pick_row(source, ids, pool_ids, gathered, share)
    elif pool_ids is None and (segment := grid_segment(rows, length, scores_RT.device)):
        launch_grid(source, ids, segment, work)
    elif length <= min(REGISTERS, 2 * current().index.listed):
        _pick_row(source, ids, pool_ids)
    else:
        _pick_from_lists(source, ids, pool_ids)
    return ids, pool_ids


def grid_segment(rows: int, length: int, device: torch.device) -> int:
    """Return the keys of one program of `select_grid`, so that all programs fit on the device.

    0: they do not fit, or `select_grid` is not the fastest way. It was measured on Hopper, and
    `pick_row` is faster for short rows.
    """
    if not current().index.grid or not tuning.gluon_runs(device):
        return 0
    if length <= current().index.listed or rows > GRID_ROWS:
        return 0
    processors = current().index.workers
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # Two programs of 8 warps with at most 128 registers fit on a multiprocessor.
    for segment in (2048, 4096, 8192):
        if rows * -(-length // segment) <= 2 * processors:
            return segment
    return 0


def grid_work(rows: int, length: int, device: torch.device) -> Tensor | None:
    """Return the workspace of `select_grid`, which the kernel before it must clear.

    None: `select_grid` does not run for these rows.
    """
    if not grid_segment(rows, length, device):
        return None
    return torch.empty(rows, topk_grid.WORK.value, dtype=torch.int32, device=device)


def launch_grid(source: Rows, out: Tensor, segment: int, work: Tensor | None = None) -> None:
    """Launch `select_grid`, with a workspace that an earlier kernel cleared or with its own."""
    rows, length = source.scores.shape
    k = out.shape[-1]
    groups = topk_grid.GROUPS.value
    samples = min(power(5 * length // k, groups), 16 * groups)
    stride = -(-length // samples)
    # This many of the groups of samples hold one of the k best, plus the deviations.
    share = 1 - math.exp(-k / stride / groups)
    deviation = (groups * share * (1 - share)) ** 0.5
    rank = int(groups * share + current().index.deviations * deviation) + 2
    programs = -(-length // segment)
    places = power(programs, 16)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": out.device}
    if work is None:
        work = torch.zeros(rows, topk_grid.WORK.value, **integers)
    arguments = source.read_args | source.map_args | {"p_out": out, "p_work": work}
    arguments |= {"p_count": torch.empty(rows, places, **integers)}
    arguments |= {"p_list": torch.empty(rows, topk_grid.LIST.value, 2, **integers)}
    arguments |= {"stride": stride, "rank": rank, "TOPK": k, "FILL": power(k, 16)}
    arguments |= {"SEGMENT": segment, "PROGRAMS": places, "SAMPLE": samples, "num_warps": 8}
    if not INTERPRETED.value:
        arguments |= {"maxnreg": 128, "launch_cooperative_grid": True}
    topk_grid.select_grid[(programs, rows)](**arguments)


def _pick_row(
    source: Rows,
    out: Tensor,
    pool: Tensor | None,
    gathered: bool = False,
    share: Fraction | None = None,
) -> None:
    rows, length = source.scores.shape
    columns = 0 if source.mapped is None else source.mapped.shape[1]
    slots = power(columns if gathered else length, 32)
    arguments = source.read_args | source.map_args | output_args(out, pool)
    arguments |= {"n_map": columns, "GATHER": gathered, "SLOTS": slots, "BLOCK": min(slots, 4096)}
    arguments |= {"SHARE": 0, "PARTS": 0}
    if share is not None:
        arguments |= {"SHARE": share.numerator, "PARTS": share.denominator}
    topk.pick_row[(rows,)](**arguments, num_warps=warps(rows, slots, 64))


def _pick_from_lists(source: Rows, out: Tensor, pool: Tensor | None) -> None:
    rows, length = source.scores.shape
    widest = max(out.shape[-1], 0 if pool is None else pool.shape[-1])
    sampling = Sampling.of(length, widest, spread=2)
    block = 1024
    count = 1
    while count < LISTS and rows * count < 12 * current().index.workers and length > count * block:
        count *= 2
    segment = -(-length // (count * block)) * block
    lists = Lists(rows, count, segment, sampling.listed, source.scores.device)
    lists.set_thresholds(source, sampling, keys=length, s_col=sampling.stride, pairs=True)
    topk.compact[(rows, count)](
        **source.read_args, **lists.append_args, segment=segment, num_warps=1
    )
    lists.pick(out, pool, source)


def outputs(rows: int, k: int, pool: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Allocate int32 [rows, k] and, where pool is positive, [rows, pool]."""
    out = torch.empty(rows, k, dtype=torch.int32, device=device)
    return out, torch.empty(rows, pool, dtype=torch.int32, device=device) if pool else None
