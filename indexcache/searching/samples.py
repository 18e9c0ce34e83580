"""Measure patterns on growing parts of the calibration text, and compare two of them by pairs.

A part is a set of batches. What was measured once is kept, and a journal brings it back.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import Tensor

from indexcache.data import Batch
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.models.family import DsaModule
from indexcache.models.gradients import pair_losses, pair_passes
from indexcache.models.prefix import PrefixCache, memory_for_outputs
from indexcache.models.soundness import check_scores
from indexcache.pattern import Pattern
from indexcache.searching.combining import Combination
from indexcache.searching.meter import KEY_PASSES, Meter, check_finite, full_losses
from indexcache.searching.objective import Evaluation, shows_parts
from indexcache.searching.settings import ObjectiveName
from indexcache.searching.work import Work

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
LEAST = 5
"""Sequences of text, and of each kind of retrieval, in the smallest part, where there are so many;
fewer say nothing of their spread."""
SKETCH, SKETCH_TOKENS = 2, 4096
"""Sequences of each in the sketch, which shows what is far worse, and its least tokens in all."""

Parts = tuple[int, ...]
Measured = tuple[list[float], list[int] | None]
"""The sum of each sequence of a batch, and the answers found in it."""


@dataclass(frozen=True)
class Difference:
    """How much more one pattern loses than another.

    Attributes:
        value: the difference of the objective, nats per token, on the part that was measured.
        error: its standard error as an estimate of the difference on the whole text; 0 there.
        freedom: degrees of freedom of the error.
    """

    value: float
    error: float
    freedom: float

    def low(self, rate: float) -> float:
        """Return the lower end of the one-sided interval that errs at this rate."""
        return self.value - self._spread(rate)

    def high(self, rate: float) -> float:
        """Return the upper end of the one-sided interval that errs at this rate."""
        return self.value + self._spread(rate)

    def missed(self) -> float:
        """Return the expected value of by how much the first pattern loses less, or 0."""
        if self.error == 0:
            return max(-self.value, 0.0)
        if self.freedom <= 1:
            return math.inf
        n, at = self.freedom, self.value / self.error
        if math.isinf(n):
            return self.error * float(normal.pdf(at) - at * normal.sf(at))
        mean = (n + at**2) / (n - 1) * student.pdf(at, n) - at * student.sf(at, n)
        return self.error * float(mean)

    def _spread(self, rate: float) -> float:
        if self.error == 0:
            return 0.0
        return (
            math.inf
            if self.freedom < 1
            else float(student.ppf(1 - rate, self.freedom)) * self.error
        )


class Samples(ABC):
    """The sums of patterns over the sequences of batches.

    Args:
        batches: the calibration batches.
        name: which objective.
        counts: per batch, the number of tokens that count in each sequence.
        layers: number of decoder layers.
        journal: the entries of an interrupted run.
        record: gets an entry {"pattern", "batches", "sums"} after each new measurement.

    Attributes:
        work: what all that was asked for costs.
        whole: all batches.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        name: ObjectiveName,
        counts: Sequence[np.ndarray],
        layers: int,
        full: Pattern,
        journal: Sequence[dict[str, Any]],
        record: Callable[[dict[str, Any]], None],
    ):
        self.batches = batches
        self.record = record
        self.full = full
        self.layers = layers
        domains = tuple(b.domain for b in batches for _ in b.units)
        each = tuple(int(n) for row in counts for n in row)
        self.combination = Combination(name, domains, each)
        self.shows_parts = shows_parts(batches, name)
        ends = np.cumsum([0, *(len(b.units) for b in batches)]).tolist()
        self.rows = [range(a, b) for a, b in itertools.pairwise(ends)]
        self.asked_for = [
            len(spans) for b in batches for spans in b.answers or ((),) * len(b.units)
        ]
        self.whole: Parts = tuple(range(len(batches)))
        self.work = Work(whole=sum(b.ids.numel() for b in batches) * layers)
        self._known: dict[str, dict[int, Measured]] = {}
        self._asked: dict[str, set[int]] = {}
        self._pairs: np.ndarray | None = None
        for entry in journal:
            if "batches" in entry:
                self._keep(entry)
            elif "pairs" in entry:
                self._pairs = np.array(entry["pairs"], np.float64)

    def _keep(self, entry: dict[str, Any]) -> None:
        known = self._known.setdefault(entry["pattern"], {})
        found = entry.get("found") or [None] * len(entry["batches"])
        for batch, sums, count in zip(entry["batches"], entry["sums"], found, strict=True):
            known[batch] = (sums, count)

    def parts(self) -> list[Parts]:
        """Return growing parts of the text, each with its share of text and of every kind.

        The last one is all of it.
        """
        result: list[Parts] = []
        for share in SHARES:
            part = self._share(share, LEAST)
            if not result or part != result[-1]:
                result.append(part)
        return result

    def sketch(self) -> Parts:
        """Return a few batches of the smallest part; none where they have too few tokens."""
        part = self._share(0.0, SKETCH)
        tokens = sum(self.batches[b].ids.numel() for b in part)
        return part if tokens >= SKETCH_TOKENS and part != self.parts()[0] else ()

    def first_part(self) -> Parts:
        """Return the sketch, or the smallest part where there is none."""
        return self.sketch() or self.parts()[0]

    def _share(self, share: float, least: int) -> Parts:
        """Return a share of the batches, and so many sequences of text and of every kind."""
        groups: dict[str, list[int]] = {}
        for i, b in enumerate(self.batches):
            groups.setdefault(b.domain if b.answers else "", []).append(i)
        # Batches of one domain follow each other, so a part takes them evenly spread.
        order = {
            g: sorted(own, key=lambda i: _bit_reversed(own.index(i))) for g, own in groups.items()
        }
        taken: list[int] = []
        for own in order.values():
            per = max(len(self.batches[own[0]].units), 1)
            count = max(math.ceil(share * len(own)), math.ceil(least / per))
            taken += own[:count]
        return tuple(sorted(taken))

    def measure(self, patterns: Iterable[Pattern], part: Parts) -> None:
        """Measure patterns on a part, where they were not measured yet.

        Raises:
            ValueError: a loss or an indexer's scores are not finite.
        """
        for pattern in patterns:
            key = str(pattern)
            asked = self._asked.setdefault(key, set())
            self.work.evaluations += not asked
            missing = [b for b in part if b not in asked]
            asked.update(missing)
            for b in missing:
                self.work.layer_tokens += self._layers_of(pattern, b) * self.batches[b].ids.numel()
            known = self._known.setdefault(key, {})
            new = [b for b in missing if b not in known]
            if not new:
                continue
            values = self._run(pattern, new)
            for sums, _ in values:
                check_finite(math.fsum(sums), key)
            entry: dict[str, Any] = {"pattern": key, "batches": new, "sums": [s for s, _ in values]}
            if any(self.batches[b].answers for b in new):
                entry["found"] = [found for _, found in values]
            self._keep(entry)
            self.record(entry)

    def measured(self, pattern: Pattern) -> Parts:
        """Return the part on which a pattern was measured."""
        return tuple(sorted(self._asked.get(str(pattern), ())))

    @abstractmethod
    def _run(self, pattern: Pattern, new: Sequence[int]) -> list[Measured]:
        """Measure a pattern on batches: the sum of each sequence, and the answers found in it."""

    @abstractmethod
    def _layers_of(self, pattern: Pattern, batch: int) -> int:
        """Return how many layers an uninterrupted run runs for a pattern on a batch."""

    def rebase(self, pattern: Pattern) -> None:  # noqa: B027
        """Announce that the next patterns differ little from this one."""

    def sums(self, pattern: Pattern, part: Parts) -> np.ndarray:
        """Return the sums of every sequence, float64 [sequences]; NaN outside the part."""
        result = np.full(len(self.combination.domains), np.nan)
        known = self._known[str(pattern)]
        for b in part:
            result[self.rows[b].start : self.rows[b].stop] = known[b][0]
        return result

    def difference(
        self, more: Sequence[Pattern], less: Sequence[Pattern], part: Parts
    ) -> Difference:
        """Compare patterns by pairs: the sum of the objective of some minus that of others.

        All of them, as many on both sides, and all full were measured on the part. Sequences of
        text, or of a kind of retrieval, are a sample without replacement of those in the whole
        text.
        """
        full = self.sums(self.full, part)
        signed = [(1.0, p) for p in more] + [(-1.0, p) for p in less]
        excess = [(sign, self.sums(p, part) - full, self._terms(p, part)) for sign, p in signed]
        value, variance, fourth = 0.0, 0.0, 0.0
        for key in sorted({entries for _, _, terms in excess for entries in terms}):
            entries = np.array(key)
            measured = entries[~np.isnan(full[entries])]
            counts = np.array([self.combination.counts[i] for i in measured], np.float64)
            z = sum(sign * terms.get(key, 0.0) * x[measured] for sign, x, terms in excess)
            mean = float(np.sum(z) / counts.sum())
            value += mean
            many, sample = len(entries), len(measured)
            if sample == many:
                continue
            if sample == 1:
                return Difference(value, math.inf, 0)
            spread = float((((z - mean * counts) / counts.mean()) ** 2).sum()) / (sample - 1)
            own = spread / sample * (1 - sample / many)
            variance += own
            fourth += own**2 / (sample - 1)
        freedom = variance**2 / fourth if fourth else math.inf
        return Difference(value, math.sqrt(variance), freedom)

    def _terms(self, pattern: Pattern, part: Parts) -> dict[tuple[int, ...], float]:
        """Return the weights of the means that make up the objective, by their entries."""
        if self.combination.objective != "worst":
            return {tuple(own): weight for weight, own in self.combination.terms}
        excess = self.sums(pattern, part) - self.sums(self.full, part)
        counts = np.array(self.combination.counts, np.float64)

        def mean(own: Iterable[int]) -> float:
            there = [i for i in own if not math.isnan(excess[i])]
            return float(excess[there].sum() / counts[there].sum()) if there else -math.inf

        return {tuple(max(self.combination.parts.values(), key=mean)): 1.0}

    def pairs(self, part: Parts) -> np.ndarray:
        """Estimate by gradients what layer l loses with layer s's selection on a part.

        The journal keeps it.

        Returns:
            float64 [layers, layers], row s and column l; see `gradients.pair_losses`.
        """
        tokens = sum(self.batches[b].ids.numel() for b in part)
        self.work.layer_tokens += round(pair_passes(self.layers) * self.layers * tokens)
        if self._pairs is None:
            self._pairs = self._estimate(part)
            self.record({"pairs": self._pairs.tolist()})
        return self._pairs

    def _estimate(self, part: Parts) -> np.ndarray:
        """Compute `pairs`; `LossSource.check_settings` refuses other sources before."""
        raise NotImplementedError(
            f"{type(self).__name__} says that it has gradients, but does not estimate pairs."
        )

    def weights(self, part: Parts) -> list[np.ndarray]:
        """Return how much the objective on a part rises with each sequence's sum, by batch.

        For the worst part, which the full model does not have, all parts count the same.
        """
        terms = self.combination.terms
        if self.combination.objective == "worst":
            own = list(self.combination.parts.values())
            terms = [(1 / len(own), places) for places in own]
        measured = {i for b in part for i in self.rows[b]}
        found = np.zeros(len(self.combination.domains))
        for weight, places in terms:
            there = [i for i in places if i in measured]
            counts = sum(self.combination.counts[i] for i in there)
            found[there] += weight / counts if counts else 0.0
        return [found[list(self.rows[b])] for b in part]

    def evaluate(self, pattern: Pattern) -> Evaluation:
        """Return the objective of a pattern on the whole text, with its parts."""
        self.measure([self.full, pattern], self.whole)
        sums = self.sums(pattern, self.whole).tolist()
        loss = self.combination.value(sums, self.sums(self.full, self.whole).tolist())
        if not self.shows_parts:
            return Evaluation(loss, {}, {})
        counts: dict[str, tuple[int, int]] = {}
        for b, batch in enumerate(self.batches):
            found = self._known[str(pattern)][b][1]
            if batch.answers and found is not None:
                asked = sum(self.asked_for[i] for i in self.rows[b])
                before = counts.get(batch.domain, (0, 0))
                counts[batch.domain] = (before[0] + sum(found), before[1] + asked)
        return Evaluation(loss, self.combination.means(sums), counts)


def _bit_reversed(number: int) -> int:
    """Return the bits of a number of 16 bits in reversed order, which spreads counts evenly."""
    return int(f"{number:016b}"[::-1], 2)


class ModelSamples(Samples):
    """Samples of a model in this process; layers that patterns share with the trunk run once."""

    def __init__(
        self,
        model: DsaModule,
        batches: Sequence[Batch],
        name: ObjectiveName,
        journal: Sequence[dict[str, Any]],
        record: Callable[[dict[str, Any]], None],
    ):
        self.model = model
        self.meter = Meter(model, batches, name, self._full_losses)
        layers = int(model.config.num_hidden_layers)
        full = Pattern.full(layers)
        super().__init__(batches, name, self.meter.counts, layers, full, journal, record)
        limit = memory_for_outputs(model) // max(len(batches), 1)
        self.prefixes = [PrefixCache(model, [b.ids], limit) for b in batches]
        self.trunks: list[Pattern | None] = [None] * len(batches)  # of an uninterrupted run
        self.base: Pattern = full
        self.watched = False
        if name == "key-kl":
            self.work.layer_tokens += KEY_PASSES * self.work.whole

    def rebase(self, pattern: Pattern) -> None:
        self.base = pattern

    def _layers_of(self, pattern: Pattern, batch: int) -> int:
        prefix, layers = self.prefixes[batch], 0
        if self.trunks[batch] != self.base:
            layers += prefix.layers_run(self.base, self.trunks[batch])
            self.trunks[batch] = self.base
        return layers + (prefix.layers_run(pattern, self.base) if pattern != self.base else 0)

    def _run(self, pattern: Pattern, new: Sequence[int]) -> list[Measured]:
        values = []
        for b in new:
            prefix = self.prefixes[b]
            with nullcontext() if self.watched else check_scores(self.model):
                prefix.rebase(self.base)
                if self.meter.divergence and b not in self.meter.base:
                    self.meter.base = {**self.meter.base, b: prefix.hidden(0, self.full)}
                hidden = prefix.hidden(0, pattern)
            self.watched = True
            values.append(self._measured(b, hidden))
        return values

    def _measured(self, batch: int, hidden: Tensor) -> Measured:
        """Measure a batch by its final hidden states [B, T, E]."""
        rows = self.meter.rows(batch, hidden)
        found = None if rows.found is None else [int(n) for n in rows.found]
        return [float(s) for s in rows.sums], found

    def _full_losses(self, model: DsaModule, inputs: Sequence[Tensor]) -> list[Tensor]:
        return full_losses(model, inputs)

    def _estimate(self, part: Parts) -> np.ndarray:
        own = [self.batches[b] for b in part]
        counted = [self.meter.counted[b] for b in part]
        return pair_losses(self.model, [b.ids for b in own], counted, self.weights(part))


class EngineSamples(Samples):
    """Samples of a model inside vLLM, which runs all layers for every pattern."""

    def __init__(
        self,
        engine: VllmEngine,
        batches: Sequence[Batch],
        name: ObjectiveName,
        journal: Sequence[dict[str, Any]],
        record: Callable[[dict[str, Any]], None],
    ):
        self.engine = engine
        counts = [b.counted.sum(-1).numpy() for b in batches]
        full = engine.fullest()
        super().__init__(batches, name, counts, engine.layers, full, journal, record)

    def _layers_of(self, pattern: Pattern, batch: int) -> int:
        return self.layers

    def _run(self, pattern: Pattern, new: Sequence[int]) -> list[Measured]:
        losses = self.engine.losses(pattern, [self.batches[b] for b in new])
        values, at = [], 0
        for b in new:
            span = slice(at, at + len(self.rows[b]))
            found = None if losses.found is None else losses.found[span].tolist()
            values.append((losses.sums[span].tolist(), found))
            at = span.stop
        return values
