"""Run folders: settings that must not change, an append-only journal, atomic results. Resume = the same command again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part of it."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, allow_nan=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What libraries raise where the system refuses to write below `path` (safetensors and torch wrap it), as the OSError it is."""
    try:
        yield
    except (OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        number = _refusal(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)  # of what is written


def _refusal(error: BaseException) -> int | None:
    """The number of the OSError of `REFUSALS` behind an exception; None where there is none."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        e = waiting.pop()
        seen.add(id(e))
        said = re.search(r"\(os error (\d+)\)", str(e))  # as Rust says it
        number = e.errno if isinstance(e, OSError) else int(said[1]) if said else None
        if number in REFUSALS:
            return number
        failures = [
            x for x, _ in getattr(e, "failures", {}).values()
        ]  # CheckpointException: {rank: (exception, traceback)}
        waiting += [
            x
            for x in (*failures, e.__cause__, e.__context__)
            if x is not None and id(x) not in seen
        ]
    return None


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}).") from None


class Run:
    """One run's folder, open for writing: `settings.json`, `journal.jsonl`, and whatever results are saved.

    Use it as `with open_run(out, settings) as run:`. The journal holds one JSON object a line; a line that a kill cut
    off is dropped when the folder is opened again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.journal = self._recover()
        self._file = open(folder / "journal.jsonl", "a", encoding="utf-8")

    def _recover(self) -> list[dict[str, Any]]:
        path = self.folder / "journal.jsonl"
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with open(path, "r+b") as f:
                f.truncate(len(whole))
        return _entries(path, whole)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and force it to the disk before returning."""
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.journal.append(entry)

    def save(self, name: str, value: Any) -> Path:
        """Write `value` as JSON into the folder, atomically."""
        write_json(self.folder / name, value)
        return self.folder / name

    def close(self) -> None:
        self._file.close()


def _entries(path: Path, lines: bytes) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in lines.splitlines()]
    except (ValueError, RecursionError):
        entries = [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{path}: a line is not a JSON object, so the journal was changed by hand; start in a new folder."
        )
    return entries


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run, which may be writing it now: a line without its end is left out.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / "journal.jsonl"
    raw = _read(path)
    return _entries(path, raw[: raw.rfind(b"\n") + 1])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from None


def finished_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run that has its result.

    Raises:
        ValueError: the folder has none, or the journal cannot be read.
    """
    path = folder / "journal.jsonl"
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder}: there is no finished run in this folder.")
    return _entries(path, _read(path))


@contextmanager
def open_run(folder: Path, settings: Mapping[str, Any]) -> Iterator[Run]:
    """Open a run's folder, new or interrupted.

    Raises:
        ValueError: the folder belongs to a run with other settings (each difference is named), or to one that is
            running now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder}: another process is writing this run; wait for it or choose another --out."
            ) from None
        _claim(folder, settings)
        run = Run(folder)
        try:
            yield run
        finally:
            run.close()


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `settings` those of a folder that has none, without opening a run; processes that do it together wait for each other.
    For a folder of several runs, each in a folder of its own. Raises ValueError where it has others (each difference is named)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _claim(folder, settings)


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(
                f"{path}: is not a JSON object, so it was changed by hand; choose another --out."
            )
        changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if changed:
            what = "; ".join(
                f"{k} was {_short(before.get(k))}, now {_short(settings.get(k))}" for k in changed
            )
            raise ValueError(
                f"{folder}: this run was begun with other settings ({what}); choose another --out."
            )
    else:
        if (folder / "journal.jsonl").exists():
            raise ValueError(
                f"{folder}: there is a journal but no settings.json; choose another --out."
            )
        write_json(path, settings)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
