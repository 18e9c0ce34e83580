"""Measure one batch under a pattern: losses or divergences of the tokens that count."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class Meter:
    """Measures batches by hidden states under some pattern.

    The divergences need the hidden states under the full model, which are kept.

    Args:
        model: the transformers model.
        batches: the batches, addressed by their index.
        objective: its name decides what is measured.
    """

    def __init__(self, model: DsaModule, batches: Sequence[Batch], objective: ObjectiveName):
        self.model = model
        self.batches = batches
        self.divergence = objective in ("kl", "key-kl")
        self.counted = [b.counted for b in batches]
        self.base: dict[int, Tensor] = {}
        if objective == "key-kl":
            self.counted = key_tokens(model, batches)

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


def key_tokens(model: DsaModule, batches: Sequence[Batch]) -> list[Tensor]:
    """Find the tokens whose loss needs more context than the last k to 2 k tokens, bool [B, T].

    Answers of retrieval need it by their making.

    Raises:
        ValueError: there are too few of them in the text.
    """
    k = int(model.config.index_topk)
    full = Pattern.full(int(model.config.num_hidden_layers))
    keys, most = [], 0
    for batch in batches:
        if batch.answers:
            keys.append(batch.counted)
            continue
        with use_pattern(model, full):
            known = token_losses(model, hidden_states(model, batch.ids), batch.ids).cpu()
            near = known.clone()
            for start in range(k, batch.ids.shape[1] - 1 - k, k):
                window = batch.ids[:, start : start + 2 * k + 1]
                losses = token_losses(model, hidden_states(model, window), window).cpu()
                near[:, start + k : start + 2 * k] = losses[:, k:]
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
