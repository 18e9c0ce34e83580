"""Pick layers by how similar their selections are: no loss is measured.

It is the baseline that a search by loss has to beat. The paper's appendix reports the same for the
similarity of attention outputs: dynamic programming over it is no better than uniform patterns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from indexcache.data import Batch
from indexcache.models.family import DsaModule
from indexcache.models.lm import hidden_states
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern

QUERIES = 128  # queries whose selections are compared at once


def selection_overlap(model: DsaModule, batches: Sequence[Batch]) -> np.ndarray:
    """Measure what share of its selection every layer has in common with every other.

    Returns:
        float64 [layers, layers], the mean over all queries that see more than k tokens, under the
        pattern with all layers full.
    """
    layers, k = int(model.config.num_hidden_layers), int(model.config.index_topk)
    common, queries = np.zeros((layers, layers)), 0
    for batch in batches:
        with use_pattern(model, Pattern.full(layers), capture=True) as seam:
            hidden_states(model, batch.ids)
            ids = torch.stack([seam.selections[i] for i in range(layers)]).long()  # [N, B, T, k]
        length = batch.ids.shape[1]
        for row in range(len(batch.ids)):
            for start in range(k, length, QUERIES):
                own = ids[:, row, start : start + QUERIES]
                chosen = torch.zeros(*own.shape[:2], length, device=own.device)
                chosen.scatter_(-1, own, 1.0)
                flat = chosen.flatten(1)
                common += (flat @ flat.T).double().cpu().numpy()
                queries += own.shape[1]
    return common / (k * queries)


def best_patterns(
    similarity: np.ndarray,
    full: int,
    starts: Sequence[int] = (0,),
    allowed: Sequence[int] | None = None,
) -> dict[int, Pattern]:
    """Find for every number of full layers the pattern with the most similar source layers.

    Args:
        similarity: of a source layer and a layer that reads its selection, [layers, layers].
        full: the fewest full layers.
        starts: first layers of the pipeline stages, which are full.
        allowed: the layers that may be full, those of `starts` among them; None for all.

    Returns:
        A pattern for each number of full layers from all, or all that are allowed, down to `full`.
    """
    layers = len(similarity)
    # served[a, b]: the similarity of layers a+1 .. b-1 to layer a, if none of them must be full.
    served = np.full((layers, layers + 1), -np.inf)
    for a in range(layers) if allowed is None else allowed:
        end = next((s for s in starts if s > a), layers)
        served[a, a + 1 : end + 1] = np.cumsum([0.0, *similarity[a, a + 1 : end]])
    # best[b]: the most that the layers before b have with so many full ones; b is full, or the end.
    best = np.full(layers + 1, -np.inf)
    best[0] = 0.0
    origins: list[np.ndarray] = []
    found: dict[int, Pattern] = {}
    for count in range(1, layers + 1):
        totals = best[:layers, None] + served
        origins.append(totals.argmax(0))
        best = totals.max(0)
        if count < full or best[layers] == -np.inf:
            continue
        roles, at = ["S"] * layers, layers
        for origin in reversed(origins):
            at = int(origin[at])
            roles[at] = "F"
        found[count] = Pattern("".join(roles))
    return dict(sorted(found.items(), reverse=True))
