"""Refuse caches in which indexer keys are missing for the layers that need them."""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakSet

from torch import nn

from indexcache.models.family import AnyModel, decoder_of, either, native_pattern
from indexcache.models.patch import ModelState, keep_clean, state_of, unkeep
from indexcache.pattern import Pattern


class CacheGuard:
    """The hook that checks, before each forward pass of the decoder, which cache it continues."""

    own = True  # `CleanState` leaves it out of copies.

    def __init__(self, state: ModelState, native: Pattern):
        self.state = weakref.ref(state)
        self.native = native

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state()
        if state is None:
            return
        if not state.guarded and state.guard is not None:
            state.guard.remove()
            state.guard = None
            unkeep(module)
        elif not state.router:  # The router checks while it is in place.
            refuse_guarded(state, cache_of(args, kwargs))


def guard(model: AnyModel, caches: WeakSet[Any]) -> None:
    """Refuse, after the context, to continue a cache where indexer keys are missing.

    Without the pattern the model runs indexers in layers that were shared while the cache was
    filled. The hook removes itself once no such cache is alive.
    """
    state = state_of(model)
    state.guarded.update(caches)
    if state.guard is None:
        state.native = native_pattern(model)
        decoder = decoder_of(model)
        keep_clean(decoder)
        hook = CacheGuard(state, state.native)
        state.guard = decoder.register_forward_pre_hook(hook, with_kwargs=True)


def refuse_guarded(state: ModelState, cache: Any) -> None:
    """Refuse a cache that was filled under a pattern, where the model is to run without one."""
    if cache is not None and cache in state.guarded:
        assert state.native is not None
        refuse_lacking(cache, state.native)


def cache_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else either(kwargs.get("cache"), kwargs.get("past_key_values"))


def refuse_lacking(cache: Any, pattern: Pattern) -> None:
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
