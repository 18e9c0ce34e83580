"""The settings of a search, which import nothing heavy because the command line reads them."""

from __future__ import annotations

from dataclasses import dataclass

from indexcache.pattern import full_count, stage_starts


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search."""

    keep: float = 0.25
    "Fraction of the layers that stay full at the end, e.g. 1/4. Each stage keeps at least one."
    stages: int = 1
    "Number of pipeline stages of the engine. The first layer of each stays full."
    uniform: bool = True
    "Evaluate uniform patterns too, with S and with R layers, for comparison."
    pool_factor: int = 8
    """Size of the pool of the uniform R patterns, in units of k. It is halved where the sequences
    are too short for it; what is evaluated is said."""

    def full_layers(self, layers: int, stages: int | None = None) -> int:
        """Return how many of `layers` layers stay full at the end.

        Args:
            stages: the number of pipeline stages; None is that of the settings.

        Raises:
            ValueError: `keep` or `stages` does not fit the number of layers.
        """
        stages = stages or self.stages
        stage_starts(layers, stages)
        full = full_count(layers, self.keep)
        if full < stages:
            raise ValueError(
                f"{stages} pipeline stages need at least {stages} full layers, but keep "
                f"= {self.keep} of {layers} layers leaves {full}."
            )
        return full
