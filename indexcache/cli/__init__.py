"""The command line: one module per verb, each with a frozen dataclass of settings and `run(settings)`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from indexcache.cli.flags import build_parser, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a gate failed, 2 wrong usage or bad input (one sentence on stderr), 130 interrupted, 141 stdout was closed."""
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

    verbs = {
        v.Settings.verb: v
        for v in (
            inspect,
            overlap,
            search,
            evaluate,
            distill,
            export,
            bench,
            profile,
            generate,
            plan,
        )
    }

    def call() -> int:
        verb, settings = parse(
            build_parser(verbs), verbs, sys.argv[1:] if argv is None else list(argv)
        )
        return verbs[verb].run(settings)

    return guarded(call)


def guarded(call: Callable[[], int | None]) -> int:
    """The exit code of `call`, None being 0, with one sentence on stderr for what is the user's or the machine's; see `main`."""
    try:
        return call() or 0
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(
            "indexcache: interrupted; a search, distillation or bench goes on with the same command.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # who read our output has gone, e.g. head; the interpreter flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("There is not enough memory for this; use fewer or shorter sequences.")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"The disk is full ({error.filename or 'while writing'}); free space and run the same command again."
            )
        if error.errno in (
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
        ):
            return _fail(f"{error.filename or 'A file'!s:.120}: {error.strerror}.")
        raise
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _fail(
                "There is not enough memory for this; use fewer or shorter sequences, or another --device."
            )
        raise


def _fail(message: str) -> int:
    print("indexcache: " + " ".join(message.split()), file=sys.stderr)
    return 2
