"""Keep what an evaluation has measured; a journal brings back what an interrupted one had."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from indexcache.data import Batch
from indexcache.evals.subject import BUCKETS, FIELDS, Key
from indexcache.models.together import Follower
from indexcache.records import Run, number_of


class Kept:
    """The sums of patterns on batches.

    Args:
        run: gets a line {"batch", "pattern", "sums"} of each new measurement; None keeps no
            journal. The sums are FIELDS of each sequence and each part of it, where null is NaN.
    """

    def __init__(self, run: Run | Follower | None = None):
        self._run = run
        self._sums: dict[tuple[int, str], np.ndarray] = {}
        for entry in run.journal if run is not None else ():
            sums = np.array(entry["sums"], np.float64).reshape(-1, len(FIELDS))
            self._sums[entry["batch"], entry["pattern"]] = sums

    def __len__(self) -> int:
        return len(self._sums)

    def missing(self, batch: int, names: Sequence[str]) -> list[str]:
        """Return the patterns, by name, that were not measured on a batch."""
        return [name for name in names if (batch, name) not in self._sums]

    def add(self, batch: int, name: str, sums: np.ndarray) -> None:
        """Keep the sums of a pattern on a batch, float64 [sequences and parts, fields]."""
        self._sums[batch, name] = sums
        if self._run is not None:
            values = [[None if math.isnan(v) else v for v in row] for row in sums.tolist()]
            self._run.append({"batch": batch, "pattern": name, "sums": values})

    def of(self, number: int, name: str, batch: Batch) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield the sums of each sequence of a batch and each part of it, float64 [fields]."""
        length = int(batch.ids.shape[1])
        keys = [(batch.domain, unit, length, i) for unit in batch.units for i in range(BUCKETS)]
        yield from zip(keys, self._sums[number, name], strict=True)


def check_entry(entry: Mapping[str, Any], batches: Sequence[Batch], names: Sequence[str]) -> None:
    """Raise ValueError, KeyError or TypeError for a line that no evaluation has written.

    Args:
        names: the names of all patterns, and of an engine's second evaluation.
    """
    batch, name, sums = entry["batch"], entry["pattern"], entry["sums"]
    if isinstance(batch, bool) or not isinstance(batch, int) or not 0 <= batch < len(batches):
        raise ValueError(f"its batch is {batch!r:.60}")
    if name not in names:
        raise ValueError(f"its pattern is {name!r:.60}")
    for row in sums:
        for value in row:
            if value is not None:
                number_of({"sum": value}, "sum")
    if [len(row) for row in sums] != [len(FIELDS)] * len(batches[batch].units) * BUCKETS:
        raise ValueError("its sums are not those of its batch")
