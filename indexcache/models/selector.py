"""Who computes a selection: stock transformers' indexer, or (`indexcache.models.fast.accelerate`) the operations of this package.

The seam decides which layer runs in which role; a selector carries the roles F and R out.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from indexcache.models.family import Family, family_of, indexers
from indexcache.ops import index_scores

_chosen: WeakKeyDictionary[nn.Module, StockSelector] = WeakKeyDictionary()


class StockSelector:
    """Selections by the stock indexer: `forward` of each indexer as it was when no pattern was in force. Ids are int32
    [B, S, k] in falling order of score; a row with fewer than k keys is filled up with future ids, which the mask removes."""

    path = "stock"

    def __init__(self, model: nn.Module):
        self.family: Family = family_of(model)
        self.stock: dict[int, Any] = {
            i: m.forward for i, m in enumerate(indexers(model)) if m is not None
        }

    def full(
        self,
        layer: int,
        indexer: Any,
        x: Tensor,
        q_resid: Tensor,
        rope,
        mask: Any,
        positions,
        cache: Any,
        pool: int = 0,
    ):
        """(ids of the top k, ids of the top `pool` or None) over all keys."""
        stock = self.stock[layer]
        if not pool:
            return stock(x, q_resid, rope, mask, positions, cache), None
        topk = indexer.index_topk
        try:  # the same pass gives the pool: top-(c k) in falling order begins with the top-k (at equal scores, with one of them)
            indexer.index_topk = pool
            candidates = stock(x, q_resid, rope, mask, positions, cache)
        finally:
            indexer.index_topk = topk
        return candidates[..., :topk].contiguous(), candidates

    @torch.no_grad()
    def reindex(
        self,
        layer: int,
        indexer: Any,
        x: Tensor,
        q_resid: Tensor,
        rope,
        mask: Any,
        cache: Any,
        pool: Tensor,
    ) -> Tensor:
        """Ids of the top k among the ids of `pool`, by the layer's own indexer."""
        q, k, w = self.family.project(indexer, x, q_resid, rope)
        if cache is not None:
            k = cache.update_indexer(k, layer)
        scores = index_scores(q, k, w, pool)
        allowed = mask.expand(*pool.shape[:2], -1).gather(-1, pool.long())
        scores = (
            scores.masked_fill(~allowed, -torch.inf)
            if allowed.dtype == torch.bool
            else scores + allowed
        )
        best = scores.topk(min(indexer.index_topk, pool.shape[-1]), dim=-1).indices
        return pool.gather(-1, best)


def choose_selector(model: nn.Module, selector: StockSelector | None) -> None:
    """Make `selector` compute the selections of `model`; None: the stock indexers."""
    if selector is None:
        _chosen.pop(model, None)
    else:
        _chosen[model] = selector


def selector_of(model: nn.Module) -> StockSelector:
    """The selector in force; call it while no pattern is."""
    return _chosen.get(model) or StockSelector(model)
