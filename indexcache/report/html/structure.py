"""The sections about layers: patterns, the order of flips, overlap, and training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from indexcache.pattern import Pattern
from indexcache.report.html import charts
from indexcache.report.html.decision import Decision
from indexcache.report.html.markup import Html, counted, data, el, figure, join, table
from indexcache.report.html.results import DistillRun, OverlapRun, Point, Run, SearchRun, of_verb

ROLES = {"F": "full", "R": "re-index", "S": "shared"}


def describe(pattern: Pattern) -> str:
    """Say how many layers have which role."""
    parts = [f"{pattern.roles.count(r)} {name}" for r, name in ROLES.items() if r in pattern.roles]
    return f"{len(pattern)} layers: {', '.join(parts)}"


def pattern_figure(pattern: Pattern, name: str) -> Html:
    """Draw a pattern as a strip, with a table of what every layer does."""
    rows = []
    for i, role in enumerate(pattern.roles):
        does = {
            "F": "runs its indexer over the whole context",
            "R": f"runs its indexer over the pool of layer {pattern.source(i)}",
            "S": f"reads the selection of layer {pattern.source(i)}",
        }[role]
        rows.append([i, f"{role}, {ROLES[role]}", does])
    caption = f"{name}: {describe(pattern)}"
    pool = f", with a pool of {pattern.pool_factor} k" if pattern.pool_factor else ""
    if pattern.pool_share is not None:
        pool = f", with a pool of {pattern.pool_share} of what a query sees"
    text = join([caption, pool, ". As a text: ", el("code", pattern), "."])
    numbers = table(caption, ["layer", "role", "what it does"], rows)
    return figure(charts.strip(pattern.roles, f"The pattern {pattern}. {caption}"), text, numbers)


def patterns(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw all patterns that were evaluated, below each other."""
    if len(decision.all) < 2:
        return None
    rows = [
        el(
            "li",
            el("p", el("b", c.title), f" — {c.word}; {describe(c.pattern)}"),
            charts.strip(c.pattern.roles, f"{c.title}: the pattern {c.pattern}"),
        )
        for c in decision.all
    ]
    return el("ul", rows, class_="plain")


def flips(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw in which order each search gave up layers, and what that cost on its own text."""
    parts = [_flips(run) for run in of_verb(runs, SearchRun)]
    return join(parts) if parts else None


def _flips(run: SearchRun) -> Html:
    order = flip_order([p.pattern for p in run.frontier])
    last = run.frontier[-1].pattern
    texts = [str(order.get(i, "·")) for i in range(len(last))]
    base = run.frontier[0].loss
    where = f"{run.folder}: {run.conditions.short()}, calibration text"
    title = f"Order in which layers got their roles in the search ({where})"
    first = sorted(order, key=lambda layer: (order[layer], layer))
    spoken = ", ".join(f"layer {layer}" for layer in first) or "no layer"
    rows = []
    for i, point in enumerate(run.frontier):
        now = ", ".join(str(layer) for layer in first if order[layer] == i)
        name = f"searched, {len(point.pattern.full_layers)} full"
        rows.append(_point_row(point, base, name, now or "–"))
    rows += [_point_row(p, base, "uniform", "–") for p in run.uniform]
    tasks = list(dict.fromkeys(kind for p in run.frontier for kind, _, _ in p.found))
    head = ["pattern", "layer that changed", run.objective, "above all full", "roles"]
    head += [f"answers of {task}" for task in tasks]
    numbers = table(f"Searched and uniform patterns ({where})", head, rows)
    strip = charts.strip(last.roles, f"{title}: {spoken}", texts)
    costed = all(p.cost is not None for p in run.frontier[1:]) and len(run.frontier) > 1
    axis = "cost by the search's cost model, % of all full" if costed else "number of full layers"
    series = [("searched", _points(run.frontier, base))]
    for role, name in () if costed else (("S", "uniform"), ("R", "uniform, rest R")):
        own = [p for p in run.uniform if ("R" in p.pattern.roles) == (role == "R")]
        if own:
            series.append((name, _points(own, base)))
    curve = charts.lines(
        series, f"Calibration loss above all full by {axis} ({where})", axis, "above all full, nats"
    )
    words = (
        f"{title}. 1 went first, because it loses least; a dot stays full. These losses are on the "
        "text that chose the pattern and flatter it; they are no evidence."
    )
    notes = [el("p", note) for note in run.notes]
    return join([figure(join([strip, curve]), words, numbers), notes])


def flip_order(patterns: Sequence[Pattern]) -> dict[int, int]:
    """Return of every layer that is not full in the last pattern at which step it got its role."""
    order: dict[int, int] = {}
    for i, (before, after) in enumerate(pairwise(patterns), 1):
        for layer, (a, b) in enumerate(zip(before.roles, after.roles, strict=True)):
            if b == "F":
                order.pop(layer, None)
            elif a != b:
                order[layer] = i
    return order


def _points(points: Sequence[Point], base: float) -> list[tuple[float, float]]:
    if any(p.cost is not None for p in points):
        return [(100 * (1.0 if p.cost is None else p.cost), p.loss - base) for p in points]
    return [(len(p.pattern.full_layers), p.loss - base) for p in points]


def _point_row(point: Point, base: float, name: str, now: str) -> list[object]:
    return [
        f"{name}, estimated" if point.estimated else name,
        now,
        data(point.loss, ".4f"),
        data(point.loss - base),
        el("code", point.pattern),
        *(f"{found} of {asked}" for _, found, asked in point.found),
    ]


def overlap(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw how much the selections of each pair of layers share."""
    parts = []
    for run in of_verb(runs, OverlapRun):
        pattern = run.pattern
        if decision.shown is not None and len(decision.shown.pattern) == len(run.shares):
            pattern = decision.shown.pattern
        groups = [range(g[0], g[-1] + 1) for g in pattern.groups()] if pattern else []
        topk = run.conditions.k
        title = (
            f"Shared part of what two layers select ({run.folder}: {run.queries} queries with more "
            f"than k = {topk} tokens, {run.conditions.length}); chance is {run.chance:.0%}"
        )
        frames = f". The frames are the groups of {pattern}" if pattern else ""
        head = ["layer", *(str(i) for i in range(len(run.shares)))]
        rows = [[i, *(data(s, ".0%") for s in row)] for i, row in enumerate(run.shares)]
        ramp = el("p", "0 % ", el("span", class_="ramp", aria_hidden="true"), " 100 % shared")
        svg = charts.heat_map(run.shares, title, groups)
        caption = f"{title}{frames}."
        numbers = table("Shared part of the selections of two layers", head, rows, wide=True)
        parts.append(figure(join([svg, ramp]), caption, numbers))
    if not parts:
        return None
    text = (
        "Where two layers select the same tokens, one can read the selection of the other. A "
        "shared layer reads that of the full layer in the corner of its frame."
    )
    return join([el("p", text), parts])


def training(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Say what trainings did to the loss on held-out text."""
    found = of_verb(runs, DistillRun)
    if not found:
        return None
    items = []
    for run in found:
        text = (
            f"{run.folder}: the indexers of {run.pattern} were trained in "
            f"{counted(run.steps, 'step')} on {counted(run.tokens, 'token')}. "
        )
        if run.held_out is None:
            text += "No held-out loss was measured on the way."
        else:
            first, best, step, end = run.held_out
            text += (
                f"The held-out loss under the pattern was {first:.4f} before, {best:.4f} at step "
                f"{step}, which is kept, and {end:.4f} at the end, in nats per token. It chose the "
                "step, so it is no evidence: evaluate the result on other text."
            )
        items.append(el("li", text))
    return el("ul", items)
