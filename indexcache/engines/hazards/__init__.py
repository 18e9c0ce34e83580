"""Find what is dangerous in what the engines would run; each hazard is a sentence with its fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from indexcache.engines.hazards import keys, running, weights
from indexcache.engines.hazards.case import LEVELS, Case, Hazard, asked_by

__all__ = ["CHECKS", "LEVELS", "Case", "Hazard", "asked_by"]

CHECKS: tuple[Callable[[Case], Iterator[Hazard]], ...] = (
    keys.malformed,
    keys.twice,
    keys.nesting,
    keys.disagreement,
    keys.switches,
    keys.offsets,
    running.failures,
    running.ignored,
    running.nowhere,
    running.stages,
    running.tensor_parallel,
    weights.weights,
    weights.native,
    weights.next_token,
    running.overlap,
    running.versions,
    weights.training,
)
"""Every check; each yields its hazards."""
