"""Compare the patterns of a model whose layers are read one at a time, with one pass over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from indexcache.data import Batch
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.evals.kept import Kept
from indexcache.evals.subject import EngineSubject, ModelSubject, Subject, by_bucket
from indexcache.models.family import AnyModel
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Finals, Stream, Variant
from indexcache.models.world import Processes, join
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar


class StreamedSubject(ModelSubject):
    """A model that was loaded with `stream`; its numbers are bitwise those of `ModelSubject`.

    Several processes deal the batches out.
    """

    def __init__(self, model: AnyModel, stream: Stream):
        super().__init__(model)
        self.stream = stream

    @property
    def world(self) -> Processes:
        return join()

    def fill(
        self,
        kept: Kept,
        batches: Sequence[Batch],
        base: Pattern,
        named: Mapping[str, Pattern],
        *,
        progress: bool,
    ) -> None:
        found: list[tuple[int, str, np.ndarray]] = []
        world = self.world
        missing = [i for i in range(len(batches)) if kept.missing(i, list(named))]
        mine = missing[world.rank :: world.size]

        def use(finals: Finals) -> None:
            for at, number in enumerate(mine):
                batch, base_hidden = batches[number], finals.get(0, at)
                for variant, (name, pattern) in enumerate(named.items(), 1):
                    hidden = finals.get(variant, at)
                    fields = self.fields(pattern, base, base_hidden, hidden, batch)
                    sums = np.stack([value for _, value in by_bucket(fields, batch)])
                    found.append((number, name, sums))

        shown = progress and world.rank == 0
        if mine:
            with progress_bar(len(base), "layer", shown=shown) as bar:
                self.stream.run(
                    [Variant(base, trained=False), *map(Variant, named.values())],
                    [batches[number].ids for number in mine],
                    use,
                    watch=True,
                    report=lambda done: done.show(bar),
                )
        self.stream.close()
        everything = [one for part in world.gather(found) for one in part]
        for number, name, sums in sorted(everything, key=lambda one: one[0]):
            if kept.missing(number, [name]):
                kept.add(number, name, sums)


def subject_of(model: AnyModel | VllmEngine) -> Subject:
    """Return what gives the numbers of a model."""
    if isinstance(model, VllmEngine):
        return EngineSubject(model)
    stream = stream_of(model)
    return ModelSubject(model) if stream is None else StreamedSubject(model, stream)
