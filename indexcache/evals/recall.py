"""The answers of retrieval that a pattern finds, beside those of the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from indexcache.evals.statistics import bootstrap_interval
from indexcache.evals.subject import ANSWERS


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The answers of retrieval that greedy decoding gives, word for word.

    Attributes:
        found: the number that the pattern finds.
        found_baseline: the number that the baseline finds.
        answers: the number that was asked for.
        lost: the number that only the baseline finds.
        gained: the number that only the pattern finds.
        low, high: the 95 % interval, over sequences, of the share that the pattern finds minus that
            of the baseline; None for fewer sequences than it needs.
        by_sequence: per sequence, the answers lost minus those gained, and those asked for.
    """

    found: int
    found_baseline: int
    answers: int
    lost: int
    gained: int
    low: float | None
    high: float | None
    by_sequence: tuple[tuple[int, int], ...] = field(repr=False)

    @property
    def excess(self) -> float:
        """The share of the answers that is lost on balance."""
        return (self.lost - self.gained) / self.answers

    def to_json(self) -> dict[str, Any]:
        """Return what a row of evidence.json holds."""
        return {
            "found": self.found,
            "found_baseline": self.found_baseline,
            "answers": self.answers,
            "lost": self.lost,
            "gained": self.gained,
            "found_ci_low": self.low,
            "found_ci_high": self.high,
        }

    def __str__(self) -> str:
        text = f"{self.found / self.answers:.0%} of {self.answers}"
        interval = "" if self.low is None else f" [{self.low:+.0%}, {self.high:+.0%}]"
        return f"{text}, {-self.excess:+.0%}{interval}"


def recall_of(by_unit: np.ndarray, *, same: bool) -> Recall | None:
    """Count the answers found of FIELDS by sequence; None where nothing was asked."""
    found, base, asked, lost, gained = by_unit[:, -len(ANSWERS) :].T.astype(np.int64)
    if not asked.sum():
        return None
    bound = worst(lost - gained, asked)
    interval = bootstrap_interval(gained - lost, asked, bound=bound)
    low, high = (0.0, 0.0) if same else interval
    return Recall(
        found=int(found.sum()),
        found_baseline=int(base.sum()),
        answers=int(asked.sum()),
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
        by_sequence=tuple(zip((lost - gained).tolist(), asked.tolist(), strict=True)),
    )


def worst(lost: Sequence[int] | np.ndarray, asked: Sequence[int] | np.ndarray) -> float:
    """Return a value, as `statistics.per_document` gives them, that no sequence can exceed.

    A sequence with the most answers that loses, or gains, all of them has it. It is 1 where all
    sequences have as many answers.
    """
    counts = np.asarray(asked, np.float64)
    most, mean = counts.max() / counts.mean(), np.sum(lost) / counts.sum()
    return float(most + abs(mean) * (most - 1))
