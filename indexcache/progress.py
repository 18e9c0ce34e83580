"""Show progress on stderr, with an estimate of the time left."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(
    total: int,
    unit: str,
    done: int = 0,
    *,
    shown: bool = True,
    delay: float = 0.0,
    scaled: bool = False,
) -> tqdm:
    """Return a progress bar to use as a context manager, which closes it also when the work fails.

    Where stderr is a file, the bar is written every 15 seconds only.

    Args:
        total: number of units of work.
        unit: the name of a unit.
        done: units that an earlier run has done.
        shown: False prints nothing.
        delay: seconds before the bar is shown.
        scaled: write numbers as 1.2M.
    """
    from tqdm import tqdm  # It takes a tenth of the time of --help to import.

    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        file=sys.stderr,
        mininterval=interval,
        smoothing=0.1,
        disable=not shown,
        delay=delay,
        unit_scale=scaled,
    )
