"""Say which keys each query of a forward pass may see, from the masks that transformers takes.

Stock builds a dense mask [B, 1, S, T] of every kind of padding and packing. The fast path cuts a
pass into spans instead: some queries of some sequences, the keys that exist for them, and the
position of the first query among those keys, behind which causality hides the rest. S queries are
the last of T tokens, of which T - S are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Ids = slice | Tensor


@dataclass(frozen=True)
class Span:
    """Queries that see the same keys, up to their own position.

    Attributes:
        rows: the sequences, neighbours in the batch.
        queries: a slice of the pass's queries, or their int64 numbers.
        keys: a slice of all T keys, or their int64 ids in ascending order.
        offset: number of these keys before the first query; query i sees the first offset + i + 1.
    """

    rows: slice
    queries: Ids
    keys: Ids
    offset: int


@dataclass(frozen=True, eq=False)
class Visible:
    """What the queries of one forward pass see; it goes where stock passes its attention mask.

    Attributes:
        spans: the parts of the pass, None where every query sees all keys up to its own. A query
            in no span sees nothing.
        total: T, or None in a step of a `Decoder`, whose keys are those of the whole cache.
        memory: what layers compute once for the pass; it belongs to one thread.
    """

    spans: tuple[Span, ...] | None = None
    total: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)


def visible_of(
    mask: Any, queries: int, total: int, batch: int, positions: Tensor | None = None
) -> Visible:
    """Convert transformers' masks and positions to what the queries of a pass see.

    Args:
        mask: None, [B, T] (true or 1: token; 0: padding, anywhere), or [B or 1, 1, S, >= T]
            of booleans or of summands, or a dict that holds one of those for every layer type.
            Without a mask, positions that do not count up by one begin another document.
        positions: int64 [B or 1, S]; the caller leaves them out where a cache is filled.

    Raises:
        ValueError: a mask of another form or length, one that a causal mask with padding and
            documents cannot express, or a sequence without tokens.
    """
    if isinstance(mask, dict):
        mask = mask.get("indexed_attention", next(iter(mask.values()), None))
    if mask is None:
        return _documents(positions, queries, total, batch)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            "The fast path takes an attention mask [batch, tokens] of ones and zeros, "
            f"[batch, 1, queries, tokens], or none; got {_form(mask)}."
        )
    if mask.dim() == 4:
        return _dense(mask, queries, total, batch)
    if mask.shape != (batch, total):
        raise ValueError(
            f"The attention mask has the shape {_form(mask)}, but there are {batch} sequences of "
            f"{total} tokens, {total - queries} of them cached; give one value for each."
        )
    tokens = mask.bool().cpu()
    if bool(tokens.all()):
        return Visible(None, total)
    if not bool(tokens.any(-1).all()):
        raise ValueError(
            "The attention mask has a sequence without tokens; leave that sequence out."
        )
    return _by_rows(tokens, lambda row: _padded(row, queries, mask.device), total)


def _by_rows(rows: Tensor, cut: Callable[[Tensor], list[tuple[Ids, Ids, int]]], total: int):
    """Cut each group of equal neighbouring rows of a batch."""
    spans = []
    start = 0
    for b in range(1, len(rows) + 1):
        if b < len(rows) and torch.equal(rows[b], rows[start]):
            continue
        spans += [Span(slice(start, b), *part) for part in cut(rows[start])]
        start = b
    return Visible(tuple(spans), total)


def _padded(tokens_T: Tensor, queries: int, device: torch.device) -> list[tuple[Ids, Ids, int]]:
    """Cut a sequence with padding: (queries, keys, offset) of its tokens, then of its padding.

    Padding sees the tokens before it, as in stock. That matters where generation starts from it.
    """
    total = len(tokens_T)
    first = total - queries
    ids = tokens_T.nonzero()[:, 0]
    begin, end = int(ids[0]), int(ids[-1]) + 1
    parts: list[tuple[Ids, Ids, int]] = []
    if end - begin == len(ids):
        if end > first:
            start = max(begin, first)
            parts.append((slice(start - first, end - first), slice(begin, end), start - begin))
        if end < total:
            parts.append((slice(max(end - first, 0), queries), slice(begin, end), end - begin - 1))
        return parts
    ids = ids.to(device)
    asked = tokens_T[first:].nonzero()[:, 0]
    if len(asked):
        parts.append((asked.to(device), ids, int(tokens_T[:first].sum())))
    before = tokens_T.cumsum(0)
    start = first
    while start < total:
        stop = start + 1
        if not tokens_T[start]:
            while stop < total and not tokens_T[stop]:
                stop += 1
            if count := int(before[start]):
                parts.append((slice(start - first, stop - first), ids[:count], count - 1))
        start = stop
    return parts


def _documents(positions: Tensor | None, queries: int, total: int, batch: int) -> Visible:
    """Cut a pass without a mask where its positions do not count up by one."""
    if positions is None or queries == 1:
        return Visible(None, total)
    starts = restarts(positions).cpu()
    if not bool(starts.any()):
        return Visible(None, total)

    def cut(row: Tensor) -> list[tuple[Ids, Ids, int]]:
        cuts = [0, *(row.nonzero()[:, 0] + 1).tolist(), queries]
        return [(slice(a, b), slice(a, b), 0) for a, b in pairwise(cuts)]

    return _by_rows(starts.expand(batch, -1), cut, total)


def restarts(positions: Tensor) -> Tensor:
    """Return, for each pair of neighbouring positions [.., S], whether they do not follow."""
    return positions.diff(dim=-1) != 1


def _dense(mask: Tensor, queries: int, total: int, batch: int) -> Visible:
    """Find padding or documents in a mask of all pairs."""
    allowed = mask if mask.dtype == torch.bool else mask >= torch.finfo(mask.dtype).min / 2
    if (
        mask.shape[0] not in (1, batch)
        or mask.shape[1] != 1
        or mask.shape[2] != queries
        or mask.shape[3] < total
        or bool(allowed[..., total:].any())
    ):
        raise ValueError(
            f"The attention mask has the shape {_form(mask)}, but there are {queries} queries of "
            f"{batch} sequences over {total} tokens, and the same mask for all heads."
        )
    allowed = allowed[:, 0, :, :total].cpu()
    if mask.dtype != torch.bool and bool((mask[:, 0, :, :total].cpu()[allowed] != 0).any()):
        raise ValueError(
            "The attention mask adds numbers to scores; the fast path takes 0 for a visible key "
            "and the dtype's minimum or -inf for a hidden one."
        )
    first = total - queries
    causal = torch.ones(queries, total, dtype=torch.bool).tril(first)
    tokens = allowed.any(1)
    if torch.equal(allowed, tokens[:, None] & causal) and bool(tokens.any(-1).all()):
        if bool(tokens.all()):
            return Visible(None, total)
        tokens = tokens.expand(batch, -1)
        return _by_rows(tokens, lambda row: _padded(row, queries, mask.device), total)
    starts = allowed.int().argmax(-1)
    if not torch.equal(allowed, causal & (torch.arange(total) >= starts[..., None])):
        raise ValueError(
            "The attention mask hides keys otherwise than by causality, padding and documents, "
            "which the fast path cannot express; run stock."
        )

    def cut(row: Tensor) -> list[tuple[Ids, Ids, int]]:
        cuts = [0, *((row.diff() != 0).nonzero()[:, 0] + 1).tolist(), queries]
        return [
            (slice(a, b), slice(int(row[a]), first + b), first + a - int(row[a]))
            for a, b in pairwise(cuts)
        ]

    return _by_rows(starts.expand(batch, -1), cut, total)


def _form(mask: Any) -> str:
    return str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
