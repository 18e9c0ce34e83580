"""Documents packed into rows of one length, with their boundaries; which rows a step takes is a function of (seed, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from indexcache.data import Document

LEAST_BEYOND = (
    0.25  # share of the packed queries that must see more than k tokens of their own document
)


@dataclass(frozen=True, eq=False)
class Row:
    """One packed row: token ids int64 [T], and the (start, stop) of each document in it, which covers it without gaps.

    A document starts at position 0 and sees nothing of its neighbours.
    """

    ids: np.ndarray
    cuts: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, ids: np.ndarray) -> Row:
        """A row that is one document."""
        return cls(ids, ((0, len(ids)),))


def pack_rows(documents: Sequence[Document], length: int, seed: int = 0) -> list[Row]:
    """Rows of exactly `length` tokens, the documents one after the other in an order drawn from `seed`. A document that a row
    cuts goes on in the next row as a document of its own; what is left at the end is dropped.

    Raises:
        ValueError: length below 2, or less text than one row.
    """
    if length < 2:
        raise ValueError(f"A row has at least 2 tokens, not {length}.")
    rows: list[Row] = []
    parts: list[np.ndarray] = []
    filled = 0
    for i in np.random.default_rng([seed, 1]).permutation(len(documents)):
        rest = documents[i].ids
        while len(rest):
            part, rest = rest[: length - filled], rest[length - filled :]
            parts.append(part)
            filled += len(part)
            if filled == length:
                ends = np.cumsum([len(p) for p in parts]).tolist()
                rows.append(
                    Row(np.concatenate(parts), tuple(zip([0, *ends[:-1]], ends, strict=True)))
                )
                parts, filled = [], 0
    if not rows:
        raise ValueError(
            f"The training text has {sum(len(d.ids) for d in documents)} tokens, which is less than one row of {length}; "
            "give more text or a smaller --length."
        )
    return rows


def check_beyond(rows: Sequence[Row], topk: int) -> float:
    """The share of queries that see more than k tokens of their own document.

    Raises:
        ValueError: it is below a quarter: the documents are too short to teach an indexer what to select.
    """
    total = sum(len(row.ids) for row in rows)
    beyond = sum(max(b - a - topk, 0) for row in rows for a, b in row.cuts) / total
    if beyond < LEAST_BEYOND:
        raise ValueError(
            f"Only {beyond:.0%} of the training queries see more than k = {topk} tokens of their own document, so there is "
            f"next to nothing to select; give longer documents (at least {LEAST_BEYOND:.0%} of the queries)."
        )
    return beyond


def rows_of_step(rows: Sequence[Row], step: int, count: int, seed: int) -> list[Row]:
    """The `count` rows of step `step` (0-based): every row once, in an order drawn for each round over the data."""
    found: list[Row] = []
    order: dict[int, np.ndarray] = {}
    for at in range(step * count, (step + 1) * count):
        turn, place = divmod(at, len(rows))
        if turn not in order:
            order[turn] = np.random.default_rng([seed, 2, turn]).permutation(len(rows))
        found.append(rows[order[turn][place]])
    return found


def digest_of_rows(rows: Sequence[Row]) -> str:
    """One digest of all rows, order and boundaries included."""
    h = hashlib.sha256()
    for row in rows:
        h.update(f"{row.cuts}".encode() + row.ids.tobytes())
    return h.hexdigest()
