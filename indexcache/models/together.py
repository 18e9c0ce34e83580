"""Open the folder of a run that several processes compute together and the first one writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from indexcache.models.world import Processes
from indexcache.records import Run, open_run


class Follower:
    """A run that another process writes.

    Attributes:
        journal: its entries.
    """

    def __init__(self, journal: list[dict[str, Any]]):
        self.journal = journal

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry, which the other process writes."""
        self.journal.append(entry)

    def save(self, name: str, value: Any) -> None:
        """Leave it to the other process to write a file."""


@contextmanager
def open_together(
    world: Processes, folder: Path, settings: dict[str, Any], check: Callable[[Any], object]
) -> Iterator[Run | Follower]:
    """Open a run's folder in the first process; see `records.open_run`.

    Raises:
        ValueError: the first process refuses the folder, on every process.
    """
    with ExitStack() as stack:
        run: Run | Follower | None = None
        refusal: Exception | None = None
        if world.rank == 0:
            try:
                run = stack.enter_context(open_run(folder, settings, check))
            except (ValueError, OSError) as error:
                refusal = error
        world.agree(refusal)
        journal = world.first(None if run is None else run.journal)
        yield Follower(journal) if run is None else run
