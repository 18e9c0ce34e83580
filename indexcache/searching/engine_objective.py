"""The objective of a search inside an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from indexcache.data import Batch
from indexcache.engines.vllm.engine import DocumentLosses, VllmEngine
from indexcache.pattern import Pattern
from indexcache.searching.combining import Combination
from indexcache.searching.objective import Evaluation, shows_parts
from indexcache.searching.settings import ObjectiveName, SearchSettings
from indexcache.searching.work import Work

NOISE_PASSES = 4  # The noise and the effect of sharing take two evaluations each.


def measure_noise(
    engine: VllmEngine,
    batches: Sequence[Batch],
    combination: Combination | None,
    journal: Sequence[dict[str, Any]],
    record: Callable[[dict[str, Any]], None],
) -> float:
    """Return how far two evaluations of one pattern lie apart, from the journal or measured now.

    Args:
        combination: how the sums of the sequences become one number; None is their mean.

    Raises:
        ValueError: sharing has no effect in this vLLM.
    """
    for entry in journal:
        if "noise" in entry:
            return float(entry["noise"])

    def weights(full: DocumentLosses) -> np.ndarray:
        assert combination is not None
        return combination.weights(full.sums.tolist(), full.sums.tolist())

    noise = engine.noise(batches, weights if combination else None)
    engine.check_effect(batches, noise)
    record({"noise": noise})
    return noise


class EngineObjective:
    """A function from a pattern to its loss inside vLLM, nats per token, computed once.

    A journal keeps the noise, and the losses of every sequence beside those of a pattern.

    Args:
        engine: the running vLLM.
        batches: the calibration batches.
        journal: the entries of an interrupted run, none of which is computed again.
        record: gets an entry {"pattern", "loss", "sums"} after each new evaluation.
        name: which objective; the divergences are refused.

    Attributes:
        noise: how far two evaluations of one pattern lie apart, nats per token.
        work: what the evaluations have cost; an engine reuses no layers.

    Raises:
        ValueError: an objective that needs more than the losses of tokens.
    """

    def __init__(
        self,
        engine: VllmEngine,
        batches: Sequence[Batch],
        journal: Sequence[dict[str, Any]],
        record: Callable[[dict[str, Any]], None],
        name: ObjectiveName,
    ):
        SearchSettings(objective=name).check_engine()
        self.engine = engine
        self.batches = batches
        self.record = record
        rows = [(b, row) for b in batches for row in b.counted]
        counts = tuple(int(row.sum()) for _, row in rows)
        self.combination = Combination(name, tuple(b.domain for b, _ in rows), counts)
        self.asked = [len(spans) for b in batches for spans in b.answers or ((),) * len(b.units)]
        self.shows_parts = shows_parts(batches, name)
        self.full = engine.fullest()
        self.evaluated: dict[str, Evaluation] = {}
        self.full_sums: list[float] | None = None
        for entry in journal:
            if "pattern" in entry:
                self.evaluated[entry["pattern"]] = Evaluation.from_json(entry)
                if entry["pattern"] == str(self.full):
                    self.full_sums = entry["sums"]
        tokens = sum(b.ids.numel() for b in batches)
        self.work = Work(whole=tokens * engine.layers)
        self._counted: set[str] = set()
        self.noise = measure_noise(
            engine, batches, self.combination if self.shows_parts else None, journal, record
        )
        self.work.add(NOISE_PASSES * engine.layers, tokens)

    def __call__(self, pattern: Pattern) -> float:
        """Return the loss of a pattern."""
        return self.evaluate(pattern).loss

    def evaluate(self, pattern: Pattern) -> Evaluation:
        """Return the loss of a pattern and its parts."""
        key = str(pattern)
        if key not in self._counted:
            self._counted.add(key)
            self.work.evaluations += 1
            self.work.layer_tokens += self.work.whole
        if key not in self.evaluated:
            losses = self.engine.losses(pattern, self.batches)
            sums = losses.sums.tolist()
            if pattern == self.full:
                self.full_sums = sums
            value = self._evaluation(losses)
            self.evaluated[key] = value
            self.record({"pattern": key} | value.to_json() | {"sums": sums})
        return self.evaluated[key]

    def _evaluation(self, losses: DocumentLosses) -> Evaluation:
        sums = losses.sums.tolist()
        if not self.shows_parts:
            return Evaluation(losses.mean, {}, {})
        loss = self.combination.value(sums, self.full_sums)
        found = {}
        if losses.found is not None:
            for kind in self.combination.kinds:
                own = self.combination.parts[kind]
                found[kind] = (int(losses.found[own].sum()), sum(self.asked[i] for i in own))
        return Evaluation(loss, self.combination.means(sums), found)
