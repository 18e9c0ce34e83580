"""Correct the estimates of what layers lose by patterns that were measured.

The loss of a pattern is thought to be the sum, over its shared layers, of what each loses by
reading the selection of its source. These parts are unknown: the gradients give a first guess of
them (`models/gradients.py`), and every pattern that is measured tells their sum. With a normal
distribution for the guess and for the error of a sum, the best new guess is linear regression.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from indexcache.pattern import Pattern

RELATIVE = 0.5
"""One standard deviation of a first guess, as a part of it."""
ALIKE = 0.5
"""Correlation of the errors of two first guesses for one layer."""
ADDITIVE = 0.1
"""One standard deviation of the sum of what layers lose from what they lose together."""
SMALLEST = 1e-6
"""Nats per token that nothing is known more exactly than."""
SCALES = (0.25, 1.0)
"""Bounds of what the guesses are multiplied by: half of a squared slope is often too much."""


@dataclass
class Estimates:
    """This holds what layers lose by reading the selection of each earlier layer.

    Args:
        pairs: the first guess, float64 [layers, layers], row s and column l: what layer l loses
            with the selection of layer s < l, nats per token.
        least: a difference of losses that is not worth telling apart, nats per token; at least
            `SMALLEST`.
    """

    pairs: np.ndarray
    least: float
    sums: list[tuple[Pattern, Pattern, float, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.least = max(self.least, SMALLEST)

    def scale(self, flips: dict[int, float]) -> None:
        """Multiply the guess by the median of what flips of single layers lose over it."""
        ratios = [lost / self.pairs[i - 1, i] for i, lost in flips.items() if self.pairs[i - 1, i]]
        if ratios:
            self.pairs = self.pairs * float(np.clip(np.median(ratios), *SCALES))

    def learn(self, pattern: Pattern, base: Pattern, lost: float, error: float) -> None:
        """Take in what a pattern loses beyond a base, and the standard error of that."""
        self.sums.append((pattern, base, lost, error))

    def best(self) -> np.ndarray:
        """Return the guess by all that was learned, float64 [layers, layers]."""
        if not self.sums:
            return self.pairs
        prior = self.pairs.ravel()
        read = np.stack([self._read(p) - self._read(base) for p, base, _, _ in self.sums])
        lost = np.array([x for _, _, x, _ in self.sums])
        error = np.array([e**2 for _, _, _, e in self.sums])
        # One layer alone is no sum.
        error += (np.abs(read).sum(1) > 1) * (ADDITIVE * lost) ** 2
        spread = RELATIVE * np.abs(prior) + self.least
        own = (read * spread).reshape(len(read), *self.pairs.shape)
        # Guesses of one layer's losses, whatever it reads, err alike.
        alike = np.broadcast_to(own.sum(1, keepdims=True), own.shape)
        moved = spread * (ALIKE * alike + (1 - ALIKE) * own).reshape(read.shape)
        among = moved @ read.T + np.diag(error + self.least**2)
        found = prior + np.linalg.solve(among, lost - read @ prior) @ moved
        return found.reshape(self.pairs.shape)

    def _read(self, pattern: Pattern) -> np.ndarray:
        """Return 1 for every layer of a pattern that reads another one's selection, by source."""
        layers = len(pattern)
        read = np.zeros(layers * layers)
        sources = [(pattern.source(i), i) for i in range(layers)]
        read[[s * layers + i for s, i in sources if s != i]] = 1
        return read
