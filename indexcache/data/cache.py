"""Keep token ids between commands, because tokenising a large text takes minutes.

One SQLite file in the user's cache folder holds the ids of texts, by a digest of tokenizer and
text. It is a convenience: where it cannot be read or written, is damaged, or is in use too long,
texts are tokenised. INDEXCACHE_CACHE names another folder; "off" or nothing switches it off.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import sqlite3

VARIABLE = "INDEXCACHE_CACHE"
FILE = "tokens-1.sqlite"
MIN_TEXT = 1 << 12
"""Characters of the shortest text that is worth a look-up."""
MAX_BYTES = 4 << 30
"""Bytes of the file above which nothing is added to it."""
PENDING = 1 << 26
"""Bytes of ids that are written at once."""
WAIT = 2.0
"""Seconds to wait for another process that writes."""

log = logging.getLogger("indexcache")


def cache_folder() -> Path | None:
    """Return the folder of the cache; None if it is switched off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named.strip().lower() not in ("", "off", "0", "no") else None
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "indexcache")
    home = Path(os.path.expanduser("~"))
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "indexcache"


class TokenCache:
    """Token ids by text, for one tokenizer."""

    def __init__(self, tokenizer: str, database: sqlite3.Connection | None):
        self._tokenizer = tokenizer
        self._database = database
        self._new: dict[bytes, bytes] = {}
        self._bytes = 0

    @classmethod
    @contextmanager
    def open(cls, tokenizer: str | None) -> Iterator[TokenCache]:
        """Open the cache of a tokenizer, and write what is new at the end.

        Args:
            tokenizer: a digest of everything that decides the ids; None opens none.
        """
        folder = cache_folder() if tokenizer else None
        cache = cls(tokenizer or "", _connect(folder / FILE) if folder else None)
        try:
            yield cache
        finally:
            cache._write()
            if cache._database is not None:
                cache._database.close()

    def ids(self, text: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the ids of a text: kept ones, or else those that `make` returns."""
        if self._database is None or len(text) < MIN_TEXT:
            return make()
        key = hashlib.sha256(f"{self._tokenizer}\0{text}".encode()).digest()
        if (kept := self._read(key)) is not None:
            return kept
        ids = make()
        if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) and _fits(ids):
            body = ids.astype("<i4").tobytes()
            self._new[key] = _seal(key, body) + body
            self._bytes += len(body)
            if self._bytes > PENDING:
                self._write()
        return ids

    def _read(self, key: bytes) -> np.ndarray | None:
        import sqlite3

        assert self._database is not None
        try:
            row = self._database.execute("SELECT ids FROM tokens WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
        if row is None or not isinstance(row[0], bytes):
            return None
        seal, body = row[0][:16], row[0][16:]
        if seal != _seal(key, body) or len(body) % 4:
            return None
        return np.frombuffer(body, "<i4").astype(np.int64)

    def _write(self) -> None:
        """Write what is new in one transaction; whatever fails, the texts were tokenised."""
        rows, self._new, self._bytes = list(self._new.items()), {}, 0
        if self._database is None or not rows:
            return
        import sqlite3

        try:
            with self._database:
                pages, size = (
                    self._database.execute(f"PRAGMA {what}").fetchone()[0]
                    for what in ("page_count", "page_size")
                )
                if pages * size < MAX_BYTES:
                    self._database.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            log.debug("The token cache was not written (%s).", error)


def _fits(ids: np.ndarray) -> bool:
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < 1 << 31)


def _seal(key: bytes, body: bytes) -> bytes:
    return hashlib.sha256(key + body).digest()[:16]


def _connect(path: Path) -> sqlite3.Connection | None:
    """Open the file, and begin a new one where the old one is damaged; None if that fails."""
    try:
        import sqlite3
    except ImportError:  # Python can be built without it.
        return None
    for attempt in range(2):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=WAIT)
            try:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS tokens (key BLOB PRIMARY KEY, ids BLOB)"
                )
                return database
            except BaseException:
                database.close()
                raise
        except sqlite3.OperationalError:
            return None  # It is locked, read-only or out of space.
        except sqlite3.DatabaseError:
            if attempt == 0:
                with suppress(OSError):
                    path.unlink()
        except (OSError, ValueError):
            return None
    return None
