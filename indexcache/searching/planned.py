"""A fast search that starts from estimates: the best pattern of every budget, then swaps.

Dynamic programming over what every layer is thought to lose by reading every earlier layer's
selection (`models/gradients.py`) gives the pattern of every number of full layers. Those of the
budgets 1/2, 1/4, .. and of the last one are measured. What is measured corrects the estimates
(`estimates.py`), first by the flips of single layers on the smallest part of the text, and the plan
is made again until it stays. Then the swaps that the estimates prefer are raced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from indexcache.pattern import Pattern
from indexcache.searching.estimates import Estimates
from indexcache.searching.fast import FastSearch
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.samples import Difference, Parts
from indexcache.searching.similarity import best_patterns

SWAPS = 4  # so many are raced in a round
PLANS = 4  # so many are measured at a budget


@dataclass(kw_only=True)
class PlannedSearch(FastSearch):
    """The state of a search from estimates; see `FastSearch`.

    Args:
        pairs: what layer l loses with the selection of layer s < l, float64 [layers, layers], row s
            and column l.
    """

    pairs: np.ndarray
    estimates: Estimates = field(init=False)
    proposed: list[Pattern] = field(init=False, default_factory=list)  # swaps of the last round

    def run(self) -> Iterator[FrontierPoint]:
        """Yield a point for every number of full layers, from all down to `full`.

        The loss of a point between two budgets is estimated.
        """
        samples = self.samples
        samples.rebase(self.trunk)
        self.loss = samples.evaluate(self.trunk).loss
        yield FrontierPoint(self.trunk, self.loss)
        self.estimates = Estimates(self.pairs, self.slack)
        self.flips()
        above, before = samples.layers, (0.0, self.loss)
        for budget in sorted((b for b in self.budgets if self.full <= b < above), reverse=True):
            measured: dict[Pattern, float] = {}
            for _ in range(PLANS):
                planned = self.plan(range(samples.layers))
                if planned[budget] in measured:
                    break
                measured[planned[budget]] = self.evaluate(planned[budget])
            # Layers that share add up less well the more they are, so the plan that keeps to the
            # full layers of the last budget is measured too.
            nested = self.plan(self.trunk.full_layers)[budget]
            if nested not in measured:
                measured[nested] = self.evaluate(nested)
            self.trunk, self.loss = min(measured.items(), key=lambda x: x[1])
            samples.rebase(self.trunk)
            after = self.promised(self.trunk), self.loss
            for count in range(above - 1, budget, -1):
                at = self.promised(planned[count])
                loss = float(np.interp(at, (before[0], after[0]), (before[1], after[1])))
                yield FrontierPoint(planned[count], loss, estimated=True)
            if self.savings.swaps:
                self.refine()
            yield FrontierPoint(self.trunk, self.loss)
            above, before = budget, (self.promised(self.trunk), self.loss)

    def flips(self) -> None:
        """Measure on the first part what the flip of every layer alone loses, and learn from it."""
        samples, part = self.samples, self.parts[0]
        staying = {*self.starts, *self.fixed}
        flips = {i: self.trunk.replace(i, "S") for i in range(samples.layers) if i not in staying}
        samples.measure([self.trunk, *flips.values()], part)
        found = {i: samples.difference([p], [samples.full], part) for i, p in flips.items()}
        self.estimates.scale({i: d.value for i, d in found.items()})
        for i, error in grown_errors(found).items():
            self.estimates.learn(flips[i], found[i].value, error)

    def plan(self, allowed: Sequence[int]) -> dict[int, Pattern]:
        """Return the best pattern of every number of full layers, which are among these.

        Stages share in turn, as in the exact search, so each has its own best patterns.
        """
        layers, pairs = self.samples.layers, self.estimates.best()
        staying = sorted({*self.starts, *self.fixed})
        stages = []
        for start, stop in zip(self.starts, [*self.starts[1:], layers], strict=True):
            own = range(start, stop)
            fixed, open_ = ([i - start for i in some if i in own] for some in (staying, allowed))
            inner = -pairs[start:stop, start:stop]
            stages.append(best_patterns(inner, len(fixed), fixed, sorted(open_)))
        counts = [max(stage) for stage in stages]
        found = {}
        while True:
            pattern = Pattern("".join(s[n].roles for s, n in zip(stages, counts, strict=True)))
            found[sum(counts)] = pattern
            left = [i for i, s in enumerate(stages) if counts[i] > min(s)]
            if not left or sum(counts) <= self.full:
                return found
            most = max(counts[i] for i in left)
            counts[next(i for i in left if counts[i] == most)] -= 1

    def evaluate(self, pattern: Pattern) -> float:
        """Return the loss of a pattern on the whole text, and learn from it."""
        self.samples.rebase(pattern)
        loss = self.samples.evaluate(pattern).loss
        self.learn(pattern, self.samples.whole)
        return loss

    def learn(self, pattern: Pattern, part: Parts) -> None:
        """Learn from what a pattern loses on a part of the text."""
        lost = self.samples.difference([pattern], [self.samples.full], part)
        if np.isfinite(lost.error):
            self.estimates.learn(pattern, lost.value, lost.error)

    def promised(self, pattern: Pattern) -> float:
        """Return what a pattern loses by the estimates, as if they added up."""
        return total(self.estimates.best(), pattern)

    def swaps(self) -> dict[tuple[int, int], Pattern]:
        """Propose the swaps that lose least by the estimates, and learn from those before."""
        for pattern in self.proposed:
            self.learn(pattern, self.samples.measured(pattern))
        movable = [i for i in self.trunk.full_layers if i not in {*self.starts, *self.fixed}]
        patterns = {
            (i, j): self.trunk.replace(j, "F").replace(i, "S")
            for i in movable
            for j in range(len(self.trunk))
            if self.trunk[j] == "S" and self.stage(i) == self.stage(j)
        }
        pairs = self.estimates.best()
        order = sorted(patterns, key=lambda swap: (total(pairs, patterns[swap]), swap))
        proposed = {swap: patterns[swap] for swap in order[:SWAPS]}
        self.proposed = list(proposed.values())
        return proposed


def grown_errors(found: Mapping[int, Difference]) -> dict[int, float]:
    """Return standard errors of differences, of which few sequences tell little one by one.

    What varies between sequences has a part that all differences have, seen on the smaller half of
    them, and a part that grows with what is lost, seen on the larger half.
    """
    known = sorted((abs(d.value), d.error) for d in found.values() if np.isfinite(d.error))
    if not known:
        return {}
    lost, squares = np.array(known).T ** np.array([[1], [2]])
    half = -(-len(known) // 2)
    common = float(squares[:half].mean())
    rest = np.maximum(squares[half:] - common, 0) / np.maximum(lost[half:], 1e-12) ** 2
    growth = float(rest.mean()) if len(rest) else 0.0
    return {
        i: float(np.sqrt(common + growth * d.value**2))
        for i, d in found.items()
        if np.isfinite(d.error)
    }


def total(pairs: np.ndarray, pattern: Pattern) -> float:
    """Add up what the layers of a pattern lose by their sources."""
    return float(sum(pairs[pattern.source(i), i] for i in range(len(pattern))))
