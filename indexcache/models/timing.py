"""Time the parts of a forward pass by name, only while a `PartTimer` is open.

The names in use: "indexer" (its projections and keys), "index_topk" (the operation: scores and
top-k), "plan" (the query groups), "attention" (sparse MLA), "linears" (projections of attention,
absorption included), "mlp" (MLPs and experts), "head" (the logits). In a compiled step of one
sequence "linears" and "mlp" each include a norm and a residual as well.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch

_open: PartTimer | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def timed(name: str) -> AbstractContextManager[None]:
    """Count the time of a context under `name` while a timer is open; otherwise cost nothing.

    These contexts do not nest.
    """
    if _open is None:
        return _NOTHING
    if _open.cuda and torch.cuda.is_current_stream_capturing():
        return _NOTHING  # A replayed graph runs none of this code.
    return _Span(_open, name)


class _Span(AbstractContextManager[None]):
    def __init__(self, timer: PartTimer, name: str):
        self.timer = timer
        self.name = name

    def __enter__(self) -> None:
        self.start = self.timer._now()

    def __exit__(self, *_: object) -> None:
        self.timer._spans.append((self.name, self.start, self.timer._now()))


class PartTimer(AbstractContextManager["PartTimer"]):
    """A timer of every `timed` context that runs while it is open. Only one can be open.

    On a machine with a GPU it records CUDA events, which are read when asked for, so that nothing
    waits inside; otherwise it reads `time.perf_counter`.

    Raises:
        ValueError: another timer is open.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self._spans: list[tuple[str, Any, Any]] = []
        self._total: tuple[Any, Any] | None = None

    def __enter__(self) -> Self:
        global _open
        if _open is not None:
            raise ValueError("A PartTimer is open already; close that first.")
        self._spans.clear()
        self._start = self._now()
        _open = self
        return self

    def __exit__(self, *_: object) -> None:
        global _open
        _open = None
        self._total = (self._start, self._now())

    def milliseconds(self) -> dict[str, float]:
        """Return the milliseconds of each name, summed, then "rest" and "total".

        It waits for the GPU.

        Raises:
            ValueError: the timer is open, or was never opened.
        """
        if self._total is None or _open is self:
            raise ValueError("milliseconds() is for after the context: with PartTimer() as t: ..")
        if self.cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self._between(start, end)
        total = self._between(*self._total)
        return {**sums, "rest": total - sum(sums.values()), "total": total}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
