"""Pools that are a share of what a query sees: how many tokens that is, and which stay."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from indexcache.ops import index_scores

QUERIES = 64  # queries whose pools are scored at once


def width_of(share: Fraction, total: int, topk: int) -> int:
    """Return the number of tokens in the largest pool, for `total` keys: at least k."""
    return min(max(-(-total * share.numerator // share.denominator), topk), total)


def sizes_of(share: Fraction, seen: Tensor, topk: int) -> Tensor:
    """Return how many tokens the pool of each query holds: its share, rounded up, at least k.

    Args:
        seen: the number of keys that each query sees, int64 of any shape.
    """
    return (-(-seen * share.numerator // share.denominator)).clamp(min=topk)


def keep_first(ids_BSP: Tensor, sizes: Tensor) -> Tensor:
    """Return ids in falling order of score with -1 in the place of those beyond the pool.

    Args:
        sizes: the number of tokens that stay, int64 [B, S] or [S].
    """
    place = torch.arange(ids_BSP.shape[-1], device=ids_BSP.device)
    return torch.where(place < sizes[..., None].to(place.device), ids_BSP, -1)


def keep_best(
    q_BSHD: Tensor, k_BTD: Tensor, w_BSH: Tensor, ids_BSP: Tensor, sizes_S: Tensor
) -> Tensor:
    """Return the ids with the best scores, ascending, -1 padded at the end.

    Args:
        q_BSHD, k_BTD, w_BSH: queries, keys and head weights, as in `ops.index_topk`.
        ids_BSP: int32, ascending, -1 padded at the end.
        sizes_S: the number of ids that stay, int64 [S].
    """
    result = torch.full_like(ids_BSP, -1)
    none = torch.iinfo(ids_BSP.dtype).max
    for start in range(0, ids_BSP.shape[1], QUERIES):
        span = slice(start, start + QUERIES)
        ids = ids_BSP[:, span]
        scores = index_scores(q_BSHD[:, span], k_BTD, w_BSH[:, span], ids.clamp(min=0))
        scores = scores.masked_fill(ids < 0, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = keep_first(ids.gather(-1, order), sizes_S[span])
        best = torch.where(best < 0, none, best).sort(-1).values
        result[:, span] = torch.where(best == none, -1, best)
    return result
