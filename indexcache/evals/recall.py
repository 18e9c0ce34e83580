"""The answers of retrieval that a pattern finds, beside those of the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from indexcache.evals.statistics import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The answers of retrieval that greedy decoding gives, word for word.

    Attributes:
        found: the number that the pattern finds.
        found_baseline: the number that the baseline finds.
        answers: the number that was asked for.
        low, high: the 95 % interval, over sequences, of the share that the pattern finds minus that
            of the baseline; None for fewer sequences than it needs.
    """

    found: int
    found_baseline: int
    answers: int
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        """Return what a row of evidence.json holds."""
        return {
            "found": self.found,
            "found_baseline": self.found_baseline,
            "answers": self.answers,
            "found_ci_low": self.low,
            "found_ci_high": self.high,
        }

    def __str__(self) -> str:
        text = f"{self.found / self.answers:.0%} of {self.answers}"
        difference = (self.found - self.found_baseline) / self.answers
        interval = "" if self.low is None else f" [{self.low:+.0%}, {self.high:+.0%}]"
        return f"{text}, {difference:+.0%}{interval}"


def recall_of(by_unit: np.ndarray, *, same: bool) -> Recall | None:
    """Count the answers found of FIELDS by sequence; None where nothing was asked."""
    found, base, asked = by_unit[:, -3:].T
    if not asked.sum():
        return None
    low, high = (0.0, 0.0) if same else bootstrap_interval(found - base, asked)
    return Recall(
        found=int(found.sum()),
        found_baseline=int(base.sum()),
        answers=int(asked.sum()),
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
    )
