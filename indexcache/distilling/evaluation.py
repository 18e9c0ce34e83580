"""Evaluate a model that is being trained: the held-out loss, and the answers it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from indexcache.data import Batch
from indexcache.data.retrieval import DOMAIN
from indexcache.distilling.forward import DistillForward, attention_replaced
from indexcache.distilling.parallel import RowLoss, World
from indexcache.distilling.rows import Row, retrieval_rows


def rows_by_kind(batches: Sequence[Batch]) -> dict[str, list[Row]]:
    """Return the rows of the retrieval sequences among some batches, by kind."""
    kinds: dict[str, list[Row]] = {}
    for b in batches:
        if b.answers:
            kinds.setdefault(b.domain.removeprefix(DOMAIN), []).extend(retrieval_rows([b]))
    return kinds


@torch.no_grad()
def mean_loss(
    row_loss: RowLoss, forward: DistillForward, rows: Sequence[Row], world: World
) -> float:
    """Return the mean next-token loss of some rows over all processes, in nats a token.

    The model runs under the pattern, with the selections of the indexers as they are.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    count = len(rows)
    with attention_replaced(row_loss.inner, forward):
        for i in _shared(count, world):
            row = rows[i % count]
            with forward.row(row, collect=False):
                lm, tokens = row_loss(row, world.device, True)
            if i < count:
                sums += torch.stack(sum_and_count(lm, tokens))
    sums = world.mean(sums)
    return float(sums[0] / sums[1])


@torch.no_grad()
def recall(
    row_loss: RowLoss, forward: DistillForward, kinds: Mapping[str, Sequence[Row]], world: World
) -> dict[str, float]:
    """Return the share of the answers that are found under the pattern, by kind and of "all".

    An answer is found where greedy decoding would give it (`models.lm.found_answers`).
    """
    rows = [(number, row) for number, some in enumerate(kinds.values()) for row in some]
    asked = [sum(len(row.answers) for row in some) for some in kinds.values()]
    sums = torch.zeros(len(kinds), dtype=torch.float64, device=world.device)
    with attention_replaced(row_loss.inner, forward):
        for i in _shared(len(rows), world):
            number, row = rows[i % len(rows)]
            with forward.row(row, collect=False):
                _, right = row_loss(row, world.device, True, True)
            if i < len(rows):
                answers = right.split([b - a for a, b in sorted(row.answers)])
                sums[number] += sum(bool(answer.all()) for answer in answers)
    found = (world.mean(sums) * world.size).tolist()
    shares = {kind: n / of for kind, n, of in zip(kinds, found, asked, strict=True)}
    return shares | {"all": sum(found) / sum(asked)}


def _shared(count: int, world: World) -> range:
    """Return the numbers that this process runs, as many as each: FSDP2 gathers weights in all.

    Those from `count` on are repeated, and do not count.
    """
    return range(world.rank, count + (-count) % world.size, world.size)


def sum_and_count(loss: Tensor, count: int) -> list[Tensor]:
    """Return a sum of losses and their number as fp64 scalars on the losses' device."""
    return [loss.detach().double(), loss.new_full((), count, dtype=torch.float64)]
