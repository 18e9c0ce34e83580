"""Measure how much the selections of two layers share: the mean of |T_i and T_j| / k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indexcache.data import Batch
from indexcache.models.conditions import Conditions, Origin, conditions_of
from indexcache.models.family import AnyModel, module_of, native_pattern
from indexcache.models.lm import hidden_states
from indexcache.models.seam import use_pattern
from indexcache.models.soundness import check_scores, check_weights
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.run import Finals, Stream, Variant
from indexcache.models.stream.store import Slot, Store
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar
from indexcache.report.tables import table
from indexcache.vacuity import check_batches

CHUNK_BYTES = 1 << 26  # bytes of the membership matrix of a chunk of queries


@dataclass(frozen=True, eq=False)
class Overlap:
    """Overlap of the selections of all pairs of layers.

    Attributes:
        shares: float64 [N, N], the mean of |T_i and T_j| / k over the queries.
        chance: the share of independent random selections: the mean of k / context over the same
            queries.
        queries: number of queries with more than k tokens of context.
        topk: k.
        conditions: what the shares hold for.
    """

    shares: np.ndarray
    chance: float
    queries: int
    topk: int
    conditions: Conditions

    def table(self) -> str:
        """Format one line per layer: its overlap with the layer before, and the mean over all."""
        rows = [
            [
                i,
                f"{self.shares[i - 1, i]:.3f}",
                f"{sum(self.shares[i].tolist()) / len(self.shares):.3f}",
            ]
            for i in range(1, len(self.shares))
        ]
        return table(["layer", "with the layer before", "mean over all layers"], rows)

    def to_json(self) -> dict[str, Any]:
        """Return the content of overlap.json, without the pattern that is drawn."""
        return {
            "overlap": self.shares.tolist(),
            "chance": self.chance,
            "queries": self.queries,
            "layers": len(self.shares),
            "topk": self.topk,
            "conditions": self.conditions.to_json(),
        }


def overlap(
    model: AnyModel, batches: Sequence[Batch], *, origin: Origin = Origin(), progress: bool = False
) -> Overlap:
    """Measure the overlap of all pairs of layers when every layer that has an indexer runs it.

    Only queries with more than k tokens of context count: before that every layer selects
    everything.

    Args:
        model: a model of a known family.
        batches: text to measure on (`indexcache.data.batches`).
        origin: where the batches come from, for the record in the result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: sequences or documents too short for k (`vacuity.check_batches`), or weights or
            scores of an indexer that are not finite.
    """
    module = module_of(model)
    topk = int(module.config.index_topk)
    check_weights(module, selecting=True)
    pattern = native_pattern(module)
    conditions = conditions_of(model, batches, check_batches(batches, topk), origin)
    total = np.zeros((len(pattern), len(pattern)))
    queries = 0
    chance = 0.0

    def add(batch: Batch, selections: list[Tensor]) -> None:
        nonlocal total, queries, chance
        sequences, length = batch.ids.shape
        contexts = torch.arange(topk + 1, length + 1).double()
        total += _shared(selections, length)
        queries += sequences * (length - topk)
        chance += sequences * float((topk / contexts).sum())

    stream = stream_of(module)
    if stream is not None:
        with progress_bar(len(pattern), "layer", shown=progress) as bar:
            _stream(stream, pattern, batches, topk, add, bar)
    else:
        with progress_bar(len(batches), "batch", shown=progress) as bar:
            for batch in batches:
                # One batch shows whether the scores of an indexer are finite.
                watch = partial(check_scores, module) if batch is batches[0] else nullcontext
                with use_pattern(module, pattern, capture=True) as seam, watch():
                    hidden_states(module, batch.ids)
                    add(batch, [seam.selections[i][:, topk:].cpu() for i in range(len(pattern))])
                bar.update()
    return Overlap(total / queries / topk, chance / queries, queries, topk, conditions)


def _stream(
    stream: Stream,
    pattern: Pattern,
    batches: Sequence[Batch],
    topk: int,
    add: Callable[[Batch, list[Tensor]], None],
    bar: Any,
) -> None:
    """Add the selections of a model whose layers are read one at a time."""
    kept: list[list[Slot]] = [[] for _ in batches]

    def observe(store: Store, layer: int, batch: int, ids: Tensor) -> None:
        kept[batch].append(store.put(ids[:, topk:].contiguous()))

    def use(finals: Finals) -> None:
        for batch, slots in zip(batches, kept, strict=True):
            add(batch, [slot.store.host(slot) for slot in slots])
            slots.clear()

    stream.run(
        [Variant(pattern)],
        [b.ids for b in batches],
        use,
        watch=True,
        observe=observe,
        report=lambda done: done.show(bar),
    )
    stream.close()


def _shared(selections: list[Tensor], length: int) -> np.ndarray:
    """Sum |T_i and T_j| over queries for all pairs of layers; every row holds only valid ids.

    Returns float64 [N, N].
    """
    layers = len(selections)
    batch, rows, _ = selections[0].shape
    total = np.zeros((layers, layers))
    chunk = max(CHUNK_BYTES // (4 * layers * length), 1)
    for b in range(batch):
        for start in range(0, rows, chunk):
            ids_NQK = torch.stack([s[b, start : start + chunk].long() for s in selections])
            member = torch.zeros(layers, ids_NQK.shape[1], length).scatter_(-1, ids_NQK, 1.0)
            member = member.flatten(1)
            total += (member @ member.T).double().numpy()
    return total
