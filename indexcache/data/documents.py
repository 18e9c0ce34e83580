"""Documents: what one is, when two are the same, and on which side of a split it falls."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

SPLITS = ("calibration", "heldout", "all")
INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060\u00ad]")
"""Byte order marks, and characters without a width."""

TEXT_PREFIX = b"text\0"
"""These bytes are hashed before a text, so that no text has the digest of token ids."""


@dataclass(frozen=True, eq=False)
class Document:
    """One document.

    Attributes:
        ids: token ids, int64 [n].
        domain: the kind of text, e.g. "code".
        name: where the document was read, for messages.
        digest: sha256 of the ids.
        text_digest: `text_digest` of the text that the ids were made of; "" where it was ids.
        shingles: hashes of its passages (`leaks.text_shingles`), uint64; empty where it was ids.
    """

    ids: np.ndarray
    domain: str
    name: str
    digest: str
    text_digest: str = ""
    shingles: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def key(self) -> str:
        """The digest that says which document this is, and on which side of a split."""
        return self.text_digest or self.digest


def normal_text(text: str) -> str:
    """Return what two copies of a text have in common, for comparisons; no model ever sees it.

    White space, byte order marks, characters without a width, case and Unicode's ways to write
    one character are what copies of a text differ in.
    """
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return "".join(text.split()).casefold()


def text_digest(text: str) -> str:
    """Return the sha256 of a text as `normal_text` has it; "" if nothing visible is in it."""
    normal = normal_text(text)
    return hashlib.sha256(TEXT_PREFIX + normal.encode()).hexdigest() if normal else ""


def ids_digest(ids: np.ndarray) -> str:
    """Return the sha256 of token ids, int64 [n]; "" if there are none."""
    return hashlib.sha256(ids.tobytes()).hexdigest() if len(ids) else ""


@dataclass(frozen=True, slots=True)
class Unread:
    """A document that was seen but not kept in memory.

    Attributes:
        file: the index of its file in the source.
        row: the number of the record in the file, from 1 on; a line in .jsonl files.
        offset: where a reader of the file finds it again.
        domain: as in `Document`.
        key: as in `Document`.
    """

    file: int
    row: int
    offset: int
    domain: str
    key: str


Either = TypeVar("Either", Document, Unread)


def split_documents(documents: Sequence[Either], split: str) -> list[Either]:
    """Return the documents of one split: "calibration", "heldout" or "all".

    The side of a document depends on its content alone, so the two sides never share one, whatever
    else is in the source. Copies that differ in white space, case or Unicode form are one
    document.

    Raises:
        ValueError: an unknown split, or one without a document.
    """
    if split not in SPLITS:
        raise ValueError(f"The split is one of {', '.join(SPLITS)}, not {split!r}.")
    if split == "all":
        return list(documents)
    parity = int(split == "heldout")
    side = [d for d in documents if int(d.key[:8], 16) % 2 == parity]
    if not side:
        raise ValueError(
            f"None of the {len(documents)} documents falls into the {split} half; give calibration "
            "and held-out text as two sources and use the split 'all' for each."
        )
    return side
