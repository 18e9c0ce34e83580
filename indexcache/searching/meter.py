"""Measure one batch under a pattern: losses or divergences of the tokens that count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from indexcache.data import Batch
from indexcache.models.family import DsaModule
from indexcache.models.lm import (
    counted_kl,
    counted_losses,
    found_answers,
    hidden_states,
    token_losses,
)
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern
from indexcache.searching.settings import ObjectiveName

GAIN = 2.0
"""A token needs the long context if its loss rises by more than this many nats without it, .."""
KNOWN = 2.0
""".. and is below this many nats with it (LongPPL, arXiv 2410.23771)."""
LEAST_KEY_TOKENS = 20
KEY_PASSES = 3
"""Passes over the text that finding these tokens takes: one, and windows that overlap by half."""


@dataclass(frozen=True)
class Rows:
    """What a batch gives under a pattern.

    Attributes:
        sums: per sequence, the sum over its tokens that count, nats, float64 [B].
        total: the sum of all of them, nats.
        found: per sequence, the number of answers found, int64 [B]; None without answers.
    """

    sums: np.ndarray
    total: float
    found: np.ndarray | None


def full_losses(model: DsaModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the losses of all next tokens with all layers full, fp32 [B, T - 1] on the CPU."""
    with use_pattern(model, Pattern.full(int(model.config.num_hidden_layers))):
        return [token_losses(model, hidden_states(model, x), x).cpu() for x in inputs]


class Meter:
    """Measures batches by hidden states under some pattern.

    The divergences need the hidden states under the full model, which are kept.

    Args:
        model: the transformers model.
        batches: the batches, addressed by their index.
        objective: its name decides what is measured.
        losses: how the losses of the full model are computed.
    """

    def __init__(
        self,
        model: DsaModule,
        batches: Sequence[Batch],
        objective: ObjectiveName,
        losses: Callable[[DsaModule, Sequence[Tensor]], list[Tensor]] = full_losses,
    ):
        self.model = model
        self.batches = batches
        self.divergence = objective in ("kl", "key-kl")
        self.counted = [b.counted for b in batches]
        self.base: Mapping[int, Tensor] = {}
        if objective == "key-kl":
            self.counted = key_tokens(model, batches, losses)

    @property
    def counts(self) -> list[np.ndarray]:
        """Per batch, the number of tokens that count in each sequence, int64 [B]."""
        return [c.sum(-1).numpy() for c in self.counted]

    def rows(self, index: int, hidden: Tensor) -> Rows:
        """Measure batch `index` by its final hidden states [B, T, E]."""
        batch, counted = self.batches[index], self.counted[index]
        if batch.plain and not self.divergence:
            losses = token_losses(self.model, hidden, batch.ids).double()
            return Rows(losses.sum(-1).cpu().numpy(), float(losses.sum()), None)
        if self.divergence:
            base = self.base[index]
            values, right = counted_kl(self.model, base, hidden, batch.ids, counted)
        else:
            values, right = counted_losses(self.model, hidden, batch.ids, counted)
        row = counted.nonzero()[:, 0]
        sums = torch.zeros(len(batch.ids), dtype=torch.float64).index_add(0, row, values.double())
        found = found_answers(right, counted, batch.answers) if batch.answers else None
        return Rows(sums.numpy(), float(values.double().sum()), found)


def key_tokens(
    model: DsaModule,
    batches: Sequence[Batch],
    losses: Callable[[DsaModule, Sequence[Tensor]], list[Tensor]] = full_losses,
) -> list[Tensor]:
    """Find the tokens whose loss needs more context than the last k to 2 k tokens, bool [B, T].

    Answers of retrieval need it by their making.

    Args:
        losses: see `full_losses`.

    Raises:
        ValueError: there are too few of them in the text.
    """
    k = int(model.config.index_topk)
    inputs, starts = [], []
    for batch in (b for b in batches if not b.answers):
        starts.append(range(k, batch.ids.shape[1] - 1 - k, k))
        inputs += [batch.ids, *(batch.ids[:, start : start + 2 * k + 1] for start in starts[-1])]
    measured, places = iter(losses(model, inputs)), iter(starts)
    keys, most = [], 0
    for batch in batches:
        if batch.answers:
            keys.append(batch.counted)
            continue
        known = next(measured)
        near = known.clone()
        for start in next(places):
            near[:, start + k : start + 2 * k] = next(measured)[:, k:]
        key = torch.zeros_like(batch.counted)
        key[:, 1:] = (near - known > GAIN) & (known < KNOWN)
        keys.append(key & batch.counted)
        most += int(batch.counted.sum())
    found = sum(int(key.sum()) for key, b in zip(keys, batches, strict=True) if not b.answers)
    if found < LEAST_KEY_TOKENS and any(not b.answers for b in batches):
        raise ValueError(
            f"Only {found} of {most} tokens of the text need more context than the last "
            f"{2 * k} tokens, too few for the objective key-kl; give more or longer text, or "
            "take the objective kl."
        )
    return keys


def check_finite(loss: float, pattern: str) -> float:
    """Return a loss.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss of {pattern} is {loss}: the model gives no finite logits on this text "
            "(wrong dtype or broken weights?); nothing was recorded for it."
        )
    return loss
