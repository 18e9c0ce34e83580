"""Progress on stderr, with an ETA; rare lines where stderr is a file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(total: int, unit: str, done: int = 0) -> tqdm:
    """A bar to be used as a context: it is closed, with a line break, also when what it counts fails."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, initial=done, unit=unit, file=sys.stderr, mininterval=interval, smoothing=0.1
    )
