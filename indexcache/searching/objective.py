"""The objective of a search: what a pattern loses over fixed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from indexcache.data import Batch
from indexcache.models.family import DsaModule
from indexcache.models.prefix import PrefixCache
from indexcache.models.soundness import check_scores
from indexcache.pattern import Pattern
from indexcache.searching.combining import Combination
from indexcache.searching.meter import KEY_PASSES, Meter, check_finite, full_losses
from indexcache.searching.settings import DEFAULT_OBJECTIVE, ObjectiveName
from indexcache.searching.work import Work


@dataclass(frozen=True)
class Evaluation:
    """What a pattern loses.

    Attributes:
        loss: the objective, nats per token; with plain text and the default it is the mean loss.
        parts: the mean of every domain and kind of retrieval; empty where nobody asked for them.
        found: (answers found, answers asked for) of every kind of retrieval.
    """

    loss: float
    parts: dict[str, float]
    found: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Return what a journal and a result hold."""
        value: dict[str, Any] = {"loss": self.loss}
        if self.parts:
            value["parts"] = self.parts
        if self.found:
            value["found"] = {kind: list(pair) for kind, pair in self.found.items()}
        return value

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Evaluation:
        """Read what `to_json` wrote."""
        found = {kind: (pair[0], pair[1]) for kind, pair in entry.get("found", {}).items()}
        return cls(entry["loss"], entry.get("parts", {}), found)


def shows_parts(batches: Sequence[Batch], objective: ObjectiveName) -> bool:
    """Return whether journals name the parts: not for the mean loss of plain text."""
    plain = all(b.plain for b in batches)
    return not (plain and objective in ("mean", DEFAULT_OBJECTIVE))


class Objective:
    """A function from a pattern to its loss over all batches, nats per token, computed once.

    Args:
        model: the transformers model.
        batches: the calibration batches, the same for every pattern.
        evaluated: earlier evaluations, by pattern string, e.g. from a run's journal.
        record: a function that gets (pattern, evaluation) after each new evaluation.
        name: which objective.
    """

    def __init__(
        self,
        model: DsaModule,
        batches: Sequence[Batch],
        evaluated: dict[str, Evaluation] | None = None,
        record: Callable[[Pattern, Evaluation], None] = lambda pattern, evaluation: None,
        name: ObjectiveName = DEFAULT_OBJECTIVE,
    ):
        self.model = model
        self.batches = batches
        self.evaluated = dict(evaluated or {})
        self.record = record
        self.base: Pattern | None = None
        self.watched = False  # whether the indexers' scores have been looked at
        self.prefix = PrefixCache(model, [b.ids for b in batches])
        self.layers = int(model.config.num_hidden_layers)
        self.full = Pattern.full(self.layers)
        self.meter = Meter(model, batches, name, self._full_losses)
        counts = tuple(int(c.sum()) for c in self.meter.counts)
        self.combination = Combination(name, tuple(b.domain for b in batches), counts)
        self.shows_parts = shows_parts(batches, name)
        self.full_sums: list[float] | None = None
        tokens = sum(b.ids.numel() for b in batches)
        self.work = Work(whole=tokens * self.layers)
        if name == "key-kl":
            self.work.layer_tokens += KEY_PASSES * self.work.whole
        self._tokens = tokens
        self._asked: set[str] = set()
        self._trunk: Pattern | None = None  # as an uninterrupted run would have it

    def together(self, patterns: Sequence[Pattern], trunk: Pattern | None) -> list[float]:
        """Return the losses of several patterns.

        The layers that they share with the trunk are computed once, at the first new evaluation.
        """
        return [self._beside(pattern, trunk) for pattern in patterns]

    def _beside(self, pattern: Pattern, trunk: Pattern | None) -> float:
        if pattern != trunk:  # A trunk that is asked for itself shares nothing with others yet.
            self.base = trunk
        return self(pattern)

    def __call__(self, pattern: Pattern) -> float:
        """Return the loss of a pattern.

        Raises:
            ValueError: the loss is not finite, or in the first batch an indexer's scores are not.
        """
        return self.evaluate(pattern).loss

    def evaluate(self, pattern: Pattern) -> Evaluation:
        """Return the loss of a pattern and its parts; see `__call__`."""
        key = str(pattern)
        self._count(pattern)
        if key not in self.evaluated:
            evaluation = self._measure(pattern)
            check_finite(evaluation.loss, key)
            self.evaluated[key] = evaluation
            self.record(pattern, evaluation)
        return self.evaluated[key]

    def _measure(self, pattern: Pattern) -> Evaluation:
        """Run the layers that the pattern does not share with the trunk."""
        if self.base is not None:
            self.prefix.rebase(self.base)
        if self.full_sums is None and pattern != self.full and self._needs_full:
            full = self._evaluation(self.full, partial(self._hidden, self.full))
            check_finite(full.loss, str(self.full))
        return self._evaluation(pattern, partial(self._hidden, pattern))

    def _full_losses(self, model: DsaModule, inputs: Sequence[Tensor]) -> list[Tensor]:
        return full_losses(model, inputs)

    @property
    def _needs_full(self) -> bool:
        return self.meter.divergence or self.combination.objective == "worst"

    def _hidden(self, pattern: Pattern, index: int) -> Tensor:
        with nullcontext() if self.watched else check_scores(self.model):
            hidden = self.prefix.hidden(index, pattern)
        self.watched = True
        if self.meter.divergence and pattern == self.full:
            self.meter.base = {**self.meter.base, index: hidden}
        return hidden

    def _evaluation(self, pattern: Pattern, hidden: Callable[[int], Tensor]) -> Evaluation:
        """Measure a pattern by its final hidden states [B, T, E] of every batch."""
        sums: list[float] = []
        found: dict[str, tuple[int, int]] = {}
        for i, batch in enumerate(self.batches):
            rows = self.meter.rows(i, hidden(i))
            sums.append(rows.total)
            if rows.found is not None:
                asked = sum(map(len, batch.answers))
                before = found.get(batch.domain, (0, 0))
                found[batch.domain] = (before[0] + int(rows.found.sum()), before[1] + asked)
        if pattern == self.full:
            self.full_sums = sums
        loss = self.combination.value(sums, self.full_sums)
        parts = self.combination.means(sums) if self.shows_parts else {}
        return Evaluation(loss, parts, found)

    def _count(self, pattern: Pattern) -> None:
        """Count the work of a pattern at its first evaluation, in this run or in an earlier one."""
        if str(pattern) in self._asked:
            return
        self._asked.add(str(pattern))
        if self.base is not None and self.base != self._trunk:
            self.work.add(self.prefix.layers_run(self.base, self._trunk), self._tokens)
            self._trunk = self.base
        self.work.add(self.prefix.layers_run(pattern, self._trunk), self._tokens)
        self.work.evaluations += 1
