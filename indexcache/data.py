"""Turn text into batches of token ids: read documents, split them, and cut them into sequences.

A source of text is a `.jsonl` file (a `text` or an `ids` field and an optional `domain` per line),
a `.txt`, `.md` or `.rst` file (one document), a `.npy` file (one document of token ids), or a
folder of those, where the name of the sub-folder is the domain. Everything is a function of the
text and the random seed: no global random state is read or changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from indexcache.pattern import Pattern
from indexcache.vacuity import check_context, check_length, default_length

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_context", "check_length", "default_length"]  # They lie in `vacuity`.

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (".jsonl", ".npy", *TEXT_SUFFIXES)
SPLITS = ("calibration", "heldout", "all")
SHIPPED = ("calibration", "heldout")  # names of the two shipped texts
ALL = "all"  # In results, this name stands for all domains together.

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Document:
    """One document.

    Attributes:
        ids: token ids, int64 [n].
        domain: the kind of text, e.g. "code".
        name: where the document was read, for messages.
        digest: sha256 of the ids.
    """

    ids: np.ndarray
    domain: str
    name: str
    digest: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one domain that go through the model together.

    Attributes:
        ids: token ids, int64 [B, T].
        domain: the domain of all of them.
        units: per sequence, the document(s) it is cut from; a bootstrap over documents resamples
            these.
        digests: the digests of all documents in the batch.
        own_context: for each token, the number of tokens of its own document in the sequence up to
            and including it, int64 [B, T]: 1..T where a sequence is cut from one document, and it
            restarts where documents are joined. A batch built without it has 1..T.
    """

    ids: Tensor
    domain: str
    units: tuple[str, ...]
    digests: tuple[str, ...]
    own_context: Tensor = field(default=None)  # type: ignore[assignment]  # __post_init__ sets it.

    def __post_init__(self) -> None:
        if self.own_context is None:
            import torch

            own = torch.arange(1, self.ids.shape[1] + 1).expand(self.ids.shape)
            object.__setattr__(self, "own_context", own)


def batches(
    source: str | Path,
    encode: Encode,
    config: Any,
    *,
    split: str | None = None,
    length: int | None = None,
    sequences: int = 24,
    batch: int = 1,
    seed: int = 0,
    patterns: Iterable[Pattern | str] = (),
) -> list[Batch]:
    """Read a text and cut it into the batches on which a model is searched or evaluated.

    Args:
        source: "calibration" or "heldout" for the shipped text, else a file or folder (see the
            module).
        encode: maps a text to token ids, without special tokens.
        config: the model's config: `vocab_size`, `max_position_embeddings` and `index_topk`.
        split: the split of `split_documents`; None is "all".
        length: tokens per sequence; None is `default_length` for the patterns.
        sequences, batch, seed: see `make_batches`.
        patterns: what is to be measured on the batches; R layers need longer sequences.

    Raises:
        ValueError: text that `load_documents`, `split_documents` or `make_batches` refuses, or a
            length that `check_length` refuses.
    """
    measured = [Pattern.of(p) for p in patterns]
    topk, context = int(config.index_topk), int(config.max_position_embeddings)
    length = check_length(length, topk, context, measured)
    path = shipped_text(str(source)) if source in SHIPPED else Path(source)
    documents = split_documents(load_documents(path, encode, config.vocab_size), split or "all")
    return make_batches(documents, length=length, sequences=sequences, batch=batch, seed=seed)


def shipped_text(name: str) -> Path:
    """Return the file of a shipped text, "calibration" or "heldout"; the licences are in NOTICE."""
    return Path(str(resources.files("indexcache") / "assets" / "text" / f"{name}.jsonl"))


def text_for(model: str, source: str | Path | None, split: str) -> tuple[Path, str]:
    """Return (file or folder, split): the user's text, or the shipped text for the model `tiny`.

    Raises:
        ValueError: no text is given for a model other than `tiny`.
    """
    if source is not None:
        return Path(source), split
    if model != "tiny":
        raise ValueError(
            "Give the text with --data: a .jsonl or text file, a folder of them, or token ids."
        )
    return shipped_text("heldout" if split == "heldout" else "calibration"), "all"


def load_documents(
    source: str | Path, encode: Encode, vocabulary: int, domain: str = "text"
) -> list[Document]:
    """Read a file or a folder into documents, in a fixed order; exact repetitions are dropped.

    Args:
        source: a file or folder, as the module describes.
        encode: maps a text to token ids, without special tokens.
        vocabulary: ids must lie in 0..vocabulary-1.
        domain: the domain of documents that name none.

    Raises:
        ValueError: nothing readable is there, a line is not JSON or has neither text nor ids, or
            ids lie outside the vocabulary.
    """
    root = Path(source)
    documents: dict[str, Document] = {}
    for path, folder_domain in _files(root, domain):
        for ids, where, label in _read(path, encode, folder_domain):
            if not isinstance(label, str) or label in ("", ALL):
                raise ValueError(
                    f"{where}: the domain is {label!r}, but it must be a name other than {ALL!r}, "
                    "which stands for all domains together in results."
                )
            array = _ids(ids, vocabulary, where)
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            if len(array):
                documents.setdefault(digest, Document(array, label, where, digest))
    if not documents:
        raise ValueError(f"{root}: there is no text in it.")
    return list(documents.values())


def _files(root: Path, domain: str) -> list[tuple[Path, str]]:
    """List (file, domain) of everything readable below a source."""
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not paths:
            raise ValueError(f"{root}: no {', '.join(SUFFIXES)} file in this folder.")
        return [(p, p.relative_to(root).parts[0] if p.parent != root else domain) for p in paths]
    if not root.is_file():
        raise ValueError(f"{root}: no such file or folder.")
    if root.suffix not in SUFFIXES:
        raise ValueError(
            f"{root}: text is read from {', '.join(SUFFIXES)} files, not from "
            f"{root.suffix or 'this'}."
        )
    return [(root, domain)]


def _read(path: Path, encode: Encode, domain: str) -> Iterator[tuple[Any, str, Any]]:
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
    except UnicodeError:
        raise ValueError(f"{path}: is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _load_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # On a damaged header numpy raises whatever its parser meets.
        raise ValueError(
            f"{path}: is not a .npy file of numbers ({' '.join(str(error).split())})."
        ) from None


def _row(line: str, where: str, encode: Encode, domain: str) -> tuple[Any, str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError(
            f"{where}: is not JSON; every line of a .jsonl file is one JSON object."
        ) from None
    fields = row if isinstance(row, dict) else {}
    label = fields.get("domain", domain)
    if isinstance(fields.get("ids"), list):
        return fields["ids"], where, label
    if isinstance(fields.get("text"), str):
        return encode(fields["text"]), where, label
    raise ValueError(
        f"{where}: has neither a text field (a string) nor an ids field (a list of token ids)."
    )


def _ids(ids: Any, vocabulary: int, where: str) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # numpy refuses a ragged list.
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{where}: token ids must be one list of whole numbers.")
    array = array.astype(np.int64)
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise ValueError(
            f"{where}: token id {outside[0]} is outside the model's vocabulary of {vocabulary}."
        )
    return array


def split_documents(documents: Sequence[Document], split: str) -> list[Document]:
    """Return the documents of one split: "calibration", "heldout" or "all".

    The side of a document depends on its content alone, so the two sides never share one, whatever
    else is in the source.

    Raises:
        ValueError: an unknown split, or one without a document.
    """
    if split not in SPLITS:
        raise ValueError(f"The split is one of {', '.join(SPLITS)}, not {split!r}.")
    if split == "all":
        return list(documents)
    parity = int(split == "heldout")
    side = [d for d in documents if int(d.digest[:8], 16) % 2 == parity]
    if not side:
        raise ValueError(
            f"None of the {len(documents)} documents falls into the {split} half; give calibration "
            "and held-out text as two sources and use the split 'all' for each."
        )
    return side


def make_batches(
    documents: Sequence[Document], *, length: int, sequences: int, batch: int = 1, seed: int = 0
) -> list[Batch]:
    """Cut documents into `sequences` sequences of `length` tokens, in batches of one domain each.

    The sequences are spread evenly over the domains. A long document gives its first window before
    any gives its second; documents shorter than `length` are joined with others of their domain
    until the sequence is full.

    Args:
        batch: max number of sequences per batch.
        seed: random seed of the order in which documents are taken.

    Raises:
        ValueError: a number that is too small, or a domain with too little text.
    """
    for name, value, minimum in (
        ("length", length, 1),
        ("sequences", sequences, 1),
        ("batch", batch, 1),
        ("seed", seed, 0),
    ):
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value}.")
    domains = sorted({d.domain for d in documents})
    if not domains:
        raise ValueError("There is no document to make sequences from.")
    if sequences < len(domains):
        raise ValueError(
            f"{sequences} sequences cannot cover {len(domains)} domains ({', '.join(domains)}); "
            "ask for more."
        )
    import torch  # It is imported here so that --help need not wait for it.

    result = []
    for i, domain in enumerate(domains):
        count = sequences // len(domains) + (i < sequences % len(domains))
        rng = np.random.default_rng([seed, *domain.encode()])
        windows = _windows([d for d in documents if d.domain == domain], length, rng)
        if len(windows) < count:
            raise ValueError(
                f"The domain {domain!r} has text for {len(windows)} sequences of {length} tokens, "
                f"but {count} are asked for; give more text, shorter sequences or fewer of them."
            )
        for start in range(0, count, batch):
            taken = windows[start : min(start + batch, count)]
            ids = torch.from_numpy(np.stack([w.ids for w in taken]))
            own = torch.from_numpy(np.stack([w.own_context for w in taken]))
            units = tuple(w.unit for w in taken)
            digests = tuple(d for w in taken for d in w.digests)
            result.append(Batch(ids, domain, units, digests, own))
    return result


@dataclass(frozen=True, eq=False)
class _Window:
    """One sequence, with its place in the order in which sequences are taken."""

    order: tuple[int, int]  # (number of the window in its document, place of the document)
    ids: np.ndarray
    unit: str
    digests: tuple[str, ...]
    own_context: np.ndarray  # int64 [length], as in Batch


def _windows(documents: list[Document], length: int, rng: np.random.Generator) -> list[_Window]:
    """Cut one domain into every full sequence it has, in the order in which they are taken."""
    windows: list[_Window] = []
    counted = np.arange(1, length + 1)
    short: list[Document] = []
    for place, index in enumerate(rng.permutation(len(documents))):
        d = documents[index]
        for n in range(len(d.ids) // length):
            ids = d.ids[n * length : (n + 1) * length]
            windows.append(_Window((n, place), ids, d.name, (d.digest,), counted))
        if len(d.ids) < length:
            short.append(d)
            if sum(len(s.ids) for s in short) >= length:
                ids = np.concatenate([s.ids for s in short])[:length]
                unit = " + ".join(s.name for s in short)
                digests = tuple(s.digest for s in short)
                own = np.concatenate([np.arange(1, len(s.ids) + 1) for s in short])[:length]
                windows.append(_Window((0, place), ids, unit, digests, own))
                short = []
    return sorted(windows, key=lambda w: w.order)


def digest_of(batches: Sequence[Batch]) -> str:
    """Return one digest of everything that is in the batches, order included."""
    h = hashlib.sha256()
    for b in batches:
        h.update(f"{b.domain}|{tuple(b.ids.shape)}|{b.digests}".encode() + b.ids.numpy().tobytes())
    return h.hexdigest()


def check_unseen(batches: Sequence[Batch], seen: Iterable[str]) -> None:
    """Raise ValueError when a document of these batches was calibration text of a search."""
    shared = {d for b in batches for d in b.digests} & set(seen)
    if shared:
        raise ValueError(
            f"{len(shared)} of the held-out documents were calibration text of the search, so this "
            "would not be evidence; give other text, or use the split 'heldout' of the text the "
            "search took its 'calibration' from."
        )
