"""Make one self-contained page of run folders: what to deploy, why, and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from indexcache.report.html import proof, quality, speed, structure
from indexcache.report.html.conditions import DIGITS
from indexcache.report.html.decision import Decision, about_work, decide
from indexcache.report.html.markup import Html, counted, data, el, interval, join, table
from indexcache.report.html.results import BenchRun, EvaluateRun, Row, Run, of_verb
from indexcache.report.html.runs import read_runs
from indexcache.report.html.theme import DARK, LIGHT, style_sheet

WORDS = {
    "indexer": "the part of a layer that scores all earlier tokens and selects the k best",
    "full layer": "a layer that runs its own indexer",
    "shared layer": "a layer that reads the selection of an earlier full layer and runs no indexer",
    "re-index layer": "a layer that scores only a pool, which an earlier full layer selected",
    "pattern": "which layers are full (F), shared (S) and re-index (R)",
    "excess loss": "how much worse the model predicts a token than the baseline, in nats; 0.01 "
    "nats make the right token 1 % less likely",
    "95 % interval": "where the excess lies, over documents of this kind, with 95 % confidence",
    "margin": "the excess that whoever set the gate would accept",
    "same top-1": "how often both predict the same next token",
}


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """The settings of a report."""

    price: float | None = None
    "Price of a GPU hour, in any currency, for the cost of a million tokens."
    output_tokens: int = 500
    "Number of tokens that are decoded for a request, for the cost of a million tokens."

    def check(self) -> None:
        """Raise ValueError for settings that make no sense."""
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"--price must be a number of at least 0, not {self.price}.")
        if self.output_tokens < 1:
            raise ValueError(f"--output-tokens must be at least 1, not {self.output_tokens}.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page about some runs.

    Attributes:
        html: the page.
        decision: what it says in its first screen.
        gaps: what the runs leave open, in sentences.
        sections: the titles of its sections.
        runs: what was read.
    """

    html: str = field(repr=False)
    decision: Decision
    gaps: list[str]
    sections: list[str]
    runs: list[Run] = field(repr=False)

    def table(self) -> str:
        """Return what to deploy and why, as text."""
        return "\n".join([self.decision.headline, *self.decision.why])

    def to_json(self) -> dict[str, Any]:
        """Return the decision with its numbers, and what the page is made of."""
        shown = self.decision.shown
        facts: dict[str, Any] = {"pattern": None, "excess": None, "ci_low": None, "ci_high": None}
        if shown is not None:
            facts |= {"pattern": str(shown.pattern), "scores_left": shown.left}
            if shown.rows:
                _, row = shown.worst
                facts |= {"excess": row.excess, "ci_low": row.low, "ci_high": row.high}
        return {
            "verdict": self.decision.word,
            "headline": self.decision.headline,
            "why": self.decision.why,
            **facts,
            "gaps": self.gaps,
            "sections": self.sections,
            "runs": [{"verb": run.verb, "folder": run.folder} for run in self.runs],
        }


def make_report(folders: Sequence[str], settings: ReportSettings = ReportSettings()) -> Report:
    """Make a page of run folders.

    The page needs no network and no script, and the same folders give the same page.

    Args:
        folders: run folders of one model, of any verbs.
        settings: see `ReportSettings`.

    Raises:
        ValueError: a setting that makes no sense, a folder without a finished run, a file that no
            verb writes, or runs of different models.
    """
    settings.check()
    runs = read_runs(folders)
    decision = decide(runs)
    longest = max(
        (n for run in of_verb(runs, EvaluateRun) for n in run.conditions.lengths), default=0
    )
    gaps = quality.gaps(runs, decision)
    gaps += speed.gaps(runs, decision, settings.price, longest)
    parts = [
        ("patterns", "Patterns", structure.patterns(runs, decision)),
        ("frontier", "Cost against loss", quality.frontier(runs, decision)),
        ("domains", "By kind of text", quality.domains(runs, decision)),
        ("recall", "Recall", quality.recall(runs, decision)),
        ("matrix", "Domains that were not calibrated on", proof.matrix(runs)),
        ("verdicts", "Verdicts", quality.verdicts(runs, decision)),
        ("certificate", "Certificate", proof.certificates(runs)),
        ("speed", "Speed", speed.speed(runs, decision)),
        ("cost", "Cost", speed.cost(runs, decision, settings.price, settings.output_tokens)),
        ("flips", "Search", structure.flips(runs, decision)),
        ("overlap", "Overlap of layers", structure.overlap(runs, decision)),
        ("training", "Training", structure.training(runs, decision)),
        ("sources", "Sources", _sources(runs)),
        ("words", "Words", _words()),
    ]
    shown = [(key, title, part) for key, title, part in parts if part is not None]
    page = _page(runs, decision, gaps, shown, settings)
    return Report(
        html=page,
        decision=decision,
        gaps=gaps,
        sections=["decision", *(key for key, _, _ in shown)],
        runs=runs,
    )


def _page(
    runs: Sequence[Run],
    decision: Decision,
    gaps: Sequence[str],
    parts: Sequence[tuple[str, str, Html]],
    settings: ReportSettings,
) -> str:
    model = next((r.identity for r in runs if r.identity.digest), runs[0].identity)
    name = PurePath(model.name).name or model.name
    layers = next((r.identity.layers for r in runs if r.identity.layers), None)
    topk = next((r.identity.k for r in runs if r.identity.k), None)
    facts = [f"{layers} layers"] if layers else []
    facts += [f"k = {topk}"] if topk else []
    facts += [f"digest {model.digest[:DIGITS]}"] if model.digest else ["no digest of a checkpoint"]
    title = f"Which layers of {name} can share their indexers"
    links = [("decision", "Decision"), *((key, text) for key, text, _ in parts)]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el(
            "meta", name="theme-color", content=LIGHT["page"], media="(prefers-color-scheme: light)"
        ),
        el("meta", name="theme-color", content=DARK["page"], media="(prefers-color-scheme: dark)"),
        el("title", title),
        el("style", Html(style_sheet())),
    )
    top = el(
        "header",
        el(
            "div",
            el("div", el("h1", title), el("p", ", ".join(facts), ".", class_="soft")),
            _theme(),
            class_="top",
        ),
    )
    nav = el(
        "nav",
        el("ul", [el("li", el("a", text, href=f"#{key}")) for key, text in links]),
        aria_label="Sections",
    )
    sections = [
        el(
            "section",
            el("h2", text, id=f"{key}-title"),
            part,
            id=key,
            aria_labelledby=f"{key}-title",
        )
        for key, text, part in parts
    ]
    body = el(
        "body",
        el("a", "Skip to the decision", href="#decision", class_="skip"),
        top,
        el("main", _decision(runs, decision, gaps, settings), nav, sections, id="main"),
        el("footer", "Made by indexcache report. This page needs no network and runs no script."),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _theme() -> Html:
    choices = [("auto", "as the system", True), ("light", "light", False), ("dark", "dark", False)]
    buttons = [
        el(
            "label",
            el("input", type="radio", name="theme", id=f"theme-{key}", checked=checked),
            " ",
            text,
        )
        for key, text, checked in choices
    ]
    return el("fieldset", el("legend", "Colours"), buttons, class_="theme")


def _decision(
    runs: Sequence[Run], decision: Decision, gaps: Sequence[str], settings: ReportSettings
) -> Html:
    kind = {"safe": "good", "not safe": "bad"}.get(decision.word, "unsure")
    strip = None
    if decision.shown is not None:
        strip = structure.pattern_figure(decision.shown.pattern, decision.shown.title)
    return el(
        "section",
        el("p", "What to deploy: ", quality.badge(decision.word), class_="soft"),
        el("h2", decision.headline, id="decision-title"),
        [el("p", text) for text in decision.why],
        _cards(runs, decision, settings),
        strip,
        el("h3", "What these runs leave open") if gaps else None,
        el("ul", [el("li", text) for text in gaps]) if gaps else None,
        id="decision",
        class_=kind,
        aria_labelledby="decision-title",
    )


def _cards(runs: Sequence[Run], decision: Decision, settings: ReportSettings) -> Html | None:
    shown = decision.shown
    if shown is None:
        return None
    cards: list[Html | None] = []
    if shown.rows:
        run, row = shown.worst
        worst = ""
        if len(shown.rows) > 1:
            worst = f"the highest of {len(shown.rows)} measurements; "
        tokens = run.tokens(row.length)
        few = "" if row.low is not None else f"only {counted(row.documents, 'document')}: "
        value = data(row.excess, unit=" nats")
        rest = join(
            [
                few,
                interval(row.low, row.high),
                f" with 95 % confidence; {worst}{run.folder}: "
                f"{counted(row.documents, 'document')}, {tokens}, k = {run.conditions.k}, "
                f"against {run.against}",
            ]
        )
        cards.append(_card("Excess loss", value, rest))
    else:
        cards.append(_card("Excess loss", None, "no evaluation on held-out text"))
    cards.append(_card("Indexer scores saved", data(1 - shown.left, ".1%"), about_work(shown)))
    if shown.most_lost is not None:
        run, row = shown.most_lost
        cards.append(_answers_card(run, row, len(shown.answers)))
    gain = speed.best_gain(runs, shown)
    if gain is None:
        cards.append(_card("Speed-up", None, _no_bench(runs)))
    else:
        timed, row_ = gain
        first, decoding = row_.gains
        value = data(decoding if first is None else first, ".2f", "x")
        what = "decoding" if first is None else "to the first token, "
        also = [what] if first is None else [what, data(decoding, ".2f", "x"), " decoding"]
        about = speed.about_gain(timed, row_, shown)
        cards.append(_card("Speed-up", value, join([*also, "; ", about])))
    cards.append(_cost_card(runs, gain, settings))
    return el("dl", cards, class_="cards")


def _answers_card(run: EvaluateRun, row: Row, count: int) -> Html:
    answers = row.answers
    assert answers is not None
    worst = f"the highest of {count} tasks and lengths; " if count > 1 else ""
    rest = join(
        [
            interval(answers.low, answers.high, "+.1%"),
            f" with 95 % confidence; {worst}{row.task}: {answers.found} of {answers.asked} found, "
            f"{answers.before} by {run.against}; {counted(row.documents, 'sequence')} of "
            f"{run.tokens(row.length)} ({run.folder})",
        ]
    )
    return _card("Share of answers lost", data(answers.lost, "+.1%"), rest)


def _cost_card(runs: Sequence[Run], gain: Any, settings: ReportSettings) -> Html | None:
    if settings.price is None:
        return None
    if gain is not None:
        run, row = gain
        found = speed.costs(run, settings.price, settings.output_tokens)
        own = next((c for c in found if c.row is row and c.saving is not None), None)
        base = next(
            (
                c
                for c in found
                if (c.row.context, c.row.asked) == (row.context, row.asked)
                and set(c.row.pattern.roles) == {"F"}
            ),
            None,
        )
        if own is not None and base is not None:
            value = data(base.per_million - own.per_million, ".4g")
            rest = (
                f"{own.saving:.1%} of {base.per_million:.4g} for a million tokens, at "
                f"{settings.price:g} a GPU hour; {speed.requests(row)}, "
                f"{settings.output_tokens} decoded for each ({run.folder})"
            )
            return _card("Cost saved per million tokens", value, rest)
    return _card("Cost saved per million tokens", None, _no_bench(runs))


def _no_bench(runs: Sequence[Run]) -> str:
    timed = of_verb(runs, BenchRun)
    return "no bench timed such a pattern" if timed else "no bench is among the runs"


def _card(title: str, value: Html | None, rest: object) -> Html:
    shown = el("dd", "not measured", class_="value none")
    if value is not None:
        shown = el("dd", value, class_="value")
    return el("div", el("dt", title), shown, el("dd", rest, class_="rest"), class_="card")


def _sources(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        conditions = getattr(run, "conditions", None)
        if conditions is not None:
            holds = str(conditions)
        elif run.node.has("settings"):
            settings = run.node["settings"]
            holds = "; ".join(f"{key} {node.value}" for key, node in settings.items())
        else:
            holds = f"{run.identity.name}, digest {str(run.identity.digest)[:DIGITS]}"
        rows.append([run.folder, run.verb, run.node.file.name, holds])
    head = ["folder", "verb", "file", "its numbers hold for"]
    return table("The runs of this page", head, rows)


def _words() -> Html:
    pairs = [[el("dt", word), el("dd", text)] for word, text in WORDS.items()]
    return el("dl", pairs, class_="terms")
