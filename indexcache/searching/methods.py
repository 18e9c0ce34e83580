"""The ways to look for patterns, each with a journal and a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from indexcache.data import Batch
from indexcache.models.together import Follower
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar
from indexcache.records import Run
from indexcache.searching.costs import RoleCosts
from indexcache.searching.fast import FastSearch
from indexcache.searching.greedy import FrontierPoint, evaluations, greedy, rounds, together
from indexcache.searching.mixed import MixedSearch
from indexcache.searching.objective import Evaluation, shows_parts
from indexcache.searching.planned import PlannedSearch
from indexcache.searching.settings import SearchSettings
from indexcache.searching.similarity import best_patterns
from indexcache.searching.source import Entry, LossSource
from indexcache.searching.work import Work


@dataclass(frozen=True)
class Asked:
    """What a search is asked for.

    Attributes:
        full: number of full layers at the end.
        starts: first layers of the pipeline stages.
        fixed: layers that stay full, those of `starts` among them.
        comparisons: patterns to evaluate beside it.
        costs: the cost of patterns, where R layers are chosen too.
    """

    full: int
    starts: Sequence[int]
    fixed: Sequence[int]
    comparisons: Sequence[Pattern]
    costs: RoleCosts | None = None


Found = tuple[list[FrontierPoint], list[FrontierPoint], dict[str, Evaluation], Work]


def exact(
    run: Run | Follower,
    source: LossSource,
    batches: Sequence[Batch],
    settings: SearchSettings,
    asked: Asked,
    progress: bool,
) -> Found:
    """Run the paper's search, which measures every candidate on the whole text."""
    full, starts, comparisons = asked.full, asked.starts, asked.comparisons
    total = evaluations(source.layers, full, starts, asked.fixed)
    total += len({str(p) for p in comparisons})
    done = sum("pattern" in entry for entry in run.journal)
    shown = progress and source.world.rank == 0
    with progress_bar(total, "eval", done, shown=shown) as bar:

        def record(entry: Entry) -> None:
            run.append(entry)
            bar.update("pattern" in entry)

        source.expect(rounds(source.layers, full, starts, asked.fixed), comparisons, _said_on(bar))
        loss = source.objective(batches, run.journal, record, settings.objective)
        frontier: list[FrontierPoint] = []
        for point in greedy(loss, source.layers, full, starts, source.noise, asked.fixed):
            source.advance(len(frontier))
            if _too_much(point, frontier, settings):
                break
            frontier.append(point)
            _record_tie(run, point)
            bar.set_postfix_str(f"{point.full} full, best loss {point.loss:.4f}")
        losses = together(loss, comparisons, frontier[-1].pattern)
        uniform = [FrontierPoint(*both) for both in zip(comparisons, losses, strict=True)]
    parts: dict[str, Evaluation] = {}
    if shows_parts(batches, settings.objective):
        parts = {str(p.pattern): loss.evaluate(p.pattern) for p in (*frontier, *uniform)}
    return frontier, uniform, parts, loss.work


def sampled(
    run: Run | Follower,
    source: LossSource,
    batches: Sequence[Batch],
    settings: SearchSettings,
    asked: Asked,
    progress: bool,
) -> Found:
    """Run a search that measures parts of the text, or only what similarity has chosen."""
    full, starts, comparisons = asked.full, asked.starts, asked.comparisons
    shown = progress and source.world.rank == 0
    with progress_bar(source.layers - full + 1, "budget", shown=shown) as bar:
        source.expect([], comparisons, _said_on(bar))
        samples = source.samples(batches, run.journal, run.append, settings.objective)
        if settings.method == "similarity":
            chosen = best_patterns(source.overlap(batches), full, asked.fixed)
            samples.work.layer_tokens += samples.work.whole
            points: Iterable[FrontierPoint] = (
                FrontierPoint(p, samples.evaluate(p).loss) for p in chosen.values()
            )
        elif asked.costs is not None:
            points = MixedSearch(
                samples,
                asked.costs,
                settings.pool_sizes(),
                frozenset(asked.fixed),
                settings,
                settings.keep,
                settings.most_loss,
            ).run()
        else:
            state = samples, full, starts, settings, source.noise, asked.fixed
            points = (
                FastSearch(*state).run()
                if settings.start == "flips"
                else PlannedSearch(*state, pairs=samples.pairs(samples.first_part())).run()
            )
        frontier: list[FrontierPoint] = []
        for point in points:
            if _too_much(point, frontier, settings):
                break
            frontier.append(point)
            bar.update()
            bar.set_postfix_str(f"{point.full} full, loss {point.loss:.4f}; {samples.work}")
        work = replace(samples.work)
        samples.rebase(frontier[0].pattern)
        uniform = [FrontierPoint(p, samples.evaluate(p).loss) for p in comparisons]
    parts: dict[str, Evaluation] = {}
    if samples.shows_parts:
        measured = [*(p for p in frontier if not p.estimated), *uniform]
        parts = {str(p.pattern): samples.evaluate(p.pattern) for p in measured}
    return frontier, uniform, parts, work


def _too_much(
    point: FrontierPoint, frontier: Sequence[FrontierPoint], settings: SearchSettings
) -> bool:
    """Return whether a pattern loses more than the search may."""
    if settings.most_loss is None or not frontier:
        return False
    return point.loss - frontier[0].loss > settings.most_loss


def _said_on(bar: Any) -> Callable[[str], None]:
    """Return what shows a text beside a progress bar, not more often than the bar is drawn."""
    last = -math.inf

    def say(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if not bar.disable and now - last >= bar.mininterval:
            last = now
            bar.set_postfix_str(text)

    return say


def _record_tie(run: Run | Follower, point: FrontierPoint) -> None:
    """Write into the journal, once, that the noise did not let a flip be told from others."""
    entry = {"flipped": point.flipped, "tied": list(point.tied), "full": point.full}
    if point.tied and entry not in run.journal:
        run.append(entry)
