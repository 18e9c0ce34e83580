"""The seam: run a loaded transformers model under a sharing pattern, and undo it.

Every decoder layer asks its indexer for ids; the seam replaces `forward` on the indexer objects while the context is
open. Weights, module tree and state dict stay as they are, stock code computes everything else, and leaving the
context (also through an exception) restores what was there before. One thing stays as long as a cache lives that shared layers
have filled: a check that refuses to continue it where a layer now runs its indexer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from indexcache.models.family import either, family_of, indexers, native_pattern
from indexcache.models.selector import StockSelector, selector_of
from indexcache.pattern import Pattern

_active: WeakKeyDictionary[nn.Module, list[Seam]] = WeakKeyDictionary()
_guarded: WeakKeyDictionary[nn.Module, WeakSet[Any]] = (
    WeakKeyDictionary()
)  # caches that were filled under S, by model


class Seam:
    """A model under a pattern. `selections` maps each F and R layer to the ids of the last forward pass (int32
    [B, S, k]; in rows with fewer than k keys the surplus ids lie in the future) when capturing was asked for."""

    def __init__(self, model: nn.Module, pattern: Pattern, capture: bool):
        self.pattern, self.capture = pattern, capture
        self.ids: Tensor | None = None  # the selection in force: overwritten at each F and R
        self.pool: Tensor | None = None  # the candidates the nearest F published
        self.captured: dict[int, Tensor] = {}
        self._undo: list[tuple[nn.Module, Any]] = []
        self._hook: Any = None
        self._filled: WeakSet[Any] = WeakSet()  # caches that S layers saw
        outer = _active.get(model)
        self.selector: StockSelector = outer[-1].selector if outer else selector_of(model)

    @property
    def selections(self) -> dict[int, Tensor]:
        """Ids per layer, S layers included (they read their source's)."""
        return {
            i: self.captured[j]
            for i in range(len(self.pattern))
            if (j := self._selector(i)) in self.captured
        }

    def _selector(self, layer: int) -> int:
        return self.pattern.source(layer) if self.pattern[layer] == "S" else layer

    def install(self, model: nn.Module) -> None:
        publishers = self.pattern.publishers()
        self._filled = WeakSet()
        self._hook = _on_forward(model, self._check_cache)
        for i, indexer in enumerate(indexers(model)):
            if indexer is None:
                continue  # natively shared: stock passes the previous layer's ids on, as S does
            self._undo.append((indexer, indexer.__dict__.get("forward")))
            if self.pattern[i] == "S":
                forward = self._shared()
            elif self.pattern[i] == "R":
                forward = self._reindex(i, indexer)
            else:
                forward = self._full(i, indexer, i in publishers)
            indexer.__dict__["forward"] = forward

    def remove(self, model: nn.Module) -> None:
        for indexer, before in self._undo:
            if before is None:
                del indexer.__dict__["forward"]
            else:
                indexer.__dict__["forward"] = before
        self._undo.clear()
        if self._hook is not None:
            self._hook.remove()
        if self._filled:
            _guard(model, self._filled)
        self.ids = self.pool = None

    def _check_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward pass writes anything: every layer that runs its indexer has all past keys in the cache."""
        _refuse_lacking(_cache_of(args, kwargs), self.pattern)

    def _publish(self, layer: int, ids: Tensor) -> Tensor:
        self.ids = ids
        if self.capture:
            self.captured[layer] = ids
        return ids

    def _full(self, layer: int, indexer: Any, publishes: bool):
        def forward(
            x: Tensor,
            q_resid: Tensor,
            rope,
            mask: Tensor,
            position_ids=None,
            cache=None,
            past_key_values=None,
        ) -> Tensor:
            pool = indexer.index_topk * self.pattern.pool_factor if publishes else 0
            ids, found = self.selector.full(
                layer,
                indexer,
                x,
                q_resid,
                rope,
                mask,
                position_ids,
                either(cache, past_key_values),
                pool,
            )
            self.pool = found if publishes else self.pool
            return self._publish(layer, ids)

        return forward

    def _shared(self):
        def forward(
            x: Tensor,
            q_resid: Tensor,
            rope,
            mask: Tensor,
            position_ids=None,
            cache=None,
            past_key_values=None,
        ) -> Tensor:
            if (given := either(cache, past_key_values)) is not None:
                self._filled.add(given)
            assert self.ids is not None and self.ids.shape[:2] == x.shape[:2]
            return self.ids.to(x.device)

        return forward

    def _reindex(self, layer: int, indexer: Any):
        def forward(
            x: Tensor,
            q_resid: Tensor,
            rope,
            mask: Tensor,
            position_ids=None,
            cache=None,
            past_key_values=None,
        ) -> Tensor:
            assert self.pool is not None and self.pool.shape[:2] == x.shape[:2]
            pool, given = self.pool.to(x.device), either(cache, past_key_values)
            return self._publish(
                layer, self.selector.reindex(layer, indexer, x, q_resid, rope, mask, given, pool)
            )

        return forward


@contextmanager
def use_pattern(
    model: nn.Module, pattern: Pattern | str, *, capture: bool = False
) -> Iterator[Seam]:
    """Run `model` under `pattern` inside the context; restore it in `finally`. Contexts nest.

    Args:
        model: a loaded transformers model of a known family (`indexcache.models.family.families`).
        pattern: F, R or S for each decoder layer.
        capture: keep the selections of each forward pass in the yielded object's `selections`.

    Raises:
        ValueError: unknown family, wrong length, F or R on a layer without indexer weights. Inside the context: a
            forward pass with a cache that was filled while a layer, now F or R, was shared; after it, the same for a
            layer that is full in the model itself.
    """
    family_of(model)  # refuses an unknown one
    pattern = pattern if isinstance(pattern, Pattern) else Pattern(pattern)
    missing = [i for i, indexer in enumerate(indexers(model)) if indexer is None]
    pattern.check(layers=len(indexers(model)), without_indexer=missing)
    seam = Seam(model, pattern, capture)
    stack = _active.setdefault(model, [])
    stack.append(seam)
    try:
        seam.install(model)
        yield seam
    finally:
        seam.remove(model)
        stack.remove(seam)
        if not stack:
            _active.pop(model, None)


def in_force(model: nn.Module) -> bool:
    """A pattern is in force on this model."""
    return bool(_active.get(model))


def _on_forward(model: nn.Module, check: Any) -> Any:
    """Call check(module, args, kwargs) before each forward pass of the decoder."""
    return model.model.register_forward_pre_hook(check, with_kwargs=True)  # type: ignore[union-attr, operator]


def _guard(model: nn.Module, caches: WeakSet[Any]) -> None:
    """After the context: as long as a cache that was filled under S is alive, refuse to go on with it where the model, now
    itself again, runs an indexer. The hook takes itself away with the last such cache."""
    if model in _guarded:
        _guarded[model].update(caches)
        return
    _guarded[model] = WeakSet(caches)
    native = native_pattern(model)

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        alive = next((c for m, c in _guarded.items() if m.model is module), None)
        if not alive:
            hook.remove()
            for m in [m for m in _guarded if m.model is module]:
                del _guarded[m]
        elif (cache := _cache_of(args, kwargs)) in alive and not any(
            m.model is module for m in _active
        ):
            _refuse_lacking(cache, native)

    hook = _on_forward(model, check)


def _cache_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else either(kwargs.get("cache"), kwargs.get("past_key_values"))


def _refuse_lacking(cache: Any, pattern: Pattern) -> None:
    for layer, entry in enumerate(getattr(cache, "layers", ())[: len(pattern)]):
        lacking = int(entry.get_seq_length()) - _indexed(entry)
        if pattern[layer] != "S" and lacking:
            raise ValueError(
                f"Layer {layer} runs its indexer now, but it was shared while this cache was filled: the indexer keys of "
                f"{lacking} cached tokens are missing; start a new cache after switching the pattern."
            )


def _indexed(entry: Any) -> int:
    """How many tokens have indexer keys in one layer of a transformers cache (dynamic or static)."""
    if not getattr(entry, "is_indexer_initialized", False):
        return 0
    if hasattr(entry, "indexer_cumulative_length"):
        return int(entry.indexer_cumulative_length)
    return int(entry.indexer_keys.shape[1])
