"""Where a search gets losses from: a model in this process, or an engine that serves it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from indexcache.data import Batch
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.models.conditions import (
    Conditions,
    Origin,
    conditions_in,
    conditions_of,
    environment,
)
from indexcache.models.family import AnyModel, family_of, missing_indexers, module_of
from indexcache.models.soundness import blind_loss, check_weights
from indexcache.models.stream.run import Stream
from indexcache.models.world import ALONE, Processes
from indexcache.pattern import Pattern, stage_starts
from indexcache.searching.engine_objective import NOISE_PASSES, EngineObjective, measure_noise
from indexcache.searching.objective import Evaluation, Objective
from indexcache.searching.samples import EngineSamples, ModelSamples, Samples
from indexcache.searching.settings import DEFAULT_OBJECTIVE, Method, ObjectiveName, SearchSettings
from indexcache.searching.similarity import selection_overlap
from indexcache.searching.streamed import StreamedObjective, Ticker
from indexcache.searching.streamed_samples import StreamedSamples
from indexcache.searching.work import Work
from indexcache.vacuity import Share

Entry = dict[str, Any]  # one line of a journal


class EvaluationObjective(Protocol):
    """The loss of a pattern, and what all evaluations so far have cost."""

    work: Work

    def __call__(self, pattern: Pattern) -> float:
        """Return the loss of a pattern, nats per token."""

    def evaluate(self, pattern: Pattern) -> Evaluation:
        """Return the loss of a pattern and its parts."""


class LossSource(ABC):
    """The losses of patterns, and what they hold for.

    Attributes:
        layers: number of decoder layers.
        topk: the number of tokens that a query selects.
        context: the longest context of the model.
        without_indexer: layers that can never be full.
        roles: the roles that it can run.
        noise: how far two evaluations of one pattern lie apart, nats per token.
        world: the processes that compute together, of which the first one writes.
        methods: the ways of searching that it knows.
        kind: what it is, for a refusal.
        gradients: whether it can run a backward pass.
    """

    layers: int
    topk: int
    context: int = 0
    without_indexer: tuple[int, ...]
    roles: str
    noise: float = 0.0
    world: Processes = ALONE
    methods: tuple[Method, ...] = ("exact", "fast", "similarity")
    kind: str = "this package's own path"
    gradients: bool = False

    def check_settings(self, settings: SearchSettings) -> None:
        """Raise ValueError for a way of searching that this source does not know."""
        self.check_method(settings.method)
        if settings.start == "gradients" and not self.gradients:
            raise ValueError(
                f"--start gradients does not run on {self.kind}; take --start flips, or this "
                "package's own path with the whole model in memory."
            )

    def check_method(self, method: Method) -> None:
        """Raise ValueError for a method that this source does not know."""
        if method not in self.methods:
            raise ValueError(
                f"--method {method} does not run on {self.kind}; take {' or '.join(self.methods)}, "
                "or this package's own path with the whole model in memory."
            )

    def check(self) -> None:  # noqa: B027
        """Refuse a model whose weights cannot give a loss that means anything.

        Raises:
            ValueError: weights that are not finite, or indexers that select nothing.
        """

    @abstractmethod
    def blind_loss(self) -> float:
        """Return the loss of a model that gives every token the same probability."""

    @abstractmethod
    def starts(self, settings: SearchSettings) -> tuple[int, ...]:
        """Return the first layer of every pipeline stage, which stays full."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what a resumed run must share."""

    @abstractmethod
    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin
    ) -> Conditions:
        """Return what the losses hold for."""

    @abstractmethod
    def objective(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> EvaluationObjective:
        """Return the loss of a pattern as a function, which computes each pattern once.

        It may have a method for several patterns at once, see `greedy.together`.

        Args:
            batches: the calibration batches.
            name: which objective.
            journal: the entries of an interrupted run, none of which is computed again.
            record: gets an entry {"pattern", "loss", ..} after each new evaluation.
        """

    def samples(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Samples:
        """Return what measures patterns on parts of the text; the arguments are `objective`'s.

        Only a source with the method "fast" has it; `check_method` refuses the others before.
        """
        raise NotImplementedError(f"{self.kind} lists the method 'fast' but does not define it.")

    def overlap(self, batches: Sequence[Batch]) -> np.ndarray:
        """Return what every two layers' selections have in common, [layers, layers].

        Only a source with the method "similarity" has it; `check_method` refuses the others before.
        """
        raise NotImplementedError(
            f"{self.kind} lists the method 'similarity' but does not define it."
        )

    def expect(  # noqa: B027
        self, rounds: Sequence[int], later: Sequence[Pattern], say: Callable[[str], Any]
    ) -> None:
        """Announce what will be asked for, before `objective`.

        Args:
            rounds: the number of candidates of each round.
            later: patterns that will be asked for at the end.
            say: takes a text about the progress within a round.
        """

    def advance(self, flips: int) -> None:  # noqa: B027
        """Announce that the search has made so many flips."""

    def close(self) -> None:  # noqa: B027
        """Announce that nothing more will be asked for."""


class ModelSource(LossSource):
    """The losses of a model that lies in this process; they repeat bit for bit."""

    roles = "FRS"
    gradients = True

    def __init__(self, model: AnyModel):
        family_of(model)  # It refuses an unknown family.
        self.model = model
        self.module = module_of(model)
        self.layers = self.module.config.num_hidden_layers
        self.topk = int(self.module.config.index_topk)
        self.context = int(self.module.config.max_position_embeddings)
        self.without_indexer = tuple(missing_indexers(self.module))

    def check(self) -> None:
        check_weights(self.module, selecting=True)

    def blind_loss(self) -> float:
        return blind_loss(self.module)

    def starts(self, settings: SearchSettings) -> tuple[int, ...]:
        return stage_starts(self.layers, settings.stages)

    def facts(self) -> dict[str, Any]:
        return environment(self.module)

    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin
    ) -> Conditions:
        return conditions_of(self.model, batches, shares, origin)

    def objective(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Objective:
        return Objective(
            self.module,
            batches,
            {e["pattern"]: Evaluation.from_json(e) for e in journal},
            lambda pattern, value: record({"pattern": str(pattern)} | value.to_json()),
            name,
        )

    def samples(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Samples:
        return ModelSamples(self.module, batches, name, journal, record)

    def overlap(self, batches: Sequence[Batch]) -> np.ndarray:
        return selection_overlap(self.module, batches)


class StreamedSource(ModelSource):
    """The losses of a model whose layers are read one at a time; bitwise those of `ModelSource`.

    Args:
        model: a model that was loaded with `stream`.
        stream: what runs it.
        world: the processes that compute together.
        out: the run folder, where states are saved and spilled to.
    """

    methods = ("exact", "fast")
    kind = "a streamed model"
    gradients = False

    def __init__(self, model: AnyModel, stream: Stream, world: Processes, out: Path):
        super().__init__(model)
        self.stream = stream
        self.world = world
        self.folder = stream.folder = out / "stream"
        self.later: Sequence[Pattern] = ()
        self.ticker: Ticker | None = None
        self.made: StreamedObjective | None = None

    def expect(
        self, rounds: Sequence[int], later: Sequence[Pattern], say: Callable[[str], Any]
    ) -> None:
        self.later = later
        self.ticker = Ticker(rounds, self.layers, say)

    def advance(self, flips: int) -> None:
        if self.ticker is not None:
            self.ticker.round = flips

    def close(self) -> None:
        self.stream.close()
        if self.made is not None:
            self.made.close()
        with suppress(OSError):  # Another process may have a file there yet.
            self.folder.rmdir()

    def objective(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Objective:
        self.made = StreamedObjective(
            self.stream,
            batches,
            {e["pattern"]: Evaluation.from_json(e) for e in journal},
            lambda pattern, value: record({"pattern": str(pattern)} | value.to_json()),
            name,
            world=self.world,
            folder=self.folder,
            later=self.later,
            report=self.ticker or (lambda done: None),
        )
        return self.made

    def samples(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Samples:
        return StreamedSamples(
            self.stream,
            batches,
            name,
            journal,
            record,
            world=self.world,
            folder=self.folder,
            report=self.ticker or (lambda done: None),
        )


class VllmSource(LossSource):
    """The losses of a model inside vLLM, on as many GPUs as that runs on.

    The first evaluation of a run is a gate: all layers full twice gives the noise, and a pattern
    with the fewest full layers must change the losses beyond it. A journal keeps the noise, and the
    losses of every sequence beside those of a pattern.
    """

    roles = "FS"
    methods = ("exact", "fast")  # Nobody sees the selections.
    kind = "vLLM"

    def __init__(self, engine: VllmEngine):
        self.engine = engine
        self.layers = engine.layers
        self.topk = engine.topk
        self.without_indexer = engine.without_indexer

    def blind_loss(self) -> float:
        return math.log(self.engine.vocabulary)

    def starts(self, settings: SearchSettings) -> tuple[int, ...]:
        if settings.stages not in (1, len(self.engine.stages)):
            raise ValueError(
                f"--stages {settings.stages} does not fit vLLM, which runs "
                f"{len(self.engine.stages)} pipeline stages; leave it out."
            )
        return self.engine.stages

    def facts(self) -> dict[str, Any]:
        return {"engine": "vllm", **self.engine.facts}

    def conditions(
        self, batches: Sequence[Batch], shares: Mapping[int, Share], origin: Origin
    ) -> Conditions:
        return conditions_in(self.engine, batches, shares, origin)

    def objective(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> EvaluationObjective:
        objective = EngineObjective(self.engine, batches, journal, record, name)
        self.noise = objective.noise
        return objective

    def samples(
        self,
        batches: Sequence[Batch],
        journal: Sequence[Entry],
        record: Callable[[Entry], None],
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ) -> Samples:
        samples = EngineSamples(self.engine, batches, name, journal, record)
        combination = samples.combination if samples.shows_parts else None
        self.noise = measure_noise(self.engine, batches, combination, journal, record)
        samples.work.layer_tokens += NOISE_PASSES * samples.work.whole
        return samples
