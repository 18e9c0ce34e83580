"""Launch the kernels in scores.py, scores_hopper.py and pools_hopper.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from indexcache.ops import tuning
from indexcache.ops.index import scores
from indexcache.ops.index.topk_host import Lists, output_args
from indexcache.ops.primitives import INTERPRETED
from indexcache.ops.reference import FP8, QueryGroups
from indexcache.ops.tuning import Tile, current, power, segments

MAX_SHARED = 225 << 10  # bytes of shared memory for a program of scores_half.py


class Inputs:
    """The tensors of a call as the kernels take them: contiguous, except for the keys' strides.

    q: [B, S, H, D]; k: [B, T, D], dtype of q; w: fp32 [B, S, H]; scale: fp32 [B, T] or None;
    offset: int64 [B], the position of the first query; `first` is the same where the host knows it.
    """

    def __init__(self, q: Tensor, k: Tensor, w: Tensor, scale: Tensor | None, offset: int | Tensor):
        self.q = q.contiguous()
        self.w = w.float().contiguous()
        self.k = k if k.stride(-1) == 1 else k.contiguous()
        self.scale = None if scale is None else scale.float().contiguous()
        self.first = None if isinstance(offset, Tensor) else offset
        if not isinstance(offset, Tensor):
            offset = torch.full((), offset, dtype=torch.int64, device=q.device)
        self.offset = offset.to(q.device, torch.int64).expand(q.shape[0]).contiguous()
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.keys = k.shape[1]

    @property
    def tensor_args(self) -> dict[str, Any]:
        """Arguments of every kernel that computes scores, except for the strides of the keys."""
        tensors = {"p_q": self.q, "p_k": self.k, "p_w": self.w, "p_scale": self.scale}
        sizes = {"n_queries": self.queries, "n_keys": self.keys, "H": self.heads, "D": self.dim}
        return tensors | sizes | {"p_offset": self.offset}

    @property
    def row_args(self) -> dict[str, Any]:
        """Arguments of the kernels that score one query at a time."""
        strides = {"s_kb": self.k.stride(0), "s_kt": self.k.stride(1)}
        return self.tensor_args | strides | {"HP": power(self.heads, 16), "BN": 128}

    def chunk(self, b: int, start: int, end: int) -> Inputs:
        """Return the queries from start to end of batch entry b, with all of its keys."""
        scale = None if self.scale is None else self.scale[b : b + 1]
        offset = self.offset[b : b + 1] + start if self.first is None else self.first + start
        q, w = self.q[b : b + 1, start:end], self.w[b : b + 1, start:end]
        return Inputs(q, self.k[b : b + 1], w, scale, offset)


def gluon_fits(q: Tensor, k: Tensor) -> bool:
    """Return whether the kernels in Gluon take these queries and keys on this device."""
    heads, dim = q.shape[2:]
    fits = q.dtype == FP8 and dim in (64, 128) and heads in (8, 16, 32, 64, 128)
    aligned = k.data_ptr() % 16 == 0 and k.stride(0) % 16 == 0 and k.stride(1) % 16 == 0
    return current().index.hopper and fits and aligned and tuning.gluon_runs(q.device)


def tiles_in_gluon(x: Inputs) -> bool:
    """Return whether `score_tiles` takes the Gluon kernel."""
    return x.batch == 1 and gluon_fits(x.q, x.k)


def prefill_tile(x: Inputs) -> Tile:
    """Return the tile of `score_tiles` in Triton."""
    settings = current().index
    return settings.tile if x.dim <= 128 else settings.tile_wide


def query_blocks(x: Inputs) -> int:
    """Return the number of programs of `score_tiles` for each segment of the keys."""
    queries = 256 // x.heads if tiles_in_gluon(x) else prefill_tile(x).queries
    return triton.cdiv(x.queries, queries)


def neighbours(q_BSHD: Tensor, k_BTD: Tensor) -> int:
    """Return how many neighbouring queries `score_pools` takes together; 1: `score_rows` runs."""
    queries, heads = q_BSHD.shape[1:3]
    settings = current().index
    # The kernel counts words of four bytes in 32 bits.
    addressable = k_BTD.shape[1] * k_BTD.stride(1) < 2**33
    fits = settings.grouped_pools and 16 <= heads < 128 and queries >= settings.rows_below
    return 128 // heads if fits and addressable and gluon_fits(q_BSHD, k_BTD) else 1


def queries_in_shared_memory(x: Inputs) -> int:
    """Return how many queries a program of scores_half.py takes; 0: it does not run.

    With more than 16 heads, registers spill. The kernel knows no scales of keys.
    """
    fits = current().index.hopper and x.q.dtype in (torch.bfloat16, torch.float16)
    fits = fits and x.scale is None
    aligned = x.k.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in x.k.stride()[:2])
    shape = x.batch == 1 and x.heads <= 16 and x.dim in (64, 128, 256)
    if not (fits and aligned and shape and tuning.gluon_runs(x.q.device)):
        return 0
    for queries in (32, 16):
        if x.heads * queries * (2 * x.dim + 4) + 256 * x.dim <= MAX_SHARED:
            return queries
    return 0


def score_tiles(
    x: Inputs, *, stride: int = 1, lists: Lists | None = None, out: Tensor | None = None
) -> None:
    """Launch `scores_tiles` in Triton or Gluon, into lists or into rows of scores.

    Args:
        stride: every stride-th key is scored.
        lists: the lists to which scores that reach their thresholds are appended.
        out: fp32 [B S, columns], rows of scores, in place of lists.
    """
    settings = current().index
    queries = queries_in_shared_memory(x)
    if out is not None and stride == 1 and queries:
        _score_half(x, out, queries)
        return
    columns = -(-x.keys // stride)
    blocks = query_blocks(x)
    arguments = x.tensor_args | {"n_columns": columns, "STRIDE": stride}
    if lists is None:
        assert out is not None
        count, segment = segments(
            x.batch * blocks, columns, 3 * settings.workers, 4 * settings.tile.keys
        )
        places = {"p_thr": None, "p_key": None, "p_id": None, "p_count": None, "CAP": 1}
        arguments |= places | {"p_score": out, "s_row": out.stride(0), "segment": segment}
    else:
        count = lists.segments
        if tiles_in_gluon(x):
            lists.hold_scores()
        arguments |= lists.append_args | {"p_score": None, "s_row": 0, "segment": lists.segment}
    if tiles_in_gluon(x):
        from indexcache.ops.index import scores_hopper

        del arguments["p_k"]
        arguments |= {"keys": scores_hopper.describe(x.k[0, ::stride])}
        arguments |= {"STAGES": settings.hopper_stages, "num_warps": 4}
        scores_hopper.scores_tiles[(count, blocks)](**arguments)
        return
    tile = prefill_tile(x)
    arguments |= {"s_kb": x.k.stride(0), "s_kt": x.k.stride(1)}
    arguments |= {"BM": tile.queries, "BN": tile.keys, "STAGES": tile.stages}
    arguments["num_warps"] = max(tile.queries // 16, 4)
    scores.scores_tiles[(count, blocks, x.batch)](**arguments)


def _score_half(x: Inputs, out: Tensor, queries: int) -> None:
    from indexcache.ops.index import scores_half

    blocks = triton.cdiv(x.queries, queries)
    count, segment = segments(blocks, x.keys, current().index.workers, 1024)
    arguments: dict[str, Any] = {"p_q": x.q, "p_w": x.w, "p_offset": x.offset, "p_score": out}
    arguments |= {"s_row": out.stride(0), "n_queries": x.queries, "n_keys": x.keys}
    arguments |= {"segment": segment, "H": x.heads, "D": x.dim, "Q": queries}
    keys = scores_half.describe(x.k[0])
    scores_half.scores_rows_of_tiles[(count, blocks)](keys, **arguments, num_warps=8)


def score_rows(x: Inputs, ids: Tensor | None, out: Tensor, clear: Tensor | None = None) -> None:
    """Launch `scores_rows`.

    Args:
        ids: int32 [B S, columns], the candidates of each row; None: all keys.
        out: int32 [B S, columns], rows of sort keys.
        clear: integers that are zeros afterwards.
    """
    rows, columns = out.shape
    arguments = x.row_args | {"p_ids": ids, "p_key": out, "p_clear": clear}
    arguments |= {"n_rows": rows, "n_columns": columns, "s_row": out.stride(0)}
    arguments |= {"s_ids": 0 if ids is None else ids.stride(0)}
    arguments |= {"n_clear": 0 if clear is None else clear.numel()}
    blocks = triton.cdiv(columns, arguments["BN"])
    options: dict[str, Any] = {"num_warps": 8 if ids is None else 4}
    # In fp8 seven programs fit on a multiprocessor; bf16 and more heads spill or do not compile.
    if ids is not None and x.q.dtype == FP8 and arguments["HP"] <= 32 and not INTERPRETED.value:
        options["maxnreg"] = 72
    lines = x.dim * x.k.element_size() >= 128  # A line of the cache has 128 bytes.
    pdl = current().index.pdl and ids is None and lines and not INTERPRETED.value
    options |= {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    scores.scores_rows[(rows * blocks,)](**arguments, **options)


def rescue(x: Inputs, flag: Tensor, ids: Tensor | None, out: Tensor, pool: Tensor | None) -> None:
    """Launch `rescue_fused`: select the flagged rows of one batch entry anew.

    Args:
        flag: int32 [S].
        ids: int32 [S, columns], the pools to select from; None: all keys.
        out, pool: int32 [S, k] and [S, P], of which the rows that are flagged are written.
    """
    columns = x.keys if ids is None else ids.shape[1]
    workers = min(current().index.workers, x.queries)
    work = torch.empty(workers, columns, dtype=torch.int32, device=x.q.device)
    arguments = x.row_args | output_args(out, pool)
    arguments |= {"p_flag": flag, "p_ids": ids, "p_work": work, "s_work": work.stride(0)}
    arguments |= {"s_ids": 0 if ids is None else ids.stride(0)}
    arguments |= {"n_rows": x.queries, "n_columns": columns, "BLOCK": 4096, "num_warps": 8}
    scores.rescue_fused[(workers,)](**arguments)


def score_pools(
    x: Inputs,
    groups: QueryGroups,
    *,
    stride: int = 1,
    lists: Lists | None = None,
    out: Tensor | None = None,
) -> None:
    """Launch `scores_pools` for one batch entry, into lists or into rows of keys.

    Args:
        groups: the groups of these queries, with `neighbours` queries in each.
        stride: every stride-th slot of a union is scored.
        lists: where to append, with one segment a row.
        out: int32 [S, columns], rows of sort keys, in place of lists.
    """
    from indexcache.ops.index import pools_hopper

    arguments = x.tensor_args | {"p_q": x.q.view(torch.int32), "p_k": x.k.view(torch.int32)}
    arguments |= {"s_kt": x.k.stride(1) // 4, "STRIDE": stride}
    arguments |= {"p_union": groups.union_BGU, "p_mask": groups.mask_BGU}
    arguments |= {"p_slots": groups.count_BG, "n_slots": groups.union_BGU.shape[-1]}
    if lists is None:
        assert out is not None
        arguments |= {"p_thr": None, "p_id": None, "p_count": None}
        arguments |= {"p_key": out, "CAP": out.shape[1]}
    else:
        lists.hold_scores()
        arguments |= lists.append_args
    programs = groups.count_BG.numel()
    pools_hopper.scores_pools[(programs,)](**arguments, num_warps=4, maxnreg=168)
