"""What a process of the command line has: streams, signals, exit codes, files of last resort.

Nothing heavy is imported here, so that Ctrl-C is understood while everything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

BAD_INPUT = 2
BUG = 70
INTERRUPTED = 130
NO_READER = 141
PR_SET_PDEATHSIG = 1
TURN = 30.0
"""Seconds that a process of torchrun leaves to the first one to say what all are refused for."""


class Lenient:
    """A text stream for notes: what cannot be written is dropped, because no work depends on it.

    Everything but writing is the stream's own.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_streams() -> None:
    """Give the process three standard streams that take every text.

    A closed one becomes the null device, so that no file of ours gets its number. A character that
    the locale cannot print is printed as an escape, e.g. `\\u5c0f`. Notes that cannot be written to
    stderr are dropped.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Lenient(sys.stderr)  # type: ignore[assignment]


def catch_interrupts() -> None:
    """Make Ctrl-C end the process with `INTERRUPTED` and one sentence, at any moment.

    Imports are ended at once, because code that is half imported raises or swallows anything, and
    so is a process that is interrupted twice. A process that ignores the signal goes on to do so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)


def forget_interrupts(code: int) -> None:
    """Make Ctrl-C end the process at once with `code`, which is that of its finished work."""
    if signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))


def end_with_torchrun() -> None:
    """Let Linux end this process, if torchrun started it, by SIGTERM when torchrun is killed.

    Nobody would end it otherwise, and it would go on to hold its run folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


_interrupts = 0


def _on_interrupt(_signal: int, frame: Any) -> None:
    global _interrupts
    _interrupts += 1
    importing = False
    while frame is not None and not importing:
        importing = frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    if importing or _interrupts > 1:
        say_interrupted()
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Say whether the process was interrupted, perhaps within code that hid it."""
    return _interrupts > 0


def say_interrupted() -> None:
    """Write the sentence of an interrupted process to stderr."""
    say(
        "interrupted; a search, evaluation, distillation or bench with an --out goes on with the "
        "same command."
    )


def drop_stdout() -> None:
    """Let what is still buffered for stdout vanish, because it cannot be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def calm_warnings() -> None:
    """Print warnings that the environment makes errors (PYTHONWARNINGS=error).

    Those of other libraries say nothing about a result.
    """
    import warnings

    rules: Any = warnings.filters
    rules[:] = [("default", *rule[1:]) if rule[0] == "error" else rule for rule in rules]
    warnings.filterwarnings("default", "^$")  # This makes Python forget what it cached.


def keep(name: str, text: str) -> Path | None:
    """Write a text that must not get lost to a new file, where that is possible.

    Args:
        name: the name of the file, e.g. "evidence.json"; something is put in front of it.

    Returns:
        The path of the file, in the folder for temporary files, else in the current or the home
        folder; None where none of them can be written.
    """
    import tempfile

    folders: list[str] = []
    with contextlib.suppress(OSError):
        folders.append(tempfile.gettempdir())
    folders += [os.curdir, os.path.expanduser("~")]
    for folder in folders:
        try:
            handle, path = tempfile.mkstemp(suffix=f"-{name}", prefix="indexcache-", dir=folder)
        except OSError:
            continue
        try:
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.write(text)
            return Path(path).resolve()
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return None


def end_of(error: BaseException, arguments: list[str], version: str) -> int:
    """Write one sentence about an error that is no bad input, and return its exit code.

    An interruption and a missing library are the machine's. Anything else is a bug of ours, whose
    traceback goes to a file.
    """
    if isinstance(error, KeyboardInterrupt) or was_interrupted():
        say_interrupted()
        return INTERRUPTED
    if isinstance(error, ImportError) and not (error.name or "").startswith("indexcache"):
        say(f"A library that this needs cannot be imported ({error}).")
        return BAD_INPUT
    what = f"This is a bug of indexcache, and there is no result ({_described(error):.200})."
    trace = _trace(error)
    path = keep("traceback.txt", "\n".join([*_facts(arguments, version), "", trace]))
    if path is None:
        with contextlib.suppress(OSError, ValueError):
            print(trace, file=sys.stderr)
        say(f"{what} Please report it with the traceback above.")
    else:
        say(f"{what} Please report it with the traceback in {path}.")
    return BUG


def say(sentence: str) -> None:
    """Write one line to stderr; where that is impossible the exit code alone has to say it.

    A word of more than 400 characters, such as a number of 4,000 digits, is shortened.
    """
    words = (w if len(w) <= 400 else f"{w[:200]}..{w[-40:]}" for w in sentence.split())
    with contextlib.suppress(OSError, ValueError):
        print(printable("indexcache: " + " ".join(words), sys.stderr), file=sys.stderr)


def say_together(sentence: str) -> None:
    """Write the sentence of an error that every process of torchrun is likely to meet, once.

    The first process writes it and ends, and then torchrun ends the others, which have waited for
    that, with `BAD_INPUT`. One that nobody ends in `TURN` seconds was refused alone, and says why.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(BAD_INPUT))
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(TURN)
    say(sentence)


def printable(text: str, stream: Any) -> str:
    """Return a text in which characters that a stream cannot take are escapes, e.g. `\\u5c0f`."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # Its own __str__ fails.
        return type(error).__name__


def _trace(error: BaseException) -> str:
    try:
        import traceback

        return "".join(traceback.format_exception(error))
    except Exception:
        return _described(error)


def _facts(arguments: list[str], version: str) -> list[str]:
    import platform

    libraries = ("torch", "transformers", "numpy", "cyclopts")
    return [
        f"indexcache {version}, Python {platform.python_version()}, {platform.platform()}",
        f"arguments: {arguments!r}",
        *(
            f"{name} {getattr(sys.modules[name], '__version__', '')}"
            for name in libraries
            if name in sys.modules
        ),
    ]
