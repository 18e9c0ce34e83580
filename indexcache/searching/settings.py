"""The settings of a search, which import nothing heavy because the command line reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Literal

from indexcache.pattern import Pattern, full_count, parse_pool, stage_starts

ObjectiveName = Literal["weighted", "mean", "worst", "kl", "key-kl"]
Method = Literal["exact", "fast", "similarity"]
Start = Literal["flips", "gradients"]
DEFAULT_OBJECTIVE: ObjectiveName = "weighted"
FIRST = ("keep", "stages", "uniform", "pool_factor")
"""Settings that every settings.json holds; others only where they are not the default, so that
runs of earlier versions go on."""


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a fast search saves, and how much that may cost."""

    racing: bool = True
    """Fast search: measure candidates on growing parts of the text, and drop those that are clearly
    worse."""
    lazy: bool = True
    "Fast search: measure only the candidates again that promised most."
    together: bool = True
    "Fast search: flip layers that cannot be told apart at once."
    swaps: bool = True
    "Fast search: let full and shared layers change places at 1/2, 1/4, .. and at the end."
    start: Start = "flips"
    """Fast search: "flips" measures the flip of every layer first; "gradients" estimates by one
    backward pass what every layer loses with every earlier layer's selection, begins every budget
    with the best pattern by that, and measures only swaps."""
    error_rate: float = 0.05
    "Fast search: probability, by race, that the best candidate is dropped."
    tolerance: float = 0.005
    "Fast search: nats per token that all flips together may lose by not being told apart."


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Savings):
    """The settings of a search."""

    keep: float = 0.25
    """Fraction of the layers that stay full at the end, e.g. 1/4, or from 2 on their number, e.g.
    13. Each stage keeps at least one. With --roles FRS the indexers' cost over that of all full."""
    stages: int = 1
    "Number of pipeline stages of the engine. The first layer of each stays full."
    uniform: bool = True
    "Evaluate uniform patterns too, with S and with R layers, for comparison."
    pool_factor: int = 8
    """Size of the pool of the uniform R patterns, in units of k. It is halved where the sequences
    are too short for it; what is evaluated is said."""

    objective: ObjectiveName = DEFAULT_OBJECTIVE
    """What a search keeps low: the loss, "mean" over all tokens, or "weighted", half for text and
    half for retrieval; "worst", the most that a domain or a kind loses to the full model; "kl", the
    divergence from the full model; or "key-kl", that of tokens which need the long context."""

    method: Method = "exact"
    """How patterns are looked for: "exact", the paper's greedy search; "fast", which measures less;
    or "similarity", which measures no loss and is there to compare with."""

    roles: Literal["FS", "FRS"] = "FS"
    """Roles to choose among. With FRS, which takes --method fast, R layers run their indexer over a
    pool, and --keep and --most-loss bound the indexers' cost and the loss."""
    pool: str = "1/8"
    """Size of the pools of R layers that FRS chooses: a share of what a query sees, or a factor of
    k such as 8. Of several shares, as in 1/8,1/16, every group of layers gets its own."""
    cost_context: int | None = None
    "Number of tokens at which FRS counts costs. The default is the model's context."
    costs: str | None = None
    """The bench.json whose rows with R layers give the costs. The default is arithmetic, the least
    that is possible."""
    most_loss: float | None = None
    "Nats per token above all full at which the search ends, before --keep."
    stay_full: tuple[int, ...] = ()
    "Layers that stay full."

    def pool_sizes(self) -> list[int | Fraction]:
        """Return the sizes that the pools of R layers may have, the largest first.

        Raises:
            ValueError: one of them is no factor and no share.
        """
        sizes = parse_pool(self.pool)
        if isinstance(sizes, str):
            raise ValueError(
                "--pool is a share such as 1/8, several such as 1/8,1/16, or a factor of k such as "
                f"8, not {self.pool!r:.40}."
            )
        several = sizes if isinstance(sizes, tuple) else (sizes,)
        for size in several:
            Pattern("FR", size)  # It refuses what is out of range.
        return sorted(set(several), reverse=True)

    def fixed_layers(self, layers: int, starts: Sequence[int], full: int) -> tuple[int, ...]:
        """Return the layers that stay full, the first ones of the stages among them.

        Raises:
            ValueError: there is no such layer, or more of them than full layers at the end.
        """
        for layer in self.stay_full:
            if not 0 <= layer < layers:
                raise ValueError(f"--stay-full {layer}: the model has layers 0 to {layers - 1}.")
        fixed = tuple(sorted({*starts, *self.stay_full}))
        if self.roles == "FS" and full < len(fixed):
            raise ValueError(
                f"{len(fixed)} layers stay full ({', '.join(map(str, fixed[:8]))}), but --keep "
                f"leaves {full} of {layers}; keep more."
            )
        return fixed

    def facts(self) -> dict[str, Any]:
        """Return what a run folder holds of the settings."""
        default = asdict(SearchSettings())
        return {k: v for k, v in asdict(self).items() if k in FIRST or v != default[k]}

    def check_method(self) -> None:
        """Check the settings of a fast search.

        Raises:
            ValueError: one of them is given for another method, or is out of range.
        """
        for f in fields(Savings):
            if self.method != "fast" and getattr(self, f.name) != f.default:
                flag = f.name.replace("_", "-")
                flag = f"no-{flag}" if f.default is True else flag
                raise ValueError(f"--{flag} is a setting of the fast search; add --method fast.")
        if self.start == "gradients" and self.roles == "FRS":
            raise ValueError("--start gradients is for F and S layers; leave --roles FRS out.")
        if self.roles == "FRS" and self.method != "fast":
            raise ValueError("--roles FRS is searched by --method fast; add that.")
        for name in ("pool", "cost_context", "costs"):
            if self.roles == "FS" and getattr(self, name) != getattr(SearchSettings, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is a setting of R layers; add --roles FRS.")
        self.pool_sizes()
        if self.roles == "FRS" and not 0 < self.keep <= 1:
            raise ValueError(
                "With --roles FRS, --keep is a share of the indexers' cost, above 0 and at most 1, "
                f"not {self.keep:g}."
            )
        if self.most_loss is not None and not 0 <= self.most_loss < math.inf:
            raise ValueError(
                f"--most-loss is a number of nats per token, 0 or more, not {self.most_loss}."
            )
        if self.cost_context is not None and self.cost_context < 1:
            raise ValueError(f"--cost-context is a number of tokens, not {self.cost_context}.")
        if not 0 < self.error_rate < 0.5:
            raise ValueError(
                f"The error rate of a race is above 0 and below 0.5, not {self.error_rate}."
            )
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(
                f"The tolerance is a number of nats per token, 0 or more, not {self.tolerance}."
            )

    def check_engine(self) -> None:
        """Raise ValueError for an objective or a method that no engine gives."""
        if self.roles == "FRS":
            raise ValueError(
                "vLLM knows no R layers, so --roles FRS needs this package's own path."
            )
        if self.start == "gradients":
            raise ValueError(
                "vLLM gives no gradients, so --start gradients needs this package's own path."
            )
        if self.method == "similarity":
            raise ValueError(
                "The selections of layers cannot be seen in vLLM; --method similarity needs this "
                "package's own path."
            )
        if self.objective in ("kl", "key-kl"):
            raise ValueError(
                f"The objective {self.objective} needs all probabilities of a token, which vLLM "
                "does not give; take weighted, mean or worst, or this package's own path."
            )

    def check_streamed(self) -> None:
        """Raise ValueError for a method that no streamed model gives."""
        for flag, asked in (
            ("--method similarity", self.method == "similarity"),
            ("--start gradients", self.start == "gradients"),
        ):
            if asked:
                raise ValueError(
                    f"{flag} does not run on a streamed model, only with the whole model in memory."
                )

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
