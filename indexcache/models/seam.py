"""Run a loaded transformers model under a sharing pattern, and undo it: the seam.

Every decoder layer asks its indexer for ids. Inside a `use_pattern` context `models/router.py`
leads each call to the role of its layer, and a `Selector` computes the selections of F and R
layers. Weights, module tree and state dict stay as they are, and stock code computes everything
else.
Leaving the context, also through an exception, restores the forwards. Two things may remain for a
while. Where gradient checkpointing will run layers again, they run under the pattern of their
forward pass, as long as its graph lives. And while a cache lives that shared layers have filled,
it is refused to continue it where a layer now runs its indexer.

A copy of the model (`copy.deepcopy`, pickle, `torch.save`) is one without the pattern.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any
from weakref import WeakSet

from torch import Tensor

from indexcache.models.family import AnyModel, decoder_of, family_of, indexers, missing_indexers
from indexcache.models.guard import guard, mark_lacking, refuse_lacking
from indexcache.models.passes import Pass, running
from indexcache.models.patch import LOCK, Patches, state_of
from indexcache.models.regions import unseen_by_selective
from indexcache.models.router import route
from indexcache.models.saving import write_patterns
from indexcache.models.scopes import Scope, enter, leave
from indexcache.models.selector import IndexerCall, Selector, StockSelector, on_device
from indexcache.ops import Selection
from indexcache.pattern import Pattern

BY_HAND = 8
"""Number of forward passes without the decoder that a pattern follows at once."""


def selector_of(model: AnyModel) -> Selector:
    """Return the selector in force: the fast path's, or the stock indexers."""
    state = state_of(model)
    return state.selector or StockSelector(model)


class Seam:
    """A model under a pattern.

    Attributes:
        pattern: the roles in force.
        selector: computes the selections.
        state: the state of the model.
        scope: where it was entered.
        saving: what lets the model's `save_pretrained` write the pattern.
        open: whether the context has not been left.
    """

    def __init__(self, model: AnyModel, pattern: Pattern, capture: bool):
        self.pattern = pattern
        self.capture = capture
        self.state = state_of(model)
        self.scope = Scope(self.state)
        self.selector = selector_of(model)
        self.open = True
        self.saving = Patches()
        self._publishers = pattern.pools()
        self._captured: dict[int, Tensor] = {}
        self._roles = {"F": self._full, "R": self._reindex, "S": self._shared}
        self._filled: WeakSet[Any] = WeakSet()  # caches that S layers have seen
        self._by_hand: list[Pass] = []  # passes without the decoder, the newest last

    def current(self) -> Pass:
        """Return the forward pass under this pattern that is under way in this thread."""
        current = running(self.state)
        assert current is not None and current.seam is self
        return current

    def runs_here(self) -> bool:
        """Return whether the forward pass under way in this thread is one under this pattern."""
        current = running(self.state)
        return current is not None and current.seam is self

    @property
    def selections(self) -> dict[int, Tensor]:
        """Captured ids of every layer in the last pass, int32 [B, S, k].

        S layers have those of their source. In rows with fewer than k keys the surplus ids lie in
        the future (stock) or are -1 (fast).
        """
        return {
            i: self._captured[source]
            for i in range(len(self.pattern))
            if (source := self._source_layer(i)) in self._captured
        }

    def _source_layer(self, layer: int) -> int:
        return self.pattern.source(layer) if self.pattern[layer] == "S" else layer

    def begin(self, watched: bool) -> Pass:
        """Begin a forward pass under this pattern."""
        new = Pass(self, watched)
        if self.capture:
            self._captured = new.captured
        return new

    def check_cache(self, cache: Any) -> None:
        """Check before a forward pass that layers with an indexer have all past keys cached."""
        refuse_lacking(cache, self.pattern)

    def close(self, model: AnyModel) -> None:
        """Leave the pattern, and guard the caches that S layers have filled."""
        self.open = False
        self._by_hand.clear()
        with LOCK:
            if self in self.state.patterns:
                self.state.patterns.remove(self)
            self.saving.undo()
        leave()
        self.state.settle()
        if self._filled:
            guard(model, self._filled)

    def by_hand(self, call: IndexerCall) -> Pass:
        """Return the pass of a layer that is called without the decoder.

        It goes on with the pass of this thread that has the same rotary embeddings, else with that
        whose next layer this is, and otherwise it is a new one.
        """
        rope, thread = call.rope[0], threading.get_ident()
        mine = [p for p in reversed(self._by_hand) if p.thread == thread and p.last < call.layer]
        same = [p for p in mine if p.rope is not None and p.rope() is rope]
        following = [p for p in mine if p.last == call.layer - 1]
        for one in (*same, *following):
            one.rope = weakref.ref(rope)
            return one
        new = self.begin(watched=True)
        new.rope = weakref.ref(rope)
        self._by_hand = [*self._by_hand[-BY_HAND + 1 :], new]
        return new

    def answer(self, one: Pass, call: IndexerCall) -> tuple[Any, Selection | None]:
        """Answer a layer's indexer in a forward pass.

        Returns:
            What attention takes, and the selection where a recomputation cannot compute it anew.
        """
        role = self.pattern[call.layer]
        with unseen_by_selective():
            selection = self._roles[role](one, call)
        one.last = call.layer
        if role != "S":
            one.selection = selection
            if self.capture:
                one.captured[call.layer] = selection.ids
        kept = role != "F" or call.layer in self._publishers
        return self.selector.answer(selection), selection if kept else None

    def answer_again(self, call: IndexerCall, selection: Selection | None) -> Any:
        """Answer a layer's indexer as the forward pass did, from the selection kept of it."""
        if selection is None:
            if self.pattern[call.layer] != "F" or call.layer in self._publishers:
                raise ValueError(
                    f"Layer {call.layer} is run again in a second backward pass, but its selection "
                    "went with the first; use retain_graph=True."
                )
            with unseen_by_selective():
                selection = self.selector.full(call)
        return self.selector.answer(on_device(selection, call.x.device))

    def _full(self, one: Pass, call: IndexerCall) -> Selection:
        one.selection = None  # Its memory is free before the next one is made.
        if call.layer not in self._publishers:
            return self.selector.full(call)
        one.pool = None
        pool = self._publishers[call.layer]
        size = pool if isinstance(pool, Fraction) else call.indexer.index_topk * pool
        selection = self.selector.full(call, size)
        assert selection.pool is not None
        one.pool = Selection(selection.pool)
        return replace(selection, pool=None)

    def _reindex(self, one: Pass, call: IndexerCall) -> Selection:
        one.selection = None
        selection, one.pool = self.selector.reindex(call, _published(call, one.pool))
        return selection

    def _shared(self, one: Pass, call: IndexerCall) -> Selection:
        if call.cache is not None:
            self._filled.add(call.cache)
            mark_lacking(call.cache, call.layer)
        return _published(call, one.selection)

    def resume(self, ids: Tensor | None, pool: Tensor | None) -> None:
        """Put the selection and the pool in force that an earlier pass left after some layer."""
        current = self.current()
        current.selection = None if ids is None else self.selector.grouped(ids)
        current.pool = None if pool is None else Selection(pool)


def _published(call: IndexerCall, selection: Selection | None) -> Selection:
    """Return a selection that was published for this call, on the device of its layer."""
    if selection is None or selection.ids.shape[:2] != call.x.shape[:2]:
        raise ValueError(
            f"Layer {call.layer} takes the selection of an earlier layer, which has not run in "
            "this forward pass; run the layers in order, each with the same rotary embeddings."
        )
    return on_device(selection, call.x.device)


def check_pattern(model: AnyModel, pattern: Pattern | str) -> Pattern:
    """Return `pattern` as a `Pattern` that this model can run.

    Raises:
        ValueError: unknown family, wrong length, F or R on a layer without indexer weights.
    """
    family_of(decoder_of(model))  # It refuses an unknown family.
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
    pattern = check_pattern(model, pattern)
    seam = Seam(model, pattern, capture)
    try:
        with LOCK:
            seam.state.patterns.append(seam)
            route(model, seam.state)
            write_patterns(model, seam.state, seam.saving)
        enter(seam)
        yield seam
    finally:
        seam.close(model)


def in_force(model: AnyModel) -> bool:
    """Return whether a pattern is in force on this model, in any thread."""
    return bool(state_of(model).patterns)
