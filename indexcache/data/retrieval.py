"""Make retrieval sequences: facts spread over a long text, and questions for them at its end.

The mean loss hardly sees whether a model finds what lies far back in its context. In these
sequences only the tokens of the answers count, so their loss is nothing else. Everything is a
function of the tokenizer, the filler and the random seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexcache.data.batch import Batch
from indexcache.data.batches import SHIPPED, named_source, shipped_text
from indexcache.data.documents import SPLITS, Document, ids_digest, split_documents
from indexcache.data.records import Encode, checked_ids
from indexcache.data.sources import Tokenizing, scan
from indexcache.data.tasks import KINDS, Task, filler_sentence

DOMAIN = "retrieval:"
"""The domain of a retrieval sequence is this and its kind."""
FACTS_SHARE = 0.5
"""Facts take at most this share of a sequence; where they would take more there are fewer."""
SENTENCES = 64  # so many sentences of generated filler are encoded at once

Filler = Callable[[np.random.Generator, int], tuple[np.ndarray, tuple[Document, ...]]]


def parse_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return kinds of retrieval in the order of `KINDS`; "all" means every kind.

    Raises:
        ValueError: an unknown kind.
    """
    for kind in kinds:
        if kind != "all" and kind not in KINDS:
            raise ValueError(
                f"{kind!r:.60} is no kind of retrieval; the kinds are {', '.join(KINDS)}, or all."
            )
    return tuple(k for k in KINDS if k in kinds or "all" in kinds)


def retrieval_batches(
    encode: Encode,
    vocabulary: int,
    kinds: Sequence[str],
    *,
    length: int,
    sequences: int,
    documents: Sequence[Document] = (),
    split: str = "all",
    batch: int = 1,
    seed: int = 0,
) -> list[Batch]:
    """Make `sequences` sequences of exactly `length` tokens of every kind of retrieval.

    Args:
        encode: maps a text to token ids, without special tokens.
        vocabulary: ids must lie in 0..vocabulary-1.
        kinds: see `parse_kinds`.
        documents: their text is the filler; without any, sentences that mean nothing are.
        split: calibration and held-out sequences of one seed are others.
        batch: max number of sequences in a batch.
        seed: random seed.

    Returns:
        Batches whose domain is "retrieval:" and the kind, with `answers`.

    Raises:
        ValueError: an unknown kind or split; a number that is too small; a length into which a
            kind does not fit; documents with too little text; a tokenizer that gives different
            answers the same tokens.
    """
    kinds = parse_kinds(kinds)
    if split not in SPLITS:
        raise ValueError(f"The split is one of {', '.join(SPLITS)}, not {split!r}.")
    for name, value, least in (
        ("length", length, 1),
        ("sequences", sequences, 1),
        ("batch", batch, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}.")
    writer = _Writer(encode, vocabulary, length)
    result = []
    for kind in kinds:
        rows = []
        for i in range(sequences):
            rng = np.random.default_rng([seed, SPLITS.index(split), i, *kind.encode()])
            fill = _text_filler(documents) if documents else writer.generated
            rows.append(writer.sequence(kind, rng, (i + rng.random()) / sequences, fill))
        names = [f"{kind} {split} {seed}:{i}" for i in range(sequences)]
        for at in range(0, sequences, batch):
            result.append(_batch(kind, rows[at : at + batch], names[at : at + batch]))
    return result


def filler_documents(
    source: str | Path, how: Tokenizing, *, split: str | None, tokens: int, seed: int
) -> list[Document]:
    """Read as many documents of a text as have `tokens` tokens together, or all, for filler.

    Raises:
        ValueError: text that `scan`, `Source.read` or `split_documents` refuses.
    """
    path = shipped_text(str(source)) if source in SHIPPED else named_source(source)
    found = scan(path, how.vocabulary)
    unread = split_documents(found.documents, split or "all")
    order = np.random.default_rng([seed, len(unread)]).permutation(len(unread)).tolist()
    documents: list[Document] = []
    while order and sum(len(d.ids) for d in documents) < tokens:
        taken, order = order[: max(len(documents), 4)], order[max(len(documents), 4) :]
        documents += found.read([unread[i] for i in taken], how)
    return documents


@dataclass(frozen=True, eq=False)
class _Row:
    ids: np.ndarray  # int64 [length]
    answers: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...]  # the filler is taken from these


def _batch(kind: str, rows: Sequence[_Row], units: Sequence[str]) -> Batch:
    import torch  # It is imported here so that --help need not wait for it.

    digests = [(d.digest, d.text_digest) for r in rows for d in r.documents]
    digests += [(ids_digest(r.ids), "") for r in rows]
    return Batch(
        torch.from_numpy(np.stack([r.ids for r in rows])),
        f"{DOMAIN}{kind}",
        units=tuple(units),
        digests=tuple(d for d, _ in digests),
        text_digests=tuple(t for _, t in digests),
        shingles=tuple(
            np.concatenate([np.empty(0, np.uint64), *(d.shingles for d in r.documents)])
            for r in rows
        ),
        answers=tuple(r.answers for r in rows),
    )


def _text_filler(documents: Sequence[Document]) -> Filler:
    """Return a filler that takes the text of the documents in a random order."""

    def fill(rng: np.random.Generator, count: int) -> tuple[np.ndarray, tuple[Document, ...]]:
        taken: list[Document] = []
        for i in rng.permutation(len(documents)).tolist():
            if sum(len(d.ids) for d in taken) >= count:
                break
            taken.append(documents[i])
        ids = np.concatenate([np.empty(0, np.int64), *(d.ids for d in taken)])
        if len(ids) < count:
            raise ValueError(
                f"The text has {len(ids)} tokens, but retrieval sequences need {count} between "
                "their facts; give more text, shorter sequences, or take generated filler."
            )
        return ids[:count], tuple(taken)

    return fill


class _Writer:
    """Makes token ids of tasks, in one tokenizer and at one length."""

    def __init__(self, encode: Encode, vocabulary: int, length: int):
        self.encode = encode
        self.vocabulary = vocabulary
        self.length = length
        self.sizes: dict[str, int] = {}

    def ids(self, text: str) -> np.ndarray:
        return checked_ids(self.encode(text), self.vocabulary, "retrieval")

    def generated(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, tuple[()]]:
        parts = [np.empty(0, np.int64)]
        while sum(map(len, parts)) < count:
            parts.append(self.ids("".join(filler_sentence(rng) for _ in range(SENTENCES))))
            if not len(parts[-1]):
                raise ValueError("The tokenizer gives no tokens for a plain English sentence.")
        return np.concatenate(parts)[:count], ()

    def sequence(self, kind: str, rng: np.random.Generator, depth: float, fill: Filler) -> _Row:
        """Make one sequence; `depth`, in 0..1, is where a single fact lies."""
        facts, tail, answers = self._task(kind, rng)
        room = self.length - sum(map(len, facts)) - len(tail)
        filler, documents = fill(rng, room)
        cuts = (
            [int(depth * room)]
            if len(facts) == 1
            else sorted(rng.integers(0, room + 1, len(facts)))
        )
        parts: list[np.ndarray] = []
        at = 0
        for cut, fact in zip(cuts, facts, strict=True):
            parts += [filler[at:cut], fact]
            at = cut
        ids = np.concatenate([*parts, filler[at:], tail])
        begin = self.length - len(tail)
        spans = tuple((begin + start, begin + stop) for start, stop in answers)
        return _Row(ids, spans, documents)

    def _task(
        self, kind: str, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray, list[tuple[int, int]]]:
        """Write a task with as many facts as fit: the ids of its facts, its tail and its answers.

        The number of facts is that of the first sequence of the kind that fitted.
        """
        write, most, least = KINDS[kind]
        size = self.sizes.get(kind, most)
        state = rng.bit_generator.state
        while True:
            task = write(rng, size)
            facts = [self.ids(fact) for fact in task.facts]
            tail, answers = self._tail(task)
            taken = sum(map(len, facts))
            if size == least or taken + len(tail) <= FACTS_SHARE * self.length:
                break
            rng.bit_generator.state = state
            size = max(size * 3 // 4, least)
        if taken + len(tail) > self.length:
            raise ValueError(
                f"Retrieval of the kind {kind} needs sequences of at least {taken + len(tail)} "
                f"tokens in this tokenizer, not {self.length}; give longer ones, or leave it out."
            )
        self.sizes[kind] = size
        return facts, tail, answers

    def _tail(self, task: Task) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Encode the questions with their answers: the ids, and the places of those that count."""
        parts: list[np.ndarray] = []
        spans: list[tuple[int, int]] = []
        texts: dict[bytes, str] = {}
        at = 0
        for i, (question, answer) in enumerate(task.questions):
            asked, both = self.ids(question), self.ids(question + answer)
            if len(both) > len(asked) and np.array_equal(both[: len(asked)], asked):
                given = both[len(asked) :]
            else:  # The tokenizer joins the end of the question with the answer.
                given = self.ids(answer)
            if texts.setdefault(given.tobytes(), answer) != answer or not len(given):
                raise ValueError(
                    f"The tokenizer gives the answers {answer!r:.40} and "
                    f"{texts[given.tobytes()]!r:.40} the same tokens, so retrieval would say "
                    "nothing with it."
                )
            parts += [asked, given]
            if i >= task.shown:
                spans.append((at + len(asked), at + len(asked) + len(given)))
            at += len(asked) + len(given)
        return np.concatenate(parts), spans
