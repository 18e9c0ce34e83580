"""The objective of a search: the mean language-modelling loss of a pattern over fixed batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import nn

from indexcache.data import Batch
from indexcache.models.lm import token_losses
from indexcache.models.prefix import PrefixCache
from indexcache.models.soundness import check_scores
from indexcache.pattern import Pattern


class Objective:
    """A function from a pattern to its loss over all batches, nats per token, computed once.

    Args:
        model: the transformers model.
        batches: the calibration batches, the same for every pattern.
        evaluated: losses of earlier evaluations, by pattern string, e.g. from a run's journal.
        record: a function that gets (pattern, loss) after each new evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        evaluated: dict[str, float] | None = None,
        record: Callable[[Pattern, float], None] = lambda pattern, loss: None,
    ):
        self.model = model
        self.batches = batches
        self.evaluated = dict(evaluated or {})
        self.record = record
        self.base: Pattern | None = None
        self.watched = False  # whether the indexers' scores have been looked at
        self.prefix = PrefixCache(model, [b.ids for b in batches])

    def rebase(self, pattern: Pattern) -> None:
        """Announce that the next patterns differ little from this one.

        The layers that they share with it are computed once, at the next new evaluation.
        """
        self.base = pattern

    def __call__(self, pattern: Pattern) -> float:
        """Return the loss of a pattern.

        Raises:
            ValueError: the loss is not finite, or in the first batch an indexer's scores are not.
        """
        key = str(pattern)
        if key not in self.evaluated:
            if self.base is not None:
                self.prefix.rebase(self.base)
            total, count = 0.0, 0
            for i, batch in enumerate(self.batches):
                with nullcontext() if self.watched else check_scores(self.model):
                    hidden = self.prefix.hidden(i, pattern)
                self.watched = True
                losses = token_losses(self.model, hidden, batch.ids)
                total += float(losses.double().sum())
                count += losses.numel()
            loss = total / count
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss of {key} is {loss}: the model gives no finite logits on this text "
                    "(wrong dtype or broken weights?); nothing was recorded for it."
                )
            self.evaluated[key] = loss
            self.record(pattern, loss)
        return self.evaluated[key]
