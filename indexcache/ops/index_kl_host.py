"""Host side of ops/distill.py: the warm-up's loss and gradients of one indexer on one document."""

# ruff: noqa: RUF009 - tiles are tuples
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from indexcache.ops import index_kl as distill

LOG2E = distill.LOG2E.value
# of a layer: queries [S, H, n], its keys [T, H, n] or [T, 1, n], scale, log-sum-exp [S, H] where it is known
Taught = tuple[Tensor, Callable[[], Tensor], float, Tensor | None]


class Tile(NamedTuple):
    """Queries and keys of a kernel's tile, and how many steps ahead it loads."""

    queries: int
    keys: int
    stages: int = 2

    def options(self, own: int, less: int) -> dict[str, int]:
        """Launch options; `less` times smaller in both directions, four warps for 64 rows of the side that a program has to itself."""
        tile = {"BM": max(self.queries // less, 32), "BN": max(self.keys // less, 32)}
        return tile | {"num_warps": min(max(own // less // 16, 4), 8), "num_stages": self.stages}


@dataclass
class Settings:
    """What the speed depends on and the result does not. `wide`: more dims than 192 (teachers), than 128 (the indexer)."""

    normalise: Tile = Tile(128, 128)
    teach: Tile = Tile(128, 128)
    teach_wide: Tile = Tile(128, 64)
    score: Tile = Tile(128, 128)
    queries: Tile = Tile(128, 64)  # of grad_queries
    keys: Tile = Tile(64, 128)  # of grad_keys
    keys_wide: Tile = Tile(32, 128, 3)  # 64 queries spill 280 bytes
    part: int = 64  # dims of a teacher's product at a time
    rows: int = 8192  # most queries of a chunk
    programs: int = (
        264  # that fill a device: short documents share the heads of a block of keys among several
    )

    def largest(self) -> int:
        return max(max(t[:2]) for t in vars(self).values() if isinstance(t, Tile))


SETTINGS = Settings()


def refuse(*queries: Tensor) -> str | None:
    """Why these queries, the indexer's and all layers', cannot go through the kernels; None: they can."""
    dtypes = {q.dtype for q in queries}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"the dtypes are {', '.join(sorted(map(str, dtypes)))}"
    width = max(q.shape[-1] for q in queries)
    return f"rows of {width} numbers are longer than 256" if width > 256 else None


def warm_up(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    layers: Sequence[Taught],
    weights: Sequence[float],
    multi: bool,
    grads: list[Tensor] | None,
    block_bytes: int,
) -> Tensor:
    """As `ops.warm_up`."""
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, heads, dim = q.shape
    s, device = SETTINGS, q.device
    whole = s.largest()
    rows = min(max(block_bytes // (8 * length) // whole, 1) * whole, s.rows)
    padded = [
        triton.cdiv(n, whole) * whole for n in (min(rows, length), length)
    ]  # tiles are written and read whole
    target, scores = (torch.empty(padded, dtype=torch.float32, device=device) for _ in range(2))
    total = torch.zeros((), dtype=torch.float64, device=device)
    # fp32 has twice the bytes; its gradients of wider tiles do not fit the registers
    less, least = (2, 4) if q.dtype == torch.float32 else (1, 1)
    wide = {"D": dim, "DP": max(triton.next_power_of_2(dim), 16)}
    by_queries = s.queries.options(s.queries.queries, least)
    keys_tile = s.keys_wide if dim > 128 else s.keys
    by_keys = keys_tile.options(keys_tile.keys, least)
    far = max(x["BM"] + x["BN"] for x in (by_queries, by_keys))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        for i, ((queries, keys_of, scale, known), weight) in enumerate(
            zip(layers, weights, strict=True)
        ):
            some, keys, each = (
                queries[start:stop].contiguous(),
                keys_of().contiguous(),
                queries.shape[1],
            )
            dims, scale2 = {"E": some.shape[2], "BE": s.part}, scale * LOG2E
            first, second = s.normalise, s.teach_wide if some.shape[2] > 192 else s.teach
            steps = (
                some.stride(0),
                some.stride(1),
                keys.stride(0),
                0 if keys.shape[1] == 1 else keys.stride(1),
            )
            if known is None:
                lse = torch.empty(stop - start, each, dtype=torch.float32, device=device)
                tile = first.options(first.queries, less)
                distill.normalise[(triton.cdiv(stop - start, tile["BM"]), each)](
                    some, keys, lse, scale2, *steps, start, stop, each, **dims, **tile
                )
            else:
                lse = (known[start:stop] * LOG2E).contiguous()
            tile = second.options(second.queries, less)
            grid = triton.cdiv(stop - start, tile["BM"]), triton.cdiv(stop, tile["BN"])
            entropy = torch.empty(grid, dtype=torch.float32, device=device)
            distill.teach[grid](
                some,
                keys,
                lse,
                target,
                entropy,
                scale2,
                weight,
                *steps,
                target.stride(0),
                start,
                stop,
                each,
                ADD=i > 0,
                **dims,
                **tile,
            )
            if multi:
                total += weight * entropy.sum(dtype=torch.float64)
        inputs = (q[start:], k, w[start:])
        strides = (q.stride(0), q.stride(1), k.stride(0), w.stride(0), scores.stride(0))
        tile = s.score.options(s.score.queries, less)
        grid = triton.cdiv(stop - start, tile["BM"]), triton.cdiv(stop, tile["BN"])
        distill.score[grid](*inputs, scores, *strides, start, stop, heads, **wide, **tile)
        value = torch.empty(stop - start, dtype=torch.float32, device=device)
        last = triton.cdiv(stop - start, whole) * whole  # rows that tiles of gradients read
        distill.compare[(last,)](
            scores,
            target,
            value,
            scores.stride(0),
            target.stride(0),
            start,
            stop - start,
            far,
            MULTI=multi,
            BN=1024,
            num_warps=4,
        )
        total += value.sum(dtype=torch.float64)
        if grads is not None:
            dq, dk, dw = grads
            grid = triton.cdiv(stop - start, by_queries["BM"]), heads
            rest = *strides, dw.stride(0), start, stop, heads
            distill.grad_queries[grid](
                *inputs, scores, dq[start:], dw[start:], *rest, **wide, **by_queries
            )
            blocks = triton.cdiv(stop, by_keys["BN"])
            each = triton.cdiv(
                heads, min(triton.cdiv(s.programs, blocks), heads)
            )  # heads of a program
            parts = torch.empty(
                triton.cdiv(heads, each), stop, dim, dtype=torch.float32, device=device
            )
            distill.grad_keys[(blocks, len(parts))](
                *inputs, scores, parts, *strides, start, stop, heads, each, **wide, **by_keys
            )
            dk[:stop] += parts.sum(0)
    return total
