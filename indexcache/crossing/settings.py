"""The settings of a domain matrix, which import nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from indexcache.searching.settings import Method, ObjectiveName, SearchSettings


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """The settings of a domain matrix."""

    keep: tuple[float, ...] = (0.25,)
    "Fractions of the layers that stay full, e.g. 1/4 1/8. Each is one matrix."
    stages: int = 1
    "Number of pipeline stages of the engine. The first layer of each stays full."
    method: Method = "exact"
    """How patterns are looked for: "exact", the paper's greedy search; "fast", which measures less;
    or "similarity", which measures no loss."""

    def search(self, keep: float, objective: ObjectiveName = "mean") -> SearchSettings:
        """Return the settings of one of the searches."""
        return SearchSettings(
            keep=keep, stages=self.stages, uniform=False, objective=objective, method=self.method
        )

    def budgets(self, layers: int, stages: int | None = None) -> dict[int, float]:
        """Return the fractions by the number of full layers, the most layers first.

        Raises:
            ValueError: no fraction, or one that does not fit the number of layers.
        """
        if not self.keep:
            raise ValueError("There is no budget; give fractions of the layers with --keep.")
        if more := [keep for keep in self.keep if keep > 1]:
            raise ValueError(
                f"--keep {more[0]:g}: the budgets of a matrix are fractions of the layers, above 0 "
                "and below 1."
            )
        counts = {self.search(keep).full_layers(layers, stages): keep for keep in self.keep}
        if layers in counts:
            raise ValueError(
                f"--keep {counts[layers]:g} keeps all {layers} layers full, so there is nothing to "
                "search; take a smaller fraction."
            )
        return dict(sorted(counts.items(), reverse=True))

    def facts(self) -> dict[str, Any]:
        """Return what a run folder holds of the settings."""
        return asdict(self)
