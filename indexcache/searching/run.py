"""The search as a run with a journal, which can be resumed; the algorithm itself is in `greedy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from indexcache.data import Batch, digest_of, seen_in
from indexcache.data.retrieval import DOMAIN
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.models.conditions import Conditions, Origin
from indexcache.models.family import AnyModel
from indexcache.models.soundness import blindness
from indexcache.models.stream.loading import stream_of
from indexcache.models.together import open_together
from indexcache.models.world import Processes, join
from indexcache.pattern import Pattern, full_count
from indexcache.records import number_of
from indexcache.report.tables import table
from indexcache.searching.costs import RoleCosts, by_arithmetic, fitted
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.methods import Asked, exact, sampled
from indexcache.searching.objective import Evaluation
from indexcache.searching.settings import SearchSettings
from indexcache.searching.source import Entry, LossSource, ModelSource, StreamedSource, VllmSource
from indexcache.searching.work import Work
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
        work: what the search has cost.
        objective: the name of what `loss` is; None for the mean loss of plain text.
        evaluations: the parts of the objective, by pattern, where it has any.
        method: how the patterns were found; the losses of "fast" are estimated between budgets.
        costs: the costs of roles, where R layers were chosen too.
    """

    frontier: tuple[FrontierPoint, ...]
    uniform: tuple[FrontierPoint, ...]
    calibration: dict[str, Any]
    notes: tuple[str, ...]
    conditions: Conditions
    noise: float = 0.0
    work: Work = field(default_factory=Work)
    objective: str | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    method: str = "exact"
    costs: RoleCosts | None = None

    @property
    def pattern(self) -> Pattern:
        """The searched pattern with the fewest full layers."""
        return self.frontier[-1].pattern

    def table(self) -> str:
        """Format one line per pattern: its calibration loss, and the difference to all full."""
        base = self.frontier[0].loss
        named = [(f"searched, {p.full} full", p) for p in self.frontier]
        named += [(f"uniform{self._pool(p.pattern)}", p) for p in self.uniform]
        extra = self._parts_head()
        rows = [
            [
                name,
                f"{'~' * p.estimated}{p.loss:.4f}",
                f"{p.loss - base:+.4f}",
                *self._cells(p, extra),
                str(p.pattern),
            ]
            for name, p in named
        ]
        head = f"roles ({self.conditions.summary()})"
        return table(["calibration", self.objective or "loss", "vs full", *extra, head], rows)

    def _parts_head(self) -> list[str]:
        """Name the columns about cost and the parts of the objective, where there are any."""
        first = self.evaluations.get(str(self.frontier[0].pattern))
        head = [] if self.costs is None else ["cost"]
        if first is None:
            return head
        return [*head, "worst part", *(["answers found"] if first.found else [])]

    def _cells(self, point: FrontierPoint, head: Sequence[str]) -> list[str]:
        """Format the cost, what loses most, and how many answers are found."""
        cost = [] if self.costs is None else [f"{self.costs.of(point.pattern):.1%}"]
        parts = self.evaluations.get(str(point.pattern))
        if parts is None:
            return [*cost, *[""] * (len(head) - len(cost))]
        full = self.evaluations[str(self.frontier[0].pattern)]
        excess = {name: mean - full.parts[name] for name, mean in parts.parts.items()}
        worst = max(excess, key=lambda name: excess[name])
        found = [sum(pair[i] for pair in parts.found.values()) for i in (0, 1)]
        cells = [f"{worst} {excess[worst]:+.4f}", f"{found[0]} of {found[1]}"]
        return [*cost, *cells][: len(head)]

    def _pool(self, pattern: Pattern) -> str:
        """Say what share of the longest context the pool of R layers is."""
        pool = pool_of(pattern, self.conditions.k)
        if pattern.pool_share is not None:
            return f", pool {float(pattern.pool_share):.0%} of the context"
        if pool is None:
            return ""
        return f", pool {self.conditions.share(pool).longest:.0%} of the context"

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json."""

        def facts(point: FrontierPoint) -> dict[str, Any]:
            parts = self.evaluations.get(str(point.pattern))
            value = {"full": point.full, "pattern": str(point.pattern), "loss": point.loss}
            estimated: dict[str, Any] = {"estimated": True} if point.estimated else {}
            if point.cost is not None:
                estimated["cost_share"] = point.cost
            return value | (parts.to_json() if parts else {}) | estimated

        def choice(point: FrontierPoint) -> dict[str, Any]:
            if not self.noise:
                return {"flipped": point.flipped}
            tied = list(point.tied)
            return {"flipped": point.flipped, "tied": tied, "margin": point.margin}

        noise: dict[str, Any] = {"noise": self.noise} if self.noise else {}
        if self.objective is not None:
            noise["objective"] = self.objective
        if self.costs is not None:
            noise["costs"] = self.costs.to_json()
        if self.method != "exact":
            noise["method"] = self.method
        return {
            "frontier": [facts(point) | choice(point) for point in self.frontier],
            "uniform": [facts(point) for point in self.uniform],
            "calibration": self.calibration,
            "notes": list(self.notes),
            "conditions": self.conditions.to_json(),
            "work": self.work.to_json(),
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
    """Search for a pattern of every budget down to `settings.keep`, greedily (paper, Algorithm 1).

    `settings.method` chooses a search that measures less.

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
    source = _source(model, join(), Path(out))
    return _search(source, batches, Path(out), settings, identity or {}, origin, progress)


def _source(model: AnyModel | VllmEngine, world: Processes, out: Path) -> LossSource:
    """Return what gives the losses of a model.

    Raises:
        ValueError: there are several processes, and a model that is not streamed.
    """
    if isinstance(model, VllmEngine):
        return VllmSource(model)
    stream = stream_of(model)
    if stream is not None:
        return StreamedSource(model, stream, world, out)
    if world.size > 1:
        raise ValueError(
            "Several processes search together where the model is streamed (--stream); start one "
            "process, or add that."
        )
    return ModelSource(model)


def _search(
    source: LossSource,
    batches: Sequence[Batch],
    out: Path,
    settings: SearchSettings,
    identity: dict[str, Any],
    origin: Origin,
    progress: bool,
) -> SearchResult:
    settings.check_method()
    source.check_settings(settings)
    _refuse_trained_sharing(source.without_indexer)
    source.check()
    layers = source.layers
    check_batches(batches, source.topk)
    starts = source.starts(settings)
    full = settings.full_layers(layers, len(starts))
    fixed = settings.fixed_layers(layers, starts, full)
    costs = _costs(source, settings)
    reindexed = "R" in source.roles
    comparisons, notes = uniform_patterns(
        batches, layers, source.topk, starts, full, settings, reindexed
    )
    sizes = [] if costs is None else settings.pool_sizes()
    pools = [Pattern("F" + "R" * (layers - 1), size) for size in sizes]
    shares = check_batches(batches, source.topk, [*comparisons, *pools])
    conditions = source.conditions(batches, shares, origin)
    facts = {**settings.facts(), "data": digest_of(batches), **source.facts(), **identity}
    check = partial(
        _check_entry,
        layers=layers,
        noisy=isinstance(source, VllmSource),
        pairs=settings.start == "gradients",
        losses={},
        sizes=None if settings.method == "exact" else [len(b.units) for b in batches],
    )
    with open_together(source.world, out, facts, check) as run:
        find = exact if settings.method == "exact" else sampled
        frontier, uniform, parts, work = find(
            run, source, batches, settings, Asked(full, starts, fixed, comparisons, costs), progress
        )
        notes += about_full(frontier[0], parts, settings.objective, source.blind_loss())
        seen = seen_in(batches)
        frontier = [replace(p, pattern=p.pattern.chosen_on(seen)) for p in frontier]
        calibration = _calibration(batches, shares[source.topk].beyond) | seen.to_json()
        result = SearchResult(
            tuple(frontier),
            tuple(uniform),
            calibration,
            notes,
            conditions,
            source.noise,
            work,
            settings.objective if parts else None,
            parts,
            settings.method,
            costs,
        )
        run.save("result.json", result.to_json())
        run.save("pattern.json", result.pattern.facts() | seen.to_pattern_file())
    source.close()
    return result


def _costs(source: LossSource, settings: SearchSettings) -> RoleCosts | None:
    """Return the costs by which layers are chosen among F, R and S; None among F and S.

    Raises:
        ValueError: R layers do not run here, or the file of a bench gives no costs.
    """
    if settings.roles == "FS":
        return None
    if "R" not in source.roles:
        raise ValueError(f"There are no R layers on {source.kind}; take --roles FS.")
    context = settings.cost_context or source.context
    found = {
        size: by_arithmetic(context, size, source.topk)
        if settings.costs is None
        else fitted(settings.costs, context, size, source.topk)
        for size in settings.pool_sizes()
    }
    largest, *others = found
    return found[largest].beside({size: found[size] for size in others})


def about_full(
    full: FrontierPoint, evaluations: Mapping[str, Evaluation], objective: str, blind: float
) -> tuple[str, ...]:
    """Say where the full model itself is no better than a blind guess, or finds no answer.

    Args:
        full: the point with all layers full.
        evaluations: the parts of the objective by pattern, where it has any.
        objective: its name; divergences say nothing of the model's own loss.
        blind: the loss of a blind guess.
    """
    notes = []
    parts = evaluations.get(str(full.pattern))
    loss = full.loss if parts is None else min(parts.parts.values())
    if objective not in ("kl", "key-kl") and (note := blindness(loss, blind)):
        notes.append(note)
    lost = [k for k, (found, _) in (parts.found if parts else {}).items() if not found]
    if lost:
        names = ", ".join(kind.removeprefix(DOMAIN) for kind in lost)
        notes.append(
            f"The model with all layers full finds no answer of {names}: what patterns lose there "
            "says little; leave it out, or take shorter sequences."
        )
    return tuple(notes)


def _check_entry(
    entry: Entry,
    layers: int,
    noisy: bool,
    pairs: bool,
    losses: dict[str, float],
    sizes: Sequence[int] | None,
) -> None:
    """Raise ValueError, KeyError or TypeError for a line of a journal that no search has written.

    Args:
        layers: number of layers of the model.
        noisy: whether the losses have noise, about which there are lines too.
        pairs: whether a line may hold estimates by gradients.
        losses: the losses of the lines before, by pattern; this adds the line's.
        sizes: the number of sequences of every batch, where lines hold their sums.
    """
    if noisy and "pattern" not in entry:
        if "noise" in entry:
            number_of(entry, "noise")
        else:
            for layer in (entry["flipped"], entry["full"], *entry["tied"]):
                number_of({"layer": layer}, "layer")
        return
    if pairs and "pairs" in entry:
        rows = [[number_of({"loss": x}, "loss") for x in row] for row in entry["pairs"]]
        if [len(row) for row in rows] != [layers] * layers:
            raise ValueError(f"its estimates are not those of {layers} layers")
        return
    pattern = entry["pattern"]
    loss = number_of(entry, "loss") if sizes is None else 0.0
    if not isinstance(pattern, str) or str(Pattern(pattern).check(layers=layers)) != pattern:
        raise ValueError(f"its pattern is {pattern!r:.60}")
    if sizes is not None:
        _check_sums(entry, sizes)
        return
    for value in dict(entry.get("parts", {})).values():
        number_of({"part": value}, "part")
    for pair in dict(entry.get("found", {})).values():
        if len([number_of({"n": n}, "n") for n in pair]) != 2:
            raise ValueError(f"found is {pair!r:.60}, which is no pair of numbers")
    if losses.setdefault(pattern, loss) != loss:
        raise ValueError(f"it gives {pattern:.60} another loss than a line before it")


def _check_sums(entry: Entry, sizes: Sequence[int]) -> None:
    """Raise ValueError, KeyError or TypeError for a line of sums that no search has written."""
    batches, sums = list(entry["batches"]), list(entry["sums"])
    found = list(entry.get("found") or [None] * len(batches))
    for batch, row, counts in zip(batches, sums, found, strict=True):
        if isinstance(batch, bool) or not isinstance(batch, int) or not 0 <= batch < len(sizes):
            raise ValueError(f"a batch is {batch!r:.60}")
        for values in (row, row if counts is None else counts):
            if len([number_of({"sum": v}, "sum") for v in values]) != sizes[batch]:
                raise ValueError(
                    f"batch {batch} has {sizes[batch]} sequences, but not so many sums"
                )


def _calibration(batches: Sequence[Batch], beyond: float) -> dict[str, Any]:
    return {
        "sequences": sum(len(b.units) for b in batches),
        "tokens": sum(b.ids.numel() for b in batches),
        "queries_beyond_k": beyond,
        "domains": sorted({b.domain for b in batches}),
    }


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


def uniform_patterns(
    batches: Sequence[Batch],
    layers: int,
    topk: int,
    starts: Sequence[int],
    full: int,
    settings: SearchSettings,
    with_pools: bool = True,
) -> tuple[list[Pattern], tuple[str, ...]]:
    """Return the uniform patterns to evaluate beside the search, and what is left out of them.

    The pool of R patterns is halved until half of the queries see more than it holds.
    """
    if not settings.uniform:
        return [], ()
    notes: tuple[str, ...] = ()
    factor = settings.pool_factor
    reindexed = _uniform(layers, full, starts, "R", factor) if with_pools else []
    while reindexed and (problem := _refusal(batches, topk, reindexed)):
        if factor > 2:
            factor = max(factor // 2, 2)
            reindexed = _uniform(layers, full, starts, "R", factor)
            notes = (
                f"The uniform R patterns have a pool of {factor} k, because the text is too short "
                f"for one of {settings.pool_factor} k.",
            )
        else:
            reindexed = []
            notes = (f"No uniform pattern with R layers was evaluated. {problem}",)
    shared = _uniform(layers, full, starts, "S")
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
