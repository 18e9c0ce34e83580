"""What run folders hold, as far as the page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from indexcache.pattern import Pattern
from indexcache.report.html.conditions import Conditions, Identity
from indexcache.report.html.nodes import Node

ALL = "all"  # the domain of a row over all domains
ANSWERS = "retrieval:"  # begins the domain of a verdict on answers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How many answers of retrieval a pattern finds, beside the baseline.

    Attributes:
        asked: number of answers asked for.
        before: number that the baseline finds.
        found: number that the pattern finds.
        low: lower end of the 95 % interval of the share that is lost; None without one.
        high: its upper end.
    """

    asked: int
    before: int
    found: int
    low: float | None
    high: float | None

    @classmethod
    def of(cls, node: Node) -> Answers | None:
        """Read the answers of a row of evidence.json, whose interval is of the share found."""
        if not node.has("answers"):
            return None
        if not node["answers"].whole():
            node["answers"].refuse("no number of answers")
        low, high = node.maybe_number("found_ci_low"), node.maybe_number("found_ci_high")
        return cls(
            asked=node["answers"].whole(),
            before=node["found_baseline"].whole(),
            found=node["found"].whole(),
            low=None if high is None else 0.0 - high,
            high=None if low is None else 0.0 - low,
        )

    @property
    def lost(self) -> float:
        """The share of the answers that is lost on balance."""
        return (self.before - self.found) / self.asked


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pattern at one place of a text, compared with the baseline; see evidence.json."""

    name: str
    pattern: Pattern
    where: str
    length: int | None
    loss: float
    excess: float
    low: float | None
    high: float | None
    kl: float | None
    agreement: float
    tokens: int
    documents: int
    beyond: float | None
    pool_share: float | None
    within_noise: bool
    answers: Answers | None

    @classmethod
    def of(cls, node: Node) -> Row:
        """Read a row of evidence.json."""
        if node.has("domain"):
            where = node["domain"].text()
        else:
            where = f"{node['from'].number():.0%} to {node['to'].number():.0%}"
        return cls(
            name=node["name"].text(),
            pattern=node["pattern"].pattern(),
            where=where,
            length=node.maybe_whole("length"),
            loss=node["loss"].number(),
            excess=node["delta_loss"].number(),
            low=node.maybe_number("ci_low"),
            high=node.maybe_number("ci_high"),
            kl=node.maybe_number("kl"),
            agreement=node["agreement"].number(),
            tokens=node["tokens"].whole(),
            documents=node["documents"].whole(),
            beyond=node.maybe_number("beyond"),
            pool_share=node.maybe_number("pool_share"),
            within_noise=node.has("within_noise") and node["within_noise"].value is True,
            answers=Answers.of(node),
        )

    @property
    def task(self) -> str:
        """The kind of retrieval, of a row of answers."""
        return self.where.removeprefix(ANSWERS)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate says of a pattern at one place."""

    name: str
    where: str
    word: str
    upper: float | None
    documents: int
    reason: str
    length: int | None

    @classmethod
    def of(cls, node: Node) -> Verdict:
        """Read a verdict of a gate."""
        word = node["verdict"].text()
        if word not in ("safe", "not safe", "inconclusive"):
            node["verdict"].refuse("no verdict")
        return cls(
            name=node["name"].text(),
            where=node["domain"].text(),
            word=word,
            upper=node.maybe_number("upper"),
            documents=node["documents"].whole(),
            reason=node["reason"].text(),
            length=node.maybe_whole("length"),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A result in a run folder.

    Attributes:
        verb: what wrote it.
        folder: where.
        node: its JSON.
        identity: which model it is of.
    """

    verb: str
    folder: str
    node: Node = field(repr=False)
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(Run):
    """Patterns on held-out text."""

    conditions: Conditions
    rows: tuple[Row, ...]
    positions: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    most: float | None
    recall_most: float | None
    baseline: Pattern

    @property
    def text_rows(self) -> list[Row]:
        """The rows of text, without those of answers."""
        return [row for row in self.rows if row.answers is None]

    @property
    def answer_rows(self) -> list[Row]:
        """The rows of retrieval."""
        return [row for row in self.rows if row.answers is not None]

    def tokens(self, length: int | None) -> str:
        """Say how long the sequences of a row are."""
        return f"{length} tokens" if length else self.conditions.length

    @property
    def against(self) -> str:
        """What the patterns are compared with, in words."""
        return "all layers full" if set(self.baseline.roles) == {"F"} else f"{self.baseline}"

    def is_baseline(self, row: Row) -> bool:
        """Say whether a row is the baseline beside itself."""
        return row.pattern == self.baseline and not self.conditions.delta


@dataclass(frozen=True, kw_only=True)
class Point:
    """A pattern of a search, with its loss on calibration text."""

    pattern: Pattern
    loss: float
    estimated: bool
    cost: float | None
    found: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class SearchRun(Run):
    """Patterns that a search found."""

    conditions: Conditions
    frontier: tuple[Point, ...]
    uniform: tuple[Point, ...]
    objective: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OverlapRun(Run):
    """How much the selections of the layers share."""

    conditions: Conditions
    shares: tuple[tuple[float, ...], ...]
    chance: float
    queries: int
    pattern: Pattern | None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A row of a bench: one pattern at one length."""

    context: int
    name: str
    pattern: Pattern
    asked: str
    batch: int
    ttft_s: float | None
    step_tok_s: float
    total_tok_s: float
    gains: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class BenchRun(Run):
    """Times on a device."""

    device: str
    date: str
    random: bool
    note: str
    dtype: str
    rows: tuple[Timed, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DistillRun(Run):
    """A training of indexers."""

    pattern: Pattern
    steps: int
    tokens: int
    held_out: tuple[float, float, int, float] | None
    delta: str | None


@dataclass(frozen=True, kw_only=True)
class CertificateRun(Run):
    """The certificate of one pattern; its numbers are those of an evaluation."""

    pattern: Pattern
    word: str
    evaluation: EvaluateRun


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A pattern that was calibrated on one kind of text and tested on another."""

    calibrated: str
    objective: str
    full: int
    pattern: Pattern
    tested: str
    excess: float
    low: float | None
    high: float | None
    documents: int

    @property
    def label(self) -> str:
        """What it was calibrated on, and by what where that was all text."""
        return self.calibrated if self.calibrated != ALL else f"all text, by the {self.objective}"


@dataclass(frozen=True, kw_only=True)
class MatrixRun(Run):
    """Patterns of each domain on each domain."""

    conditions: Conditions
    domains: tuple[str, ...]
    cells: tuple[Crossed, ...]


def of_verb(runs: Sequence[Run], kind: type[Any]) -> list[Any]:
    """Return the runs of one kind."""
    return [run for run in runs if isinstance(run, kind)]
