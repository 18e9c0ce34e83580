"""Decide from run folders which pattern may be deployed, and say why, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from indexcache.pattern import Pattern
from indexcache.report.html.markup import counted, listed
from indexcache.report.html.results import (
    ALL,
    ANSWERS,
    DistillRun,
    EvaluateRun,
    Row,
    Run,
    SearchRun,
    of_verb,
)
from indexcache.vacuity import MIN_OWN_BEYOND, blindness

SAFE, UNSAFE, UNSURE = "safe", "not safe", "inconclusive"
MOST_REASONS = 4  # in the first screen
VACUOUS, UNDECIDED, UNTESTED = "says nothing", "no verdict", "not evaluated"


@dataclass(kw_only=True)
class Candidate:
    """A pattern, perhaps with trained indexers, and all that the runs say of it.

    Attributes:
        pattern: the pattern.
        delta: the digest of the trained indexers that it runs with.
        name: its first name in the runs.
        rows: what it loses on all text, by run and length.
        answers: what it finds of each kind of retrieval, by run and length.
        word: the verdict.
        reasons: why, in sentences.
    """

    pattern: Pattern
    delta: str | None
    name: str
    rows: list[tuple[EvaluateRun, Row]] = field(default_factory=list)
    answers: list[tuple[EvaluateRun, Row]] = field(default_factory=list)
    word: str = UNTESTED
    reasons: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[EvaluateRun, Row]:
        """The run and the row with the highest upper end, and without one with the most loss."""
        return max(self.rows, key=lambda pair: (_upper(pair[1]), pair[1].excess))

    @property
    def most_lost(self) -> tuple[EvaluateRun, Row] | None:
        """The run and the kind of retrieval with the highest upper end of what is lost."""

        def key(pair: tuple[EvaluateRun, Row]) -> tuple[float, float]:
            answers = pair[1].answers
            assert answers is not None
            return (math.inf if answers.high is None else answers.high, answers.lost)

        return max(self.answers, key=key, default=None)

    @property
    def left(self) -> float:
        """The share of the scores of the indexers of all layers that is still computed."""
        return work_left(self.pattern, self.pool_share)

    @property
    def pool_share(self) -> float | None:
        """The pool of R layers over the longest context; None where nobody measured it."""
        if self.pattern.pool_share is not None:
            return float(self.pattern.pool_share)
        return next((row.pool_share for _, row in self.rows if row.pool_share is not None), None)

    @property
    def title(self) -> str:
        """The pattern, and its name where that is another."""
        delta = f", trained indexers {self.delta[:6]}" if self.delta else ""
        return f"{self.name}{delta}"


def work_left(pattern: Pattern, pool_share: float | None) -> float:
    """Return the share of the indexers' scores that a pattern still computes.

    An F layer scores the whole context, an R layer its pool, an S layer nothing. Without a share an
    R layer counts as a full one.
    """
    pool = 1.0 if pool_share is None else pool_share
    roles = pattern.roles
    return (roles.count("F") + roles.count("R") * pool) / len(roles)


def _upper(row: Row) -> float:
    return math.inf if row.high is None else row.high


def about_work(candidate: Candidate) -> str:
    """Say what of the indexers' work is saved, and where that holds."""
    roles = candidate.pattern.roles
    shared, pooled = roles.count("S"), roles.count("R")
    parts = []
    if shared:
        parts.append(f"{shared} of {len(roles)} layers run no indexer, at any length")
    if pooled:
        share = candidate.pool_share
        pool = "whose share of the context was not measured, so they count as full here"
        if share is not None:
            run, _ = candidate.worst
            pool = f"of {share:.1%} of the longest context ({run.conditions.length})"
            if candidate.pattern.pool_share is not None:
                pool = f"of {share:.1%} of the context, at any length"
        parts.append(
            f"{counted(pooled, 'layer')} score{'s' if pooled == 1 else ''} only a pool {pool}"
        )
    return "; ".join(parts) or "every layer runs its indexer"


def candidates(runs: Sequence[Run]) -> list[Candidate]:
    """List the patterns that share, each with its verdict; those of evaluations come first."""
    found: dict[tuple[str, str | None], Candidate] = {}

    def of(pattern: Pattern, delta: str | None, name: str) -> Candidate:
        key = (str(pattern), delta)
        return found.setdefault(key, Candidate(pattern=pattern, delta=delta, name=name))

    for run in of_verb(runs, EvaluateRun):
        for row in run.rows:
            if row.where == ALL and not run.is_baseline(row):
                candidate = of(row.pattern, run.conditions.delta, row.name)
                candidate.rows.append((run, row))
        for row in run.answer_rows:
            key = (str(row.pattern), run.conditions.delta)
            if key in found:
                found[key].answers.append((run, row))
    for candidate in found.values():
        _judge(candidate)
    known = {str(c.pattern) for c in found.values()}
    for run in of_verb(runs, SearchRun):
        last = run.frontier[-1].pattern
        if set(last.roles) != {"F"} and str(last) not in known:
            of(last, None, f"searched, {len(last.full_layers)} full")
    for run in of_verb(runs, DistillRun):
        if str(run.pattern) not in known:
            of(run.pattern, None, "trained")
    return list(found.values())


def _judge(candidate: Candidate) -> None:
    """Give a candidate the verdict of all its evaluations: the worst of them counts."""
    words = []
    margins = [run.most for run, _ in candidate.rows if run.most is not None]
    for run in dict.fromkeys(run.folder for run, _ in candidate.rows):
        own = [(r, row) for r, row in candidate.rows if r.folder == run]
        word, reason = _verdict(own, min(margins, default=None))
        words.append(word)
        if reason:
            candidate.reasons.append(reason)
    order = (UNSAFE, UNSURE, SAFE, VACUOUS, UNDECIDED)
    candidate.word = next(word for word in order if word in words)


def _verdict(own: list[tuple[EvaluateRun, Row]], margin: float | None) -> tuple[str, str | None]:
    """Judge a pattern by one evaluation; the reason begins with what was found."""
    run, first = own[0]
    if note := vacuous(run, first.name):
        return VACUOUS, f"{run.folder}: {note}"
    verdicts = [v for v in run.verdicts if v.name == first.name]
    if not verdicts:
        above = [r for _, r in own if margin is not None and r.high is not None and r.high > margin]
        if above:
            word = UNSAFE if any((r.low or 0) > (margin or 0) for r in above) else UNSURE
            return word, (
                f"{run.folder}: {word}, because this evaluation, which had no margin of its own, "
                f"has an interval up to {above[0].high:+.4f} nats, above {margin:g}"
            )
        return UNDECIDED, None
    several = len({v.length for v in run.verdicts}) > 1
    for word in (UNSAFE, UNSURE):
        bad = [v for v in verdicts if v.word == word]
        if bad:
            places: dict[str, list[str]] = {}
            for v in bad:
                at = f" at {run.tokens(v.length)}" if several else ""
                places.setdefault(v.reason, []).append(place(v.where) + at)
            why = "; ".join(f"on {listed(where)} ({why})" for why, where in places.items())
            return word, f"{run.folder}: {word} {why}"
    return SAFE, None


def place(where: str) -> str:
    """Name a domain or a kind of retrieval in words."""
    if where == ALL:
        return "all text"
    if where.startswith(ANSWERS):
        kind = where.removeprefix(ANSWERS)
        return "the answers of all retrieval" if kind == ALL else f"the answers of {kind}"
    return where


def vacuous(run: EvaluateRun, name: str) -> str | None:
    """Say why an evaluation says nothing of a pattern; None where it says something."""
    if run.node.has("baseline_loss") and run.node.has("blind_loss"):
        loss, blind = (run.node[key].number() for key in ("baseline_loss", "blind_loss"))
        if note := blindness(loss, blind):
            return note
    if all(share.beyond < MIN_OWN_BEYOND for share in run.conditions.shares[:1]):
        beyond = run.conditions.shares[0].beyond if run.conditions.shares else 0.0
        return (
            f"Only {beyond:.0%} of the queries see more than k = {run.conditions.k} tokens, and "
            "for the others every pattern is the same, so the evaluation is vacuous."
        )
    for row in run.rows:
        if row.name == name and row.beyond is not None and row.beyond < MIN_OWN_BEYOND:
            return (
                f"On {place(row.where)} only {row.beyond:.0%} of the tokens see more than the "
                f"layers of {name} choose from, and the others cannot differ, so the evaluation "
                "is vacuous."
            )
    return None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to deploy.

    Attributes:
        word: the verdict of the pattern that is shown.
        headline: what to do, in a sentence.
        why: sentences.
        shown: the pattern that the numbers on the first screen are of; None without any pattern.
        all: every pattern, each with its verdict.
    """

    word: str
    headline: str
    why: list[str]
    shown: Candidate | None
    all: list[Candidate]


def decide(runs: Sequence[Run]) -> Decision:
    """Choose the safe pattern that saves most; without one, say why there is none."""
    every = candidates(runs)
    tested = [c for c in every if c.rows]
    safe = [c for c in tested if c.word == SAFE]
    if safe:
        shown = min(safe, key=lambda c: (c.left, _upper(c.worst[1])))
        headline = f"Deploy {shown.name}."
        if set(shown.pattern.roles) == {"F"}:
            headline = "Keep all layers full."
        why = [_why_safe(shown), *_others(tested, shown)]
    elif tested:
        shown = min(tested, key=lambda c: (_upper(c.worst[1]), c.worst[1].excess))
        headline, why = _none(tested, shown)
    elif every:
        shown = every[0]
        headline = "Nothing is decided: no pattern was evaluated."
        why = [
            "The runs hold patterns, but no evaluation on held-out text. The loss that a search "
            "shows is on the text that chose the pattern, which flatters it: run evaluate with a "
            "margin (--most) before anything is deployed."
        ]
    else:
        return Decision(
            word=UNTESTED,
            headline="Nothing is decided: none of these runs judges a pattern.",
            why=["Evaluate a pattern on held-out text with a margin (evaluate --most)."],
            shown=None,
            all=[],
        )
    return Decision(word=shown.word, headline=headline, why=why, shown=shown, all=every)


def _why_safe(shown: Candidate) -> str:
    parts = []
    for run in dict.fromkeys(id(run) for run, _ in shown.rows):
        own = next(r for r, _ in shown.rows if id(r) == run)
        name = next(row.name for r, row in shown.rows if r is own)
        places = [v for v in own.verdicts if v.name == name]
        if own.most is None or not places:
            continue
        margins = f"a margin of {own.most:g} nats per token"
        if own.recall_most is not None:
            margins = f"margins of {own.most:g} nats per token and {own.recall_most:.1%} of answers"
        where = "on all text"
        if domains := {v.where for v in places if v.where != ALL}:
            where += f" and on each of {counted(len(domains), 'domain or task')}"
            where = where.replace("domain or tasks", "domains and tasks")
        parts.append(
            f"It is safe at {margins}, {where} "
            f"({own.folder}: {own.conditions.short()}): with 95 % confidence it loses no more than "
            f"that against {own.against}."
        )
    return " ".join(parts)


def _others(tested: list[Candidate], shown: Candidate) -> list[str]:
    """Say of the patterns that save more why it is none of them."""
    cheaper = [c for c in tested if c.left < shown.left]
    if not cheaper:
        return ["No evaluated pattern saves more of the indexers' work."]
    words = listed(f"{c.title} ({c.word})" for c in cheaper)
    return [f"Patterns that would save more are not shown to be safe: {words}."]


def _none(tested: list[Candidate], shown: Candidate) -> tuple[str, list[str]]:
    words = {c.word for c in tested}
    nearest = f"The numbers here are those of {shown.title}, which has the least to lose of them."
    if words == {UNDECIDED}:
        return "Nothing is decided: no margin was set.", [
            "The evaluation ran without --most, so it holds no verdict. Say how many nats per "
            "token you accept to lose, and run evaluate with --most.",
            nearest,
        ]
    if words == {VACUOUS}:
        return "Nothing is decided: the evaluation says nothing.", [*shown.reasons, nearest]
    count = counted(len(tested), "evaluated pattern")
    reasons = [f"{c.title}: {reason}." for c in tested for reason in c.reasons]
    if len(reasons) > MOST_REASONS:
        rest = len(reasons) - MOST_REASONS
        reasons = [
            *reasons[:MOST_REASONS],
            f"There {'is' if rest == 1 else 'are'} {rest} more "
            "of these; the verdicts below have all.",
        ]
    if len(tested) == 1:
        headline = f"Do not deploy {shown.name}: it is not shown to be safe."
        return headline, reasons
    return f"Deploy none of them: none of {count} is shown to be safe.", [nearest, *reasons]
