"""Decide whether patterns are safe: every loss difference at or below a margin, in every domain.

A pattern passes when the upper end of the interval of its loss difference is at or below the margin
on all text and on each domain, with Holm's correction over the domains. Too few documents are no
verdict, and no verdict is no pass. What no pattern could fail is no gate: it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from indexcache.data import ALL, Batch
from indexcache.evals.evaluate import Evidence, Measurement
from indexcache.evals.statistics import (
    LEAST_DOCUMENTS,
    LEVEL,
    TOO_FEW,
    chance_above,
    per_document,
    upper_end,
)
from indexcache.pattern import Pattern
from indexcache.report.tables import table

TAIL = (1 - LEVEL) / 2  # the chance beyond each end of an interval
LARGEST_MARGIN = 1000.0  # nats; a blind guess among all tokens of a vocabulary loses about 12

Word = Literal["safe", "not safe", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one pattern at one place.

    Attributes:
        name: the name of the pattern.
        domain: a domain, or "all".
        verdict: "safe" where the upper end is at or below the margin; "not safe" where the interval
            lies above it; else "inconclusive".
        upper: the upper end of the loss difference in nats, one-sided at 97.5 %, and with Holm's
            correction where it is a domain's; None for too few documents.
        documents: number of documents.
        reason: why it is no other verdict.
    """

    name: str
    domain: str
    verdict: Word
    upper: float | None
    documents: int
    reason: str


@dataclass(frozen=True)
class Gate:
    """The verdicts of a margin.

    Attributes:
        most: the margin in nats per token.
        verdicts: for every pattern, on all domains and on each.
        note: why the margin says little, if it does.
    """

    most: float
    verdicts: tuple[Verdict, ...]
    note: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every pattern is safe everywhere."""
        return all(v.verdict == "safe" for v in self.verdicts)

    def table(self) -> str:
        """Format the verdicts, then the note if there is one, and the decision as the last line."""
        lines = [
            [
                v.name,
                v.domain,
                v.verdict,
                "" if v.upper is None else f"{v.upper:+.4f}",
                str(v.documents),
                v.reason,
            ]
            for v in self.verdicts
        ]
        head = [f"gate of {self.most:g} nats", "domain", "verdict", "upper end", "documents", "why"]
        return "\n\n".join([table(head, lines), *filter(None, [self.note]), self.sentence()])

    def sentence(self) -> str:
        """Say whether the gate is passed, and if not, what is missing."""
        if self.passed:
            return f"The gate is passed: every loss difference is at most {self.most:g} nats."
        parts = []
        for word in ("not safe", "inconclusive"):
            places = [f"{v.name} on {v.domain}" for v in self.verdicts if v.verdict == word]
            if places:
                parts.append(f"{word}: {', '.join(places)}")
        return f"The gate is not passed; {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Return the content of `gate` in evidence.json."""
        return {
            "most": self.most,
            "passed": self.passed,
            "note": self.note,
            "level": LEVEL,
            "least_documents": LEAST_DOCUMENTS,
            "verdicts": [asdict(v) for v in self.verdicts],
        }


def check_margin(most: float) -> float:
    """Return a margin that a pattern could fail.

    Raises:
        ValueError: it is not a number, infinite, or larger than any loss.
    """
    if isinstance(most, bool) or not isinstance(most, (int, float, np.floating, np.integer)):
        raise ValueError(f"The gate is a number of nats per token, such as 0.01, not {most!r}.")
    if not math.isfinite(most):
        raise ValueError(
            f"The gate is {most}, which every pattern or none would pass; give a finite number of "
            "nats per token, such as 0.01."
        )
    if most > LARGEST_MARGIN:
        raise ValueError(
            f"The gate is {most:g} nats per token, which no pattern could fail; give a loss that "
            "you would accept, such as 0.01."
        )
    return float(most)


def check_gate(
    most: float, patterns: Mapping[str, Pattern], baseline: Pattern, *, topk: int, longest: int
) -> None:
    """Refuse a gate that passes whatever the model does.

    Args:
        most: the margin in nats per token.
        patterns: the patterns by name.
        baseline: the pattern they are compared with.
        topk: k of the model.
        longest: the longest context of any query, in its own document.

    Raises:
        ValueError: a margin that `check_margin` refuses; no pattern; or one that selects what the
            baseline selects, so that its difference is nothing.
    """
    check_margin(most)
    if not patterns:
        raise ValueError("There is no pattern for the gate to judge; name one with --pattern.")
    for name, pattern in patterns.items():
        if selects(pattern, topk, longest) == selects(baseline, topk, longest):
            what = "is" if pattern == baseline else "selects the same tokens as"
            _refuse_same(name, f"{what} the baseline, {baseline}")


def _refuse_same(name: str, what: str) -> None:
    raise ValueError(
        f"The pattern {name!r} {what}, so the gate would compare a model with itself and always "
        "pass; take the pattern out, compare with another one (--against), or evaluate without "
        "a gate."
    )


def selects(pattern: Pattern, topk: int, longest: int) -> str:
    """Return a text that is the same for patterns with the same selections everywhere.

    An R layer whose pool holds the whole context does what a full one does, and with a pool of k
    tokens what an S layer does. With a context of k tokens all roles do the same.
    """
    if topk >= longest:
        return "F" * len(pattern)
    if pattern.pool_share is not None:
        all_k = pattern.pool_share * longest <= topk
        return pattern.roles.replace("R", "S") if all_k else str(pattern)
    if pattern.pool_factor is None:
        return pattern.roles
    if pattern.pool_factor * topk >= longest:
        return pattern.roles.replace("R", "F")
    return pattern.roles.replace("R", "S") if pattern.pool_factor == 1 else str(pattern)


def judge(evidence: Evidence, most: float, *, allow_blind: bool = False) -> Gate:
    """Judge every pattern of an evaluation by a margin.

    Args:
        evidence: the result of `evaluate`.
        most: the margin: the largest loss difference to accept, in nats per token.
        allow_blind: judge also a model whose own loss is no better than a blind guess, as random
            weights in a test are.

    Raises:
        ValueError: a margin that `check_margin` refuses; nothing measured; or a pattern that is the
            baseline or computed what it computes at every token of a domain; or a baseline that is
            no better than a blind guess.
    """
    most = check_margin(most)
    rows: dict[str, list[Measurement]] = {}
    for row in evidence.rows:
        rows.setdefault(row.name, []).append(row)
        if not row.tokens or (row.where == ALL and not row.documents):
            raise ValueError("Nothing was measured, so there is nothing for the gate to judge.")
        if row.pattern == evidence.baseline:
            _refuse_same(row.name, f"is the baseline, {evidence.baseline}")
        if not row.kl and not any(difference for difference, _ in row.by_document):
            where = "the text" if row.where == ALL else f"the domain {row.where!r}"
            _refuse_same(row.name, f"computes what the baseline does at every token of {where}")
    if not rows:
        raise ValueError("Nothing was measured, so there is nothing for the gate to judge.")
    if evidence.blindness and not allow_blind:
        raise ValueError(f"{evidence.blindness} The gate judges it only if told to (allow_blind).")
    verdicts = tuple(v for own in rows.values() for v in _judge_pattern(own, most))
    return Gate(most, verdicts, _generous(most, evidence))


def _generous(most: float, evidence: Evidence) -> str | None:
    """Say that a margin would pass a model that guesses blindly, where it would."""
    room = evidence.blind_loss - evidence.baseline_loss
    if most < room or room <= 0:  # A baseline that is blind itself is refused or allowed above.
        return None
    return (
        f"This gate decides little: a blind guess among all tokens loses {room:.2f} nats more than "
        "the baseline and would pass it; give a loss that you would accept, such as 0.01."
    )


def few_documents(batches: Iterable[Batch]) -> dict[str, int]:
    """Return the number of documents of each domain that has too few of them for a verdict."""
    units: dict[str, set[str]] = {}
    for batch in batches:
        units.setdefault(batch.domain, set()).update(batch.units)
    return {d: len(names) for d, names in sorted(units.items()) if len(names) < LEAST_DOCUMENTS}


def _judge_pattern(rows: list[Measurement], most: float) -> list[Verdict]:
    """Judge one pattern on all text, and on each domain with Holm's correction."""
    domains = [row for row in rows if row.where != ALL]
    values = {row.where: per_document(*zip(*row.by_document, strict=True)) for row in rows}
    enough = [row for row in domains if row.documents >= LEAST_DOCUMENTS]
    chance = {row.where: float(chance_above(values[row.where], most)) for row in enough}
    tails = {row.where: TAIL for row in rows}
    # Holm's steps: the domain that is surest to be safe is held to the strictest level.
    steps = sorted(enough, key=lambda r: (chance[r.where], r.delta_loss))
    for step, row in enumerate(steps):
        tails[row.where] = TAIL / (len(domains) - step)
    uppers: dict[Any, float] = {
        row.where: upper_end(values[row.where], tails[row.where])
        for row in rows
        if row.documents >= LEAST_DOCUMENTS
    }
    safe = {
        row.where: not _drowned(row, most) and uppers.get(row.where, math.inf) <= most
        for row in rows
    }
    stopped = False
    for row in steps:
        stopped = stopped or not safe[row.where]
        safe[row.where] = not stopped
    return [_verdict(row, uppers.get(row.where), safe[row.where], most) for row in rows]


def _drowned(row: Measurement, most: float) -> bool:
    """Say whether an engine's noise is larger than both the margin and the difference.

    What two equal evaluations differ by is no evidence of a smaller difference.
    """
    return row.within_noise and row.noise is not None and row.noise > abs(most)


def _verdict(row: Measurement, upper: float | None, safe: bool, most: float) -> Verdict:
    word: Word = "inconclusive"
    if upper is None:
        reason = TOO_FEW
    elif _drowned(row, most):
        reason = "it is within the engine's noise, which is larger than the gate"
    elif safe:
        word, reason = "safe", "the upper end is at or below the gate"
    elif row.ci_low is not None and row.ci_low > most:
        word, reason = "not safe", "the whole interval is above the gate"
    elif upper > most:
        reason = "the upper end is above the gate"
    else:
        reason = "a domain that is surer of it is not safe (Holm)"
    return Verdict(
        name=row.name,
        domain=str(row.where),
        verdict=word,
        upper=upper,
        documents=row.documents,
        reason=reason,
    )
