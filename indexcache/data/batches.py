"""Cut documents into sequences, and sequences into the batches that go through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.data.batch import Batch
from indexcache.data.documents import Document, split_documents
from indexcache.data.records import Chat, Encode
from indexcache.data.sources import Tokenizing, scan
from indexcache.pattern import Pattern
from indexcache.vacuity import check_length

SHIPPED = ("calibration", "heldout")  # names of the two shipped texts
OF_A_DOMAIN = 36
"""Number of sequences of a domain where none is given: the least number of documents for a verdict
(`indexcache.evals.statistics`)."""


def batches(
    source: str | Path,
    encode: Encode,
    config: Any,
    *,
    split: str | None = None,
    length: int | None = None,
    sequences: int | None = None,
    batch: int = 1,
    seed: int = 0,
    patterns: Iterable[Pattern | str] = (),
    chat: Chat | None = None,
    tokenizer: str | None = None,
    progress: bool = False,
) -> list[Batch]:
    """Read a text and cut it into the batches on which a model is searched or evaluated.

    Only as many documents are tokenised as the sequences need.

    Args:
        source: "calibration" or "heldout" for the shipped text, else a file or folder (see
            `indexcache.data`).
        encode: maps a text to token ids, without special tokens.
        config: the model's config: `vocab_size`, `max_position_embeddings` and `index_topk`.
        split: the split of `split_documents`; None is "all".
        length: tokens per sequence; None is `default_length` for the patterns.
        sequences, batch, seed: see `make_batches`.
        patterns: what is to be measured on the batches; R layers need longer sequences.
        chat, tokenizer: see `Tokenizing`.
        progress: show a bar on stderr where reading or tokenising takes long.

    Raises:
        ValueError: text that `scan`, `Source.read`, `split_documents` or `make_batches` refuses, or
            a length that `check_length` refuses.
    """
    measured = [Pattern.of(p) for p in patterns]
    topk, context = int(config.index_topk), int(config.max_position_embeddings)
    length = check_length(length, topk, context, measured)
    path = shipped_text(str(source)) if source in SHIPPED else named_source(source)
    vocabulary = int(config.vocab_size)
    found = scan(path, vocabulary, progress=progress)
    how = Tokenizing(encode, vocabulary, chat, tokenizer)
    return _batches(
        split_documents(found.documents, split or "all"),
        lambda documents: found.read(documents, how),
        length=length,
        sequences=sequences,
        batch=batch,
        seed=seed,
    )


def shipped_text(name: str) -> Path:
    """Return the file of a shipped text, "calibration" or "heldout"; the licences are in NOTICE."""
    return Path(str(resources.files("indexcache") / "assets" / "text" / f"{name}.jsonl"))


def named_source(source: str | Path) -> Path:
    """Return the path of a text; raise ValueError where its name is empty, or there is nothing."""
    if not str(source).strip():
        raise ValueError("The name of the text is empty; name a file or a folder, or . for here.")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder.")
    return path


def text_for(model: str, source: str | Path | None, split: str) -> tuple[Path, str]:
    """Return (file or folder, split): the user's text, or the shipped text for the model `tiny`.

    Raises:
        ValueError: no text is given for a model other than `tiny`, or its name is empty.
    """
    if source is not None:
        return named_source(source), split
    if model != "tiny":
        raise ValueError(
            "Give the text with --data: a .jsonl, .parquet or text file, a folder, or token ids."
        )
    return shipped_text("heldout" if split == "heldout" else "calibration"), "all"


def make_batches(
    documents: Sequence[Document],
    *,
    length: int,
    sequences: int | None,
    batch: int = 1,
    seed: int = 0,
) -> list[Batch]:
    """Cut documents into `sequences` sequences of `length` tokens, in batches of one domain each.

    The sequences are spread evenly over the domains. A long document gives its first window before
    any gives its second; documents shorter than `length` are joined with others of their domain
    until the sequence is full.

    Args:
        sequences: their number; None is one of each document, OF_A_DOMAIN of a domain at most.
        batch: max number of sequences per batch.
        seed: random seed of the order in which documents are taken.

    Raises:
        ValueError: a number that is too small, or a domain with too little text.
    """
    return _batches(documents, list, length=length, sequences=sequences, batch=batch, seed=seed)


def _batches(
    documents: Sequence[Any],
    read: Callable[[Sequence[Any]], list[Document]],
    *,
    length: int,
    sequences: int | None,
    batch: int,
    seed: int,
) -> list[Batch]:
    """Make batches of documents that `read` reads when they are needed; see `make_batches`.

    `documents` are whatever `read` takes, with a domain.
    """
    for name, value, minimum in (
        ("length", length, 1),
        ("sequences", OF_A_DOMAIN if sequences is None else sequences, 1),
        ("batch", batch, 1),
        ("seed", seed, 0),
    ):
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value}.")
    domains = sorted({d.domain for d in documents})
    if not domains:
        raise ValueError("There is no document to make sequences from.")
    if sequences is not None and sequences < len(domains):
        raise ValueError(
            f"{sequences} sequences cannot cover {len(domains)} domains ({', '.join(domains)}); "
            "ask for more."
        )
    import torch  # It is imported here so that --help need not wait for it.

    result = []
    for i, domain in enumerate(domains):
        count = OF_A_DOMAIN
        if sequences is not None:
            count = sequences // len(domains) + (i < sequences % len(domains))
        rng = np.random.default_rng([seed, *domain.encode()])
        own = [d for d in documents if d.domain == domain]
        windows = _windows([own[i] for i in rng.permutation(len(own))], read, length, count)
        if sequences is None and windows:
            count = min(count, sum(w.order[0] == 0 for w in windows))
        if len(windows) < count:
            raise ValueError(
                f"The domain {domain!r} has text for {len(windows)} sequences of {length} tokens, "
                f"but {count} are asked for; give more text, shorter sequences or fewer of them."
            )
        for start in range(0, count, batch):
            taken = windows[start : min(start + batch, count)]
            ids = torch.from_numpy(np.stack([w.ids for w in taken]))
            result.append(
                Batch(
                    ids,
                    domain,
                    units=tuple(w.unit for w in taken),
                    digests=tuple(d.digest for w in taken for d in w.documents),
                    own_context=torch.from_numpy(np.stack([w.own_context for w in taken])),
                    text_digests=tuple(d.text_digest for w in taken for d in w.documents),
                    shingles=tuple(
                        np.concatenate([d.shingles for d in w.documents]) for w in taken
                    ),
                )
            )
    return result


@dataclass(frozen=True, eq=False)
class _Window:
    """One sequence, with its place in the order in which sequences are taken."""

    order: tuple[int, int]  # (number of the window in its document, place of the document)
    ids: np.ndarray
    documents: tuple[Document, ...]
    own_context: np.ndarray  # int64 [length], as in Batch

    @property
    def unit(self) -> str:
        return " + ".join(d.name for d in self.documents)


def _windows(
    documents: list[Any], read: Callable[[Sequence[Any]], list[Document]], length: int, count: int
) -> list[_Window]:
    """Cut documents, in their order, into the first `count` sequences, or all that there are.

    All first windows come before the second ones, so documents are read until there are `count` of
    first windows, or to the end.
    """
    windows: list[_Window] = []
    counted = np.arange(1, length + 1)
    short: list[Document] = []
    first = place = 0
    while first < count and place < len(documents):
        chunk = read(documents[place : place + max(count - first, place)])
        for d in chunk:
            for n in range(len(d.ids) // length):
                ids = d.ids[n * length : (n + 1) * length]
                windows.append(_Window((n, place), ids, (d,), counted))
            if len(d.ids) < length:
                short.append(d)
                if sum(len(s.ids) for s in short) >= length:
                    ids = np.concatenate([s.ids for s in short])[:length]
                    own = np.concatenate([np.arange(1, len(s.ids) + 1) for s in short])[:length]
                    windows.append(_Window((0, place), ids, tuple(short), own))
                    short = []
            place += 1
        first = sum(w.order[0] == 0 for w in windows)
    return sorted(windows, key=lambda w: w.order)
