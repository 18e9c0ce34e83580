"""Foresee what a fast search runs: it is run on imagined losses, and its passes are counted.

Nobody knows before how soon races end, so there are two: of a search for which all goes well, and
of one for which nothing does.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from indexcache.data import Batch
from indexcache.models.stream.forecast import Round
from indexcache.pattern import Pattern
from indexcache.searching.fast import FastSearch
from indexcache.searching.meter import KEY_PASSES
from indexcache.searching.objective import Evaluation
from indexcache.searching.samples import Difference, Measured, Parts, Samples
from indexcache.searching.settings import SearchSettings

ASSUMED = {
    "least": "what layers lose adds up and lies far apart, so every race ends on the smallest part "
    "of the text, flips are made together, and no swap helps",
    "most": "no part of the text tells candidates apart, so every race measures all of them on all "
    "of it; no flips are made together, and swaps help as often as they are tried",
}
"""Each of the two imagined searches takes this for granted."""


@dataclass(frozen=True)
class Foreseen:
    """This says how much an imagined search runs.

    Attributes:
        evaluations: patterns that it measures, each on the whole text or a part of it.
        rounds: its passes over the layers.
    """

    evaluations: int
    rounds: tuple[Round, ...]


def foresee(
    batches: Sequence[Batch],
    layers: int,
    settings: SearchSettings,
    full: int,
    starts: Sequence[int],
    fixed: Sequence[int],
    comparisons: Sequence[Pattern] = (),
) -> dict[str, Foreseen]:
    """Count what a fast search among F and S on a streamed model runs, at the least and the most.

    Args:
        batches: the calibration batches.
        layers: number of decoder layers.
        settings: those of the search.
        full, starts, fixed: see `FastSearch`.
        comparisons: patterns that are evaluated beside it.
    """
    found = {}
    for name in ASSUMED:
        unlucky = name == "most"
        samples = Imagined(batches, settings, layers, unlucky)
        asked = replace(settings, lazy=False) if unlucky else settings
        for _ in FastSearch(samples, full, starts, asked, fixed=fixed).run():
            pass
        for pattern in comparisons:
            samples.evaluate(pattern)
        found[name] = Foreseen(samples.work.evaluations, tuple(samples.rounds))
    return found


class Imagined(Samples):
    """Samples of a model whose losses are made up, which counts passes and runs nothing.

    Args:
        batches, layers: see `foresee`.
        settings: those of the search.
        unlucky: whether parts of the text say nothing, flips lose more together than alone, and
            swaps lose less; else the losses of layers add up.

    Attributes:
        rounds: the passes so far, in each of which all that is asked for together goes.
    """

    def __init__(
        self, batches: Sequence[Batch], settings: SearchSettings, layers: int, unlucky: bool
    ):
        counts = [b.counted.sum(-1).numpy() for b in batches]
        full = Pattern.full(layers)
        super().__init__(batches, settings.objective, counts, layers, full, [], lambda entry: None)
        self.unlucky = unlucky
        self.rounds: list[Round] = []
        self.divergence = settings.objective in ("kl", "key-kl")
        self.tokens = [b.ids.numel() for b in batches]
        self.order = np.random.default_rng(0).permutation(layers).tolist()
        self._losses: dict[Pattern, float] = {}
        if settings.objective == "key-kl":
            self.rounds.append(replace(Round.of_patterns([full]), share=float(KEY_PASSES)))

    def measure(self, patterns: Iterable[Pattern], part: Parts) -> None:
        missing: dict[Parts, list[Pattern]] = {}
        for pattern in patterns:
            asked = self._asked.setdefault(str(pattern), set())
            self.work.evaluations += not asked
            if new := tuple(b for b in part if b not in asked):
                missing.setdefault(new, []).append(pattern)
                asked.update(new)
        for new, some in missing.items():
            run = [self.full, *some] if self.divergence else some
            share = sum(self.tokens[b] for b in new) / sum(self.tokens)
            self.rounds.append(replace(Round.of_patterns(run), share=share))

    def difference(
        self, more: Sequence[Pattern], less: Sequence[Pattern], part: Parts
    ) -> Difference:
        value = sum(map(self.loss, more)) - sum(map(self.loss, less))
        if not self.unlucky:
            return Difference(value, 0.0, math.inf)
        if len(more) == 1 and len(more[0].full_layers) == len(less[0].full_layers):
            value = -1 - abs(value)  # a swap
        return Difference(value, 0.0 if part == self.whole else 1e6, math.inf)

    def evaluate(self, pattern: Pattern) -> Evaluation:
        self.measure([self.full, pattern], self.whole)
        return Evaluation(self.loss(pattern), {}, {})

    def loss(self, pattern: Pattern) -> float:
        """Return the imagined loss of a pattern."""
        if pattern not in self._losses:
            shared = [i for i in range(self.layers) if pattern[i] == "S"]
            if self.unlucky:
                noise = zlib.crc32(pattern.roles.encode()) / 2**36
                loss = 4.0 ** len(shared) * (1 + noise)
            else:
                loss = sum(4.0 ** self.order[i] for i in shared)
            self._losses[pattern] = loss
        return self._losses[pattern]

    def _run(self, pattern: Pattern, new: Sequence[int]) -> list[Measured]:
        raise NotImplementedError(
            "An imagined search has no model to run: `measure` only counts what would run."
        )

    def _layers_of(self, pattern: Pattern, batch: int) -> int:
        raise NotImplementedError(
            "An imagined search counts passes in `rounds`: each one streams all layers."
        )
