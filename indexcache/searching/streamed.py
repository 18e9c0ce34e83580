"""The objective of a search whose model is streamed: a round is one pass over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from indexcache.data import Batch
from indexcache.models.family import DsaModule
from indexcache.models.lm import token_losses
from indexcache.models.stream.checkpoint import Checkpoint
from indexcache.models.stream.run import Finals, LayerDone, Stream, Variant
from indexcache.models.world import Processes
from indexcache.pattern import Pattern
from indexcache.records import read_json, write_json
from indexcache.searching.objective import Evaluation, Objective
from indexcache.searching.settings import DEFAULT_OBJECTIVE, ObjectiveName

READY = "ready.json"
"""The file of losses that were computed along and are not in the journal yet."""


class StreamedObjective(Objective):
    """The objective of a streamed model, whose evaluations are bitwise those of `Objective`.

    Patterns that are asked for together are dealt out to all processes, each of which makes one
    pass over the layers.

    Args:
        stream: the model.
        batches, evaluated, record, name: see `Objective`.
        world: the processes that compute together.
        folder: where a pass that is under way saves its states.
        later: patterns that will be asked for at the end, which the first pass computes too.
        report: is called after each layer.
    """

    def __init__(
        self,
        stream: Stream,
        batches: Sequence[Batch],
        evaluated: dict[str, Evaluation],
        record: Callable[[Pattern, Evaluation], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
        *,
        world: Processes,
        folder: Path,
        later: Sequence[Pattern] = (),
        report: Callable[[LayerDone], None] = lambda done: None,
    ):
        self.stream = stream
        super().__init__(stream.module, batches, evaluated, record, name)
        self.world = world
        self.later = list(later)
        self.report = report
        self.ready_path = folder / READY
        names = [f"states-{rank}-of-{world.size}.bin" for rank in range(world.size)]
        if world.rank == 0:  # What another number of processes left may be large.
            for path in set(folder.glob("*")) - {self.ready_path, *map(folder.joinpath, names)}:
                path.unlink(missing_ok=True)
        self._ready: dict[str, Evaluation] = world.first(self._read_ready())
        every = getattr(stream.settings, "checkpoint_layers", None)
        path = folder / names[world.rank]
        self._checkpoint = Checkpoint(path, every, {"layers": self.layers})

    def together(self, patterns: Sequence[Pattern], trunk: Pattern | None) -> list[float]:
        """Return the losses of several patterns, with one pass over the layers.

        Raises:
            ValueError: a loss is not finite, or `Stream.run` refuses. Losses of patterns before
                that one are recorded.
        """
        new = self._unknown(patterns)
        if new:
            self._compute([*new, *self._unknown(self.later, new)])
            self.later = []
        losses = super().together(patterns, trunk)
        if new:
            self._write_ready()
            self._checkpoint.clear()
        return losses

    def close(self) -> None:
        """Remove what only an interrupted run needs."""
        if self.world.rank == 0:
            self.ready_path.unlink(missing_ok=True)

    def _unknown(self, patterns: Sequence[Pattern], known: Sequence[Pattern] = ()) -> list[Pattern]:
        """Return those patterns that are still to be computed, each once."""
        computed = {*self.evaluated, *self._ready, *map(str, known)}
        return [p for key, p in {str(p): p for p in patterns}.items() if key not in computed]

    def _measure(self, pattern: Pattern) -> Evaluation:
        if str(pattern) not in self._ready:
            self._compute([pattern])
        return self._ready.pop(str(pattern))

    def _full_losses(self, model: DsaModule, inputs: Sequence[Tensor]) -> list[Tensor]:
        return full_losses_of(self.stream, inputs)

    def _compute(self, patterns: list[Pattern]) -> None:
        """Deal the patterns out, and put the evaluations of all of them into `_ready`."""
        self._ready |= dealt(self.world, patterns, self._pass)

    def _pass(self, patterns: list[Pattern]) -> dict[str, Evaluation]:
        """Evaluate patterns, after the full one where all others are compared with that."""
        found: dict[str, Evaluation] = {}
        needed = self.meter.divergence or (self._needs_full and self.full_sums is None)
        run = list(patterns)
        if needed:
            run = [self.full, *(p for p in run if p != self.full)]

        def use(finals: Finals) -> None:
            if self.meter.divergence:
                self.meter.base = Base(finals, range(finals.batches))
            for number, pattern in enumerate(run):
                evaluation = self._evaluation(pattern, partial(finals.get, number))
                if pattern in patterns:
                    found[str(pattern)] = evaluation

        self.stream.run(
            [Variant(p) for p in run],
            [b.ids for b in self.batches],
            use,
            watch=not self.watched,
            checkpoint=self._checkpoint,
            report=self.report,
        )
        self.watched = True
        return found

    def _read_ready(self) -> dict[str, Evaluation]:
        """Return the evaluations that an interrupted run computed and did not need yet."""
        if self.world.rank > 0:
            return {}
        try:
            found = read_json(self.ready_path, finite=True)
            return {str(Pattern(key)): Evaluation.from_json(e) for key, e in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError):
            return {}

    def _write_ready(self) -> None:
        if self.world.rank == 0 and self._ready:
            self.ready_path.parent.mkdir(parents=True, exist_ok=True)
            finite = {k: e.to_json() for k, e in self._ready.items() if math.isfinite(e.loss)}
            write_json(self.ready_path, finite)


class Base(Mapping[int, Tensor]):
    """The full model's final hidden states by batch, which a pass computed first.

    Args:
        finals: what the pass left.
        batches: the number of each of its batches among all.
    """

    def __init__(self, finals: Finals, batches: Sequence[int]):
        self._finals = finals
        self._places = {b: i for i, b in enumerate(batches)}

    def __getitem__(self, index: int) -> Tensor:
        return self._finals.get(0, self._places[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def full_losses_of(stream: Stream, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the losses of all next tokens with all layers full, fp32 [B, T - 1] on the CPU."""
    found: list[Tensor] = []

    def use(finals: Finals) -> None:
        for i, ids in enumerate(inputs):
            found.append(token_losses(stream.module, finals.get(0, i), ids).cpu())

    stream.run([Variant(Pattern.full(len(stream.layers)))], inputs, use)
    return found


def dealt(
    world: Processes,
    patterns: Sequence[Pattern],
    compute: Callable[[list[Pattern]], dict[Any, Any]],
) -> dict[Any, Any]:
    """Let every process compute some of the patterns, and return what all of them found.

    Raises:
        ValueError, OSError: one of them did, on every process.
    """
    mine = list(patterns[world.rank :: world.size])
    found: dict[Any, Any] | Exception
    try:
        found = compute(mine) if mine else {}
    except (ValueError, OSError) as error:
        if world.size == 1:
            raise
        found = error
    together: dict[Any, Any] = {}
    for part in world.gather(found):
        if isinstance(part, Exception):
            raise part
        together |= part
    return together


class Ticker:
    """Says how far a streamed search is: round, layer, states, rate of reading, time left.

    Args:
        rounds: the number of candidates of each round; none where nobody knows it before.
        layers: number of layers.
        say: takes the text.

    Attributes:
        round: number of flips that were made.
    """

    def __init__(self, rounds: Sequence[int], layers: int, say: Callable[[str], Any]):
        self.rounds = list(rounds)
        self.layers = layers
        self.say = say
        self.round = 0
        self._seconds = self._work = 0.0

    def __call__(self, done: LayerDone) -> None:
        """Take one layer into account, and say where the search is."""
        self._seconds += done.seconds
        self._work += done.states
        each = self._seconds / self._work
        if not self.rounds:
            self.say(
                f"layer {done.layer + 1}/{done.layers}, {done.states} alive, {done.rate:.1f} GB/s"
            )
            return
        # Every candidate runs from the layer it flips on, half of the layers in the mean.
        rest = (done.layers - 1 - done.layer) * done.states
        after = sum(self.layers * (1 + count / 2) for count in self.rounds[self.round + 1 :])
        self.say(
            f"round {self.round + 1}/{len(self.rounds)}, layer {done.layer + 1}/{done.layers}, "
            f"{done.states} alive, {done.rate:.1f} GB/s, round {_time(rest * each)}, "
            f"search {_time((rest + after) * each)}"
        )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
