"""Read a source: first what documents there are, then, for those that are needed, their tokens."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from indexcache.data.cache import TokenCache
from indexcache.data.documents import Document, Unread, ids_digest, text_digest
from indexcache.data.folders import Listing, describe_listing, list_files
from indexcache.data.leaks import text_shingles
from indexcache.data.readers import read_rows, where_of
from indexcache.data.records import (
    Chat,
    Content,
    Encode,
    checked_domain,
    checked_ids,
    checked_text,
    content_of,
    plain_text,
    render,
)
from indexcache.progress import progress as progress_bar

KEPT_BYTES = 1 << 26
"""Content of about this many bytes stays in memory between the first reading and the second."""
PATIENCE = 2.0
"""Seconds after which a bar is shown; most texts are read sooner."""

log = logging.getLogger("indexcache")


@dataclass(frozen=True)
class Tokenizing:
    """How content becomes token ids.

    Attributes:
        encode: maps a text to token ids, without special tokens.
        vocabulary: ids must lie in 0..vocabulary-1.
        chat: maps the messages of a chat to the text that a model reads; None refuses chats.
        tokenizer: a digest of the tokenizer, under which token ids are cached; None caches none.
    """

    encode: Encode
    vocabulary: int
    chat: Chat | None = None
    tokenizer: str | None = None


@dataclass
class Source:
    """The documents of a source, which are read and tokenised when they are asked for.

    Attributes:
        documents: what is there, in a fixed order, every document once.
    """

    root: Path
    listing: Listing
    documents: list[Unread]
    vocabulary: int
    shown: bool = False
    _kept: dict[tuple[int, int], Content] = field(default_factory=dict, repr=False)

    def read(self, documents: Sequence[Unread], how: Tokenizing) -> list[Document]:
        """Read and tokenise documents of this source, in their order.

        Raises:
            ValueError: a file changed since it was listed, the template refuses a chat, or the
                tokenizer gives ids outside the vocabulary.
        """
        result: dict[tuple[int, int], Document] = {}
        by_file: dict[int, list[Unread]] = defaultdict(list)
        for d in documents:
            by_file[d.file].append(d)
        bar = progress_bar(len(documents), "document", shown=self.shown, delay=PATIENCE)
        with TokenCache.open(how.tokenizer) as cache, bar:
            for file, wanted in by_file.items():
                path = self.listing.files[file][0]
                keys = {d.row: d.key for d in wanted}
                for row, content in self._contents(file, wanted):
                    where = where_of(path, row)
                    if content.key != keys[row]:
                        raise ValueError(f"{path}: the file changed while it was read; try again.")
                    result[file, row] = _tokenised(content, where, how, cache)
                    bar.update()
        return [result[d.file, d.row] for d in documents]

    def _contents(self, file: int, wanted: list[Unread]) -> Iterator[tuple[int, Content]]:
        path, domain = self.listing.files[file]
        missing = {(d.row, d.offset) for d in wanted if (file, d.row) not in self._kept}
        found = 0
        for row, _, value in read_rows(path, missing) if missing else ():
            found += 1
            yield row, _content(value, where_of(path, row), row, domain, self.vocabulary)
        if found != len(missing):
            raise ValueError(f"{path}: the file changed while it was read; try again.")
        for d in wanted:
            if (file, d.row) in self._kept:
                yield d.row, self._kept[file, d.row]


def scan(
    source: str | Path, vocabulary: int, domain: str = "text", *, progress: bool = False
) -> Source:
    """Read every record of a file or folder once, and keep what tells documents apart.

    No tokenizer is needed. Exact repetitions, and copies that differ in white space, case or
    Unicode form, are one document.

    Args:
        source: see `indexcache.data`.
        vocabulary: given ids must lie in 0..vocabulary-1.
        domain: the domain of documents that name none.
        progress: show a bar on stderr if it takes long.

    Raises:
        ValueError: nothing readable is there, or a record is not what `content_of` takes.
    """
    root = Path(source)
    listing = list_files(root, domain)
    found: dict[str, Unread] = {}
    kept: dict[tuple[int, int], Content] = {}
    room = KEPT_BYTES
    total = sum(path.stat().st_size for path, _ in listing.files)
    rows = copies = 0
    with progress_bar(total, "B", shown=progress, delay=PATIENCE, scaled=True) as bar:
        for file, (path, folder_domain) in enumerate(listing.files):
            done = 0
            for row, offset, value in read_rows(path):
                content = _content(value, where_of(path, row), row, folder_domain, vocabulary)
                rows += 1
                if offset > done + (1 << 20):
                    bar.update(offset - done)
                    done = offset
                if not (key := content.key):
                    continue
                if key in found:
                    copies += 1
                    continue
                found[key] = Unread(file, row, offset, content.domain, key)
                if room > 0:
                    kept[file, row] = content
                    room -= _size(content)
            bar.update(path.stat().st_size - done)
    if root.is_dir() and os.environ.get("RANK", "0") == "0":
        log.info(describe_listing(root, listing))
    if not found:
        raise ValueError(f"{root}: there is no text in it.")
    if copies and os.environ.get("RANK", "0") == "0":
        log.info(
            "%s: %d of %d documents are copies of another one, but for white space, case and "
            "Unicode form, and were left out.",
            root,
            copies,
            rows,
        )
    return Source(root, listing, list(found.values()), vocabulary, progress, kept)


def load_documents(
    source: str | Path,
    encode: Encode,
    vocabulary: int,
    domain: str = "text",
    *,
    chat: Chat | None = None,
    tokenizer: str | None = None,
    progress: bool = False,
) -> list[Document]:
    """Read a file or a folder into documents, in a fixed order; repetitions are dropped.

    Args:
        source: a file or folder, as `indexcache.data` describes.
        encode, vocabulary, chat, tokenizer: see `Tokenizing`.
        domain: the domain of documents that name none.
        progress: show a bar on stderr if it takes long.

    Raises:
        ValueError: see `scan` and `Source.read`.
    """
    found = scan(source, vocabulary, domain, progress=progress)
    how = Tokenizing(encode, vocabulary, chat, tokenizer)
    documents: dict[str, Document] = {}
    for d in found.read(found.documents, how):
        if len(d.ids):
            documents.setdefault(d.digest, d)
    if not documents:
        raise ValueError(f"{found.root}: there is no text in it.")
    return list(documents.values())


def _content(value: object, where: str, row: int, domain: str, vocabulary: int) -> Content:
    """Return the content of what a reader yields: a record, or a file's text or array (row 0)."""
    if isinstance(value, str) and row == 0:
        return Content(checked_text(value, where), checked_domain(domain, where))
    if isinstance(value, np.ndarray):
        return Content(checked_ids(value, vocabulary, where), checked_domain(domain, where))
    return content_of(value, where, domain, vocabulary)


def _size(content: Content) -> int:
    value = content.value
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, str) else len(plain_text(value))


def _tokenised(content: Content, where: str, how: Tokenizing, cache: TokenCache) -> Document:
    if isinstance(content.value, np.ndarray):
        ids = content.value
        return Document(ids, content.domain, where, ids_digest(ids) or "0" * 64)
    text = render(content.value, how.chat, where)
    ids = cache.ids(text, lambda: _encoded(how.encode, text, where))
    ids = checked_ids(ids, how.vocabulary, where)
    plain = plain_text(content.value)
    return Document(
        ids,
        content.domain,
        where,
        ids_digest(ids) or "0" * 64,
        text_digest(plain),
        text_shingles(plain),
    )


def _encoded(encode: Callable[[str], Sequence[int]], text: str, where: str) -> np.ndarray:
    try:
        return np.asarray(encode(text))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where}: the tokenizer refuses this text ({error}).") from None
