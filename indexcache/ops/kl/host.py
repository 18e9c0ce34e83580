"""Launch the kernels of the distillation loss, one chunk of queries after another.

`kernels.py` says what each computes and what memory holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from indexcache.ops.kl.kernels import compare, grad_keys, grad_queries, normalise, score, teach
from indexcache.ops.kl.reference import AttentionTarget, Gradients
from indexcache.ops.primitives import LOG2E
from indexcache.ops.tuning import current, power


def refuse(*queries: Tensor) -> str | None:
    """Return why the kernels cannot take queries of the indexer and all layers, or None."""
    dtypes = {q.dtype for q in queries}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"the dtypes are {', '.join(sorted(map(str, dtypes)))}"
    width = max(q.shape[-1] for q in queries)
    return f"rows of {width} numbers are longer than 256" if width > 256 else None


def index_kl(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float],
    *,
    kind: str,
    block_bytes: int,
    gradients: bool,
) -> tuple[Tensor, Gradients | None]:
    """Run `ops.index_kl` on the kernels.

    `block_bytes` is the memory of two fp32 matrices [queries of a chunk, T].
    """
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, device = len(q), q.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    grads = None
    if gradients:
        dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=device) for x in (q, k, w))
        grads = dq, dk, dw
    # Kernels read and write complete tiles, so matrices are padded to their largest side.
    side = current().kl.largest()
    rows = min(max(block_bytes // (8 * length) // side, 1) * side, current().kl.rows)
    padded = [triton.cdiv(n, side) * side for n in (min(rows, length), length)]
    scores, target = (torch.empty(padded, dtype=torch.float32, device=device) for _ in range(2))
    for start in range(0, length, rows):
        chunk = _Chunk(start, min(start + rows, length), scores, target)
        for i, (layer, weight) in enumerate(zip(targets, weights, strict=True)):
            entropy = chunk.add_target(layer, weight, add=i > 0)
            if kind == "multi":
                total += weight * entropy
        total += chunk.compare(q, k, w, kind)
        if grads is not None:
            chunk.add_gradients(q, k, w, grads)
    return total, grads


class _Chunk:
    """Launches for the queries start..stop - 1 of a document, against the keys before `stop`."""

    def __init__(self, start: int, stop: int, scores: Tensor, target: Tensor):
        self.start = start
        self.stop = stop
        self.scores = scores
        self.target = target
        self.rows = {"start": start, "stop": stop}

    def add_target(self, layer: AttentionTarget, weight: float, add: bool) -> Tensor:
        """Write one layer's attention times `weight` into the target, or add it.

        Returns its sum of p log p, fp64.
        """
        tuning = current().kl
        q, keys = layer.q_SHn[self.start : self.stop].contiguous(), layer.keys().contiguous()
        heads, width = q.shape[1:]
        scale2 = layer.scale * LOG2E.value
        divisor = _divisor(q)
        s_kh = 0 if keys.shape[1] == 1 else keys.stride(1)
        strides = {"s_qt": q.stride(0), "s_qh": q.stride(1), "s_kt": keys.stride(0), "s_kh": s_kh}
        sizes = {**self.rows, "n_heads": heads, "E": width, "BE": tuning.slice}
        arguments = {"p_q": q, "p_k": keys, "scale2": scale2, **strides, **sizes}
        if layer.lse_SH is None:
            lse = torch.empty(len(q), heads, dtype=torch.float32, device=q.device)
            tile = tuning.normalise.options(tuning.normalise.queries, divisor)
            normalise[(triton.cdiv(len(q), tile["BM"]), heads)](**arguments, p_lse=lse, **tile)
        else:
            lse = (layer.lse_SH[self.start : self.stop] * LOG2E.value).contiguous()
        tile_of = tuning.teach_wide if width > 192 else tuning.teach
        tile = tile_of.options(tile_of.queries, divisor)
        grid = self._tiles(tile)
        entropy = torch.empty(grid, dtype=torch.float32, device=q.device)
        outputs = {"p_target": self.target, "p_entropy": entropy, "s_target": self.target.stride(0)}
        teach[grid](**arguments, p_lse=lse, **outputs, weight=weight, ADD=add, **tile)
        return entropy.sum(dtype=torch.float64)

    def compare(self, q: Tensor, k: Tensor, w: Tensor, kind: str) -> Tensor:
        """Compute the scores and the loss, fp64; overwrite the scores with their gradient."""
        tuning = current().kl
        tile = tuning.score.options(tuning.score.queries, _divisor(q))
        score[self._tiles(tile)](**self._indexer(q, k, w), p_score=self.scores, **tile)
        queries, side = self.stop - self.start, tuning.largest()
        value = torch.empty(queries, dtype=torch.float32, device=q.device)
        matrices = {"p_score": self.scores, "p_target": self.target, "p_value": value}
        strides = {"s_score": self.scores.stride(0), "s_target": self.target.stride(0)}
        margin = max(x["BM"] + x["BN"] for x in _gradient_tiles(q))
        sizes = {"start": self.start, "n_queries": queries, "margin": margin}
        options = {"MULTI": kind == "multi", "BN": 1024, "num_warps": 4}
        compare[(triton.cdiv(queries, side) * side,)](**matrices, **strides, **sizes, **options)
        return value.sum(dtype=torch.float64)

    def add_gradients(self, q: Tensor, k: Tensor, w: Tensor, grads: Gradients) -> None:
        """Write the gradients of the chunk's queries and head weights; add to those of the keys."""
        dq, dk, dw = grads
        heads, dim = q.shape[1:]
        arguments = self._indexer(q, k, w)
        by_queries, by_keys = _gradient_tiles(q)
        outputs = {"p_dq": dq[self.start :], "p_dw": dw[self.start :], "s_dw": dw.stride(0)}
        grid = triton.cdiv(self.stop - self.start, by_queries["BM"]), heads
        grad_queries[grid](**arguments, p_score=self.scores, **outputs, **by_queries)
        blocks = triton.cdiv(self.stop, by_keys["BN"])
        share = min(triton.cdiv(current().kl.programs, blocks), heads)
        heads_of_program = triton.cdiv(heads, share)
        shares = triton.cdiv(heads, heads_of_program)
        partial = torch.empty(shares, self.stop, dim, dtype=torch.float32, device=q.device)
        outputs = {"p_dk": partial, "n_share": heads_of_program}
        grad_keys[(blocks, shares)](**arguments, p_score=self.scores, **outputs, **by_keys)
        dk[: self.stop] += partial.sum(0)

    def _tiles(self, tile: dict[str, int]) -> tuple[int, int]:
        """Return the number of tiles of queries and of keys."""
        queries = self.stop - self.start
        return triton.cdiv(queries, tile["BM"]), triton.cdiv(self.stop, tile["BN"])

    def _indexer(self, q: Tensor, k: Tensor, w: Tensor) -> dict[str, Any]:
        """Return the arguments that the indexer's kernels share."""
        heads, dim = q.shape[1:]
        tensors = {"p_q": q[self.start :], "p_k": k, "p_w": w[self.start :]}
        strides = {"s_qt": q.stride(0), "s_qh": q.stride(1), "s_kt": k.stride(0)}
        strides |= {"s_w": w.stride(0), "s_score": self.scores.stride(0)}
        return {**tensors, **strides, **self.rows, "n_heads": heads, "D": dim, "DP": power(dim, 16)}


def _divisor(q: Tensor) -> int:
    """Return the divisor of tile sides: 2 for fp32, which has twice the bytes, else 1."""
    return 2 if q.dtype == torch.float32 else 1


def _gradient_tiles(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Return the launch options of `grad_queries` and `grad_keys`.

    In fp32 the gradients of larger tiles exceed the registers.
    """
    tuning, divisor = current().kl, 4 if q.dtype == torch.float32 else 1
    keys = tuning.keys_wide if q.shape[-1] > 128 else tuning.keys
    return (
        tuning.queries.options(tuning.queries.queries, divisor),
        keys.options(keys.keys, divisor),
    )
