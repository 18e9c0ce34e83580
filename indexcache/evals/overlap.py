"""How much the selections of two layers have in common: mean |T_i and T_j| / k over queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from indexcache.data import Batch, check_context
from indexcache.models.family import native_pattern
from indexcache.models.lm import hidden_states
from indexcache.models.seam import use_pattern
from indexcache.progress import progress

CHUNK_BYTES = 1 << 26


def overlap(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Overlap of the selections of all pairs of layers when every layer that has an indexer runs it.

    Only queries with more than k tokens of context count: before that every layer selects everything.

    Returns:
        {"overlap": float [N][N] (mean |T_i and T_j| / k), "chance": the mean k / context of the same queries (what
        independent random selections would share), "queries": how many, "layers": N, "topk": k}.

    Raises:
        ValueError: sequences too short for k.
    """
    topk = int(model.config.index_topk)  # type: ignore[union-attr, arg-type]
    pattern = native_pattern(model)
    for batch in batches:
        check_context(batch.ids.shape[1], topk)
    total = np.zeros((len(pattern), len(pattern)))
    queries, chance = 0, 0.0
    with progress(len(batches), "batch") as bar:
        for batch in batches:
            with use_pattern(model, pattern, capture=True) as seam:
                hidden_states(model, batch.ids)
                selections = [seam.selections[i][:, topk:].cpu() for i in range(len(pattern))]
            length = batch.ids.shape[1]
            total += _shared(selections, length)
            queries += len(batch.units) * (length - topk)
            chance += len(batch.units) * float(
                (topk / torch.arange(topk + 1, length + 1).double()).sum()
            )
            bar.update()
    shares = total / queries / topk
    return {
        "overlap": shares.tolist(),
        "chance": chance / queries,
        "queries": queries,
        "layers": len(pattern),
        "topk": topk,
    }


def _shared(selections: list[Tensor], length: int) -> np.ndarray:
    """Sum over queries of |T_i and T_j| for all pairs of layers; every row holds only valid ids. float64 [N, N]."""
    layers, (batch, rows, _) = len(selections), selections[0].shape
    total = np.zeros((layers, layers))
    chunk = max(CHUNK_BYTES // (4 * layers * length), 1)
    for b in range(batch):
        for start in range(0, rows, chunk):
            part = torch.stack(
                [s[b, start : start + chunk].long() for s in selections]
            )  # [N, q, k]
            member = torch.zeros(layers, part.shape[1], length).scatter_(-1, part, 1.0).flatten(1)
            total += (member @ member.T).double().numpy()
    return total
