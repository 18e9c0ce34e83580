"""Find the pattern in force at a place: of this thread, this task, this generator.

A context holds for the thread or the asyncio task that entered it, and for those that copy its
`contextvars` context (`asyncio.to_thread`, tasks made inside). One that the main thread entered
holds as well for threads that have entered none, such as a thread that runs `model.generate`.
Contexts nest in the order in which they were entered and may be left in any order. Where it cannot
be known which one is meant, running the model is refused.
"""

from __future__ import annotations

import sys
import threading
import weakref
from contextvars import ContextVar
from types import CodeType
from typing import TYPE_CHECKING, NamedTuple

from indexcache.models.patch import ModelState

if TYPE_CHECKING:
    from indexcache.models.seam import Seam

_entered: ContextVar[tuple[weakref.ref[Seam], ...]] = ContextVar("indexcache_entered", default=())

_PASSED_OVER = (__name__, "indexcache.models.seam", "contextlib")


class Call(NamedTuple):
    """A call of a function, as long as it lasts; a generator's lasts until it ends."""

    frame: int
    code: CodeType


class Scope:
    """Where a context was entered.

    Attributes:
        parent: the pattern that was in force there before.
        main: whether the main thread entered it.
        owner: the call that entered it.
        within: the calls of which those were under way that had entered a pattern before.
    """

    def __init__(self, state: ModelState):
        before = _own(state)
        self.parent = weakref.ref(before[-1]) if before else None
        self.main = threading.current_thread() is threading.main_thread()
        calls = _calls()
        self.owner = calls[0] if calls else None
        owners = {seam.scope.owner for seam in before}
        self.within = frozenset(call for call in calls if call in owners)


def enter(seam: Seam) -> None:
    """Put a pattern in force for this thread or task."""
    alive = tuple(ref for ref in _entered.get() if (s := ref()) is not None and s.open)
    _entered.set((*alive, weakref.ref(seam)))


def leave() -> None:
    """Forget the patterns that are not open any more."""
    _entered.set(tuple(ref for ref in _entered.get() if (s := ref()) is not None and s.open))


def seam_here(state: ModelState) -> Seam | None:
    """Return the pattern in force for the caller; None: the model as it is.

    Raises:
        ValueError: it cannot be known which one is meant.
    """
    if not state.patterns:
        return None
    own = _own(state)
    if own:
        if len(own) > 1:
            _check_nested(own)
        return own[-1]
    everyone = list(state.patterns)
    parents = {parent() for s in everyone if (parent := s.scope.parent) is not None}
    of_main = [s for s in everyone if s.scope.main and s.open and s not in parents]
    if threading.current_thread() is not threading.main_thread() and len(of_main) == 1:
        return of_main[0]
    if not any(s.open for s in everyone):
        return None
    raise ValueError(
        "Another thread or task has a pattern in force on this model, and this one has entered "
        "none: enter use_pattern here as well (all F is the model as it is), or run it after that."
    )


def _own(state: ModelState) -> list[Seam]:
    return [
        seam
        for ref in _entered.get()
        if (seam := ref()) is not None and seam.open and seam.state is state
    ]


def _calls() -> list[Call]:
    """Return the calls under way, the innermost first, without this package's and contextlib's."""
    calls = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") not in (
            __name__,
            "indexcache.models.seam",
            "contextlib",
        ):
            calls.append(Call(id(frame), frame.f_code))
        frame = frame.f_back  # type: ignore[assignment]
    return calls


def _check_nested(own: list[Seam]) -> None:
    """Refuse generators that take turns, each of which has entered a pattern of its own.

    The context entered last is in force. A call under way that entered an earlier one must then
    have been under way when the later ones were entered.
    """
    for call in _calls():
        entered = [i for i, seam in enumerate(own) if seam.scope.owner == call]
        if entered:
            if any(call not in seam.scope.within for seam in own[entered[-1] + 1 :]):
                raise ValueError(
                    f"Patterns {own[entered[-1]].pattern} and {own[-1].pattern} are both in force "
                    "here, in functions that take turns (generators): leave one before the other "
                    "runs the model, or run them in threads."
                )
            return
