"""The search as a run with a journal, which can be resumed; the algorithm itself is in `greedy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from indexcache.data import Batch, digest_of, seen_in
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.models.conditions import Conditions, Origin
from indexcache.models.family import AnyModel
from indexcache.models.soundness import blindness
from indexcache.pattern import Pattern, full_count
from indexcache.progress import progress as progress_bar
from indexcache.records import Run, number_of, open_run
from indexcache.report.tables import table
from indexcache.searching.greedy import FrontierPoint, evaluations, greedy
from indexcache.searching.settings import SearchSettings
from indexcache.searching.source import Entry, LossSource, ModelSource, VllmSource
from indexcache.vacuity import check_batches, pool_of


@dataclass(frozen=True)
class SearchResult:
    """The patterns that a search found, with their losses on the calibration text.

    Attributes:
        frontier: the searched patterns, from all full down to the fewest full layers.
        uniform: uniform patterns of the same budgets, for comparison.
        calibration: the text: sequences, tokens, share of queries beyond k, domains, digests,
            shingles (see `indexcache.seen`).
        notes: what was left out of the comparison, and why, in sentences.
        conditions: what the losses hold for.
        noise: how far two evaluations of one pattern lie apart, nats per token; flips that differ
            by less are ties.
    """

    frontier: tuple[FrontierPoint, ...]
    uniform: tuple[FrontierPoint, ...]
    calibration: dict[str, Any]
    notes: tuple[str, ...]
    conditions: Conditions
    noise: float = 0.0

    @property
    def pattern(self) -> Pattern:
        """The searched pattern with the fewest full layers."""
        return self.frontier[-1].pattern

    def table(self) -> str:
        """Format one line per pattern: its calibration loss, and the difference to all full."""
        base = self.frontier[0].loss
        named = [(f"searched, {p.full} full", p) for p in self.frontier]
        named += [(f"uniform{self._pool(p.pattern)}", p) for p in self.uniform]
        rows = [
            [name, f"{p.loss:.4f}", f"{p.loss - base:+.4f}", str(p.pattern)] for name, p in named
        ]
        head = f"roles ({self.conditions.summary()})"
        return table(["calibration", "loss", "vs full", head], rows)

    def _pool(self, pattern: Pattern) -> str:
        """Say what share of the longest context the pool of R layers is."""
        pool = pool_of(pattern, self.conditions.k)
        if pool is None:
            return ""
        return f", pool {self.conditions.share(pool).longest:.0%} of the context"

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json."""

        def facts(point: FrontierPoint) -> dict[str, Any]:
            return {"full": point.full, "pattern": str(point.pattern), "loss": point.loss}

        def choice(point: FrontierPoint) -> dict[str, Any]:
            if not self.noise:
                return {"flipped": point.flipped}
            tied = list(point.tied)
            return {"flipped": point.flipped, "tied": tied, "margin": point.margin}

        noise = {"noise": self.noise} if self.noise else {}
        return {
            "frontier": [facts(point) | choice(point) for point in self.frontier],
            "uniform": [facts(point) for point in self.uniform],
            "calibration": self.calibration,
            "notes": list(self.notes),
            "conditions": self.conditions.to_json(),
            **noise,
        }


def search(
    model: AnyModel | VllmEngine,
    batches: Sequence[Batch],
    out: str | Path,
    settings: SearchSettings = SearchSettings(),
    *,
    identity: dict[str, Any] | None = None,
    origin: Origin = Origin(),
    progress: bool = False,
) -> SearchResult:
    """Search greedily for a pattern of every budget down to `settings.keep` (paper, Algorithm 1).

    `out` gets settings.json, journal.jsonl (one line per evaluation), result.json and pattern.json.

    Args:
        model: a model of a known family whose layers all have an indexer, or a running vLLM that
            holds one (`engines.vllm.engine.start`).
        batches: calibration batches (`indexcache.data.batches`).
        out: run folder; an interrupted run with the same settings continues, to the same result.
        settings: see `SearchSettings`.
        identity: further facts that a resumed run must share, e.g. the checkpoint's fingerprint.
        origin: where the batches come from, for the record in the result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a model trained with sharing, sequences or documents that are too short, a
            folder of another run, or weights, indexer scores or a loss that are not finite.
    """
    source = VllmSource(model) if isinstance(model, VllmEngine) else ModelSource(model)
    _refuse_trained_sharing(source.without_indexer)
    source.check()
    layers = source.layers
    check_batches(batches, source.topk)
    starts = source.starts(settings)
    full = settings.full_layers(layers, len(starts))
    comparisons, notes = _comparisons(batches, source, starts, full, settings)
    shares = check_batches(batches, source.topk, comparisons)
    conditions = source.conditions(batches, shares, origin)
    facts = {**asdict(settings), "data": digest_of(batches), **source.facts()}
    facts |= identity or {}
    check = partial(_check_entry, layers=layers, noisy=isinstance(source, VllmSource), losses={})
    with open_run(Path(out), facts, check) as run:
        total = evaluations(layers, full, starts) + len({str(p) for p in comparisons})
        done = sum("pattern" in entry for entry in run.journal)
        with progress_bar(total, "eval", done, shown=progress) as bar:

            def record(entry: Entry) -> None:
                run.append(entry)
                bar.update("pattern" in entry)

            loss = source.objective(batches, run.journal, record)
            frontier = []
            for point in greedy(loss, layers, full, starts, source.noise):
                frontier.append(point)
                _record_tie(run, point)
                bar.set_postfix_str(f"{point.full} full, best loss {point.loss:.4f}")
                source.rebase(loss, point.pattern)
            uniform = [FrontierPoint(p, loss(p)) for p in comparisons]
        if note := blindness(frontier[0].loss, source.blind_loss()):
            notes = (*notes, note)
        seen = seen_in(batches)
        frontier = [replace(p, pattern=p.pattern.chosen_on(seen)) for p in frontier]
        calibration = _calibration(batches, shares[source.topk].beyond) | seen.to_json()
        result = SearchResult(
            tuple(frontier), tuple(uniform), calibration, notes, conditions, source.noise
        )
        run.save("result.json", result.to_json())
        run.save("pattern.json", result.pattern.facts() | seen.to_pattern_file())
    return result


def _check_entry(entry: Entry, layers: int, noisy: bool, losses: dict[str, float]) -> None:
    """Raise ValueError, KeyError or TypeError for a line of a journal that no search has written.

    Args:
        layers: number of layers of the model.
        noisy: whether the losses have noise, about which there are lines too.
        losses: the losses of the lines before, by pattern; this adds the line's.
    """
    if noisy and "pattern" not in entry:
        if "noise" in entry:
            number_of(entry, "noise")
        else:
            for layer in (entry["flipped"], entry["full"], *entry["tied"]):
                number_of({"layer": layer}, "layer")
        return
    pattern, loss = entry["pattern"], number_of(entry, "loss")
    if not isinstance(pattern, str) or str(Pattern(pattern).check(layers=layers)) != pattern:
        raise ValueError(f"its pattern is {pattern!r:.60}")
    if losses.setdefault(pattern, loss) != loss:
        raise ValueError(f"it gives {pattern:.60} another loss than a line before it")


def _calibration(batches: Sequence[Batch], beyond: float) -> dict[str, Any]:
    return {
        "sequences": sum(len(b.units) for b in batches),
        "tokens": sum(b.ids.numel() for b in batches),
        "queries_beyond_k": beyond,
        "domains": sorted({b.domain for b in batches}),
    }


def _record_tie(run: Run, point: FrontierPoint) -> None:
    """Write into the journal, once, that the noise did not let a flip be told from others."""
    entry = {"flipped": point.flipped, "tied": list(point.tied), "full": point.full}
    if point.tied and entry not in run.journal:
        run.append(entry)


def _refuse_trained_sharing(shared: Sequence[int]) -> None:
    """Raise ValueError if layers of the model have no indexer: it was trained shared, or pruned."""
    if shared:
        listed = ", ".join(map(str, shared[:8])) + (", .." if len(shared) > 8 else "")
        raise ValueError(
            f"Layers {listed} of this model have no indexer of their own and can never be full. A "
            "search is pointless on a model that was trained with sharing: its layers have learnt "
            "the pattern it ships with. If this is a pruned export, search the checkpoint it came "
            "from."
        )


def _comparisons(
    batches: Sequence[Batch],
    source: LossSource,
    starts: Sequence[int],
    full: int,
    settings: SearchSettings,
) -> tuple[list[Pattern], tuple[str, ...]]:
    """Return the uniform patterns to evaluate beside the search, and what is left out of them.

    The pool of R patterns is halved until half of the queries see more than it holds.
    """
    if not settings.uniform:
        return [], ()
    notes: tuple[str, ...] = ()
    factor = settings.pool_factor
    reindexed = _uniform(source.layers, full, starts, "R", factor) if "R" in source.roles else []
    while reindexed and (problem := _refusal(batches, source.topk, reindexed)):
        if factor > 2:
            factor = max(factor // 2, 2)
            reindexed = _uniform(source.layers, full, starts, "R", factor)
            notes = (
                f"The uniform R patterns have a pool of {factor} k, because the text is too short "
                f"for one of {settings.pool_factor} k.",
            )
        else:
            reindexed = []
            notes = (f"No uniform pattern with R layers was evaluated. {problem}",)
    shared = _uniform(source.layers, full, starts, "S")
    both = sorted([*shared, *reindexed], key=lambda p: (-len(p.full_layers), "R" in p.roles))
    return both, notes


def _refusal(batches: Sequence[Batch], topk: int, patterns: list[Pattern]) -> str | None:
    """Return why nothing can be said of the patterns on these batches; None where it can."""
    try:
        check_batches(batches, topk, patterns)
    except ValueError as error:
        return str(error)
    return None


def _uniform(
    layers: int, full: int, starts: Sequence[int], rest: str, pool_factor: int | None = None
) -> list[Pattern]:
    """List the uniform patterns 1/2, 1/4, .. down to the budget that fit the stages."""
    patterns = []
    freq = 2
    while full_count(layers, 1 / freq) >= full and freq < layers:
        p = Pattern.uniform(layers, freq, rest=rest, pool_factor=pool_factor)
        if all(p[start] == "F" for start in starts):
            patterns.append(p)
        freq *= 2
    return patterns
