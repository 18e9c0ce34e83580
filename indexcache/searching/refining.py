"""Look beside a pattern: what single changes of it lose, and which swaps promise to lose less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from indexcache.pattern import Pattern
from indexcache.searching.samples import Parts, Samples

LOOK = 1 / 4
"""Share of the changes on the sketch that are measured on more text, the best ones."""
SINGLE = 8  # so many single swaps are proposed beside those that are made together


def changed(pattern: Pattern, layer: int) -> Pattern:
    """Return the pattern with the other role, F or S, for a layer."""
    return pattern.replace(layer, "S" if pattern[layer] == "F" else "F")


@dataclass(frozen=True)
class Neighbours:
    """This holds what patterns lose that differ from one in the role of a single layer.

    Attributes:
        trunk: the pattern.
        lost: by layer, how much more is lost where it changes its role, nats per token.
        drops: full layers that may become shared, of those that were measured most.
        returns: shared layers that may become full, likewise.
    """

    trunk: Pattern
    lost: dict[int, float]
    drops: list[int]
    returns: list[int]

    def promise(self, pattern: Pattern) -> float:
        """Add up what the changes that make a pattern of the trunk lose; unknown ones count 0."""
        layers = [i for i in range(len(pattern)) if pattern[i] != self.trunk[i]]
        return math.fsum(self.lost.get(i, 0.0) for i in layers)

    def swaps(self, stage: Callable[[int], int]) -> list[Pattern]:
        """Propose swaps: the best ones that gain, made together, and each of the best alone.

        Args:
            stage: returns the pipeline stage of a layer, in which its swaps stay.
        """
        pairs = sorted(
            (self.lost[i] + self.lost[j], i, j)
            for i in self.drops
            for j in self.returns
            if stage(i) == stage(j)
        )
        found = [self._swapped(self.trunk, i, j) for _, i, j in pairs[:SINGLE]]
        together, used = self.trunk, set[int]()
        for lost, i, j in pairs:
            if lost < 0 and not used & {i, j}:
                used |= {i, j}
                together = self._swapped(together, i, j)
                found.append(together)
        return list(dict.fromkeys(found))

    @staticmethod
    def _swapped(pattern: Pattern, dropped: int, restored: int) -> Pattern:
        return pattern.replace(restored, "F").replace(dropped, "S")


def look_around(
    samples: Samples,
    trunk: Pattern,
    drops: Sequence[int],
    parts: Sequence[Parts],
    known: Mapping[int, float],
) -> Neighbours:
    """Measure what single changes lose on the first part, and the best of them on the second.

    Args:
        drops: the full layers that may become shared.
        known: what the changes that are not measured are thought to lose.
    """
    lost = dict(known)
    left = [list(drops), [j for j in range(len(trunk)) if trunk[j] == "S"]]
    for number, part in enumerate(parts[:2]):
        if number:
            best = [sorted(own, key=lambda i: (lost[i], i)) for own in left]
            left = [own[: math.ceil(LOOK * len(own))] for own in best]
        patterns = {i: changed(trunk, i) for own in left for i in own}
        samples.measure([samples.full, trunk, *patterns.values()], part)
        for i, pattern in patterns.items():
            lost[i] = samples.difference([pattern], [trunk], part).value
    return Neighbours(trunk, lost, *left)
