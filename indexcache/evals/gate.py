"""Decide whether patterns are safe: what each loses is at or below a margin, everywhere.

A pattern passes when the upper end of the interval of its loss difference is at or below the margin
on all text and on each domain, and that of the share of answers that it loses at or below a margin
of its own, on all kinds of retrieval and on each. Holm's correction is over domains and kinds, at
all lengths. Too few documents are no verdict, and no verdict is no pass. What no pattern could fail
is no gate: it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from indexcache.data import ALL, Batch
from indexcache.data.retrieval import DOMAIN
from indexcache.evals.evidence import Evidence
from indexcache.evals.measurement import ALL_RETRIEVAL, Measurement
from indexcache.evals.recall import worst
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
RECALL_MARGIN = 0.1
"""Share of the answers that may be lost where nobody says: what 36 sequences of one kind can show
if no answer is lost."""

Word = Literal["safe", "not safe", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one pattern at one place.

    Attributes:
        name: the name of the pattern.
        domain: a domain or "all", or for recall "retrieval:" and a kind or "all".
        verdict: "safe" where the upper end is at or below the margin; "not safe" where the interval
            lies above it; else "inconclusive".
        upper: the upper end of the loss difference in nats, or of the share of answers lost,
            one-sided at 97.5 %, and with Holm's correction where it is not "all"; None for too few
            documents.
        documents: number of documents, or of retrieval sequences.
        reason: why it is no other verdict.
        length: number of tokens of the sequences.
        most: the margin, in nats per token or as a share of the answers.
    """

    name: str
    domain: str
    verdict: Word
    upper: float | None
    documents: int
    reason: str
    length: int | None = None
    most: float = math.nan

    @property
    def of_recall(self) -> bool:
        """Whether it is about answers."""
        return self.domain.startswith(DOMAIN)


@dataclass(frozen=True)
class Gate:
    """The verdicts of a margin.

    Attributes:
        most: the margin in nats per token.
        verdicts: for every pattern, on all domains and on each, then on the kinds of retrieval.
        note: why the margin says little, if it does.
        recall_most: the margin of recall, a share of the answers; None without retrieval.
    """

    most: float
    verdicts: tuple[Verdict, ...]
    note: str | None = None
    recall_most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every pattern is safe everywhere."""
        return all(v.verdict == "safe" for v in self.verdicts)

    def table(self) -> str:
        """Format the verdicts, then the note if there is one, and the decision as the last line."""
        lines = [
            [
                v.name,
                self._place(v),
                v.verdict,
                "" if v.upper is None else f"{v.upper:+.1%}" if v.of_recall else f"{v.upper:+.4f}",
                str(v.documents),
                v.reason,
            ]
            for v in self.verdicts
        ]
        head = [f"gate of {self.limits()}", "domain", "verdict", "upper end", "documents", "why"]
        return "\n\n".join([table(head, lines), *filter(None, [self.note]), self.sentence()])

    def _place(self, verdict: Verdict) -> str:
        several = len({v.length for v in self.verdicts}) > 1
        return f"{verdict.domain}, {verdict.length} tokens" if several else verdict.domain

    def limits(self) -> str:
        """Say the margins in a few words."""
        loss = f"{self.most:g} nats"
        return loss if self.recall_most is None else f"{loss}, {self.recall_most:.3g} of answers"

    def sentence(self) -> str:
        """Say whether the gate is passed, and if not, what is missing."""
        if self.passed:
            recall = ""
            if self.recall_most is not None:
                recall = f", and every loss of answers at most {self.recall_most:.1%} of them"
            return (
                f"The gate is passed: every loss difference is at most {self.most:g} nats{recall}."
            )
        parts = []
        for word in ("not safe", "inconclusive"):
            places = [f"{v.name} on {self._place(v)}" for v in self.verdicts if v.verdict == word]
            if places:
                parts.append(f"{word}: {', '.join(places)}")
        return f"The gate is not passed; {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """Return the content of `gate` in evidence.json."""
        return {
            "most": self.most,
            "recall_most": self.recall_most,
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


def check_recall_margin(most: float) -> float:
    """Return a margin of recall, a share of the answers, that a pattern could fail.

    Raises:
        ValueError: it is no number of at least 0 and below 1.
    """
    number = isinstance(most, (int, float, np.floating, np.integer)) and not isinstance(most, bool)
    if not number or not 0 <= most < 1:
        raise ValueError(
            f"The gate of recall is {most!r:.40}, but it is a share of the answers, at least 0 and "
            "below 1, such as 0.03 for 3 of 100."
        )
    return float(most)


def least_sequences(most: float, places: int) -> int | None:
    """Return how many retrieval sequences of a kind can show that no more answers are lost.

    None for a margin of 0, for which no number of them is enough unless some are gained.

    Args:
        most: the margin, a share of the answers.
        places: number of kinds of retrieval, times that of lengths.
    """
    if not most:
        return None
    return max(LEAST_DOCUMENTS, math.ceil(math.log(TAIL / places) / math.log1p(-most) - 1e-9))


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


def judge(
    evidence: Evidence, most: float, *, recall_most: float | None = None, allow_blind: bool = False
) -> Gate:
    """Judge every pattern of an evaluation by margins.

    Args:
        evidence: the result of `evaluate`.
        most: the margin: the largest loss difference to accept, in nats per token.
        recall_most: the largest share of the answers to lose, where there is retrieval; None is
            `RECALL_MARGIN`.
        allow_blind: judge also a model whose own loss is no better than a blind guess, as random
            weights in a test are.

    Raises:
        ValueError: a margin that `check_margin` or `check_recall_margin` refuses; nothing measured;
            or a pattern that is the baseline or computed what it computes at every token of a
            domain; or a baseline that is no better than a blind guess.
    """
    most = check_margin(most)
    answers = None
    if any(row.recall for row in evidence.rows):
        answers = check_recall_margin(RECALL_MARGIN if recall_most is None else recall_most)
    elif recall_most is not None:
        raise ValueError("There is a gate of recall, but no retrieval was measured.")
    rows: dict[str, list[Measurement]] = {}
    for row in evidence.rows:
        rows.setdefault(row.name, []).append(row)
        if not row.tokens or (row.where == ALL and not row.documents):
            raise ValueError("Nothing was measured, so there is nothing for the gate to judge.")
        if row.pattern == evidence.baseline:
            _refuse_same(row.name, f"is the baseline, {evidence.baseline}")
        if (
            row.recall is None
            and not row.kl
            and not any(difference for difference, _ in row.by_document)
        ):
            where = "the text" if row.where == ALL else f"the domain {row.where!r}"
            _refuse_same(row.name, f"computes what the baseline does at every token of {where}")
    if not rows:
        raise ValueError("Nothing was measured, so there is nothing for the gate to judge.")
    if evidence.blindness and not allow_blind:
        raise ValueError(f"{evidence.blindness} The gate judges it only if told to (allow_blind).")
    verdicts: list[Verdict] = []
    for name, own in rows.items():
        places = [_of_text(r, most) if r.recall is None else _of_recall(r, answers) for r in own]
        verdicts += _judge_pattern(name, places)
    return Gate(most, tuple(verdicts), _generous(most, evidence), answers)


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


def little_text(batches: Iterable[Batch], recall_most: float | None = None) -> list[str]:
    """Say, in sentences, why a gate will be inconclusive whatever the patterns do.

    Args:
        batches: text and retrieval sequences.
        recall_most: as `judge` takes it.
    """
    found = []
    batches = list(batches)
    asked = [b for b in batches if b.domain.startswith(DOMAIN)]
    if few := few_documents(b for b in batches if not b.domain.startswith(DOMAIN)):
        counts = ", ".join(f"{domain} ({count})" for domain, count in few.items())
        found.append(f"too few documents in {counts}; give more text, or more --sequences.")
    places: dict[tuple[str, int], int] = {}
    for b in asked:
        place = (b.domain, int(b.ids.shape[1]))
        places[place] = places.get(place, 0) + len(b.units)
    most = RECALL_MARGIN if recall_most is None else recall_most
    least = least_sequences(most, len(places)) if places else 0
    if least is None:
        found.append("no number of sequences shows that no answer at all is lost.")
    elif places and min(places.values()) < least:
        found.append(
            f"{min(places.values())} retrieval sequences of a kind cannot show that at most "
            f"{most:.3g} of the answers are lost; at least {least} can "
            "(--retrieval-sequences), more where some are lost."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The loss of a pattern at one place, which is a domain or a kind of retrieval.

    Attributes:
        domain, length, documents, most: as in `Verdict`.
        everything: whether it is all text or all kinds of retrieval, which Holm leaves out.
        delta: the difference.
        low: the lower end of its interval; None for too few documents.
        values: the difference by document, as `statistics.per_document` gives it.
        bound: the largest value that a document can have, where that is known.
        idle: why it can be neither safe nor not, if so.
    """

    domain: str
    length: int | None
    documents: int
    most: float
    everything: bool
    delta: float
    low: float | None
    values: np.ndarray
    bound: float | None = None
    idle: str | None = None

    @property
    def enough(self) -> bool:
        """Whether there are enough documents for a verdict."""
        return self.documents >= LEAST_DOCUMENTS


def _of_text(row: Measurement, most: float) -> _Place:
    # What two equal evaluations differ by is no evidence of a smaller difference.
    drowned = row.within_noise and row.noise is not None and row.noise > abs(most)
    return _Place(
        domain=str(row.where),
        length=row.length,
        documents=row.documents,
        most=most,
        everything=row.where == ALL,
        delta=row.delta_loss,
        low=row.ci_low,
        values=per_document(*zip(*row.by_document, strict=True)),
        idle="it is within the engine's noise, which is larger than the gate" if drowned else None,
    )


def _of_recall(row: Measurement, most: float | None) -> _Place:
    assert row.recall is not None
    assert most is not None
    recall, idle = row.recall, None
    if recall.found_baseline <= most * recall.answers:
        idle = (
            f"the baseline finds {recall.found_baseline} of {recall.answers}, so no pattern can "
            "lose more than the gate; leave it out"
        )
    lost, asked = zip(*recall.by_sequence, strict=True)
    return _Place(
        domain=str(row.where),
        length=row.length,
        documents=row.documents,
        most=most,
        everything=row.where in (ALL, ALL_RETRIEVAL),
        delta=recall.excess,
        low=None if recall.high is None else -recall.high,
        values=per_document(lost, asked),
        bound=worst(lost, asked),
        idle=idle,
    )


def _judge_pattern(name: str, places: list[_Place]) -> list[Verdict]:
    """Judge one pattern on everything, and on each domain and kind with Holm's correction."""
    parts = [i for i, p in enumerate(places) if not p.everything]
    enough = [i for i in parts if places[i].enough]
    chance = {
        i: float(chance_above(places[i].values, places[i].most, places[i].bound)) for i in enough
    }
    tails = dict.fromkeys(range(len(places)), TAIL)
    # Holm's steps: the place that is surest to be safe is held to the strictest level.
    steps = sorted(enough, key=lambda i: (chance[i], places[i].delta))
    for step, i in enumerate(steps):
        tails[i] = TAIL / (len(parts) - step)
    uppers = {i: upper_end(p.values, tails[i], p.bound) for i, p in enumerate(places) if p.enough}
    safe = {i: not p.idle and uppers.get(i, math.inf) <= p.most for i, p in enumerate(places)}
    stopped = False
    for i in steps:
        stopped = stopped or not safe[i]
        safe[i] = not stopped
    return [_verdict(name, p, uppers.get(i), safe[i]) for i, p in enumerate(places)]


def _verdict(name: str, place: _Place, upper: float | None, safe: bool) -> Verdict:
    word: Word = "inconclusive"
    if upper is None:
        reason = TOO_FEW
    elif place.idle:
        reason = place.idle
    elif safe:
        word, reason = "safe", "the upper end is at or below the gate"
    elif place.low is not None and place.low > place.most:
        word, reason = "not safe", "the whole interval is above the gate"
    elif upper > place.most:
        reason = "the upper end is above the gate"
    else:
        reason = "a domain that is surer of it is not safe (Holm)"
    return Verdict(
        name=name,
        domain=place.domain,
        verdict=word,
        upper=upper,
        documents=place.documents,
        reason=reason,
        length=place.length,
        most=place.most,
    )
