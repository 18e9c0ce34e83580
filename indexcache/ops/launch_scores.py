"""Host side of ops/scores.py and ops/scores_hopper.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from indexcache.ops import scores
from indexcache.ops.launch_select import Lists
from indexcache.ops.reference import FP8
from indexcache.ops.settings import SETTINGS, power, segments


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
        count, segment = segments(x.batch * blocks, columns, 3 * SETTINGS.workers, 4 * SETTINGS.keys)
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
        HP=power(x.heads, 16),
        D=x.dim,
        BN=block,
        GATHER=ids is not None,
        QUERIES=together,
        SCALED=x.scale is not None,
        num_warps=4,
    )
