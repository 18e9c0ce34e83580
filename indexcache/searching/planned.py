"""A fast search that starts from estimates: it plans every budget's pattern, then looks beside it.

Dynamic programming over what every layer is thought to lose by reading every earlier layer's
selection (`models/gradients.py`) gives the pattern of every number of full layers. Those of the
budgets 1/2, 1/4, .. and of the last one are measured. What is measured corrects the estimates
(`estimates.py`), first by the flips of single layers on the first part of the text, and the plan is
made again until it stays. Then patterns beside the plan are measured (`refining.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from indexcache.pattern import Pattern
from indexcache.searching.estimates import Estimates
from indexcache.searching.fast import FAR, FastSearch
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.refining import Neighbours, changed, look_around
from indexcache.searching.samples import Difference, Parts
from indexcache.searching.similarity import best_patterns

PLANS = 4  # This many plans are measured at a budget.
SURPRISE = 0.01  # A plan bears the estimates out that differs from them by this part of its loss.
TRIES = 3  # This many patterns beside that of a budget are measured on all text.


@dataclass(kw_only=True)
class PlannedSearch(FastSearch):
    """The state of a search from estimates; see `FastSearch`.

    Args:
        pairs: what layer l loses with the selection of layer s < l, float64 [layers, layers], row s
            and column l.
    """

    pairs: np.ndarray
    estimates: Estimates = field(init=False)

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
        full_loss = self.loss
        above, before = samples.layers, (0.0, self.loss)
        for budget in sorted((b for b in self.budgets if self.full <= b < above), reverse=True):
            measured: dict[Pattern, float] = {}
            surprise = 0.0
            for _ in range(PLANS):
                planned = self.plan(range(samples.layers))
                if planned[budget] in measured:
                    break
                promised = full_loss + self.promised(planned[budget])
                measured[planned[budget]] = self.evaluate(planned[budget])
                surprise = max(surprise, abs(measured[planned[budget]] - promised))
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
            # Estimates that a plan bears out leave nothing to look for beside it.
            expected = self.noise + SURPRISE * abs(self.loss - full_loss)
            if self.savings.swaps and surprise > expected:
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
            self.estimates.learn(flips[i], samples.full, found[i].value, error)

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
        self.learn(pattern, self.samples.full, self.samples.whole)
        return loss

    def learn(self, pattern: Pattern, base: Pattern, part: Parts) -> None:
        """Learn from what a pattern loses beyond another one on a part of the text."""
        lost = self.samples.difference([pattern], [base], part)
        if np.isfinite(lost.error):
            self.estimates.learn(pattern, base, lost.value, lost.error)

    def promised(self, pattern: Pattern) -> float:
        """Return what a pattern loses by the estimates, as if they added up."""
        return total(self.estimates.best(), pattern)

    def refine(self) -> None:
        """Let full and shared layers change places where that loses less on the whole text.

        What changes of one role lose is measured on small parts of the text. The patterns that
        promise most by that are measured on all, and last the swap that the estimates prefer.
        """
        near = self.look()
        tried = {self.trunk}
        for _ in range(TRIES):
            left = [p for p in self.proposals(near) if p not in tried]
            best = min(left, key=lambda p: (self.promise(near, p), p.roles), default=self.trunk)
            if best in tried or self.promise(near, best) >= 0:
                break
            tried.add(best)
            self.attempt(best)
        swaps = self.single_swaps()
        if swaps and self.promised(swaps[0]) < self.promised(self.trunk):
            self.attempt(swaps[0])

    def look(self) -> Neighbours:
        """Measure the changes of one role beside the trunk, and learn from them.

        Left out are full layers that are thought to lose far more than any shared one gains.
        """
        trunk, before = self.trunk, self.promised(self.trunk)
        staying = {*self.starts, *self.fixed}
        lost = {
            i: self.promised(changed(trunk, i)) - before
            for i in range(len(trunk))
            if i not in staying
        }
        gain = max((-x for i, x in lost.items() if trunk[i] == "S"), default=0.0)
        far = FAR * (max(gain, 0.0) + self.slack)
        drops = [i for i, x in lost.items() if trunk[i] == "F" and x <= far]
        near = look_around(self.samples, trunk, drops, self.parts, lost)
        for i in lost:
            if part := self.samples.measured(changed(trunk, i)):
                self.learn(changed(trunk, i), trunk, part)
        return near

    def proposals(self, near: Neighbours) -> list[Pattern]:
        """Return patterns that may lose less than the one that was looked around."""
        count = len(near.trunk.full_layers)
        return [self.plan(range(self.samples.layers))[count], *near.swaps(self.stage)]

    def promise(self, near: Neighbours, pattern: Pattern) -> float:
        """Return the mean of what the estimates say and what the changes add up to."""
        estimated = self.promised(pattern) - self.promised(near.trunk)
        return (estimated + near.promise(pattern)) / 2

    def attempt(self, pattern: Pattern) -> None:
        """Measure a pattern on the whole text, and make it the trunk where it loses less."""
        loss = self.samples.evaluate(pattern).loss
        self.learn(pattern, self.trunk, self.samples.whole)
        if loss < self.loss:
            self.trunk, self.loss = pattern, loss
            self.samples.rebase(pattern)

    def single_swaps(self) -> list[Pattern]:
        """Return the swaps of the trunk that were not measured on all text, the best ones first."""
        staying = {*self.starts, *self.fixed}
        found = [
            self.trunk.replace(j, "F").replace(i, "S")
            for i in self.trunk.full_layers
            for j in range(len(self.trunk))
            if i not in staying and self.trunk[j] == "S" and self.stage(i) == self.stage(j)
        ]
        pairs, whole = self.estimates.best(), self.samples.whole
        new = [p for p in found if self.samples.measured(p) != whole]
        return sorted(new, key=lambda p: (total(pairs, p), p.roles))


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
