"""Read the records of one file, one after the other, whatever its format.

A reader yields (row, offset, record) of every record: its number from 1 on, where the reader finds
it again, and a dict, a text or an array of token ids. Nothing is read without a bound: a gzip file
may not unpack to a vast one, nor a line or a document be larger than `MAX_RECORD`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from indexcache.data.folders import PACKED, TEXT_SUFFIXES, format_of
from indexcache.data.records import FIELDS

MAX_RECORD = 1 << 28
"""Max bytes of a line, or of a file that is one document; a token has about four."""
MAX_JSON = 1 << 31
"""Max bytes of a .json file, which is parsed as a whole."""
MAX_RATIO = 200
"""A gzip file of text unpacks to 3 to 20 times its size; more than this is a trap."""
HARMLESS = 1 << 28
"""Bytes that a gzip file may unpack to whatever its ratio."""

Row = tuple[int, int, Any]


def read_rows(path: Path, wanted: Collection[tuple[int, int]] | None = None) -> Iterator[Row]:
    """Yield (row, offset, record) of a file.

    Args:
        wanted: (row, offset) of the only records to yield; None yields all.

    Raises:
        ValueError: the file cannot be read, or is not what its name says.
    """
    suffix = format_of(path)
    try:
        if suffix == ".npy":
            yield 0, 0, _load_array(path)
        elif suffix in (".parquet", ".arrow"):
            yield from _tables(path, suffix, None if wanted is None else {r for r, _ in wanted})
        elif suffix in (".jsonl", ".ndjson"):
            yield from _lines(path, wanted)
        elif suffix in TEXT_SUFFIXES:
            yield 0, 0, _text(path)
        else:
            rows = _csv(path) if suffix == ".csv" else _json(path)
            numbers = None if wanted is None else {r for r, _ in wanted}
            yield from (row for row in rows if numbers is None or row[0] in numbers)
    except UnicodeError:
        raise ValueError(f"{path}: is not UTF-8 text.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: cannot be unpacked ({error}); it is damaged or incomplete."
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None


def where_of(path: Path, row: int) -> str:
    """Return the name of a record for messages; row 0 is the file itself."""
    return f"{path}:{row}" if row else str(path)


class _Bounded(io.RawIOBase):
    """Unpacks a gzip file, and refuses one that unpacks to far more than text does."""

    def __init__(self, path: Path):
        self._path = path
        self._limit = max(HARMLESS, MAX_RATIO * path.stat().st_size)
        self._file = gzip.open(path)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._count += len(block)
        if self._count > self._limit:
            raise ValueError(
                f"{self._path}: unpacks to more than {self._limit >> 20} MiB, over {MAX_RATIO} "
                "times its size, which is no text."
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(PACKED):
        return io.BufferedReader(_Bounded(path), 1 << 16)
    return open(path, "rb")


def _lines(path: Path, wanted: Collection[tuple[int, int]] | None) -> Iterator[Row]:
    """Read JSON lines; wanted ones of a file that is not packed by their offset."""
    with _open(path) as f:
        if wanted is not None and f.seekable():
            for number, offset in sorted(wanted):
                f.seek(offset)
                yield number, offset, _parse(_line(f, path, number), where_of(path, number))
            return
        numbers = None if wanted is None else {row for row, _ in wanted}
        last = max(numbers, default=0) if numbers is not None else None
        offset = number = 0
        while line := _line(f, path, number + 1):
            number += 1
            blank = not line.strip(b"\xef\xbb\xbf \t\r\n")
            if not blank and (numbers is None or number in numbers):
                yield number, offset, _parse(line, where_of(path, number))
            if number == last:
                return
            offset += len(line)


def _line(f: IO[bytes], path: Path, number: int) -> bytes:
    line = f.readline(MAX_RECORD + 1)
    if len(line) > MAX_RECORD:
        raise ValueError(
            f"{where_of(path, number)}: is longer than {MAX_RECORD >> 20} MiB; every line of a "
            ".jsonl file is one document, so cut it into several."
        )
    return line


def _parse(line: bytes, where: str) -> Any:
    text = line.decode("utf-8-sig")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: is not JSON; every line of a .jsonl file is one JSON object."
        ) from None


def _whole(path: Path, most: int, advice: str) -> str:
    with _open(path) as f:
        raw = f.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path}: is larger than {most >> 20} MiB; {advice}.")
    return raw.decode("utf-8-sig")


def _text(path: Path) -> str:
    text = _whole(path, MAX_RECORD, "one text file is one document, so cut it into several")
    if "\0" in text:
        raise ValueError(f"{path}: is not text (it has NUL bytes).")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(path: Path) -> Iterator[Row]:
    """Read a .json file: a list of objects, one object with such a list, or JSON lines."""
    text = _whole(path, MAX_JSON, "give JSON lines (.jsonl), which are read one by one")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not any(line.strip() for line in text.split("\n", 1)[1:]):
            raise ValueError(f"{path}: is not JSON.") from None
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, 0, _parse(line.encode(), where_of(path, number))
        return
    if isinstance(value, dict) and not any(name in value for name in FIELDS):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else value
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, 0, row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_RECORD)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as f:
        try:
            reader = csv.DictReader(f)
            _check_columns(path, reader.fieldnames or ())
            for number, row in enumerate(reader, 1):
                fields = {k: v for k, v in row.items() if k is not None and v}
                if any(name in fields for name in FIELDS):
                    yield number, 0, fields
        except csv.Error as error:
            raise ValueError(f"{path}: is not a .csv file ({error}).") from None


def _check_columns(path: Path, names: Iterable[str]) -> list[str]:
    """Return the columns to read of a table; raise ValueError if none of them holds content."""
    names = list(names)
    if not any(name in names for name in FIELDS):
        raise ValueError(
            f"{path}: has no column {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; its columns are "
            f"{', '.join(map(str, names))[:200] or 'none'}."
        )
    return [name for name in (*FIELDS, "domain") if name in names]


def _tables(path: Path, suffix: str, wanted: set[int] | None) -> Iterator[Row]:
    """Read a .parquet or .arrow file, of which only groups of rows with wanted ones are decoded.

    A row whose content is null is passed over.
    """
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading {suffix} files needs pyarrow: pip install 'indexcache[data]'."
        ) from None
    try:
        if suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                columns = _check_columns(path, file.schema_arrow.names)
                start = 0
                for i in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(i).num_rows
                    if wanted is None or any(start < row <= stop for row in wanted):
                        at = start
                        for batch in file.iter_batches(256, row_groups=[i], columns=columns):
                            yield from _table_rows(batch, at, wanted)
                            at += batch.num_rows
                    start = stop
            return
        with pa.memory_map(str(path)) as mapped:
            try:
                batches: Iterable[Any] = ipc.open_stream(mapped)
            except pa.ArrowInvalid:
                file = ipc.open_file(mapped)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            start = 0
            for batch in batches:
                columns = _check_columns(path, batch.schema.names)
                yield from _table_rows(batch.select(columns), start, wanted)
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read as a {suffix} file ({reason:.200}); it is damaged or "
            "incomplete."
        ) from None


def _table_rows(batch: Any, start: int, wanted: set[int] | None) -> Iterator[Row]:
    numbers = range(start + 1, start + batch.num_rows + 1)
    if wanted is not None:
        import pyarrow as pa

        numbers = sorted(wanted.intersection(numbers))  # type: ignore[assignment]
        if not numbers:
            return
        batch = batch.take(pa.array([n - start - 1 for n in numbers]))
    for number, row in zip(numbers, batch.to_pylist(), strict=True):
        fields = {k: v for k, v in row.items() if v is not None}
        if any(name in fields for name in FIELDS):
            yield number, 0, fields


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
