"""Measure a model of the comparison, before and after training, and search on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indexcache.data import Batch, Document
from indexcache.distilling import measure_kept
from indexcache.distilling.rows import Row
from indexcache.evals.overlap import overlap
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import counted_losses, found_answers, hidden_states, token_losses
from indexcache.models.loading import Model
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern
from indexcache.searching.run import SearchSettings, search
from recipes.training_aware.text import (
    documents_of,
    held_out_batches,
    held_out_documents,
    retrieval,
)

SEARCH_SEED = 10_000
"""Random seed of the search's text: no other sequences have it."""
KEPT_ROWS = 4
"""Number of sequences over which the share of attention is measured that selections keep."""


class Texts:
    """The text that everything is measured on, made once a process."""

    def __init__(self, o: argparse.Namespace, vocabulary: int):
        documents = held_out_documents(o.held_out, o.length // 2, o.documents)
        self.documents = held_out_batches(documents, o.length // 2, o.windows, o.eval_batch)
        self.recall = {
            length: retrieval(o, documents, "heldout", length, o.sequences, vocabulary)
            for length in o.recall_lengths
        }
        long = [d for d in documents if len(d.ids) >= o.length] or documents
        picked = np.random.default_rng(0).permutation(len(long))[:KEPT_ROWS]
        self.rows = [Row.one_document(long[i].ids[: o.length]) for i in picked]

    @property
    def rows_as_batches(self) -> list[Batch]:
        """The rows in which selections are compared."""
        return [
            Batch(torch.from_numpy(r.ids)[None], "text", (str(i),), (str(i),))
            for i, r in enumerate(self.rows)
        ]


@torch.no_grad()
def measure(
    loaded: Model, pattern: Pattern, texts: Texts, *, inside: bool = True
) -> dict[str, Any]:
    """Measure a model under a pattern.

    Args:
        inside: measure the mass that selections keep and their overlap too.

    Returns:
        "pattern"; "documents": [[domain, name, sum of losses, tokens], ..]; "recall": [{"kind",
        "length", "found_each", "asked_each", "loss"}, ..], where each is a sequence;
        "attention_kept": by layer, the share of its dense attention on its selection; "overlap":
        the share of common ids of all pairs of layers, each with its own indexer where it has one.
    """
    model = loaded.module
    sums: dict[tuple[str, str], list[float]] = {}
    recall = []
    with accelerate(model), use_pattern(model, pattern):
        for batch in texts.documents:
            losses = token_losses(model, hidden_states(model, batch.ids), batch.ids).double()
            for name, row in zip(batch.units, losses, strict=True):
                entry = sums.setdefault((batch.domain, name), [0.0, 0])
                entry[0] += float(row.sum())
                entry[1] += row.numel()
        for length, batches in texts.recall.items():
            recall += _recall(model, batches, length)
    facts: dict[str, Any] = {
        "pattern": str(pattern),
        "documents": [[*name, *values] for name, values in sums.items()],
        "recall": recall,
    }
    if inside:
        facts["attention_kept"] = [round(x, 4) for x in measure_kept(loaded, pattern, texts.rows)]
        shares = overlap(loaded, texts.rows_as_batches)
        facts["overlap"] = np.round(shares.shares, 4).tolist()
        facts["overlap_chance"] = round(shares.chance, 4)
    return facts


def _recall(model: Any, batches: Sequence[Batch], length: int) -> list[dict[str, Any]]:
    """Count the answers found of every sequence, by kind."""
    kinds: dict[str, dict[str, Any]] = {}
    for batch in batches:
        counted = batch.counted
        losses, right = counted_losses(model, hidden_states(model, batch.ids), batch.ids, counted)
        kind = batch.domain.partition(":")[2]
        new = {"kind": kind, "length": length, "found_each": [], "asked_each": [], "losses": []}
        entry = kinds.setdefault(kind, new)
        entry["found_each"] += found_answers(right, counted, batch.answers).tolist()
        entry["asked_each"] += [len(spans) for spans in batch.answers]
        entry["losses"] += losses.tolist()
    return [{"loss": float(np.mean(e.pop("losses"))), **e} for e in kinds.values()]


def search_batches(o: argparse.Namespace, tokens: np.ndarray, vocabulary: int) -> list[Batch]:
    """Return the calibration text of the searches: training text, and retrieval in it."""
    rng = np.random.default_rng(SEARCH_SEED)
    starts = rng.integers(0, len(tokens) - 2 * o.length, o.calibration)
    pieces = [tokens[s : s + o.length].astype(np.int64) for s in starts]
    text = documents_of(pieces, "text", "calibration")
    batches = held_out_batches(text, o.length, 1, o.eval_batch)
    longer = [tokens[s : s + 2 * o.length] for s in starts]
    longer = [ids[ids != 0] for ids in longer]
    filler: list[Document] = documents_of(longer, "text", "filler")
    sequences = max(o.calibration // 4, 1)
    return batches + retrieval(
        o, filler, "calibration", o.length, sequences, vocabulary, SEARCH_SEED
    )


def search_on(
    o: argparse.Namespace, loaded: Model, batches: Sequence[Batch], out: Path
) -> dict[str, Any]:
    """Search down to 1/8 without training, or say why the package refuses.

    Returns:
        "refused": the sentence; or "frontier" and "uniform", [{"full", "pattern", "loss"}, ..],
        "evaluations" and "seconds", as far as the search has them.
    """
    try:
        with accelerate(loaded.module):
            result = search(
                loaded.module, batches, out, SearchSettings(keep=1 / 8, pool_factor=o.pool)
            )
    except ValueError as error:
        return {"refused": str(error)}
    content = result.to_json()
    return {key: content[key] for key in ("frontier", "uniform", "notes", "work")}
