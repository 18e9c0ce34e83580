"""Text to token batches: documents with a domain each, split by document, cut into sequences of one length.

A source is a `.jsonl` file (a `text` or an `ids` field, an optional `domain`), a `.txt`/`.md` file (one document), a
`.npy` file (one document of token ids), or a folder of those (the name of the sub-folder is the domain). Everything
is a function of the text and the seed: no global random state is read or changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (".jsonl", ".npy", *TEXT_SUFFIXES)
SPLITS = ("calibration", "heldout", "all")
ALL = "all"  # the name of all domains together in results
LEAST_BEYOND = 0.75  # share of queries that must see more than k tokens

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Document:
    """One document: token ids (int64, [n]), its domain, a name for messages, and the digest of its ids."""

    ids: np.ndarray
    domain: str
    name: str
    digest: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one domain. `ids` int64 [B, T]; `units` names, per sequence, the document(s) it is cut from: what a
    bootstrap over documents may resample; `digests` are all documents in it."""

    ids: Tensor
    domain: str
    units: tuple[str, ...]
    digests: tuple[str, ...]


def load_documents(
    source: str | Path, encode: Encode, vocabulary: int, domain: str = "text"
) -> list[Document]:
    """Read a file or a folder into documents, in a fixed order; exact repetitions are dropped.

    Args:
        source: file or folder, as described above.
        encode: text -> token ids, without special tokens.
        vocabulary: ids must lie in 0..vocabulary-1.
        domain: the domain where none is given.

    Raises:
        ValueError: nothing readable there, a line that is not JSON or has neither text nor ids, ids outside the
            vocabulary.
    """
    root = Path(source)
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not paths:
            raise ValueError(f"{root}: no {', '.join(SUFFIXES)} file in this folder.")
        pairs = [(p, p.relative_to(root).parts[0] if p.parent != root else domain) for p in paths]
    elif root.is_file():
        if root.suffix not in SUFFIXES:
            raise ValueError(
                f"{root}: text is read from {', '.join(SUFFIXES)} files, not from {root.suffix or 'this'}."
            )
        pairs = [(root, domain)]
    else:
        raise ValueError(f"{root}: no such file or folder.")
    documents: dict[str, Document] = {}
    for path, name in pairs:
        for ids, where, label in _read(path, encode, name):
            if label == ALL:
                raise ValueError(
                    f"{where}: the domain cannot be called {ALL!r}; results use that name for all domains together."
                )
            array = _ids(ids, vocabulary, where)
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            if len(array):
                documents.setdefault(digest, Document(array, label, where, digest))
    if not documents:
        raise ValueError(f"{root}: there is no text in it.")
    return list(documents.values())


def _read(path: Path, encode: Encode, domain: str):
    """Yield (ids, where, domain) of every document in one file."""
    try:
        if path.suffix == ".npy":
            yield _load_array(path), str(path), domain
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8-sig") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield _row(line, f"{path}:{number}", encode, domain)
        else:
            yield encode(path.read_text(encoding="utf-8")), str(path), domain
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _load_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged header numpy raises what its parser happens to meet
        raise ValueError(
            f"{path}: is not a .npy file of numbers ({' '.join(str(error).split())})."
        ) from None


def _row(line: str, where: str, encode: Encode, domain: str):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: is not JSON; every line of a .jsonl file is one JSON object."
        ) from None
    if not isinstance(row, dict) or not (
        isinstance(row.get("text"), str) or isinstance(row.get("ids"), list)
    ):
        raise ValueError(
            f"{where}: has neither a text field (a string) nor an ids field (a list of token ids)."
        )
    try:
        json.dumps([row.get("text"), row.get("domain")], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: has half of a surrogate pair, which is not text.") from None
    label = row.get("domain", domain)
    if not isinstance(label, str) or not label:
        raise ValueError(f"{where}: the domain is {label!r}, but it must be a name.")
    return (row["ids"] if isinstance(row.get("ids"), list) else encode(row["text"])), where, label


def _ids(ids, vocabulary: int, where: str) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # ragged
        array = np.empty((0, 0))
    if isinstance(ids, list) and any(isinstance(i, bool) for i in ids):
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{where}: token ids must be one list of whole numbers.")
    array = array.astype(np.int64)
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < vocabulary):
        bad = int(array.max() if array.max() >= vocabulary else array.min())
        raise ValueError(
            f"{where}: token id {bad} is outside the model's vocabulary of {vocabulary}."
        )
    return array


def split_documents(documents: Sequence[Document], split: str) -> list[Document]:
    """The documents of one split: "calibration", "heldout" or "all". A document's side depends on nothing but its
    content, so the two sides never share one, whatever else is in the source."""
    if split not in SPLITS:
        raise ValueError(f"The split is one of {', '.join(SPLITS)}, not {split!r}.")
    if split == "all":
        return list(documents)
    held_out = split == "heldout"
    chosen = [d for d in documents if (int(d.digest[:8], 16) % 2 == 1) == held_out]
    if not chosen:
        raise ValueError(
            f"None of the {len(documents)} documents falls into the {split} half; give calibration and held-out "
            "text as two sources and use the split 'all' for each."
        )
    return chosen


def check_context(length: int, topk: int) -> float:
    """The share of queries whose context holds more than k tokens; only there does a selection choose anything.

    Raises:
        ValueError: the share is below three quarters: with at most k tokens of context every pattern is the same, and
            the result would say nothing.
    """
    beyond = max(length - topk, 0) / length if length > 0 else 0.0
    if beyond < LEAST_BEYOND:
        raise ValueError(
            f"Sequences of {length} tokens are too short for this model: with index_topk = {topk} only {beyond:.0%} of the "
            f"queries have more than {topk} tokens to select from, elsewhere every pattern is the same; use at least "
            f"{4 * topk} tokens ({LEAST_BEYOND:.0%} of the queries)."
        )
    return beyond


def make_batches(
    documents: Sequence[Document], *, length: int, sequences: int, batch: int = 1, seed: int = 0
) -> list[Batch]:
    """Cut documents into `sequences` sequences of `length` tokens, spread evenly over the domains, in batches of one
    domain each. A long document gives its first window before any gives its second; documents shorter than `length`
    are joined with others of their domain until the sequence is full.

    Raises:
        ValueError: a number that is not positive, or a domain with too little text.
    """
    for name, value in (("length", length), ("sequences", sequences), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}.")
    domains = sorted({d.domain for d in documents})
    if not domains:
        raise ValueError("There is no document to make sequences from.")
    if sequences < len(domains):
        raise ValueError(
            f"{sequences} sequences cannot cover {len(domains)} domains ({', '.join(domains)}); ask for more."
        )
    import torch  # here, so that --help need not wait for it

    batches = []
    for i, domain in enumerate(domains):
        wanted = sequences // len(domains) + (i < sequences % len(domains))
        rng = np.random.default_rng([seed, *domain.encode()])
        windows = _windows([d for d in documents if d.domain == domain], length, rng)
        if len(windows) < wanted:
            raise ValueError(
                f"The domain {domain!r} has text for {len(windows)} sequences of {length} tokens, but {wanted} are "
                "asked for; give more text, shorter sequences or fewer of them."
            )
        for start in range(0, wanted, batch):
            part = windows[start : min(start + batch, wanted)]
            ids = torch.from_numpy(np.stack([w[0] for w in part]))
            batches.append(
                Batch(ids, domain, tuple(w[1] for w in part), tuple(d for w in part for d in w[2]))
            )
    return batches


def _windows(
    documents: list[Document], length: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, str, tuple[str, ...]]]:
    """(ids [length], unit, digests) of every full sequence of one domain, in the order they are taken."""
    documents = [documents[i] for i in rng.permutation(len(documents))]
    rounds: list[tuple[int, int, np.ndarray, str, tuple[str, ...]]] = []
    held: list[Document] = []
    for order, d in enumerate(documents):
        for turn in range(len(d.ids) // length):
            rounds.append(
                (turn, order, d.ids[turn * length : (turn + 1) * length], d.name, (d.digest,))
            )
        if len(d.ids) < length:
            held.append(d)
            if sum(len(h.ids) for h in held) >= length:
                ids = np.concatenate([h.ids for h in held])[:length]
                rounds.append(
                    (0, order, ids, " + ".join(h.name for h in held), tuple(h.digest for h in held))
                )
                held = []
    rounds.sort(key=lambda r: r[:2])
    return [r[2:] for r in rounds]


def digest_of(batches: Sequence[Batch]) -> str:
    """One digest of everything that is in the batches, order included."""
    h = hashlib.sha256()
    for b in batches:
        h.update(f"{b.domain}|{tuple(b.ids.shape)}|{b.digests}".encode() + b.ids.numpy().tobytes())
    return h.hexdigest()
