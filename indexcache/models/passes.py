"""Keep what belongs to one forward pass, and find it again when a backward pass recomputes layers.

A selection belongs to a layer, a forward pass and a thread. A `Pass` has the selection in force
while it runs. Layers in a checkpointed region run again in the backward pass, in any order, maybe
in another thread and after `use_pattern` was left; a `Record` on the region then has the pattern
and the selection of every call.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from indexcache.models.patch import ModelState
from indexcache.models.regions import Region
from indexcache.ops import Selection

if TYPE_CHECKING:
    from indexcache.models.seam import Seam

_KEY = "_indexcache_records"
_REENTRANT = "CheckpointFunctionBackward"  # the node of torch's checkpoint(use_reentrant=True)


class Pass:
    """One forward pass.

    Attributes:
        seam: the pattern that it runs under; None for stock.
        selection: that of the last F or R layer that ran.
        pool: the candidates that the last publishing F layer left for R layers.
        captured: ids by layer, where the seam captures.
        watched: whether its layers may run in checkpointed regions.
        last: the last layer whose indexer was called.
    """

    def __init__(self, seam: Seam | None, watched: bool):
        self.seam = seam
        self.selection: Selection | None = None
        self.pool: Selection | None = None
        self.captured: dict[int, Tensor] = {}
        self.watched = watched
        self.last = -1
        # A pass without the decoder is known by its thread and its rotary embeddings.
        self.thread = threading.get_ident()
        self.rope: weakref.ref[Tensor] | None = None


class _Running(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[ModelState, Pass]] = []


_running = _Running()


def push(state: ModelState, one: Pass) -> None:
    """Begin a forward pass in this thread."""
    _running.stack.append((state, one))


def pop() -> None:
    """End the forward pass that this thread began last."""
    _running.stack.pop()


def running(state: ModelState) -> Pass | None:
    """Return the forward pass of the decoder that is under way in this thread."""
    for owner, one in reversed(_running.stack):
        if owner is state:
            return one
    return None


class Record:
    """What ran in one checkpointed region, for its recomputations.

    Attributes:
        begun: the pattern of each pass of the whole decoder, in order.
        calls: by layer, the pattern of each call of its indexer, in order, and the selection where
            it cannot be computed from the call alone.
        spent: whether a backward pass has used the region up, so that none can run it again.
    """

    def __init__(self, once: bool = False) -> None:
        self.watched = False
        self.once = once  # Torch lets such a region run again only in graphs that are kept.
        self.spent = False
        self.begun: list[Seam | None] = []
        self.calls: dict[int, list[tuple[Seam | None, Selection | None]]] = {}
        self._task = -1
        self._count: dict[int, int] = {}

    def next_pass(self) -> Seam | None:
        """Return the pattern of the next recomputed pass of the decoder."""
        number = self._next(-1, self.begun)
        self.spent = self.once and not keeps_graph()
        return self.begun[number]

    def next_call(self, layer: int) -> tuple[Seam | None, Selection | None]:
        """Return the pattern and the selection of the next recomputed call of a layer."""
        recorded = self.calls.get(layer, [])
        number = self._next(layer, recorded)
        seam, selection = recorded[number]
        if not keeps_graph():
            self.spent = self.once
            recorded[number] = seam, None  # The graph is used up, and with it the selection.
        return seam, selection

    def _next(self, layer: int, recorded: list[Any]) -> int:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._count = task, {}
        number = self._count.get(layer, 0)
        self._count[layer] = number + 1
        if len(recorded) == 1:
            number = 0
        elif number >= len(recorded) or task == -1:
            raise ValueError(
                "A checkpointed region runs other passes in the backward pass than it ran in the "
                "forward pass; checkpoint one forward pass at a time."
            )
        return number


def keeps_graph() -> bool:
    """Return whether the backward pass under way keeps its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def record_of(region: Region, state: ModelState) -> Record | None:
    """Return what ran in a region on this model."""
    return getattr(region.anchor, _KEY, {}).get(state)


def recording(region: Region, state: ModelState, seam: Seam | None) -> Record:
    """Return the record of a region on this model, made where there is none."""
    records = region.anchor.__dict__.setdefault(_KEY, {})
    record = records.get(state)
    if record is None:
        record = records[state] = Record(type(region.anchor).__name__ == _REENTRANT)
    if seam is not None and not record.watched:
        record.watched = True
        state.watch(record)
    return record
