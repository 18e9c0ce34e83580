"""The sections about time and money: gains of a bench, and the cost of a million tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from indexcache.report.html import charts
from indexcache.report.html.charts import Mark
from indexcache.report.html.decision import Candidate, Decision
from indexcache.report.html.markup import Html, counted, data, el, figure, join, table
from indexcache.report.html.results import BenchRun, Run, Timed, of_verb
from indexcache.report.speed import format_length

ONE = "1"  # the batch that was asked for: a single request


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a million tokens of prompt and output cost under a pattern, at one length.

    Attributes:
        seconds: GPU seconds of a request.
        per_million: in the currency of the price.
        saving: share that is saved against all full; None for it and without it.
    """

    run: BenchRun
    row: Timed
    seconds: float
    per_million: float
    saving: float | None


def costs(run: BenchRun, price: float, output_tokens: int) -> list[Cost]:
    """Compute the cost of requests from the rows of a bench, as `plan` does from its predictions.

    A request takes its time to the first token and its share of the steps that decode
    `output_tokens`; all GPUs of the device are one.
    """
    ttft = {(r.context, str(r.pattern)): r.ttft_s for r in run.rows if r.asked == ONE and r.ttft_s}
    seconds = {
        id(r): ttft[r.context, str(r.pattern)] + output_tokens / r.total_tok_s
        for r in run.rows
        if (r.context, str(r.pattern)) in ttft
    }
    full = {
        (r.context, r.asked): seconds[id(r)]
        for r in run.rows
        if id(r) in seconds and set(r.pattern.roles) == {"F"}
    }
    found = []
    for row in run.rows:
        if id(row) not in seconds:
            continue
        own, base = seconds[id(row)], full.get((row.context, row.asked))
        shares = set(row.pattern.roles) != {"F"}
        found.append(
            Cost(
                run=run,
                row=row,
                seconds=own,
                per_million=price / 3600 * own / (row.context + output_tokens) * 1e6,
                saving=1 - own / base if base and shares else None,
            )
        )
    return found


def stands_for(row: Timed, candidate: Candidate | None) -> bool:
    """Say whether a row's times are those of a candidate.

    They are where the patterns are equal, or have as many full layers and no R: which of the layers
    are full does not change the work.
    """
    if candidate is None or len(row.pattern) != len(candidate.pattern):
        return False
    if row.pattern == candidate.pattern:
        return True
    mixed = "R" in row.pattern.roles + candidate.pattern.roles
    return not mixed and len(row.pattern.full_layers) == len(candidate.pattern.full_layers)


def best_gain(runs: Sequence[Run], candidate: Candidate | None) -> tuple[BenchRun, Timed] | None:
    """Return the row for a candidate at the longest context, of single requests where there are."""
    found = [
        (run, row)
        for run in of_verb(runs, BenchRun)
        for row in run.rows
        if row.gains[1] is not None and stands_for(row, candidate)
    ]
    return max(found, key=lambda pair: (pair[1].asked == ONE, pair[1].context), default=None)


def requests(row: Timed) -> str:
    """Say how many requests of which length a row is of."""
    prompts = f"of {format_length(row.context)} tokens"
    return (
        f"single requests {prompts}"
        if row.batch == 1
        else f"{row.batch} requests {prompts} decoded together"
    )


def about_gain(run: BenchRun, row: Timed, candidate: Candidate) -> str:
    """Say what a gain holds for."""
    how = ""
    if row.pattern != candidate.pattern:
        how = f", timed on {row.name}, which has as many full layers"
    weights = ", with random weights" if run.random else ""
    return f"{requests(row)} on {run.device}, {run.dtype}{weights}{how} ({run.folder}, {run.date})"


def speed(runs: Sequence[Run], decision: Decision) -> Html | None:
    """Draw the gains over all full of every bench."""
    parts: list[object] = []
    for run in of_verb(runs, BenchRun):
        where = f"{run.folder}: {run.identity.name} on {run.device}, {run.dtype}, {run.date}"
        figures = []
        names = list(dict.fromkeys(r.name for r in run.rows if set(r.pattern.roles) != {"F"}))
        for i, what in enumerate(("to the first token", "of decoding, tokens/s")):
            rows = [r for r in run.rows if r.gains[i] and r.name in names]
            if not rows:
                continue
            marks = [
                Mark(
                    label=f"{format_length(r.context)}: {r.name}"
                    + ("" if r.batch == 1 else f", {r.batch}"),
                    value=r.gains[i] or 0.0,
                    kind=0 if stands_for(r, decision.shown) else 3,
                )
                for r in rows
            ]
            title = f"Gain {what} over all full by context, pattern and batch ({where})"
            picture = charts.bars(marks, title, ".2f", reference=1.0)
            figures.append(figure(picture, title, _gains(run, where)))
        parts += [el("div", figures, class_="pair")] if figures else []
        parts += [el("p", f"Could not be measured: {text}") for text in run.failed]
        if run.note:
            parts.append(el("p", run.note))
        for context in sorted({r.context for r in run.rows}):
            if context <= (run.identity.k or 0):
                parts.append(
                    el(
                        "p",
                        f"At {format_length(context)} tokens every layer selects everything (k = "
                        f"{run.identity.k}): all patterns give the same result there.",
                    )
                )
    if not parts:
        return None
    return join(
        [el("p", "A gain of 1 is the speed of all layers full; 2 is twice as fast."), parts]
    )


def _gains(run: BenchRun, where: str) -> Html:
    rows = [
        [
            f"{format_length(r.context)}: {r.name}",
            f"{len(r.pattern.full_layers)} of {len(r.pattern)}",
            r.batch,
            data(r.ttft_s, ".4g"),
            data(r.gains[0], ".2f", "x"),
            data(r.step_tok_s, ".4g"),
            data(r.total_tok_s, ".4g"),
            data(r.gains[1], ".2f", "x"),
        ]
        for r in run.rows
    ]
    head = [
        "context: pattern", "full", "batch", "first token, s", "gain", "tokens/s of a request",
        "tokens/s of all", "gain",
    ]  # fmt: skip
    return table(f"Times ({where})", head, rows)


def cost(
    runs: Sequence[Run], decision: Decision, price: float | None, output_tokens: int
) -> Html | None:
    """Show what a million tokens cost at the user's price."""
    if price is None:
        return None
    parts: list[object] = []
    for run in of_verb(runs, BenchRun):
        found = costs(run, price, output_tokens)
        if not found:
            continue
        rows = [
            [
                f"{format_length(c.row.context)}: {c.row.name}",
                f"{len(c.row.pattern.full_layers)} of {len(c.row.pattern)}",
                c.row.batch,
                data(c.seconds, ".4g"),
                data(c.per_million, ".4g"),
                data(c.saving, ".1%"),
                "yes" if stands_for(c.row, decision.shown) else "",
            ]
            for c in found
        ]
        head = [
            "context: pattern", "full", "batch", "GPU seconds a request",
            "cost of a million tokens", "saved", "pattern shown above",
        ]  # fmt: skip
        caption = f"Cost at {price:g} a GPU hour ({run.folder}: {run.device}, {run.date})"
        parts.append(table(caption, head, rows))
    if not parts:
        return None
    text = (
        f"At a price of {price:g} for an hour of the GPU, in your currency: a request takes its "
        f"time to the first token, and its share of the steps that decode {output_tokens} tokens, "
        "as the bench measured them, at full load and without idle time. The cost is that of a "
        "million tokens of prompt and output together."
    )
    return join([el("p", text), parts])


def gaps(runs: Sequence[Run], decision: Decision, price: float | None, longest: int) -> list[str]:
    """List what the benches leave open, in sentences."""
    found = []
    benches = of_verb(runs, BenchRun)
    if not benches:
        found.append("No bench is among the runs: nothing says how much faster a pattern is.")
        if price is not None:
            found.append("A price was given, but without a bench there is no cost to compute.")
    elif decision.shown is not None and best_gain(runs, decision.shown) is None:
        full = counted(len(decision.shown.pattern.full_layers), "full layer")
        found.append(
            f"No bench has timed a pattern with {full} beside all full, so there is no speed-up of "
            "the pattern shown."
        )
    for run in benches:
        if run.random:
            found.append(
                f"{run.folder} timed random weights: times and memory count, but what real weights "
                "select may be read a little faster or slower."
            )
        beyond = max((r.context for r in run.rows), default=0)
        if longest and beyond > longest:
            found.append(
                f"{run.folder} timed up to {format_length(beyond)} tokens, but quality was "
                f"measured up to {longest} only."
            )
    return found
