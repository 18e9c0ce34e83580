"""Write small texts, load them, and make documents whose tokens differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.data import Batch, Document, load_documents

VOCABULARY = 256


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def load(source: Any, **more: Any) -> list[Document]:
    return load_documents(source, encode, VOCABULARY, **more)


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def document(ids: Any, domain: str = "d", name: str = "") -> Document:
    array = np.asarray(ids, np.int64)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return Document(array, domain, name or digest[:8], digest)


def corpus(lengths: dict[str, list[int]]) -> list[Document]:
    """Make documents of these lengths, in which no two tokens of the corpus are the same."""
    documents = []
    at = 0
    for domain, sizes in lengths.items():
        for i, n in enumerate(sizes):
            documents.append(document(range(at, at + n), domain, f"{domain}{i}"))
            at += n
    return documents


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for b in batches for row in b.ids]
