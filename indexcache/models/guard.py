"""Refuse caches in which indexer keys are missing for the layers that need them."""

from __future__ import annotations

import weakref
from functools import cache as once
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

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


def mark_lacking(cache: Any, layer: int) -> None:
    """Let a cache's layer refuse new indexer keys while keys of earlier tokens are missing.

    The mark is the class of the cache's layer, so that copies and pickles of the cache have it,
    and other models refuse it as well. Caches of other libraries are left as they are.
    """
    entries = getattr(cache, "layers", ())
    kind: Any = type(entries[layer]) if layer < len(entries) else None
    if hasattr(kind, "update_indexer") and kind.__module__.startswith("transformers."):
        entries[layer].__class__ = _lacking(kind)


@once
def _lacking(kind: Any) -> Any:
    def update_indexer(self: Any, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        lacking = int(self.get_seq_length()) - _indexed(self)
        # Attention appends the new tokens before the indexer does, or after it.
        if lacking not in (0, indexer_key_states.shape[1]):
            raise ValueError(
                "A layer runs its indexer now, but it was shared while this cache was filled, or "
                "the cache that this is a copy of: indexer keys of cached tokens are missing; "
                "start a new cache after switching the pattern."
            )
        return kind.update_indexer(self, indexer_key_states, *args, **kwargs)

    def __reduce_ex__(self: Any, _protocol: Any) -> tuple:
        return _empty, (kind,), self.__dict__

    names = {
        "__doc__": kind.__doc__,
        "__module__": __name__,
        "__reduce_ex__": __reduce_ex__,
        "update_indexer": update_indexer,
    }
    return type(kind.__name__, (kind,), names)


def _empty(kind: Any) -> Any:
    """Make a marked cache layer, whose fields copying or unpickling sets."""
    marked = _lacking(kind)
    return marked.__new__(marked)


def _indexed(entry: Any) -> int:
    """Count the tokens with indexer keys in one layer of a transformers cache."""
    if not getattr(entry, "is_indexer_initialized", False):
        return 0
    if hasattr(entry, "indexer_cumulative_length"):
        return int(entry.indexer_cumulative_length)
    return int(entry.indexer_keys.shape[1])
