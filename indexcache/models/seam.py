"""Run a loaded transformers model under a sharing pattern, and undo it: the seam.

Every decoder layer asks its indexer for ids. Inside a `use_pattern` context each indexer's forward
is replaced by that of the layer's role, and a `Selector` computes the selections of F and R layers.
Weights, module tree and state dict stay as they are, and stock code computes everything else.
Leaving the context, also through an exception, restores the forwards. A check remains while a cache
lives that shared layers have filled: it refuses to continue that cache where a layer now runs its
indexer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from indexcache.models.family import (
    AnyModel,
    DsaModule,
    Family,
    either,
    family_of,
    indexers,
    missing_indexers,
    module_of,
    native_pattern,
)
from indexcache.models.patch import ModelState, Patches, state_of
from indexcache.ops import Selection, index_scores
from indexcache.pattern import Pattern


@dataclass(frozen=True)
class IndexerCall:
    """One call of a layer's indexer, as the attention module makes it.

    Attributes:
        layer: number of the decoder layer.
        indexer: its indexer module.
        x: hidden states [B, S, E].
        q_latent: latents of the queries [B, S, Q].
        rope: cos and sin [B, S, r].
        mask: the dense causal mask; on the fast path a `Padding`.
        positions: int64 [B, S] or None.
        cache: the cache in use or None.
    """

    layer: int
    indexer: Any
    x: Tensor
    q_latent: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Any
    positions: Tensor | None
    cache: Any


def indexer_forward(
    layer: int, indexer: nn.Module, answer: Callable[[IndexerCall], Any]
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
        return answer(IndexerCall(layer, indexer, x, q_resid, rope, mask, position_ids, cache))

    return forward


class Selector(ABC):
    """The computation of selections for the roles F and R.

    Attributes:
        path: "stock" or "fast", as results name it.
    """

    path: str

    def __init__(self, model: nn.Module):
        self.family: Family = family_of(model)

    @abstractmethod
    def full(self, call: IndexerCall, pool: int = 0) -> Selection:
        """Select the top k over all keys, and where `pool` > 0 also the top `pool`."""

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
    """The selector that calls the stock indexers, by the forwards that they have when it is made.

    Ids are int32 [B, S, k] in falling order of score. A row with fewer than k keys is filled up
    with ids of future keys, which the mask removes.
    """

    path = "stock"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.stock: dict[int, Any] = {
            i: m.forward for i, m in enumerate(indexers(model)) if m is not None
        }

    def full(self, call: IndexerCall, pool: int = 0) -> Selection:
        if not pool:
            return Selection(self._topk(call))
        topk = call.indexer.index_topk
        try:
            # One pass gives both: the top k are the first of the pool, up to equal scores.
            call.indexer.index_topk = pool
            candidates = self._topk(call)
        finally:
            call.indexer.index_topk = topk
        return Selection(candidates[..., :topk].contiguous(), candidates)

    def _topk(self, call: IndexerCall) -> Tensor:
        return self.stock[call.layer](
            call.x, call.q_latent, call.rope, call.mask, call.positions, call.cache
        )

    def answer(self, selection: Selection) -> Tensor:
        return selection.ids

    @torch.no_grad()
    def reindex(self, call: IndexerCall, pool: Selection) -> tuple[Selection, Selection]:
        candidates = pool.ids
        q, k, w = self.family.project(call.indexer, call.x, call.q_latent, call.rope)
        if call.cache is not None:
            k = call.cache.update_indexer(k, call.layer)
        scores = index_scores(q, k, w, candidates)
        allowed = call.mask.expand(*candidates.shape[:2], -1).gather(-1, candidates.long())
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, -torch.inf)
        else:
            scores = scores + allowed
        best = scores.topk(min(call.indexer.index_topk, candidates.shape[-1]), dim=-1).indices
        return Selection(candidates.gather(-1, best)), pool


def selector_of(model: AnyModel) -> Selector:
    """Return the selector in force: the open pattern's, the fast path's, or the stock indexers."""
    module = module_of(model)
    state = state_of(module)
    if state.patterns:
        return state.patterns[-1].selector
    return state.selector or StockSelector(module)


@dataclass
class Current:
    """The selection in force in a forward pass.

    Attributes:
        selection: that of the last F or R layer that ran.
        pool: the candidates that the last publishing F layer left for R layers.
    """

    selection: Selection | None = None
    pool: Selection | None = None


class Seam:
    """A model under a pattern.

    Attributes:
        pattern: the roles in force.
        selector: computes the selections.
        captured: with `capture`, the ids of each F and R layer in the last forward pass.
    """

    def __init__(self, model: nn.Module, pattern: Pattern, capture: bool):
        self.pattern = pattern
        self.capture = capture
        self.selector = selector_of(model)
        self.captured: dict[int, Tensor] = {}
        self._publishers = pattern.publishers()
        self._current = Current()
        self._patches = Patches()
        self._hook: RemovableHandle | None = None
        self._filled: WeakSet[Any] = WeakSet()  # caches that S layers have seen

    def current(self) -> Current:
        """Return the selection in force; layers publish and read one only through this."""
        return self._current

    @property
    def selections(self) -> dict[int, Tensor]:
        """Captured ids of every layer, int32 [B, S, k]; S layers have those of their source.

        In rows with fewer than k keys the surplus ids lie in the future (stock) or are -1 (fast).
        """
        return {
            i: self.captured[source]
            for i in range(len(self.pattern))
            if (source := self._source_layer(i)) in self.captured
        }

    def _source_layer(self, layer: int) -> int:
        return self.pattern.source(layer) if self.pattern[layer] == "S" else layer

    def install(self, model: DsaModule) -> None:
        """Replace the indexers' forwards by those of their roles."""
        roles = {"F": self._full, "R": self._reindex, "S": self._shared}
        self._hook = _on_forward(model, self._check_cache)
        for i, indexer in enumerate(indexers(model)):
            if indexer is None:
                continue  # Natively shared: stock passes the previous layer's ids on, as S does.
            self._patches.replace(indexer, indexer_forward(i, indexer, roles[self.pattern[i]]))

    def remove(self, model: DsaModule) -> None:
        """Restore the forwards, and guard the caches that S layers have filled."""
        self._patches.undo()
        if self._hook is not None:
            self._hook.remove()
        if self._filled:
            _guard(model, self._filled)
        self._current = Current()

    def _check_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check before a forward pass that layers with an indexer have all past keys cached."""
        _refuse_lacking(_cache_of(args, kwargs), self.pattern)

    def _publish(self, layer: int, selection: Selection) -> Any:
        self.current().selection = selection
        if self.capture:
            self.captured[layer] = selection.ids
        return self.selector.answer(selection)

    def _full(self, call: IndexerCall) -> Any:
        current = self.current()
        current.selection = None  # Its memory is free before the next one is made.
        if call.layer not in self._publishers:
            return self._publish(call.layer, self.selector.full(call))
        current.pool = None
        selection = self.selector.full(call, call.indexer.index_topk * self.pattern.pool_factor)
        assert selection.pool is not None
        current.pool = Selection(selection.pool)
        return self._publish(call.layer, replace(selection, pool=None))

    def _reindex(self, call: IndexerCall) -> Any:
        current = self.current()
        current.selection = None
        selection, current.pool = self.selector.reindex(call, _on_layer(call, current.pool))
        return self._publish(call.layer, selection)

    def _shared(self, call: IndexerCall) -> Any:
        if call.cache is not None:
            self._filled.add(call.cache)
        return self.selector.answer(_on_layer(call, self.current().selection))

    def resume(self, ids: Tensor | None, pool: Tensor | None) -> None:
        """Put the selection and the pool in force that an earlier pass left after some layer."""
        self._current = Current(
            None if ids is None else self.selector.grouped(ids),
            None if pool is None else Selection(pool),
        )


def _on_layer(call: IndexerCall, selection: Selection | None) -> Selection:
    """Return a selection that was published for this call, on the device of its layer."""
    assert selection is not None and selection.ids.shape[:2] == call.x.shape[:2]
    return on_device(selection, call.x.device)


def on_device(selection: Selection, device: torch.device) -> Selection:
    """Move a selection to a device; a move drops its query groups."""
    return selection if selection.ids.device == device else Selection(selection.ids.to(device))


def check_pattern(model: AnyModel, pattern: Pattern | str) -> Pattern:
    """Return `pattern` as a `Pattern` that this model can run.

    Raises:
        ValueError: unknown family, wrong length, F or R on a layer without indexer weights.
    """
    family_of(model)  # It refuses an unknown family.
    layers = len(indexers(model))
    return Pattern.of(pattern).check(layers=layers, without_indexer=missing_indexers(model))


@contextmanager
def use_pattern(
    model: AnyModel, pattern: Pattern | str, *, capture: bool = False
) -> Iterator[Seam]:
    """Run `model` under `pattern` inside the context; restore it in `finally`. Contexts nest.

    Args:
        model: a loaded model, or its transformers module, of a known family.
        pattern: F, R or S for each decoder layer.
        capture: keep the selections of the last forward pass in the yielded object's `selections`.

    Raises:
        ValueError: as `check_pattern`. Inside the context: a forward pass with a cache that was
            filled while a layer, now F or R, was shared. After it: the same for a layer that is
            full in the model itself.
    """
    module = module_of(model)
    pattern = check_pattern(module, pattern)
    seam = Seam(module, pattern, capture)
    patterns = state_of(module).patterns
    patterns.append(seam)
    try:
        seam.install(module)
        yield seam
    finally:
        seam.remove(module)
        patterns.remove(seam)


def in_force(model: AnyModel) -> bool:
    """Return whether a pattern is in force on this model."""
    return bool(state_of(module_of(model)).patterns)


def _on_forward(model: DsaModule, check: Any) -> RemovableHandle:
    """Call check(module, args, kwargs) before each forward pass of the decoder."""
    return model.model.register_forward_pre_hook(check, with_kwargs=True)


def _guard(model: DsaModule, caches: WeakSet[Any]) -> None:
    """Refuse, after the context, to continue a cache where indexer keys are missing.

    Without the pattern the model runs indexers in layers that were shared while the cache was
    filled. The hook removes itself once no such cache is alive.
    """
    state = state_of(model)
    state.guarded.update(caches)
    if state.guard is None:
        state.guard = _on_forward(model, _guard_check(state, native_pattern(model)))


def _guard_check(state: ModelState, native: Pattern) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not state.guarded and state.guard is not None:
            state.guard.remove()
            state.guard = None
        elif (cache := _cache_of(args, kwargs)) in state.guarded and not state.patterns:
            _refuse_lacking(cache, native)

    return check


def _cache_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else either(kwargs.get("cache"), kwargs.get("past_key_values"))


def _refuse_lacking(cache: Any, pattern: Pattern) -> None:
    for layer, entry in enumerate(getattr(cache, "layers", ())[: len(pattern)]):
        lacking = int(entry.get_seq_length()) - _indexed(entry)
        if pattern[layer] != "S" and lacking:
            raise ValueError(
                f"Layer {layer} runs its indexer now, but it was shared while this cache was "
                f"filled: the indexer keys of {lacking} cached tokens are missing; start a new "
                "cache after switching the pattern."
            )


def _indexed(entry: Any) -> int:
    """Count the tokens with indexer keys in one layer of a transformers cache."""
    if not getattr(entry, "is_indexer_initialized", False):
        return 0
    if hasattr(entry, "indexer_cumulative_length"):
        return int(entry.indexer_cumulative_length)
    return int(entry.indexer_keys.shape[1])
