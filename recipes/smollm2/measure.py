"""Measure a model of the experiment: the loss of every held-out document, and the tasks' scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from indexcache.data import Batch
from indexcache.distilling import oracle_states
from indexcache.distilling.rows import Row
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import hidden_states, token_losses
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern
from recipes.smollm2.check import dense
from recipes.smollm2.tasks import logits_of, score


@torch.no_grad()
def measure(
    model: Any, batches: list[Batch], tasks: list[dict[str, Any]], pattern: Pattern, method: str
) -> dict[str, Any]:
    """Measure the model under a pattern.

    Args:
        method: "dense" selects every token, and "oracle" the keys with most attention; all others
            run the indexers.

    Returns:
        "documents": [[domain, name, sum of losses, number of tokens], ..], where the name is the
        place among the held-out documents; "tasks": what `tasks.score` returns.
    """

    def oracle(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [oracle_states(model, pattern, Row.one_document(row.numpy())) for row in ids]
        )

    states = oracle if method == "oracle" else partial(hidden_states, model)
    documents: list[list[Any]] = []
    with running(model, pattern, method):
        for batch in batches:
            losses = token_losses(model, states(batch.ids), batch.ids).double()
            for row in losses:
                documents.append([batch.domain, f"{len(documents)}", float(row.sum()), row.numel()])
        return {"documents": documents, "tasks": score(tasks, logits_of(model, states))}


@contextmanager
def running(model: Any, pattern: Pattern, method: str) -> Iterator[None]:
    """Make the model run as `method` says; the oracle replaces its own forwards."""
    if method == "oracle":
        yield
    elif method == "dense":
        with dense(model):
            yield
    else:
        with accelerate(model), use_pattern(model, pattern):
            yield
