"""Where a verb's result goes: --out is tried before any work, and no finished result gets lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from indexcache import process
from indexcache.cli.common import Output
from indexcache.records import check_folder, in_use, reason

PROBE = b"\0" * 4096


@dataclass
class Claims:
    """The claim of a verb on its --out, which it holds until it ends.

    Attributes:
        handles: file descriptors of locked folders.
        created: folders that did not exist before, the deepest first.
    """

    handles: list[int] = field(default_factory=list)
    created: list[Path] = field(default_factory=list)

    def release(self) -> None:
        """Unlock the folders, and remove those that were created and are still empty."""
        for folder in self.created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        for handle in self.handles:
            os.close(handle)
        self.created.clear()
        self.handles.clear()


CLAIMS = Claims()


def claim_folder(out: str | None, model: str | None = None) -> Path | None:
    """Create the folder of --out, try to write there, and hold it until the verb ends.

    A folder that is still empty then is removed again. Under torchrun the first process does this.

    Args:
        out: what the user gave, or None.
        model: the verb's MODEL, whose own folder is refused.

    Raises:
        ValueError: `named_folder` refuses; another process writes there; or nothing can be written
            there.
    """
    if out is None:
        return None
    folder = named_folder(out, model)
    if os.environ.get("RANK", "0") != "0":
        return folder
    try:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        CLAIMS.created += missing
        _lock(folder)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(PROBE)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise ValueError(
            f"{out}: nothing can be written there ({reason(error)}); choose another --out."
        ) from None
    return folder


def named_folder(out: str, model: str | None = None) -> Path:
    """Return the folder that --out names.

    Raises:
        ValueError: it has no name, `check_folder` refuses it, or it is the checkpoint itself.
    """
    if not out.strip() or "\0" in out:
        raise ValueError(f"--out is {out!r}, which names no folder; give one, e.g. --out runs/a.")
    folder = Path(out)
    check_folder(folder)
    if model is not None and os.path.isdir(model) and os.path.realpath(model) == _real(folder):
        raise ValueError(
            f"{out}: this is the checkpoint itself, in which nothing is written; choose another "
            "--out."
        )
    return folder


def _real(folder: Path) -> str:
    return os.path.realpath(folder)


def _lock(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    CLAIMS.handles.append(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use(f"{folder}: another process is writing this folder", handle) from None
    except OSError:
        return  # Some network file systems lock no folders.


def deliver(
    text: str | None,
    value: Any,
    output: Output,
    files: Mapping[Path, Any | Callable[[Path], object]] | None = None,
) -> None:
    """Print a finished result, write its files, and print its JSON where that was asked for.

    Where one of these fails, the others are done all the same, and the result is kept in a file
    that the error names, or printed to stderr where there is no room for it at all.

    Args:
        text: what is printed; None is nothing.
        value: the result as JSON holds it.
        files: by path, the JSON that a file gets, or a function that writes the file.

    Raises:
        ValueError: stdout or a file cannot be written.
        BrokenPipeError: nobody reads stdout any more; the files are written.
    """
    from indexcache.records import write_json

    problems = []
    bug: Exception | None = None
    unread: BrokenPipeError | None = None

    def show(line: str) -> None:
        nonlocal unread
        try:
            print(process.printable(line, sys.stdout))
            sys.stdout.flush()
        except BrokenPipeError as error:
            unread = error
            process.drop_stdout()
        except OSError as error:
            problems.append(f"stdout cannot be written ({reason(error)})")
            process.drop_stdout()

    if text is not None:
        show(text)
    for path, content in (files or {}).items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                write_json(path, content)
        except OSError as error:
            problems.append(f"{path}: cannot be written ({reason(error)})")
        except Exception as error:  # A bug, e.g. a picture that cannot be drawn.
            bug = error
    if output.json and not problems and not unread and not bug:
        show(json.dumps(value, allow_nan=False))
    if bug is not None:
        if (kept := process.keep("result.json", json.dumps(value, default=str))) is not None:
            process.say(f"note: the finished result is kept in {kept}.")
        raise bug
    if problems:
        rescue(" and ".join(problems), value)
    if unread:
        raise unread


def rescue(problem: str, value: Any) -> None:
    """Keep a finished result where that is possible, and raise ValueError that says where."""
    text = json.dumps(value)
    kept = process.keep("result.json", text)
    if kept is None:
        print(text, file=sys.stderr)
        raise ValueError(f"{problem}; the result is the JSON above.")
    raise ValueError(f"{problem}; the finished result is kept in {kept}.")
