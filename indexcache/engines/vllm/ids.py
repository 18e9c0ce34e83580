"""Make the ids that vLLM's prefill selects the same in every run.

vLLM's kernel leaves two things to the order in which its threads finish: where in a row an id
stands, and which of several equal scores get the last places. Attention adds up in the order of
the ids, and reads other tokens where a tie fell differently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int32).max


def repeatable_topk(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's `top_k_per_row_prefill(scores, starts, ends, ids, ..)`.

    It writes `ids` int32 [rows, k], counted from the row's start, in which -1 fills rows with fewer
    keys. Of equal scores the lowest ids are taken; ids ascend, and -1 comes last.
    """

    @functools.wraps(kernel)
    def topk(scores: Tensor, starts: Tensor, ends: Tensor, ids: Tensor, *rest: Any) -> None:
        kernel(scores, starts, ends, ids, *rest)
        ordered = torch.where(ids < 0, LAST, ids).sort(-1).values
        ids.copy_(torch.where(ordered == LAST, -1, ordered))
        settle_ties(scores, starts, ends, ids)

    return topk


def settle_ties(scores: Tensor, starts: Tensor, ends: Tensor, ids: Tensor) -> None:
    """Give the last places of a selection to the lowest ids among those with equal scores.

    Args:
        scores: fp32 [rows, keys].
        starts, ends: int [rows], the keys that a row can see.
        ids: int32 [rows, k], ascending, counted from `starts`; rows in which equal scores were left
            out are changed. A row with -1 holds all that it can see.
    """
    first = starts[:, None]
    picked = scores.gather(1, (ids + first).clamp_min(0).long())
    least = picked.amin(1, keepdim=True)
    key = torch.arange(scores.shape[1], device=scores.device)
    # In place, because scores of a chunk can take half a gigabyte.
    equal = scores == least
    equal &= key >= first
    equal &= key < ends[:, None]
    inside = (picked == least).sum(1)
    tied = ((ids >= 0).all(1) & (equal.sum(1) > inside)).nonzero()[:, 0]
    for rows in tied.split(1024):
        chosen = equal[rows]
        chosen &= chosen.cumsum(1, dtype=torch.int32) <= inside[rows, None]
        above = torch.where(picked[rows] > least[rows], ids[rows] + first[rows], LAST).long()
        # A column past the end takes what is not above the least score.
        chosen = torch.cat([chosen, chosen.new_zeros(len(rows), 1)], 1)
        chosen.scatter_(1, above.clamp_max(scores.shape[1]), True)
        columns = chosen[:, :-1].nonzero()[:, 1].view(len(rows), ids.shape[1])
        ids[rows] = (columns - first[rows]).to(ids.dtype)
