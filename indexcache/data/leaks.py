"""Find text on both sides: the same documents, and sequences that share long passages.

A passage is `PASSAGE` words, or token ids, in a row. Two texts share one only if one was copied
from the other, or both quote a third. Words are those of the text without case, punctuation, white
space and Unicode form, so a copy with other line breaks has the same ones; token ids find copies
where one side is given as ids, and copies within a longer document.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from indexcache.data.batch import Batch
from indexcache.data.documents import Document
from indexcache.seen import MAX_SHINGLES, Seen

PASSAGE = 32
MAX_SHARE = 0.2
"""A sequence of whose passages at least this share was seen is no held-out text, if they hold
`MIN_WORDS`. Licence headers and quotations of unrelated documents stay below one of the two."""
MIN_WORDS = 96
"""A header is a large share of a short sequence, so fewer words in common tell a near copy only
where they are `NEAR_COPY` of it. The shipped texts share up to 70 words, licence headers, and 87
as `Seen` estimates them; of sequences of 256 tokens, 96 are 29 % of the passages."""
NEAR_COPY = 0.5
"""Sequences that share at least this part of their passages are near copies. It is more than
`MAX_SHARE`: a licence header can be a third of a short sequence."""
SAMPLE = 512  # About so many passages of a sequence are compared with other sequences.

# Scripts that put no space between words are taken character by character.
UNSPACED = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")
ODD = np.uint64(0x9E3779B97F4A7C15)
WORDS, IDS = np.uint64(1), np.uint64(2)


def text_shingles(text: str) -> np.ndarray:
    """Return a hash of every passage of `PASSAGE` words of a text, uint64 [words - 31]."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    words = WORD.findall(text.casefold())
    hashes = {w: zlib.crc32(w.encode()) + 1 for w in set(words)}
    return _passages(np.array([hashes[w] for w in words], np.uint64), WORDS)


def ids_shingles(ids: np.ndarray) -> np.ndarray:
    """Return a hash of every passage of `PASSAGE` of the token ids, int64 [n], uint64 [n - 31]."""
    return _passages(ids.astype(np.uint64) + np.uint64(1), IDS)


def _passages(values: np.ndarray, kind: np.uint64) -> np.ndarray:
    """Hash every window of `PASSAGE` values, uint64 [n]; sums wrap modulo 2^64."""
    count = len(values) - PASSAGE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    values = _mixed(values * ODD + kind)
    total = np.zeros(count, np.uint64)
    for i in range(PASSAGE):
        total = total * ODD + values[i : i + count]
    return _mixed(total)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread values evenly over 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seen_in(batches: Sequence[Batch]) -> Seen:
    """Return what a search on these batches sees."""
    digests = {d for b in batches for d in (*b.digests, *b.text_digests)}
    hashes = [h for b in batches for h in b.shingles]
    hashes += [ids_shingles(row) for b in batches for row in b.ids.numpy()]
    return Seen.of(digests, np.concatenate(hashes) if hashes else np.empty(0, np.uint64))


def seen_in_documents(documents: Iterable[Document]) -> Seen:
    """Return what a training on these documents sees."""
    digests: set[str] = set()
    kept: list[np.ndarray] = []
    for d in documents:
        digests |= {d.digest, d.text_digest}
        kept += [d.shingles, ids_shingles(d.ids)]
        if len(kept) > 512:  # Only the smallest hashes are wanted, and texts are large.
            kept = [np.unique(np.concatenate(kept))[: 2 * MAX_SHINGLES]]
    return Seen.of(digests, np.concatenate(kept) if kept else np.empty(0, np.uint64))


def close_documents(documents: Sequence[Document], others: Iterable[Document]) -> list[Document]:
    """Return the documents that are near copies of the others (see `is_copy`)."""
    parts = [(d.shingles, ids_shingles(d.ids)) for d in documents]
    if not parts:
        return []
    asked = np.unique(np.concatenate([h for pair in parts for h in pair]))
    known = np.zeros(len(asked), bool)
    for d in others:
        for hashes in (d.shingles, ids_shingles(d.ids)):
            known |= np.isin(asked, hashes)

    def copied(hashes: np.ndarray) -> bool:
        share = float(known[np.searchsorted(asked, hashes)].mean()) if len(hashes) else 0.0
        return is_copy(share, len(hashes))

    return [d for d, pair in zip(documents, parts, strict=True) if any(map(copied, pair))]


def is_copy(share: float, passages: int) -> bool:
    """Return whether a text is a near copy of one that was seen.

    Args:
        share: the share of its passages that was seen.
        passages: their number, seen or not.
    """
    words = share * passages + PASSAGE - 1  # as if they followed each other
    return share >= NEAR_COPY or (share >= MAX_SHARE and words >= MIN_WORDS)


def check_unseen(batches: Sequence[Batch], seen: Seen | Iterable[str]) -> None:
    """Raise ValueError when text of these batches was calibration text of a search.

    Args:
        seen: what the search saw; digests alone find whole documents only.
    """
    if not isinstance(seen, Seen):
        seen = Seen(frozenset(seen))
    shared = 0
    for b in batches:
        texts = b.text_digests or ("",) * len(b.digests)
        shared += sum(
            d in seen.digests or t in seen.digests for d, t in zip(b.digests, texts, strict=True)
        )
    if shared:
        raise ValueError(
            f"{shared} of the held-out documents were calibration text of the search, so this "
            "would not be evidence; give other text, or use the split 'heldout' of the text the "
            "search took its 'calibration' from."
        )
    close = near_copies(batches, seen)
    if close:
        named = ", ".join(f"{share:.0%} of {unit:.200}" for share, unit in close[:5])
        more = f" and {len(close) - 5} more" if len(close) > 5 else ""
        raise ValueError(
            f"{len(close)} of the held-out sequences share long passages with the calibration "
            f"text of the search ({named}{more}), so this would not be evidence; take such near "
            "copies out, or give other text."
        )


def near_copies(batches: Sequence[Batch], seen: Seen) -> list[tuple[float, str]]:
    """Return (share seen, unit) of sequences that are near copies, the closest first.

    `is_copy` says which they are.
    """
    close = []
    for b in batches:
        shingles = b.shingles or (np.empty(0, np.uint64),) * len(b.units)
        for row, hashes, unit in zip(b.ids.numpy(), shingles, b.units, strict=True):
            parts = [(seen.share(h), len(h)) for h in (hashes, ids_shingles(row))]
            if copied := [share for share, passages in parts if is_copy(share, passages)]:
                close.append((max(copied), unit))
    return sorted(close, reverse=True)


def document_groups(batches: Sequence[Batch]) -> dict[tuple[str, str], tuple[str, str]]:
    """Say which documents are no evidence of their own: near copies of each other.

    Returns:
        For the (domain, unit) of every sequence, the first one of its group. Two are in one group
        where a sequence shares `NEAR_COPY` of its passages of token ids with another.
    """
    groups: dict[tuple[str, str], tuple[str, str]] = {}
    owners: dict[int, tuple[str, str]] = {}

    def first(node: tuple[str, str]) -> tuple[str, str]:
        while groups[node] != node:
            node = groups[node]
        return node

    for b in batches:
        every = np.uint64(max(b.ids.shape[1] // SAMPLE, 1))
        for row, unit in zip(b.ids.numpy(), b.units, strict=True):
            node = (b.domain, unit)
            groups.setdefault(node, node)
            hashes = np.unique(ids_shingles(row))
            sample = hashes[hashes % every == 0].tolist()
            found = Counter(first(owners[h]) for h in sample if h in owners)
            for other, count in found.items():
                if count >= NEAR_COPY * len(sample):
                    groups[first(node)] = first(other)
            for h in sample:
                owners.setdefault(h, node)
    return {node: first(node) for node in groups}
