"""Where the time of a forward pass goes: named parts, timed only while a `PartTimer` is open.

The names in use: "indexer" (its projections and keys), "index_topk" (the operation: scores and selection), "plan" (the union
of neighbouring queries), "attention" (sparse MLA), "linears" (projections of attention, absorption included), "mlp" (MLPs and
experts), "head" (the logits). In a compiled step of one sequence "linears" and "mlp" each hold a norm and a residual as well.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch

_open: PartTimer | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def part(name: str) -> AbstractContextManager[None]:
    """A context that counts its time under `name` while a timer is open, and is free otherwise. Parts do not nest."""
    if _open is None or (
        _open.cuda and torch.cuda.is_current_stream_capturing()
    ):  # a graph has no parts
        return _NOTHING
    return _Part(_open, name)


class _Part(AbstractContextManager[None]):
    def __init__(self, timer: PartTimer, name: str):
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.start = self.timer._now()

    def __exit__(self, *_: object) -> None:
        self.timer._spans.append((self.name, self.start, self.timer._now()))


class PartTimer(AbstractContextManager["PartTimer"]):
    """Times every `part` that runs while it is open: CUDA events where there is a GPU (read when asked, so that nothing waits
    inside), `time.perf_counter` otherwise. One at a time.

    Raises:
        ValueError: another timer is open.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self._spans: list[tuple[str, Any, Any]] = []
        self._whole: tuple[Any, Any] | None = None

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
        self._whole = (self._start, self._now())

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds of each part that ran, summed over its calls, then "rest" and "total". Waits for the GPU.

        Raises:
            ValueError: the timer is open, or was never.
        """
        if self._whole is None or _open is self:
            raise ValueError("milliseconds() is for after the context: with PartTimer() as t: ..")
        if self.cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self._between(start, end)
        total = self._between(*self._whole)
        return {**sums, "rest": total - sum(sums.values()), "total": total}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
