"""Host side of ops/scores.py and ops/scores_hopper.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from indexcache.ops import tuning as settings
from indexcache.ops.index import scores
from indexcache.ops.index.topk_host import Lists
from indexcache.ops.reference import FP8, QueryGroups
from indexcache.ops.tuning import current, power, segments


class Inputs:
    """Tensors as the kernels want them: contiguous but for the strides that they take."""

    def __init__(self, q: Tensor, k: Tensor, w: Tensor, scale: Tensor | None, offset: int | Tensor):
        self.q, self.w = q.contiguous(), w.float().contiguous()
        self.k = k if k.stride(-1) == 1 else k.contiguous()
        self.scale = None if scale is None else scale.float().contiguous()
        start = (
            offset
            if isinstance(offset, Tensor)
            else torch.full((), offset, dtype=torch.int64, device=q.device)
        )
        self.offset = start.to(q.device, torch.int64).expand(q.shape[0]).contiguous()
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.keys = k.shape[1]

    @property
    def scale_or_any(self) -> Tensor:
        return self.w if self.scale is None else self.scale

    def chunk(self, b: int, start: int, end: int) -> Inputs:
        scale = None if self.scale is None else self.scale[b : b + 1]
        return Inputs(
            self.q[b : b + 1, start:end],
            self.k[b : b + 1],
            self.w[b : b + 1, start:end],
            scale,
            self.offset[b : b + 1] + start,
        )


def _gluon(q: Tensor, k: Tensor) -> bool:
    """The kernels of ops/scores_hopper.py fit."""
    heads, dim = q.shape[2:]
    fits = q.dtype == FP8 and dim in (64, 128) and heads in (8, 16, 32, 64, 128)
    aligned = k.data_ptr() % 16 == 0 and k.stride(0) % 16 == 0 and k.stride(1) % 16 == 0
    return current().index.hopper and fits and aligned and settings.gluon_runs(q.device)


def tiles_in_gluon(x: Inputs) -> bool:
    """`score_tiles` takes the Gluon kernel."""
    return x.batch == 1 and _gluon(x.q, x.k)


def query_blocks(x: Inputs) -> int:
    """Programs of `score_tiles` for each segment of the keys."""
    return triton.cdiv(x.queries, 256 // x.heads if tiles_in_gluon(x) else current().index.queries)


def pool_group(q_BSHD: Tensor, k_BTD: Tensor) -> int:
    """How many neighbouring queries `score_pools` takes together; 1: it cannot run, `score_rows` does."""
    queries, heads = q_BSHD.shape[1:3]
    fits = (
        current().index.grouped_pools
        and 16 <= heads < 128
        and queries >= current().index.rows_below
    )
    fits = (
        fits and k_BTD.shape[1] * k_BTD.stride(1) < 2**33
    )  # words of four bytes are counted in 32 bits
    return 128 // heads if fits and _gluon(q_BSHD, k_BTD) else 1


def score_tiles(
    x: Inputs, *, stride: int = 1, lists: Lists | None = None, out: Tensor | None = None
) -> None:
    """Launches `scores_tiles`, plain or Hopper's: into the lists, or into rows of scores `out` (fp32 [B S, columns])."""
    columns, blocks = -(-x.keys // stride), query_blocks(x)
    if lists is None:
        count, segment = segments(
            x.batch * blocks, columns, 3 * current().index.workers, 4 * current().index.keys
        )
    else:
        count, segment = lists.segments, lists.segment
    unused = x.offset
    constants: dict = {"H": x.heads, "D": x.dim, "STRIDE": stride, "SCALED": x.scale is not None}
    constants |= {"CAP": 1 if lists is None else lists.cap, "APPEND": lists is not None}
    places = (
        unused if lists is None else lists.thr,
        unused if out is None else out,
        unused if lists is None else lists.key,
        unused if lists is None else lists.id,
        unused if lists is None else lists.count,
    )
    sizes = (0 if out is None else out.stride(0), x.queries, columns, x.keys, segment)
    inputs = (x.q, x.w, x.scale_or_any, x.offset)
    if tiles_in_gluon(x):
        from indexcache.ops.index import scores_hopper

        constants |= {"STAGES": current().index.hopper_stages, "num_warps": 4}
        if lists is not None:
            places = (*places[:2], lists.as_scores(), *places[3:])
        keys = scores_hopper.describe(x.k[0, ::stride])
        scores_hopper.scores_tiles[(count, blocks)](keys, *inputs, *places, *sizes, **constants)
        return
    keys = (
        current().index.keys if x.dim <= 128 else current().index.keys // 2
    )  # wider ones spill (896 bytes)
    constants |= {
        "BM": current().index.queries,
        "BN": keys,
        "STAGES": current().index.stages,
        "num_warps": 4,
    }
    strides = (x.k.stride(0), x.k.stride(1), x.keys)
    scores.scores_tiles[(count, blocks, x.batch)](
        x.q, x.k, *inputs[1:], *places, *strides, *sizes, **constants
    )


def score_rows(x: Inputs, ids: Tensor | None, out: Tensor, clear: Tensor | None = None) -> None:
    """Launches `scores.scores_rows` into rows of keys `out` (int32 [B S, columns]). clear: integers that are zeros afterwards."""
    (rows, columns), block = out.shape, 128
    scores.scores_rows[(rows * triton.cdiv(columns, block),)](
        x.q,
        x.k,
        x.w,
        x.scale_or_any,
        x.offset,
        x.offset if ids is None else ids,
        out,
        out if clear is None else clear,
        x.k.stride(0),
        x.k.stride(1),
        x.keys,
        0 if ids is None else ids.stride(0),
        out.stride(0),
        rows,
        x.queries,
        columns,
        x.keys,
        0 if clear is None else clear.numel(),
        H=x.heads,
        HP=power(x.heads, 16),
        D=x.dim,
        BN=block,
        GATHER=ids is not None,
        SCALED=x.scale is not None,
        num_warps=8 if ids is None else 4,
    )


def score_pools(
    x: Inputs,
    groups: QueryGroups,
    *,
    stride: int = 1,
    lists: Lists | None = None,
    out: Tensor | None = None,
) -> None:
    """Launches `scores_hopper.scores_pools`, of one batch entry: into lists of one segment, or every stride-th into rows of keys
    `out` (int32 [S, columns]). groups: the groups of these queries, of the size of `pool_group`."""
    from indexcache.ops.index import scores_hopper

    unused = x.offset
    scores_hopper.scores_pools[(groups.count_BG.numel(),)](
        x.q.view(torch.int32),
        x.k.view(torch.int32),
        x.w,
        x.scale_or_any,
        x.offset,
        groups.union_BGU,
        groups.mask_BGU,
        groups.count_BG,
        unused if lists is None else lists.thr,
        out if lists is None else lists.as_scores(),
        unused if lists is None else lists.id,
        unused if lists is None else lists.count,
        x.k.stride(1) // 4,
        x.queries,
        x.keys,
        groups.union_BGU.shape[-1],
        H=x.heads,
        D=x.dim,
        CAP=lists.cap if lists is not None else 0 if out is None else out.shape[1],
        STRIDE=stride,
        APPEND=lists is not None,
        SCALED=x.scale is not None,
        num_warps=4,
        maxnreg=168,
    )
