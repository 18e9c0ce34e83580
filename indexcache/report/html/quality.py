"""The sections about what patterns lose: verdicts, frontier, domains, positions, recall."""

from __future__ import annotations

from collections.abc import Sequence

from indexcache.report.html import charts
from indexcache.report.html.charts import Mark
from indexcache.report.html.decision import SAFE, Candidate, Decision, place, vacuous, work_left
from indexcache.report.html.markup import (
    Html,
    counted,
    data,
    el,
    figure,
    interval,
    join,
    listed,
    table,
)
from indexcache.report.html.results import ALL, EvaluateRun, Row, Run, of_verb

HEAD = ["pattern", "full layers", "excess loss, nats", "95 % interval", "KL, nats", "same top-1"]


def verdicts(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Show what every gate says of every pattern at every place."""
    parts = []
    for run in of_verb(runs, EvaluateRun):
        if not run.verdicts:
            continue
        rows = [
            [
                v.name,
                place(v.where),
                v.length or run.conditions.length.removesuffix(" tokens"),
                badge(v.word),
                data(v.upper, "+.1%" if v.where.startswith("retrieval:") else "+.4f"),
                v.documents,
                v.reason,
            ]
            for v in run.verdicts
        ]
        recall = ""
        if run.recall_most is not None:
            recall = f" and {run.recall_most:.1%} of the answers"
        head = ["pattern", "where", "tokens", "verdict", "upper end", "documents", "why"]
        caption = (
            f"Gate of {run.most:g} nats per token{recall} against {run.against} "
            f"({run.folder}: {run.conditions.short()})"
        )
        parts.append(table(caption, head, rows))
    if not parts:
        return None
    note = (
        "A pattern is safe where the upper end of the 95 % interval of what it loses is at or "
        "below the margin, with Holm's correction over domains and tasks. It is not safe where the "
        "whole interval lies above the margin, and inconclusive anywhere else; inconclusive is no "
        "pass."
    )
    return join([el("p", note), parts])


def badge(word: str) -> Html:
    """Show a verdict with a sign, so that its colour is not all that tells it."""
    kind = {SAFE: "good", "not safe": "bad"}.get(word, "unsure")
    sign = {"good": "✓", "bad": "✕", "unsure": "?"}[kind]
    return el("span", el("span", sign, aria_hidden="true"), " ", word, class_=f"badge {kind}")


def frontier(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw cost against excess loss, one picture for every evaluation and length."""
    parts = []
    for run in of_verb(runs, EvaluateRun):
        for length in dict.fromkeys(r.length for r in run.rows):
            rows = [r for r in run.rows if r.where == ALL and r.length == length]
            parts.append(_frontier(run, rows, length, decision))
    if not parts:
        return None
    text = (
        "Each number is a pattern. To the left it saves more of the indexers' work, further down "
        "it loses less; a vertical line is the 95 % interval over documents."
    )
    return join([el("p", text), parts])


def _frontier(
    run: EvaluateRun, rows: Sequence[Row], length: int | None, decision: Decision
) -> Html:
    marks, lines = [], []
    words = {(str(c.pattern), c.delta): c.word for c in decision.all}
    for i, row in enumerate(rows, 1):
        left = work_left(row.pattern, row.pool_share)
        word = words.get((str(row.pattern), run.conditions.delta), "the baseline")
        kind = 0 if word in (SAFE, "the baseline") else 1
        marks.append(
            Mark(label=str(i), value=row.excess, low=row.low, high=row.high, x=left, kind=kind)
        )
        lines.append(
            [
                f"{i}. {row.name}",
                el("code", row.pattern),
                data(left, ".1%"),
                data(row.excess),
                interval(row.low, row.high),
                data(row.kl, ".4f"),
                data(row.agreement, ".1%"),
                "within the engine's noise" if row.within_noise else word,
            ]
        )
    at = f"{length} tokens" if length else run.conditions.length
    caption = (
        f"What patterns cost and lose at {at}, against {run.against} ({run.folder}: "
        f"{run.conditions.short()})"
    )
    svg = charts.scatter(
        marks, caption, "indexers' scores still computed", "excess loss, nats", run.most
    )
    key = el(
        "p",
        charts.legend(0, "safe, or the baseline"),
        charts.legend(1, "not shown to be safe"),
        class_="legend",
    )
    head = [
        "pattern", "roles", "scores left", "excess, nats", "95 % interval", "KL, nats",
        "same top-1", "verdict",
    ]  # fmt: skip
    numbers = table(caption, head, lines)
    return figure(join([svg, key]), caption, numbers, open_=True)


def domains(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw the excess of the shown pattern on every domain; the table has all patterns."""
    shown = decision.shown
    parts = []
    for run in of_verb(runs, EvaluateRun):
        for length in dict.fromkeys(r.length for r in run.rows):
            rows = [r for r in run.rows if r.length == length]
            parts.append(_places(run, rows, length, shown, "domain"))
            own = [r for r in run.positions if r.length == length]
            parts.append(_places(run, own, length, shown, "part of the sequence"))
    parts = [part for part in parts if part is not None]
    return el("div", parts, class_="pair") if parts else None


def _places(
    run: EvaluateRun, rows: Sequence[Row], length: int | None, shown: Candidate | None, what: str
) -> Html | None:
    if not rows:
        return None
    names = list(dict.fromkeys(r.name for r in rows))
    places = list(dict.fromkeys(r.where for r in rows))
    name = names[-1]
    if shown is not None and run.conditions.delta == shown.delta:
        name = next((r.name for r in rows if r.pattern == shown.pattern), name)
    at = f"{length} tokens" if length else run.conditions.length
    marks = [
        Mark(label=place(r.where), value=r.excess, low=r.low, high=r.high)
        for r in rows
        if r.name == name
    ]
    title = f"Excess loss of {name} by {what} at {at}, against {run.against} ({run.folder})"
    cells = {(r.name, r.where): r for r in rows}
    lines = [
        [
            one,
            *(
                join(
                    [
                        data(cells[one, p].excess),
                        el("br"),
                        interval(cells[one, p].low, cells[one, p].high),
                    ]
                )
                if what == "domain"
                else data(cells[one, p].excess)
                for p in places
                if (one, p) in cells
            ),
        ]
        for one in names
    ]
    documents = [f"{place(p)} ({counted(cells[name, p].documents, 'document')})" for p in places]
    caption = f"Excess loss by {what}, nats per token, at {at}, against {run.against}"
    return figure(
        charts.forest(marks, title, "excess loss, nats per token", run.most),
        title,
        table(caption, ["pattern", *documents], lines),
    )


def recall(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw how many answers the shown pattern finds by task and length, beside the baseline."""
    parts = []
    for run in of_verb(runs, EvaluateRun):
        if not run.answers:
            continue
        names = list(dict.fromkeys(a.name for a in run.answers))
        name = names[-1]
        if decision.shown is not None:
            own = [a.name for a in run.answers if a.pattern == decision.shown.pattern]
            name = own[0] if own else name
        marks = []
        for a in run.answers:
            if a.name == name:
                where = f"{a.task}, {a.length}"
                marks.append(Mark(label=f"{where}: full", value=a.before / max(a.asked, 1), kind=3))
                marks.append(Mark(label=where, value=a.found / max(a.asked, 1), kind=0))
        title = f"Answers found by {name}, and by {run.against}, by task and length ({run.folder})"
        rows = [
            [
                a.name,
                a.task,
                a.length,
                f"{a.before} of {a.asked}",
                f"{a.found} of {a.asked}",
                data(a.lost, "+.1%"),
                interval(a.low, a.high, "+.1%"),
                a.sequences,
            ]
            for a in run.answers
        ]
        head = [
            "pattern", "task", "tokens", run.against, "pattern", "share lost", "95 % interval",
            "sequences",
        ]  # fmt: skip
        picture = charts.bars(marks, title, ".0%", most=1.0)
        parts.append(figure(picture, title, table("Answers found by task and length", head, rows)))
    if not parts:
        return None
    text = (
        "The mean loss can stay flat while a model stops finding facts far back in its prompt. "
        "Here facts are spread over a long text, and only the answers count."
    )
    return join([el("p", text), parts])


def gaps(runs: Sequence[Run], decision: Decision) -> list[str]:
    """List what the evaluations leave open, in sentences."""
    found = []
    evaluated = of_verb(runs, EvaluateRun)
    if not evaluated:
        return ["No evaluation is among the runs: nothing says what a pattern loses."]
    for run in evaluated:
        if run.most is None:
            found.append(f"{run.folder} ran without a margin (--most) and holds no verdict.")
        few = sorted({place(r.where) for r in run.rows if r.low is None})
        if few:
            found.append(
                f"{run.folder} has too few documents for an interval on {listed(few)}: the numbers "
                "there are means without a verdict."
            )
        for name in dict.fromkeys(r.name for r in run.rows if not run.is_baseline(r)):
            note = vacuous(run, name)
            if note and note not in found:
                found.append(note)
        if len({r.where for r in run.rows} - {ALL}) < 2:
            found.append(f"{run.folder} has one kind of text: other kinds may lose more.")
        generous = {r.name for r in run.rows if (r.pool_share or 0) > 0.25}
        if generous:
            found.append(
                f"In {run.folder} the pool of {listed(sorted(generous))} is more than a quarter of "
                "the longest context, which flatters R layers."
            )
        if run.node.has("gate") and (note := run.node["gate"].maybe_text("note")):
            found.append(note)
    if not any(run.answers for run in evaluated):
        found.append(
            "Recall was not tested: the mean loss can stay flat while the model stops finding "
            "facts far back in its prompt."
        )
    longest = max(n for run in evaluated for n in run.conditions.lengths)
    found.append(
        f"Quality was measured up to {longest} tokens; longer prompts lose more, and nothing here "
        "says how much."
    )
    return found
