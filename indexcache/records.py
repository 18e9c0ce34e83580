"""Run folders: settings that must not change, an append-only journal, and results.

Everything that is written as a whole goes through `atomic`, `atomic_folder` or `publish`;
everything that one process at a time may write goes through `locked`. A run is resumed by the same
command.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from indexcache.reading import check_regular, parse_json, read_json

__all__ = [
    "Run",
    "atomic",
    "atomic_folder",
    "changed",
    "check_folder",
    "claim",
    "finished_journal",
    "in_use",
    "locked",
    "number_of",
    "open_run",
    "publish",
    "read_journal",
    "read_json",
    "reason",
    "usable",
    "write_json",
    "write_text",
    "writing",
]

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which replaces `path` when the block ends.

    A reader sees the old file or the new one, also after a kill, never a part of it. After an error
    only the old file is there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `path` when the block ends and vanishes on an error.

    Its name is fixed and it is locked, so what a killed process left there (perhaps a terabyte) is
    cleared by the next one, and two processes that write one folder do not mix.

    Raises:
        ValueError: another process is writing this folder.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    with locked(temporary, f"{path}: another process is writing this folder"):
        try:
            for old in temporary.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield temporary
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish(temporary: Path, path: Path) -> None:
    """Force a file or a folder to the disk and rename it to `path`, replacing what is there.

    Raises:
        OSError: a folder is where a file shall be; it is not removed.
    """
    if path.is_dir() and not temporary.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    files = [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else [temporary]
    for file in files:
        _sync(file)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a folder, or on a file that is created when it is missing.

    Args:
        busy: the error where another process holds the lock; None waits until it is free.

    Raises:
        ValueError: another process holds the lock and `busy` is given.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise in_use(busy or str(path), handle) from None
        yield
    finally:
        os.close(handle)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is none, and cannot be made.

    Raises:
        ValueError: it, or what it lies in, is a file or a symbolic link that leads nowhere.
    """
    for path in (folder, *folder.parents):
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            what = "this" if path == folder else path
            if os.path.exists(path):
                raise ValueError(f"{folder}: {what} is a file, but a folder is needed.")
            raise ValueError(
                f"{folder}: {what} is a symbolic link to {os.readlink(path)}, which does not "
                "exist; choose another folder."
            )


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Raise ValueError where the folder of a run cannot be made, read or written."""
    check_folder(folder)
    try:
        yield
    except OSError as error:
        why = reason(error)
        if error.filename and Path(error.filename) != folder:
            why = f"{error.filename}: {why}"
        raise ValueError(
            f"{folder}: nothing can be written there ({why}); choose another folder."
        ) from None


def reason(error: OSError) -> str:
    """Say in a few words why something cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return error.strerror or str(error)


def in_use(busy: str, handle: int) -> ValueError:
    """Return the error for an open file that another process has locked, which it names.

    Args:
        busy: what is wrong.
        handle: the open file.
    """
    inode = os.fstat(handle).st_ino
    with suppress(OSError, ValueError, IndexError):  # Linux alone knows who locks a file.
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            kind, process, place = (line.split()[i] for i in (1, 4, 5))
            same = kind == "FLOCK" and int(place.split(":")[-1]) == inode
            if same and int(process) not in (0, os.getpid()):
                return ValueError(
                    f"{busy}, process {process}; wait for it, end it by kill {process}, or choose "
                    "another --out."
                )
    return ValueError(f"{busy}; wait for it or choose another --out.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Re-raise write errors that safetensors and torch wrap as the OSError that caused them."""
    try:
        yield
    except OSError:
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception.
        failures = [e for e, _ in getattr(error, "failures", {}).values()]
        text = "".join(line for e in (error, *failures) for line in traceback.format_exception(e))
        for number in map(int, re.findall(r"(?:\(os error |\[Errno )(\d+)", text)):
            if number in WRITE_ERRORS:
                raise OSError(number, os.strerror(number), str(path)) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, allow_nan=False)
        f.write("\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Run:
    """One run's folder, open for writing: `settings.json`, `journal.jsonl` and the saved results.

    Use it as `with open_run(out, settings) as run:`. The journal holds one JSON object per line; a
    line that a kill cut off is dropped when the folder is opened again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.journal = self._recover()
        self._file = open(self.path, "a", encoding="utf-8")

    def _recover(self) -> list[dict[str, Any]]:
        path = self.path
        check_regular(path)
        raw = path.read_bytes() if path.exists() else b""
        complete = raw[: raw.rfind(b"\n") + 1]
        if len(complete) < len(raw):
            with open(path, "r+b") as f:
                f.truncate(len(complete))
        return _entries(path, complete)

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
        """Close the journal."""
        self._file.close()


def _entries(path: Path, lines: bytes) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n") if lines else (), 1):
        try:
            entry = parse_json(line, finite=True)
        except ValueError as error:
            raise changed(path, number, str(error)) from None
        if not isinstance(entry, dict):
            raise changed(path, number, "it is not a JSON object")
        entries.append(entry)
    return entries


def number_of(entry: Mapping[str, Any], key: str) -> float:
    """Return a number of a journal's line.

    Raises:
        KeyError: there is none.
        TypeError: it is something else; a truth value is no number.
    """
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is {value!r:.60}, which is no number")
    return value


def changed(path: Path, number: int, why: str) -> ValueError:
    """Return the refusal of a line of a journal that nothing of ours has written."""
    return ValueError(
        f"{path}: line {number} is not what a run writes ({' '.join(why.split()):.200}), so the "
        "journal was changed by hand; start in a new folder."
    )


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Read the journal of a run, which may be writing it now: a line without its end is left out.

    Raises:
        ValueError: the journal cannot be read.
    """
    path = folder / "journal.jsonl"
    raw = _read(path)
    return _entries(path, raw[: raw.rfind(b"\n") + 1])


def finished_journal(folder: Path) -> list[dict[str, Any]]:
    """Read the journal of a run that has its result.

    Raises:
        ValueError: the folder has no result, or the journal cannot be read.
    """
    path = folder / "journal.jsonl"
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder}: there is no finished run in this folder.")
    return _entries(path, _read(path))


def _read(path: Path) -> bytes:
    if not path.exists():
        raise ValueError(f"{path}: cannot be read (there is no such file).")
    check_regular(path)
    return path.read_bytes()


@contextmanager
def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    check: Callable[[dict[str, Any]], object] | None = None,
) -> Iterator[Run]:
    """Open a run's folder, new or interrupted.

    Args:
        check: is called with every line of the journal, and raises ValueError, KeyError or
            TypeError for one that the run would not have written.

    Raises:
        ValueError: the folder belongs to a run with other settings (each difference is named), or
            to one that is running now; it cannot be made or written; or a line of the journal is
            refused.
    """
    with ExitStack() as stack:
        with usable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            busy = f"{folder}: another process is writing this run"
            stack.enter_context(locked(folder / ".lock", busy))
            _claim(folder, settings)
            run = Run(folder)
        try:
            for number, entry in enumerate(run.journal, 1):
                try:
                    if check is not None:
                        check(entry)
                except KeyError as error:
                    raise changed(run.path, number, f"it has no {error}") from None
                except (ValueError, TypeError) as error:
                    raise changed(run.path, number, str(error).rstrip(".")) from None
            yield run
        finally:
            run.close()


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `settings` those of a folder of several runs, without opening a run in it.

    Processes that claim a folder at the same time wait for each other.

    Raises:
        ValueError: the folder has other settings (each difference is named), or cannot be made.
    """
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        _claim(folder, settings)


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # A tuple becomes a list, as in the file.
    if not path.exists():
        if (folder / "journal.jsonl").exists():
            raise ValueError(
                f"{folder}: there is a journal but no settings.json; choose another --out."
            )
        write_json(path, settings)
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise ValueError(
            f"{path}: is not a JSON object, so it was changed by hand; choose another --out."
        )
    if changed := list(_differences(before, settings)):
        differences = "; ".join(f"{k} was {_short(a)}, now {_short(b)}" for k, a, b in changed)
        raise ValueError(
            f"{folder}: this run was begun with other settings ({differences}); choose another "
            "--out."
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, old, new) of what differs, by its dotted name where both are objects."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
