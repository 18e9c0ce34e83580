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
from indexcache.report.html.results import ALL, ANSWERS, EvaluateRun, Row, Run, Verdict, of_verb

HEAD = ["pattern", "full layers", "excess loss, nats", "95 % interval", "KL, nats", "same top-1"]


def verdicts(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Show what every gate says of every pattern at every place, and why in a second table."""
    parts = []
    for run in of_verb(runs, EvaluateRun):
        if not run.verdicts:
            continue
        limits = f"{run.most:g} nats per token"
        if run.recall_most is not None:
            limits += f" and {run.recall_most:.1%} of the answers"
        caption = f"Gate of {limits} against {run.against} ({run.folder}: {run.conditions.short()})"
        names = list(dict.fromkeys(v.name for v in run.verdicts))
        found = {(v.name, v.where, v.length): v for v in run.verdicts}
        places = list(dict.fromkeys((v.where, v.length) for v in run.verdicts))
        rows = [
            [
                join([place(where), f", {run.tokens(length)}"]),
                *(_judged(found.get((name, where, length)), run) for name in names),
            ]
            for where, length in places
        ]
        parts.append(table(caption, ["where", *names], rows))
        reasons = [
            [v.name, place(v.where), run.tokens(v.length), v.word, v.documents, v.reason]
            for v in run.verdicts
        ]
        head = ["pattern", "where", "length", "verdict", "documents", "why"]
        reasoned = table(f"Reasons of the gate of {limits}", head, reasons)
        parts.append(el("details", el("summary", "The reason of every verdict"), reasoned))
    if not parts:
        return None
    note = (
        "A pattern is safe where the upper end of the 95 % interval of what it loses is at or "
        "below the margin, with Holm's correction over domains and tasks. It is not safe where the "
        "whole interval lies above the margin, and inconclusive anywhere else; inconclusive is no "
        "pass. The number is the upper end."
    )
    return join([el("p", note), parts])


def _judged(verdict: Verdict | None, run: EvaluateRun) -> Html:
    if verdict is None:
        return Html("–")
    form = "+.1%" if verdict.where.startswith(ANSWERS) and run.recall_most else "+.4f"
    return el("span", badge(verdict.word), " ", data(verdict.upper, form), class_="ends")


def badge(word: str) -> Html:
    """Show a verdict with a sign, so that its colour is not all that tells it."""
    kind = {SAFE: "good", "not safe": "bad"}.get(word, "unsure")
    sign = {"good": "✓", "bad": "✕", "unsure": "?"}[kind]
    return el("span", el("span", sign, aria_hidden="true"), " ", word, class_=f"badge {kind}")


def frontier(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw cost against excess loss, one picture for every evaluation and length."""
    parts: list[Html] = []
    for run in of_verb(runs, EvaluateRun):
        for length in dict.fromkeys(r.length for r in run.text_rows):
            rows = [r for r in run.text_rows if r.where == ALL and r.length == length]
            parts.append(_frontier(run, rows, length, decision, first=not parts))
    if not parts:
        return None
    text = (
        "Each number is a pattern. To the left it saves more of the indexers' work, further down "
        "it loses less; a vertical line is the 95 % interval over documents."
    )
    return join([el("p", text), parts])


def _frontier(
    run: EvaluateRun, rows: Sequence[Row], length: int | None, decision: Decision, *, first: bool
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
    at = run.tokens(length)
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
    return figure(join([svg, key]), caption, numbers, open_=first)


def domains(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw the excess of the shown pattern on every domain; the table has all patterns."""
    shown = decision.shown
    parts = []
    for run in of_verb(runs, EvaluateRun):
        for length in dict.fromkeys(r.length for r in run.text_rows):
            rows = [r for r in run.text_rows if r.length == length]
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
    at = run.tokens(length)
    marks = [
        Mark(label=place(r.where), value=r.excess, low=r.low, high=r.high)
        for r in rows
        if r.name == name
    ]
    title = f"Excess loss of {name} by {what} at {at}, against {run.against} ({run.folder})"
    cells = {(r.name, r.where): r for r in rows}

    def cell(row: Row | None) -> Html:
        if row is None or what != "domain":
            return data(None if row is None else row.excess)
        return join([data(row.excess), el("br"), interval(row.low, row.high)])

    lines = [[one, *(cell(cells.get((one, p))) for p in places)] for one in names]
    counts = {r.where: r.documents for r in rows}
    documents = [f"{place(p)} ({counted(counts[p], 'document')})" for p in places]
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
        if not run.answer_rows:
            continue
        name = run.answer_rows[-1].name
        if decision.shown is not None:
            own = [r.name for r in run.answer_rows if r.pattern == decision.shown.pattern]
            name = own[0] if own else name
        marks, lines = [], []
        for row in run.answer_rows:
            answers = row.answers
            assert answers is not None
            low, high = answers.low, answers.high
            lines.append(
                [
                    row.name,
                    row.task,
                    run.tokens(row.length),
                    f"{answers.before} of {answers.asked}",
                    f"{answers.found} of {answers.asked}",
                    data(answers.lost, "+.1%"),
                    interval(low, high, "+.1%"),
                    data(row.excess),
                    row.documents,
                ]
            )
            if row.name == name:
                at = f", {row.length}" if row.length else ""
                marks.append(Mark(label=row.task + at, value=answers.lost, low=low, high=high))
        title = (
            f"Share of the answers that {name} loses by task and number of tokens, against "
            f"{run.against} ({run.folder})"
        )
        head = [
            "pattern", "task", "length", f"found by {run.against}", "found", "share lost",
            "95 % interval", "excess loss of answers, nats", "sequences",
        ]  # fmt: skip
        picture = charts.forest(marks, title, "share of answers lost", run.recall_most, "+.1%")
        numbers = table(f"Answers found by task and length ({run.folder})", head, lines)
        parts.append(figure(picture, title, numbers))
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
        if len({r.where for r in run.text_rows} - {ALL}) < 2:
            found.append(f"{run.folder} has one kind of text: other kinds may lose more.")
        generous = {r.name for r in run.rows if (r.pool_share or 0) > 0.25}
        if generous:
            found.append(
                f"In {run.folder} the pool of {listed(sorted(generous))} is more than a quarter of "
                "the longest context, which flatters R layers."
            )
        if run.node.has("gate") and (note := run.node["gate"].maybe_text("note")):
            found.append(note)
    if not any(run.answer_rows for run in evaluated):
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
