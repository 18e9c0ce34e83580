"""Documents packed into rows of one length, and the rows of each step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from indexcache.data import Batch, Document

MIN_BEYOND = 0.25
"""Min share of the packed queries that see more than k tokens of their own document, and more than
the pool where R layers choose from one in training."""


@dataclass(frozen=True, eq=False)
class Row:
    """One packed row of documents.

    A document starts at position 0 and sees nothing of its neighbours.

    Attributes:
        ids: token ids, int64 [T].
        cuts: the (start, stop) of each document; together they cover the row without gaps.
        answers: the (start, stop) of answers that the model has to find in the text before them.
    """

    ids: np.ndarray
    cuts: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...] = ()

    @classmethod
    def one_document(cls, ids: np.ndarray) -> Row:
        """Make a row that is one document."""
        return cls(ids, ((0, len(ids)),))

    @property
    def asked(self) -> tuple[tuple[int, int], ...]:
        """The queries (start, stop) that must find an answer: they predict its tokens."""
        return tuple((start - 1, stop - 1) for start, stop in self.answers)

    @classmethod
    def of_documents(cls, documents: Sequence[np.ndarray]) -> Row:
        """Make a row of whole documents. Where they have one length, the sparse stage runs them as
        a batch, which is faster on a GPU than a row for each.
        """
        ends = np.cumsum([len(ids) for ids in documents]).tolist()
        return cls(np.concatenate(documents), tuple(zip([0, *ends[:-1]], ends, strict=True)))


def pack_rows(documents: Sequence[Document], length: int, seed: int = 0) -> list[Row]:
    """Pack documents into rows of exactly `length` tokens, in an order drawn from `seed`.

    A document that a row cuts goes on in the next row as a document of its own. Tokens that do
    not fill a last row are dropped.

    Raises:
        ValueError: length is below 2, or there is less text than one row.
    """
    if length < 2:
        raise ValueError(f"A row has at least 2 tokens, not {length}.")
    rows: list[Row] = []
    pieces: list[np.ndarray] = []
    filled = 0
    for i in np.random.default_rng([seed, 1]).permutation(len(documents)):
        ids = documents[i].ids
        while len(ids):
            room = length - filled
            pieces.append(ids[:room])
            filled += len(pieces[-1])
            ids = ids[room:]
            if filled == length:
                rows.append(Row.of_documents(pieces))
                pieces = []
                filled = 0
    if not rows:
        tokens = sum(len(d.ids) for d in documents)
        raise ValueError(
            f"The training text has {tokens} tokens, which is less than one row of {length}; "
            "give more text or a smaller --length."
        )
    return rows


def retrieval_rows(batches: Sequence[Batch]) -> list[Row]:
    """Make a row of every retrieval sequence."""
    return [
        replace(Row.one_document(ids.numpy()), answers=answers)
        for b in batches
        for ids, answers in zip(b.ids, b.answers, strict=True)
    ]


def check_beyond(rows: Sequence[Row], topk: int, pool: int | None = None) -> float:
    """Return the share of queries that see more than k tokens of their own document.

    Raises:
        ValueError: the share, or that of the pool, is below `MIN_BEYOND`: the documents are too
            short to teach an indexer what to select.
    """
    sizes = {f"k = {topk}": topk} | ({f"the pool of {pool}": pool} if pool else {})
    shares = {what: _share_beyond(rows, size) for what, size in sizes.items()}
    for what, share in shares.items():
        if share < MIN_BEYOND:
            raise ValueError(
                f"Only {share:.0%} of the training queries see more than {what} tokens of their "
                "own document, so there is almost nothing to select; give longer documents (at "
                f"least {MIN_BEYOND:.0%} of the queries) in longer rows."
            )
    return shares[f"k = {topk}"]


def _share_beyond(rows: Sequence[Row], size: int) -> float:
    """Return the share of queries that see more than `size` tokens of their own document."""
    total = sum(len(row.ids) for row in rows)
    return sum(max(b - a - size, 0) for row in rows for a, b in row.cuts) / total


def rows_of_step(rows: Sequence[Row], step: int, count: int, seed: int) -> list[Row]:
    """Return the `count` rows of step `step` (0-based), a function of `seed` and `step` alone.

    Every epoch takes every row once, in an order of its own.
    """
    orders: dict[int, np.ndarray] = {}
    taken: list[Row] = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(rows))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, 2, epoch]).permutation(len(rows))
        taken.append(rows[orders[epoch][place]])
    return taken


def digest_of_rows(rows: Sequence[Row]) -> str:
    """Return one digest of all rows, which depends on their order and boundaries too."""
    h = hashlib.sha256()
    for row in rows:
        h.update(f"{row.cuts}{row.answers or ''}".encode() + row.ids.tobytes())
    return h.hexdigest()
