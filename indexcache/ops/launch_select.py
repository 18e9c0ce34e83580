"""Host side of ops/select.py: samples, candidate lists and launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from indexcache.ops import select
from indexcache.ops.settings import SETTINGS, power, segments


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
        listed = max(SETTINGS.listed, power(2 * most))
        stride = max(SETTINGS.stride, power(-(-length // SETTINGS.sample)))
        # r samples above the threshold mean r * stride +- sqrt(r) * stride keys: want `most` even on the low side
        z = SETTINGS.deviations
        root = (z + (z * z + 4 * most / stride) ** 0.5) / 2
        wanted = int(root * root) + 1
        return cls(stride, power(-(-length // stride), 16), wanted, wanted // 8, listed)


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

    def pick(self, out: Tensor, pool: Tensor | None, mapped: Tensor | None) -> None:
        topk, wide = out.shape[-1], 0 if pool is None else pool.shape[-1]
        every = min(self.listed, power(self.segments * self.cap))
        lists = (self.key, self.id, self.count, self.thr, self.key if mapped is None else mapped)
        outputs = (out, out if pool is None else pool, self.flag, 0 if mapped is None else mapped.stride(0))
        constants = {"TOPK": topk, "POOL": wide, "SEGMENTS": self.segments, "CAP": self.cap, "ALL": every, "MAPPED": mapped is not None}
        if every > SETTINGS.registered:
            select.pick_long[(self.rows,)](*lists, *outputs, **constants, BLOCK=min(every, 4096), num_warps=8)
        else:
            constants |= {"FILL": power(max(topk, wide)), "LOG": self.segments.bit_length() - 1}
            select.pick[(self.rows,)](*lists, *outputs, **constants, num_warps=min(max(every // 1024, 4), 16))


def topk_rows(
    scores_RT: Tensor, topk: int, *, pool: int = 0, offset: Tensor | None = None, queries: int = 1, mapped_RT: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Exact top-k of rows of fp32 scores, or of int32 keys; see `select.py`.

    Row r sees all columns, or with `offset` (int64 [R / queries]) what query r % queries of entry r // queries sees. mapped_RT: ids to
    return in place of columns.
    """
    rows, length = scores_RT.shape
    out, wide = outputs(rows, topk, pool, scores_RT.device)
    if not rows or not length:
        return out.fill_(-1), None if wide is None else wide.fill_(-1)
    floating, causal = scores_RT.dtype == torch.float32, offset is not None
    sampling = Sampling.of(length, max(topk, pool))
    block = min(power(length, 16), 2048)
    count, segment = segments(rows, length, 4 * SETTINGS.workers, block)
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


def outputs(rows: int, topk: int, pool: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(rows, topk, dtype=torch.int32, device=device)
    return out, torch.empty(rows, pool, dtype=torch.int32, device=device) if pool else None
