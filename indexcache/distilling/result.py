"""The result of a distillation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from indexcache.distilling.forward import served_layers
from indexcache.distilling.settings import FILE_KEYS
from indexcache.models.soundness import blindness
from indexcache.pattern import Pattern
from indexcache.report.tables import table
from indexcache.vacuity import Share, sentence


@dataclass(frozen=True)
class HeldOutLosses:
    """Mean next-token losses on held-out text, in nats a token.

    Attributes:
        first: before the first step.
        best: the lowest, after step `best_step`.
        last: after the last step.
        sparsity: the share of the held-out context that k, and the pool of R layers, are.
        blind: the loss of a blind guess among all tokens; None in older runs.
    """

    first: float
    best: float
    best_step: int
    last: float
    sparsity: tuple[Share, ...] = ()
    blind: float | None = None


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """The result of a distillation run.

    Attributes:
        objective: what the indexers learnt, as in the settings.
        frozen: whether only the indexers trained.
        tokens: number of training tokens, over all steps.
        kl: by layer, the loss of its indexer in the last step, in nats a token.
        lm_loss: the language-modelling loss of the last step; None with a frozen backbone.
        held_out: None without evaluations.
        queries_beyond_k: share of the training queries that see more than k tokens.
        delta: the name of the delta's file in the run folder; None in full mode.
        layer_weights: as in the settings; not in result.json.
        recall: the shares of the answers found by kind and of "all", before the "first" step, at
            the "best" held-out loss and at the "last" step; empty without retrieval.
        weights: in full mode, on the first process, all weights on the CPU under their names in
            the model; not in result.json.
    """

    pattern: Pattern
    stage: str
    objective: str
    frozen: bool
    steps: int
    tokens: int
    kl: dict[int, float]
    lm_loss: float | None
    held_out: HeldOutLosses | None
    queries_beyond_k: float
    delta: str | None
    layer_weights: tuple[float, ...] | None = None
    recall: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            "pattern": str(self.pattern),
            "stage": self.stage,
            FILE_KEYS["objective"]: self.objective,
            "frozen": self.frozen,
            "steps": self.steps,
            "tokens": self.tokens,
            "kl": {str(layer): kl for layer, kl in self.kl.items()},
            "lm_loss": self.lm_loss,
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "queries_beyond_k": self.queries_beyond_k,
            "delta": self.delta,
            **({"recall": self.recall} if self.recall else {}),
            **({"calibration": self.pattern.seen.to_json()} if self.pattern.seen else {}),
        }

    def table(self) -> str:
        """Return what each indexer serves and its last loss, and the held-out losses, as text."""
        weights = self.layer_weights
        rows = []
        for layer, group in served_layers(self.pattern, own=self.objective == "own").items():
            row = [str(layer), " ".join(map(str, group))]
            if weights is not None:
                total = sum(weights[i] for i in group)
                row.append(" ".join(f"{weights[i] / total:.2f}" for i in group))
            rows.append([*row, f"{self.kl[layer]:.4f}"])
        counting = [] if weights is None else ["counting"]
        text = table(["layer", "serves", *counting, "KL, nats a token"], rows) + (
            f"\n\n{self.queries_beyond_k:.0%} of the training queries see more than k tokens of "
            "their own document"
        )
        if self.held_out is None:
            return text
        losses = self.held_out
        shares = {share.size: share for share in losses.sparsity}
        note = blindness(losses.first, math.inf if losses.blind is None else losses.blind)
        return text + (
            f"\n\nheld-out loss under {self.pattern}: {losses.first:.4f} before, "
            f"{losses.best:.4f} at step {losses.best_step} (the one kept), "
            f"{losses.last:.4f} at the end"
            + (f"\n{sentence(shares)}" if shares else "")
            + self._recall()
            + ("" if note is None else f"\n\n{note}")
        )

    def _recall(self) -> str:
        """Return a line of the answers found, at the steps of the held-out losses."""
        if not self.recall:
            return ""
        kinds = [kind for kind in self.recall["best"] if kind != "all"]
        each = ", ".join(f"{kind} {self.recall['best'][kind]:.0%}" for kind in kinds)
        first, best, last = (self.recall[name]["all"] for name in ("first", "best", "last"))
        return (
            f"\nanswers found: {first:.0%} before, {best:.0%} kept ({each}), {last:.0%} at the end"
        )
