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
        measured = [float(e["noise"]) for e in journal if "noise" in e]
        if measured:
            self.noise = measured[0]
        else:
            self.noise = engine.noise(batches, self._weights if self.shows_parts else None)
            engine.check_effect(batches, self.noise)
            record({"noise": self.noise})
        self.work.add(4 * engine.layers, tokens)  # The noise and the effect take two each.

    def _weights(self, full: DocumentLosses) -> np.ndarray:
        sums = full.sums.tolist()
        return self.combination.weights(sums, sums)

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
