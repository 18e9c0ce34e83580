"""The command line: one module per verb; the settings classes of the library are its flags."""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, CoercionError, CycloptsError, Parameter, convert
from cyclopts.config import Dict

from indexcache import __version__
from indexcache.cli import (
    bench,
    distill,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    matrix,
    overlap,
    plan,
    profile,
    report,
    search,
)
from indexcache.cli.numbers import SHORT, number
from indexcache.cli.results import CLAIMS
from indexcache.memory import out_of_memory
from indexcache.process import (
    BAD_INPUT,
    NO_READER,
    drop_stdout,
    end_of,
    say,
    say_together,
    was_interrupted,
)
from indexcache.reading import read_toml
from indexcache.spec import SYNTAX

VERBS: dict[str, Callable[..., int | None]] = {
    "inspect": inspect.inspect,
    "overlap": overlap.overlap,
    "search": search.search,
    "evaluate": evaluate.evaluate,
    "distill": distill.distill,
    "export": export.export,
    "doctor": doctor.doctor,
    "bench": bench.bench,
    "profile": profile.profile,
    "generate": generate.generate,
    "plan": plan.plan,
    "matrix": matrix.matrix,
    "report": report.report,
}
LARGEST = 2**53
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
    errno.ENXIO,
    errno.ENODEV,
    errno.ETXTBSY,
    errno.EMFILE,
    errno.ENFILE,
)
"""Errors of the file system that name a file of the user's, not a bug of ours."""
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of a disk or of the network to it, where they name a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb, and return its exit code.

    0: it is done. 1: a gate failed. 2: the usage, the input or the machine is wrong, and one
    sentence on stderr says how. 70: a bug of ours; the sentence names the file with its traceback.
    130: it was interrupted. 141: nobody reads stdout any more.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    log = logging.getLogger("indexcache")
    notes = Notes(logging.INFO)
    log.setLevel(logging.INFO)
    log.addHandler(notes)
    try:
        return guarded(lambda: run(tokens), tokens)
    finally:
        log.removeHandler(notes)


class Notes(logging.Handler):
    """Writes what the library logs to stderr, as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one note."""
        say(f"note: {record.getMessage()}")


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
        takes_patterns = name not in ("inspect", "search", "plan", "report", "matrix")
        app.command(
            verb, name=name, sort_key=0, help_epilogue=SPEC_HELP if takes_patterns else None
        )
    return app


def read_value(type_: Any, tokens: Sequence[Any]) -> Any:
    """Convert a flag's value; read fractions such as 1/4, and 60K, 1.5K or 1M in whole numbers.

    A point in an integer is refused, and an integer that no tensor could count.
    """
    text = tokens[0].value if tokens else ""
    numbers = {tuple[int, ...]: int, tuple[float, ...]: float}
    for several, one in numbers.items():
        if type_ in (several, several | None):
            return tuple(read_value(one, [token]) for token in tokens)
    if type_ in (int, int | None) and SHORT.fullmatch(text):
        return number(text)
    if type_ is int and "." in text:
        raise CoercionError(token=tokens[0], target_type=int)
    if type_ is float and "/" in text:
        numerator, _, denominator = text.partition("/")
        try:
            return float(numerator) / float(denominator)
        except (ValueError, ZeroDivisionError):
            raise CoercionError(token=tokens[0], target_type=float) from None
    value = convert(type_, tokens)
    if isinstance(value, int) and abs(value) > LARGEST:
        where = "" if tokens[0].source in ("", "cli") else f" (in {tokens[0].source})"
        raise CoercionError(
            f'"{text:.40}" is larger than {LARGEST}{where}', token=tokens[0], target_type=int
        )
    return value


def read_config(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take from the TOML file of --config every setting that has no flag.

    Raises:
        ValueError: the file cannot be read, or has a key that is no setting.
    """
    path = next((a.tokens[0].value for a in arguments if a.name == "--config" and a.tokens), None)
    if path is None:
        return
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{path}: there is no such settings file.")
    nested: dict[str, Any] = read_toml(file)
    for command in reversed(commands):
        nested = {command: nested}
    Dict(nested, source=path)(app, commands, arguments)


def _of_argparse(error: SystemExit) -> bool:
    """Return whether argparse ended a recipe or a benchmark, whose flags it reads."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") == "argparse"


def guarded(call: Callable[[], int | None], arguments: Sequence[str] = ()) -> int:
    """Return the exit code of `call`, where None means 0; see `main`.

    An error that is the user's or the machine's becomes one sentence on stderr, and so does a bug,
    whose traceback goes to a file.
    """
    try:
        code = call() or 0
    except BaseException as error:
        # The reader of our output has gone, e.g. head. Rich exits with 1 where it prints the help.
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if isinstance(cause, BrokenPipeError):
            drop_stdout()
            return NO_READER
        sentence = None if was_interrupted() else explained(error)
        if isinstance(error, SystemExit) and _of_argparse(error):
            code = int(error.code or 0)  # It has printed the help, or what is wrong.
        elif sentence is None:
            code = end_of(error, list(arguments), __version__)
        else:
            say_together(sentence)
            code = BAD_INPUT
    finally:
        CLAIMS.release()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        return NO_READER
    except OSError as error:
        drop_stdout()
        say(f"stdout cannot be written: {error.strerror or error}.")
        return BAD_INPUT
    return code


def explained(error: BaseException) -> str | None:
    """Return the sentence about an error that is the user's or the machine's; None for a bug."""
    if isinstance(error, ValueError):
        return str(error)
    if out_of_memory(error):
        return (
            "There is not enough memory for this; use fewer or shorter sequences, a smaller "
            "--batch or --chunk, or another --device."
        )
    if isinstance(error, OverflowError):
        return f"A number is too large ({error})."
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"The disk is full ({error.filename or 'while writing'}); free space and run the "
                "same command again."
            )
        if error.errno == errno.EFBIG:
            return (
                f"{error.filename or 'A file'!s:.120}: a file there may not grow any more "
                f"({error.strerror}); raise the limit (ulimit -f), or choose another --out."
            )
        if error.errno in UNREACHABLE or (error.filename and error.errno in FAILING):
            return f"{error.filename or 'A file'!s:.120}: {error.strerror}."
    return None
