"""The process of `indexcache`, and of `python -m indexcache`.

It is ready for signals and for bad streams before it imports anything heavy.
"""

from __future__ import annotations

import sys

from indexcache import __version__, process


def main() -> int:
    """Run the command line as a process, and return its exit code; see `indexcache.cli.main`."""
    code = process.BUG
    try:
        process.catch_interrupts()
        process.end_with_torchrun()
        process.open_streams()
        process.calm_warnings()
        from indexcache.cli import main as run

        code = run()
    except BaseException as error:  # It was raised by an import; `run` returns.
        code = process.end_of(error, sys.argv[1:], __version__)
    process.forget_interrupts(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
