"""Select tokens for the roles F and R: the call of an indexer, and the stock selector."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.family import AnyModel, Family, either, family_of
from indexcache.models.patch import Replaced
from indexcache.ops import Selection, index_scores
from indexcache.ops.shares import pool_sizes, pool_width

_REPLACED = threading.RLock()


@dataclass(frozen=True)
class IndexerCall:
    """One call of a layer's indexer, as the attention module makes it.

    Attributes:
        layer: number of the decoder layer.
        indexer: its indexer module.
        x: hidden states [B, S, E].
        q_latent: latents of the queries [B, S, Q].
        rope: cos and sin [B, S, r].
        mask: the dense causal mask; on the fast path a `Visible`.
        positions: int64 [B, S] or None.
        cache: the cache in use or None.
        below: the forward that would run without this package; None: that of its class.
    """

    layer: int
    indexer: Any
    x: Tensor
    q_latent: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Any
    positions: Tensor | None
    cache: Any
    below: Replaced | None = None

    def stock(self, topk: int | None = None) -> Tensor:
        """Run the stock indexer, and let it select `topk` ids: int32 [B, S, topk].

        Other threads may run the same indexer, so it is not changed while it runs.
        """
        args = (self.x, self.q_latent, self.rope, self.mask, self.positions, self.cache)
        if self.below is None or self.below.on_class:
            indexer = self.indexer
            if topk is not None:
                indexer = copy.copy(indexer)
                indexer.index_topk = topk
            return type(indexer).forward(indexer, *args)
        with _REPLACED:  # Another library runs the indexer, which has to be changed in place.
            before = self.indexer.index_topk
            try:
                self.indexer.index_topk = topk or before
                return self.below.below(*args)
            finally:
                self.indexer.index_topk = before


def indexer_forward(
    layer: int,
    indexer: nn.Module,
    answer: Callable[[IndexerCall], Any],
    below: Replaced | None = None,
) -> Callable[..., Any]:
    """Make a forward for an indexer module that returns `answer` of each call."""

    def forward(
        x: Tensor,
        q_resid: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
    ) -> Any:
        cache = either(cache, past_key_values)
        return answer(
            IndexerCall(layer, indexer, x, q_resid, rope, mask, position_ids, cache, below)
        )

    return forward


class Selector(ABC):
    """The computation of selections for the roles F and R.

    Attributes:
        path: "stock" or "fast", as results name it.
    """

    path: str

    def __init__(self, model: AnyModel):
        self.family: Family = family_of(model)

    @abstractmethod
    def full(self, call: IndexerCall, pool: int | Fraction = 0) -> Selection:
        """Select the top k over all keys, and where `pool` > 0 also the top `pool`.

        A fraction is the share of the keys that each query sees.
        """

    @abstractmethod
    def reindex(self, call: IndexerCall, pool: Selection) -> tuple[Selection, Selection]:
        """Select the top k among the ids of `pool`, by the layer's indexer.

        Returns:
            The selection, and the pool for the next R layer.
        """

    def grouped(self, ids: Tensor) -> Selection:
        """Make a selection of ids int32 [B, S, k]."""
        return Selection(ids)

    def answer(self, selection: Selection) -> Any:
        """Convert a selection to the form in which attention takes it from an indexer."""
        return selection

    def clear(self) -> None:  # noqa: B027 - most selectors keep nothing to drop
        """Drop the tensors that belong to one forward pass."""


class StockSelector(Selector):
    """The selector that calls the stock indexers.

    Ids are int32 [B, S, k] in falling order of score. A row with fewer than k keys is filled up
    with ids of future keys, which the mask removes.
    """

    path = "stock"

    def full(self, call: IndexerCall, pool: int | Fraction = 0) -> Selection:
        if not pool:
            return Selection(call.stock())
        # One pass gives both: the top k are the first of the pool, up to equal scores.
        topk = call.indexer.index_topk
        if isinstance(pool, Fraction):
            candidates = call.stock(pool_width(pool, call.mask.shape[-1], topk))
            seen = _allowed(call.mask).sum(-1).expand(*candidates.shape[:2])
            shared = _keep_first(candidates, pool_sizes(pool, seen, topk))
        else:
            candidates = shared = call.stock(pool)
        return Selection(candidates[..., :topk].contiguous(), shared)

    def answer(self, selection: Selection) -> Tensor:
        return selection.ids

    @torch.no_grad()
    def reindex(self, call: IndexerCall, pool: Selection) -> tuple[Selection, Selection]:
        candidates = pool.ids
        q, k, w = self.family.project(call.indexer, call.x, call.q_latent, call.rope)
        if call.cache is not None:
            k = call.cache.update_indexer(k, call.layer)
        # A pool that is a share has -1 where there is no key; the last key stands in for it.
        last = call.mask.shape[-1] - 1
        ids = torch.where(candidates < 0, last, candidates)
        scores = index_scores(q, k, w, ids)
        allowed = call.mask.expand(*ids.shape[:2], -1).gather(-1, ids.long())
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, -torch.inf)
        else:
            scores = scores + allowed
        scores = scores.masked_fill(candidates < 0, -torch.inf)
        best = scores.topk(min(call.indexer.index_topk, ids.shape[-1]), dim=-1).indices
        return Selection(ids.gather(-1, best)), pool


def _allowed(mask: Tensor) -> Tensor:
    """Return which keys each query sees, bool [B or 1, S, T], of a mask of booleans or summands."""
    return mask if mask.dtype == torch.bool else mask >= 0


def _keep_first(ids_BSP: Tensor, sizes: Tensor) -> Tensor:
    """Return ids in falling order of score with -1 in the place of those beyond the pool.

    sizes: the number of ids that stay, int64 [B, S].
    """
    place = torch.arange(ids_BSP.shape[-1], device=ids_BSP.device)
    return torch.where(place < sizes[..., None].to(place.device), ids_BSP, -1)


def on_device(selection: Selection, device: torch.device) -> Selection:
    """Move a selection to a device; a move drops its query groups."""
    return selection if selection.ids.device == device else Selection(selection.ids.to(device))
