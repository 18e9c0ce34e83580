"""The text of the comparison: tokens, retrieval sequences, rows of the arms, held-out documents.

    python -m recipes.training_aware.text --tokens train.u16.xz --out work --millions 35 35

cuts a long file of token ids into smaller ones, tokens-0.u16.xz and so on, of whole documents in a
random order, for a machine to which little can be carried.

The tokens are uint16 ids, documents closed by id 0. A share of all training sequences holds a
retrieval task: half of these are of the kinds of `indexcache.data.tasks`, made once (`make_bank`),
the others are those of recipes/tiny, made on the way. Everything is a function of the random seed.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from indexcache.data import Batch, Document, parse_kinds, retrieval_batches
from indexcache.distilling import Row
from indexcache.records import atomic
from recipes.tiny.retrieval import Retrieval

DOMAINS = {
    "prose": ("anarchism", "austen", "bible", "shakespeare", "sotu"),
    "code": ("code_c", "code_go", "code_py", "code_rs"),
    "legal": ("legal",),
}
"""The sources of each domain; all others are documentation."""
ROWS_SEED = 1000
"""The bank, the base and the rows of an arm draw from different streams of random numbers."""


def read_tokens(paths: Sequence[Path]) -> np.ndarray:
    """Return the token ids of the files, uint16 [tokens]."""
    return np.concatenate(
        [np.frombuffer(lzma.decompress(p.read_bytes()), np.uint16) for p in paths]
    )


def split(ids: np.ndarray) -> list[np.ndarray]:
    """Return the documents of a stream of ids, without the 0 that closes each."""
    stops = np.append(np.flatnonzero(ids == 0), len(ids))
    starts = np.append(0, stops[:-1] + 1)
    return [ids[a:b] for a, b in zip(starts, stops, strict=True) if b > a]


def encoder(path: Path) -> Any:
    """Return the function that turns text into ids, without special tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def documents_of(pieces: Sequence[np.ndarray], domain: str, name: str) -> list[Document]:
    """Make documents of token ids."""
    return [
        Document(
            np.asarray(ids, np.int64),
            domain,
            f"{name}/{i}",
            hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest(),
        )
        for i, ids in enumerate(pieces)
    ]


def held_out_documents(path: Path, shortest: int, most: int | None = None) -> list[Document]:
    """Read the held-out documents of at least `shortest` tokens, with their domains.

    Args:
        most: the number of documents of each source, at most.
    """
    domain_of = {source: d for d, sources in DOMAINS.items() for source in sources}
    found: list[Document] = []
    with np.load(path) as sources:
        for name in sorted(sources.files):
            pieces = [p for p in split(sources[name]) if len(p) >= shortest][:most]
            found += documents_of(pieces, domain_of.get(name, "documentation"), name)
    return found


def held_out_batches(
    documents: Sequence[Document], length: int, windows: int, batch: int
) -> list[Batch]:
    """Cut every document into at most `windows` sequences; batches are of one domain."""
    batches = []
    for domain in sorted({d.domain for d in documents}):
        cut = [
            (d, d.ids[i * length : (i + 1) * length])
            for d in documents
            if d.domain == domain
            for i in range(min(len(d.ids) // length, windows))
        ]
        for at in range(0, len(cut), batch):
            part = cut[at : at + batch]
            batches.append(
                Batch(
                    torch.from_numpy(np.stack([ids for _, ids in part])),
                    domain,
                    units=tuple(d.name for d, _ in part),
                    digests=tuple(d.digest for d, _ in part),
                )
            )
    return batches


# ---- training sequences


def make_bank(
    out: Path,
    tokens: np.ndarray,
    tokenizer: Path,
    kinds: Sequence[str],
    *,
    vocabulary: int,
    length: int,
    sequences: int,
    parts: int,
) -> None:
    """Write `out`, uint16 [2, kinds x sequences, length]: retrieval in real text, to train on.

    The ids come first, then 1 where a token is part of an answer.

    Args:
        parts: number of parts, each of its own random seed, which processes make at once.
    """
    rng = np.random.default_rng(ROWS_SEED)
    starts = rng.integers(0, len(tokens) - length, 64 * parts)
    filler = [tokens[s : s + length][tokens[s : s + length] != 0] for s in starts]
    size = -(-sequences // parts)
    jobs = [
        (i, filler[i::parts], tokenizer, tuple(kinds), vocabulary, length, size)
        for i in range(parts)
    ]
    if parts == 1:
        made = [_part_of_bank(*jobs[0])]
    else:
        with ProcessPoolExecutor(min(parts, os.cpu_count() or 1)) as pool:
            made = list(pool.map(_part_of_bank, *zip(*jobs, strict=True)))
    bank = np.concatenate(made, 1)
    with atomic(out) as temporary, open(temporary, "wb") as f:
        np.save(f, np.random.default_rng(1).permutation(bank, axis=1))


def _part_of_bank(
    number: int,
    filler: Sequence[np.ndarray],
    tokenizer: Path,
    kinds: Sequence[str],
    vocabulary: int,
    length: int,
    sequences: int,
) -> np.ndarray:
    batches = retrieval_batches(
        encoder(tokenizer),
        vocabulary,
        kinds,
        length=length,
        sequences=sequences,
        documents=documents_of(filler, "text", "filler"),
        split="calibration",
        batch=sequences,
        seed=number,
    )
    both = [np.stack([b.ids.numpy(), b.counted.numpy()]) for b in batches]
    return np.concatenate(both, 1).astype(np.uint16)


class Windows:
    """Random windows of the tokens, some with a retrieval task; see the top of this file."""

    def __init__(
        self, tokens: np.ndarray, bank: np.ndarray, tokenizer: Path, vocabulary: int, share: float
    ):
        self.tokens = tokens
        self.bank = bank
        self.task = Retrieval(Tokenizer.from_file(str(tokenizer)), vocabulary)
        self.share = share

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Draw one sequence, int64 [length]."""
        return self.drawn(rng, length)[0]

    def drawn(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Draw one sequence, int64 [length], and the places of answers where it is of the bank."""
        chance = rng.random()
        if chance < self.share / 2 and length <= self.bank.shape[2]:
            # The end of a sequence of the bank has its questions.
            ids, counted = self.bank[:, rng.integers(self.bank.shape[1])][:, -length:]
            edges = np.flatnonzero(np.diff(counted[1:].astype(np.int8), prepend=0, append=0)) + 1
            return ids.astype(np.int64), [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        start = int(rng.integers(0, len(self.tokens) - length))
        ids = self.tokens[start : start + length].astype(np.int64)
        return self.task(ids, rng) if chance < self.share else ids, []

    def batches(self, seed: int) -> Any:
        """Return the function (step, batch, length) of the base's stages: int64 [B, length + 1]."""

        def draw(step: int, batch: int, length: int) -> torch.Tensor:
            rng = np.random.default_rng([seed, step])
            return torch.from_numpy(np.stack([self.window(rng, length + 1) for _ in range(batch)]))

        pool = ThreadPoolExecutor(1)
        ahead: dict[int, Any] = {}

        def batch(step: int, batch: int, length: int) -> torch.Tensor:
            found = ahead.pop(step, None)
            ids = draw(step, batch, length) if found is None else found.result()
            ahead[step + 1] = pool.submit(draw, step + 1, batch, length)  # While the GPU works.
            return ids

        return batch

    def rows(self, seed: int, count: int, together: int, length: int) -> list[Row]:
        """Return the rows that every arm of a seed trains on; fewer rows are the first of more.

        Args:
            count: number of rows.
            together: number of sequences in a row, each a document of its own.
            length: number of tokens of a sequence.
        """

        def row(i: int) -> Row:
            rng = np.random.default_rng([ROWS_SEED, seed, i])
            drawn = [self.drawn(rng, length) for _ in range(together)]
            places = [
                (a + i * length, b + i * length)
                for i, (_, spans) in enumerate(drawn)
                for a, b in spans
            ]
            row = Row.of_documents([ids for ids, _ in drawn])
            return replace(row, answers=tuple(places))

        return [row(i) for i in range(count)]


def retrieval(
    o: Any,
    documents: Sequence[Document],
    split: str,
    length: int,
    sequences: int,
    vocabulary: int,
    seed: int = 0,
) -> list[Batch]:
    """Make retrieval of all kinds of the run in the text of the documents."""
    return retrieval_batches(
        encoder(o.tokenizer),
        vocabulary,
        parse_kinds(o.kinds),
        length=length,
        sequences=sequences,
        documents=documents,
        split=split,
        batch=o.eval_batch,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--millions", type=float, nargs="+", required=True, help="Tokens of each file."
    )
    o = parser.parse_args()
    documents = split(read_tokens([o.tokens]))
    order = iter(np.random.default_rng(0).permutation(len(documents)).tolist())
    o.out.mkdir(parents=True, exist_ok=True)
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    for number, millions in enumerate(o.millions):
        taken: list[np.ndarray] = []
        size = 0
        for i in order:
            taken += [documents[i], np.zeros(1, np.uint16)]
            size += len(documents[i]) + 1
            if size >= millions * 1e6:
                break
        path = o.out / f"tokens-{number}.u16.xz"
        path.write_bytes(
            lzma.compress(np.concatenate(taken).tobytes(), format=lzma.FORMAT_XZ, filters=filters)
        )
        print(f"{path}: {size / 1e6:.1f} M tokens, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
