"""The command line: one module per verb; the settings classes of the library are its flags."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, CoercionError, CycloptsError, Parameter, convert
from cyclopts.config import Dict

from indexcache import __version__
from indexcache.cli import (
    bench,
    distill,
    evaluate,
    export,
    generate,
    inspect,
    overlap,
    plan,
    profile,
    search,
)
from indexcache.memory import out_of_memory
from indexcache.spec import SYNTAX

VERBS: dict[str, Callable[..., int | None]] = {
    "inspect": inspect.inspect,
    "overlap": overlap.overlap,
    "search": search.search,
    "evaluate": evaluate.evaluate,
    "distill": distill.distill,
    "export": export.export,
    "bench": bench.bench,
    "profile": profile.profile,
    "generate": generate.generate,
    "plan": plan.plan,
}
SPEC_HELP = f"```text\nSPEC is {SYNTAX}\n```"

UNREACHABLE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EFBIG,
)
"""Errors of the file system that name a file of the user's, not a bug of ours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb, and return its exit code.

    0: it is done. 1: a gate failed. 2: the usage or the input is wrong, and one sentence on stderr
    says how. 130: it was interrupted. 141: nobody reads stdout any more.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    log = logging.getLogger("indexcache")
    notes = Notes(logging.INFO)
    log.setLevel(logging.INFO)
    log.addHandler(notes)
    try:
        return guarded(lambda: run(tokens))
    finally:
        log.removeHandler(notes)


class Notes(logging.Handler):
    """Writes what the library logs to stderr, as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one note."""
        print(f"indexcache: note: {record.getMessage()}", file=sys.stderr)


def run(tokens: list[str]) -> int | None:
    """Run a verb with its flags.

    Raises:
        ValueError: cyclopts refuses the flags.
    """
    verb = tokens[0] if tokens and tokens[0] in VERBS else ""
    if not tokens:
        raise ValueError(f"A verb is required: {', '.join(VERBS)} (see indexcache --help).")
    if not tokens[0].startswith("-") and not verb:
        # cyclopts suggests the nearest verb; we name them all.
        raise ValueError(
            f"{tokens[0]!r} is an invalid choice of a verb; the verbs are {', '.join(VERBS)}."
        )
    try:
        return build_app()(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        message = " ".join(str(error).split()).removesuffix(".")
        message = re.sub(
            r'^Command "(\w+)" parameter (\S+) requires an argument', r"\1 needs \2", message
        )
        raise ValueError(
            f"{message} (see {' '.join(['indexcache', verb]).strip()} --help)."
        ) from None


def build_app() -> App:
    """Build the command line; verbs import what they need when they run."""
    app = App(
        name="indexcache",
        help="Find a sharing pattern for a model with DeepSeek Sparse Attention, prove it safe, "
        "and export it.",
        help_format="markdown",
        version=f"indexcache {__version__}",
        config=read_config,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(
            negative_iterable=(),
            negative_none=(),
            consume_multiple=1,
            allow_repeating=True,
            converter=read_value,
        ),
    )
    for name, verb in VERBS.items():
        takes_patterns = name not in ("inspect", "search", "plan")
        app.command(
            verb, name=name, sort_key=0, help_epilogue=SPEC_HELP if takes_patterns else None
        )
    return app


def read_value(type_: Any, tokens: Sequence[Any]) -> Any:
    """Convert a flag's value; refuse a point in an integer, and read fractions such as 1/4."""
    text = tokens[0].value if tokens else ""
    if type_ is int and "." in text:
        raise CoercionError(token=tokens[0], target_type=int)
    if type_ is float and "/" in text:
        numerator, _, denominator = text.partition("/")
        try:
            return float(numerator) / float(denominator)
        except (ValueError, ZeroDivisionError):
            raise CoercionError(token=tokens[0], target_type=float) from None
    return convert(type_, tokens)


def read_config(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take from the TOML file of --config every setting that has no flag.

    Raises:
        ValueError: the file cannot be read, or has a key that is no setting.
    """
    path = next((a.tokens[0].value for a in arguments if a.name == "--config" and a.tokens), None)
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: the settings file cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML ({error}).") from None
    nested: dict[str, Any] = values
    for command in reversed(commands):
        nested = {command: nested}
    Dict(nested, source=path)(app, commands, arguments)


def guarded(call: Callable[[], int | None]) -> int:
    """Return the exit code of `call`, where None means 0; see `main`.

    An error that is the user's or the machine's becomes one sentence on stderr. A bug keeps its
    traceback.
    """
    try:
        return call() or 0
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(
            "indexcache: interrupted; a search, distillation or bench goes on with the same "
            "command.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, e.g. head. The interpreter flushes stdout when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("There is not enough memory for this; use fewer or shorter sequences.")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"The disk is full ({error.filename or 'while writing'}); free space and run the "
                "same command again."
            )
        if error.errno in UNREACHABLE:
            return _fail(f"{error.filename or 'A file'!s:.120}: {error.strerror}.")
        raise
    except RuntimeError as error:
        if out_of_memory(error):
            return _fail(
                "There is not enough memory for this; use fewer or shorter sequences, or another "
                "--device."
            )
        raise


def _fail(message: str) -> int:
    print("indexcache: " + " ".join(message.split()), file=sys.stderr)
    return 2
