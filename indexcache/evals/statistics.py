"""Paired statistics over documents: the same tokens under two patterns.

The interval is that of the Bayesian bootstrap (Rubin 1981) with one more document, which was not
seen and lies beyond the furthest one. With a value of that document that nothing exceeds it is
Gaffke's bound (2005), for which no failing distribution is known, and Clopper and Pearson's
interval where documents have one of two values. Nobody knows such a value, so it is extrapolated
from the documents that lie furthest out; `benchmarks/coverage.py` shows for which distributions
that is enough, and what it costs in width. Of answers to be found such a value is known: a sequence
can lose no more than all of them.

No random number is drawn: a mean under random weights is above a margin with a probability that an
integral gives (Gil-Pelaez 1951).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

Floats = NDArray[np.float64]

LEVEL = 0.95  # the coverage of an interval
RARE = 0.1  # share of broken documents that must not go unseen
UNSEEN = 0.025  # max probability that it does
LEAST_DOCUMENTS = math.ceil(math.log(UNSEEN) / math.log(1 - RARE))  # 36
TAIL = 3  # The unseen document lies beyond the furthest by TAIL times the furthest one's distance
NEIGHBOUR = 4  # to the document in this place from the end.

TOO_FEW = f"fewer than {LEAST_DOCUMENTS} documents, so a fault in one of ten may be in none of them"
STEP = 0.7  # of the integral in the logarithm of its variable, times the root of the documents
SMALL = 1e-4  # below this phase the integrand is linear
LARGE = 60.0  # above this twofold exponent it is nothing
CHUNK = 2_000_000  # max numbers in memory at once


def bootstrap_interval(
    sums: Sequence[float] | Floats,
    counts: Sequence[float] | Floats,
    *,
    level: float = LEVEL,
    bound: float | None = None,
) -> tuple[float, float]:
    """Compute the interval of sum(sums) / sum(counts) over documents.

    At 95 % each end errs in 3 of 100 cases at most, for the distributions of
    `benchmarks/coverage.py`, and in less than 1 where differences are not skewed.

    Args:
        sums: per document, the sum of a paired per-token difference.
        counts: per document, the number of tokens, or another denominator of the sums.
        level: the coverage of the interval, between 0 and 1.
        bound: see `upper_end`, for both ends.

    Returns:
        (low, high); (nan, nan) for fewer than LEAST_DOCUMENTS documents, among which a fault in one
        document of ten may not be.
    """
    if len(sums) < LEAST_DOCUMENTS:
        return math.nan, math.nan
    values, tail = per_document(sums, counts), (1 - level) / 2
    return 0.0 - upper_end(-values, tail, bound), upper_end(values, tail, bound)


def per_document(sums: Sequence[float] | Floats, counts: Sequence[float] | Floats) -> Floats:
    """Return one value per document whose plain mean is sum(sums) / sum(counts).

    The ratio is linearised at its own value, so a long document counts more.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    mean = s.sum() / c.sum()
    values: Floats = mean + (s - mean * c) / c.mean()
    return values


def unseen_above(values: Floats, bound: float | None = None) -> Floats:
    """Return the value of the unseen document that is above all of `values` [.., documents].

    It is extrapolated from those that lie furthest out, or `bound` where nothing can exceed that.
    """
    if bound is not None:
        return np.maximum(values.max(-1), bound)
    place = min(NEIGHBOUR, values.shape[-1])
    ordered = np.partition(values, (-place, -1), -1)
    most: Floats = ordered[..., -1]
    return most + TAIL * (most - ordered[..., -place])


def chance_above(values: Floats, margin: ArrayLike, bound: float | None = None) -> Floats:
    """Compute the chance that the mean of documents under random weights is above a margin.

    The weights are those of the Bayesian bootstrap, exponential variables over their sum, and the
    unseen document is one more. For any number of documents, also too few.

    Args:
        values: one value per document, [.., documents].
        margin: broadcastable to [..].
        bound: see `upper_end`.

    Returns:
        Probabilities [..]. Where all values are equal, 1 if the margin is at most them, else 0.
    """
    level = np.asarray(margin, np.float64)
    excess = np.concatenate([values, unseen_above(values, bound)[..., None]], -1) - level[..., None]
    flat = excess.reshape(-1, excess.shape[-1])
    rows = max(CHUNK // flat.shape[-1] // 300, 1)
    chances = [_chance_positive(flat[i : i + rows]) for i in range(0, len(flat), rows)]
    return np.concatenate(chances).reshape(excess.shape[:-1])


def _chance_positive(a: Floats) -> Floats:
    """Compute P(sum_i E_i a_i >= 0) for exponential E_i and coefficients a [rows, n].

    The characteristic function of the sum is prod_i 1 / (1 - i a_i t). The integral over t is taken
    by the trapezoidal rule in log t, where the integrand is analytic and vanishes at both ends. Its
    points lie close enough for the phase, which turns faster with more documents.
    """
    zero = np.abs(a).max(-1, keepdims=True) == 0
    a = np.where(zero, 1.0, a)
    first = SMALL / np.abs(a).sum(-1)
    last = first.copy()
    while (short := np.log1p((a * last[:, None]) ** 2).sum(-1) < LARGE).any():
        last = np.where(short, 2 * last, last)
    step = min(0.1, STEP / math.sqrt(a.shape[-1]))
    points = math.ceil(math.log((last / first).max()) / step) + 1
    t = first[:, None] * np.exp(step * np.arange(points))
    total = step * first * a.sum(-1) / math.expm1(step)  # The points below the first one.
    most = max(CHUNK // a.size, 1)
    for start in range(0, points, most):
        z = a[:, None, :] * t[:, start : start + most, None]
        size = np.exp(-0.5 * np.log1p(z * z).sum(-1))
        total += step * (size * np.sin(np.arctan(z).sum(-1))).sum(-1)
    chance = np.clip(0.5 + total / math.pi, 0, 1)
    chance = np.where(a.min(-1) >= 0, 1.0, chance)
    result: Floats = np.where(a.max(-1) < 0, 0.0, chance)
    return result


def upper_end(values: Floats, tail: float, bound: float | None = None) -> float:
    """Return the margin that the mean of documents is above with the chance `tail`.

    Args:
        values: one value per document; for any number of documents, also too few.
        tail: between 0 and 0.5, both excluded.
        bound: the largest value that a document can have, where that is known.
    """
    mean, most = float(values.mean()), float(unseen_above(values, bound))
    if most - mean <= 1e-12 * float(np.abs(values).max()):
        return mean

    def missing(margin: float) -> float:
        return float(chance_above(values, margin, bound)) - tail

    error = float(values.std()) / math.sqrt(len(values)) or (most - mean) / len(values)
    low, high = mean, min(mean + 3 * error, most)
    while high < most and missing(high) > 0:
        low, high = high, min(mean + 2 * (high - mean), most)
    return float(brentq(missing, low, high, xtol=1e-9 * (high - mean)))
