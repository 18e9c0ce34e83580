"""Paired statistics: the same tokens under two patterns, resampled by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000


def bootstrap_interval(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of sum(sums) / sum(counts), resampling the documents.

    Args:
        sums: per document, the sum of a paired per-token difference.
        counts: per document, the number of tokens, or another denominator of the sums.
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: random seed of the resamples.

    Returns:
        (low, high); (nan, nan) for fewer than two documents, which say nothing about a spread.
    """
    documents = len(sums)
    if documents < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, documents, (resamples, documents))
    numerators = np.asarray(sums, np.float64)[picks].sum(1)
    means = numerators / np.asarray(counts, np.float64)[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
