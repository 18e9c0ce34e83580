"""The objective: mean language-modelling loss of a pattern over fixed batches, remembered per pattern."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from indexcache.data import Batch
from indexcache.models.lm import token_losses
from indexcache.models.prefix import PrefixCache
from indexcache.pattern import Pattern


class Objective:
    """Call it with a pattern: mean negative log-likelihood, nats per token, over all batches.

    Args:
        model: a loaded transformers model.
        batches: the calibration batches; the same for every pattern.
        known: losses that were evaluated before, by pattern string (a run's journal).
        record: called with (pattern, loss) after each new evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        known: dict[str, float] | None = None,
        record: Callable[[Pattern, float], None] = lambda pattern, loss: None,
    ):
        self.model, self.batches, self.known, self.record = (
            model,
            batches,
            dict(known or {}),
            record,
        )
        self.base: Pattern | None = None
        self.prefix = PrefixCache(model, [b.ids for b in batches])

    def rebase(self, pattern: Pattern) -> None:
        """Tell that the next patterns differ little from this one: their common layers are computed once, when the first
        of them is not known yet."""
        self.base = pattern

    def __call__(self, pattern: Pattern) -> float:
        """Raises ValueError when the loss is not finite."""
        key = str(pattern)
        if key not in self.known:
            if self.base is not None:
                self.prefix.rebase(self.base)
            total, count = 0.0, 0
            for i, batch in enumerate(self.batches):
                losses = token_losses(self.model, self.prefix.hidden(i, pattern), batch.ids)
                total, count = total + float(losses.double().sum()), count + losses.numel()
            loss = total / count
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss of {key} is {loss}: the model gives no finite logits on this text (wrong dtype or "
                    "broken weights?); nothing was recorded for it."
                )
            self.known[key] = loss
            self.record(pattern, loss)
        return self.known[key]
