"""Make one number of the parts of an objective: text by domain, and each kind of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from indexcache.data.retrieval import DOMAIN
from indexcache.searching.settings import ObjectiveName


@dataclass(frozen=True)
class Combination:
    """How the sums of an evaluation become one number, nats per token.

    An evaluation has one sum and one count for every entry: a batch, or a sequence.

    - mean: over all tokens that count.
    - weighted, kl and key-kl: over the tokens of all text; where there is retrieval, half of that
      and half of the mean over its kinds.
    - worst: the most that a domain or a kind loses to the model with all layers full.

    Attributes:
        objective: its name.
        domains: the domain of every entry.
        counts: the number of tokens that count of every entry.
    """

    objective: ObjectiveName
    domains: tuple[str, ...]
    counts: tuple[int, ...]

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """The entries of every domain that has tokens that count, in ascending order of names."""
        places: dict[str, list[int]] = {d: [] for d in sorted(set(self.domains))}
        for i, domain in enumerate(self.domains):
            places[domain].append(i)
        return {d: own for d, own in places.items() if sum(self.counts[i] for i in own)}

    @property
    def kinds(self) -> list[str]:
        """The domains that are retrieval."""
        return [d for d in self.parts if d.startswith(DOMAIN)]

    @cached_property
    def terms(self) -> list[tuple[float, list[int]]]:
        """The weight of each mean in the number, and the entries over which it is taken."""
        everything = range(len(self.domains))
        text = [i for i in everything if not self.domains[i].startswith(DOMAIN)]
        text = text if sum(self.counts[i] for i in text) else []
        kinds = [self.parts[kind] for kind in self.kinds]
        if self.objective == "mean" or not kinds:
            return [(1.0, list(everything))]
        share = 0.5 if text else 0.0
        terms = [(share, text)] if text else []
        return terms + [((1 - share) / len(kinds), own) for own in kinds]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean of every domain and kind."""
        return {d: self._mean(sums, own) for d, own in self.parts.items()}

    def value(self, sums: Sequence[float], full: Sequence[float] | None = None) -> float:
        """Return the objective.

        Args:
            sums: of every entry, the sum over its tokens that count.
            full: those of the model with all layers full; only "worst" needs them.
        """
        if self.objective == "worst":
            assert full is not None
            return max(self._mean(sums, own) - self._mean(full, own) for own in self.parts.values())
        terms = [(weight, self._mean(sums, own)) for weight, own in self.terms]
        return terms[0][1] if len(terms) == 1 else sum(weight * mean for weight, mean in terms)

    def weights(self, sums: Sequence[float], full: Sequence[float]) -> np.ndarray:
        """Return how much the objective rises with each entry's sum, float64 [entries]."""
        terms = self.terms
        if self.objective == "worst":
            excess = {d: self._mean(sums, o) - self._mean(full, o) for d, o in self.parts.items()}
            terms = [(1.0, self.parts[max(excess, key=lambda d: excess[d])])]
        weights = np.zeros(len(self.domains))
        for weight, own in terms:
            weights[own] = weight / sum(self.counts[i] for i in own)
        return weights

    def _mean(self, sums: Sequence[float], own: Sequence[int]) -> float:
        total = 0.0  # The order of the sum is that of the entries, so that journals repeat.
        for i in own:
            total += float(sums[i])
        return total / sum(self.counts[i] for i in own)
