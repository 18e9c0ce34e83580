"""A fast search that starts from estimates: the best pattern of every budget, then swaps.

Dynamic programming over what every layer is thought to lose by reading every earlier layer's
selection (`models/gradients.py`) gives the pattern of every number of full layers. Those of the
budgets 1/2, 1/4, .. and of the last one are measured, and the swaps that the estimates prefer are
raced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from indexcache.pattern import Pattern
from indexcache.searching.fast import FastSearch
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.similarity import best_patterns

SWAPS = 8  # so many are raced in a round


@dataclass(kw_only=True)
class PlannedSearch(FastSearch):
    """The state of a search from estimates; see `FastSearch`.

    Args:
        pairs: what layer l loses with the selection of layer s < l, float64 [layers, layers], row s
            and column l.
    """

    pairs: np.ndarray

    def run(self) -> Iterator[FrontierPoint]:
        """Yield a point for every number of full layers, from all down to `full`.

        The loss of a point between two budgets is estimated.
        """
        planned = self.plan(range(self.samples.layers))
        self.samples.rebase(self.trunk)
        self.loss = self.samples.evaluate(self.trunk).loss
        yield FrontierPoint(self.trunk, self.loss)
        above, before = self.samples.layers, (0.0, self.loss)
        for budget in sorted((b for b in self.budgets if self.full <= b < above), reverse=True):
            after = self.promised(planned[budget]), self.evaluate(planned[budget])
            # Layers that share add up less well the more they are, so the plan that keeps to the
            # full layers of the last budget is measured too.
            nested = self.plan(self.trunk.full_layers)[budget]
            self.loss, self.trunk = min(
                ((self.evaluate(p), p) for p in (planned[budget], nested)), key=lambda x: x[0]
            )
            self.samples.rebase(self.trunk)
            for count in range(above - 1, budget, -1):
                at = self.promised(planned[count])
                loss = float(np.interp(at, (before[0], after[0]), (before[1], after[1])))
                yield FrontierPoint(planned[count], loss, estimated=True)
            if self.savings.swaps:
                self.refine()
            yield FrontierPoint(self.trunk, self.loss)
            above, before = budget, after

    def plan(self, allowed: Sequence[int]) -> dict[int, Pattern]:
        """Return the best pattern of every number of full layers, which are among these.

        Stages share in turn, as in the exact search, so each has its own best patterns.
        """
        layers = self.samples.layers
        staying = sorted({*self.starts, *self.fixed})
        stages = []
        for start, stop in zip(self.starts, [*self.starts[1:], layers], strict=True):
            own = range(start, stop)
            fixed, open_ = ([i - start for i in some if i in own] for some in (staying, allowed))
            inner = -self.pairs[start:stop, start:stop]
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
        """Return the loss of a pattern on the whole text."""
        self.samples.rebase(pattern)
        return self.samples.evaluate(pattern).loss

    def promised(self, pattern: Pattern) -> float:
        """Return what a pattern loses by the estimates, as if they added up."""
        return float(sum(self.pairs[pattern.source(i), i] for i in range(len(pattern))))

    def swaps(self) -> dict[tuple[int, int], Pattern]:
        """Propose the swaps that lose least by the estimates."""
        movable = [i for i in self.trunk.full_layers if i not in {*self.starts, *self.fixed}]
        patterns = {
            (i, j): self.trunk.replace(j, "F").replace(i, "S")
            for i in movable
            for j in range(len(self.trunk))
            if self.trunk[j] == "S" and self.stage(i) == self.stage(j)
        }
        order: Sequence[tuple[int, int]] = sorted(
            patterns, key=lambda swap: (self.promised(patterns[swap]), swap)
        )
        return {swap: patterns[swap] for swap in order[:SWAPS]}
