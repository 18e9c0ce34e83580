"""Measure patterns of a streamed model on parts of the text: what is asked together is one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from indexcache.data import Batch
from indexcache.models.family import DsaModule
from indexcache.models.stream.checkpoint import Checkpoint
from indexcache.models.stream.run import Finals, LayerDone, Stream, Variant
from indexcache.models.world import Processes
from indexcache.pattern import Pattern
from indexcache.searching.samples import Measured, ModelSamples, Parts
from indexcache.searching.settings import ObjectiveName
from indexcache.searching.streamed import Base, dealt, full_losses_of


class StreamedSamples(ModelSamples):
    """Samples of a streamed model, bitwise those of `ModelSamples`, and counted like them.

    Args:
        stream: the model.
        batches, name, journal, record: see `Samples`.
        world: the processes that compute together, to which patterns are dealt out.
        folder: where a pass that is under way saves its states.
        report: is called after each layer.
    """

    def __init__(
        self,
        stream: Stream,
        batches: Sequence[Batch],
        name: ObjectiveName,
        journal: Sequence[dict[str, Any]],
        record: Callable[[dict[str, Any]], None],
        *,
        world: Processes,
        folder: Path,
        report: Callable[[LayerDone], None] = lambda done: None,
    ):
        self.stream = stream
        self.world = world
        self.report = report
        self._ready: dict[tuple[str, int], Measured] = {}
        super().__init__(stream.module, batches, name, journal, record)
        every = getattr(stream.settings, "checkpoint_layers", None)
        path = folder / f"states-{world.rank}-of-{world.size}.bin"
        self._checkpoint = Checkpoint(path, every, {})

    def measure(self, patterns: Iterable[Pattern], part: Parts) -> None:
        patterns = list(patterns)
        missing: dict[Parts, list[Pattern]] = {}
        for key, pattern in {str(p): p for p in patterns}.items():
            known = self._known.get(key, {})
            if new := tuple(b for b in part if b not in known):
                missing.setdefault(new, []).append(pattern)
        for new, some in missing.items():
            self._checkpoint.identity = {"layers": self.layers, "batches": list(new)}
            self._ready |= dealt(self.world, some, partial(self._pass, part=new))
        super().measure(patterns, part)
        if missing:
            self._checkpoint.clear()

    def _run(self, pattern: Pattern, new: Sequence[int]) -> list[Measured]:
        return [self._ready.pop((str(pattern), b)) for b in new]

    def _full_losses(self, model: DsaModule, inputs: Sequence[Tensor]) -> list[Tensor]:
        return full_losses_of(self.stream, inputs)

    def _pass(self, patterns: list[Pattern], part: Parts) -> dict[tuple[str, int], Measured]:
        """Measure patterns on some batches, for divergences after the full one."""
        found: dict[tuple[str, int], Measured] = {}
        run = list(patterns)
        if self.meter.divergence:
            run = [self.full, *(p for p in run if p != self.full)]

        def use(finals: Finals) -> None:
            if self.meter.divergence:
                self.meter.base = Base(finals, part)
            for number, pattern in enumerate(run):
                if pattern in patterns:
                    for i, b in enumerate(part):
                        found[str(pattern), b] = self._measured(b, finals.get(number, i))
            self.meter.base = {}

        self.stream.run(
            [Variant(p) for p in run],
            [self.batches[b].ids for b in part],
            use,
            watch=not self.watched,
            checkpoint=self._checkpoint,
            report=self.report,
        )
        self.watched = True
        return found
