"""Evidence that a pattern is safe: held-out loss and divergence, paired per token, by document."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from indexcache.data import ALL, Batch, check_unseen, document_groups
from indexcache.data.retrieval import DOMAIN
from indexcache.engines.vllm.engine import VllmEngine
from indexcache.evals.recall import Recall, recall_of
from indexcache.evals.statistics import TOO_FEW, bootstrap_interval
from indexcache.evals.streamed import subject_of
from indexcache.evals.subject import BUCKETS, FIELDS, TOKENS, TWIN, Key
from indexcache.models.conditions import Conditions, Origin
from indexcache.models.family import AnyModel
from indexcache.models.soundness import blindness
from indexcache.pattern import Pattern
from indexcache.report.tables import table
from indexcache.vacuity import check_batches, pool_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One pattern on some of the tokens, compared with the baseline on the same tokens.

    Attributes:
        name: the name of the pattern.
        pattern: the pattern.
        where: which tokens: those of a domain, where "all" is every domain, or those between two
            fractions (from, to) of the sequence.
        loss: mean loss, nats per token.
        delta_loss: the pattern's loss minus the baseline's.
        ci_low: lower end of the 95 % interval over documents (`statistics.bootstrap_interval`);
            None for fewer documents than it needs.
        ci_high: its upper end.
        kl: KL(baseline || pattern), nats per token; None where an engine cannot give it.
        agreement: share of tokens with the same most likely next token.
        tokens: number of tokens.
        documents: number of documents.
        by_document: per document, the sum of the loss difference and the number of tokens.
        beyond: share of the tokens at which the pattern and the baseline can differ: those that see
            more of their own document than k, or than the pool where all other layers are R. None
            where nobody counted.
        noise: how far two evaluations of all layers full lie apart on the same tokens, two standard
            errors over documents, nats per token; None where evaluations repeat bit for bit.
        recall: the answers found; None where nothing was asked.
    """

    name: str
    pattern: Pattern
    where: str | tuple[float, float]
    loss: float
    delta_loss: float
    ci_low: float | None
    ci_high: float | None
    kl: float | None
    agreement: float
    tokens: int
    documents: int
    by_document: tuple[tuple[float, int], ...] = field(repr=False)
    beyond: float | None = None
    noise: float | None = None
    recall: Recall | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the loss difference is no larger than that of two equal evaluations."""
        return self.noise is not None and bool(abs(self.delta_loss) <= self.noise)

    @property
    def full(self) -> int:
        """Number of full layers."""
        return len(self.pattern.full_layers)

    def to_json(self) -> dict[str, Any]:
        """Return one row of evidence.json."""
        if isinstance(self.where, str):
            where: dict[str, Any] = {"domain": self.where}
        else:
            where = dict(zip(("from", "to"), self.where, strict=True))
        return {
            "pattern": str(self.pattern),
            "name": self.name,
            "full": self.full,
            "layers": len(self.pattern),
            **where,
            "loss": self.loss,
            "delta_loss": self.delta_loss,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "kl": self.kl,
            "agreement": self.agreement,
            "tokens": self.tokens,
            "documents": self.documents,
            "beyond": self.beyond,
            **(
                {}
                if self.noise is None
                else {"noise": self.noise, "within_noise": self.within_noise}
            ),
            **({} if self.recall is None else self.recall.to_json()),
        }


@dataclass(frozen=True)
class Evidence:
    """Patterns compared with a baseline on held-out text.

    Attributes:
        rows: every pattern on all domains together ("all") and on each domain.
        positions: every pattern on each quarter of the sequence, over all domains.
        baseline: the pattern that all others are compared with.
        path: "stock" or "fast", the code that ran.
        conditions: what all of it holds for.
        blind_loss: the loss of a blind guess among all tokens of the vocabulary, nats per token.
        noise: that of all text, see `Measurement`.
        noise_kl: the KL between the two evaluations of all layers full, nats per token.
        facts: what ran the model, where that was an engine.
        notes: what must be known of the numbers, in sentences.
    """

    rows: tuple[Measurement, ...]
    positions: tuple[Measurement, ...]
    baseline: Pattern
    path: str
    conditions: Conditions
    blind_loss: float = math.inf
    noise: float | None = None
    noise_kl: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def baseline_loss(self) -> float:
        """The baseline's loss on all text, nats per token; NaN where nothing was measured."""
        return next((row.loss - row.delta_loss for row in self.overall), math.nan)

    @property
    def blindness(self) -> str | None:
        """The sentence that the baseline is no better than a blind guess; None where it is."""
        return blindness(self.baseline_loss, self.blind_loss)

    @property
    def overall(self) -> tuple[Measurement, ...]:
        """Every pattern on all domains together."""
        return tuple(row for row in self.rows if row.where == ALL)

    def table(self, baseline: str = "full") -> str:
        """Format three tables: the patterns overall, by domain and by position.

        A dash stands where no query sees more than the roles choose from, so nothing can differ.

        Where documents are too few for an interval, or the baseline is no better than a blind
        guess, the last lines say so.

        Args:
            baseline: what the heads of the tables call the baseline.
        """
        by_domain = [row for row in self.rows if row.where != ALL]
        parts = [
            self._overall_table(baseline),
            _table_by_place(f"vs {baseline}, by domain", by_domain, _domain_cell),
            _table_by_place(f"vs {baseline}, by position", self.positions, _position_cell),
        ]
        asked = [row for row in by_domain if row.recall is not None]
        if asked:
            parts.append(_table_by_place(f"answers found, vs {baseline}", asked, _recall_cell))
        few = {str(r.where): r.documents for r in self.rows if r.ci_low is None}
        if few:
            places = ", ".join(f"{where} ({count})" for where, count in few.items())
            parts.append(f"No interval and no verdict for {places}: {TOO_FEW}.")
        parts += filter(None, [*self.notes, self._about_noise(), self.blindness])
        return "\n\n".join(parts)

    def _about_noise(self) -> str | None:
        """Say how well evaluations repeat, and which differences are no larger than that."""
        if self.noise is None:
            return None
        if not self.noise:
            return "Two evaluations of all layers full are equal bit for bit: there is no noise."
        within: dict[str, list[str]] = {}
        for row in self.rows:
            if row.within_noise and row.pattern != self.baseline:
                within.setdefault(row.name, []).append(str(row.where))
        places = "; ".join(f"{name} on {', '.join(where)}" for name, where in within.items())
        end = (
            f"Within it, and so not to be told from nothing: {places}"
            if within
            else ("Every difference on all text and on a domain is larger than it is there")
        )
        kl = "" if self.noise_kl is None else f", and their KL is {self.noise_kl:.1e}"
        return (
            f"Noise: two evaluations of all layers full differ by {self.noise:.1e} nats per token "
            f"(two standard errors over documents){kl}. {end}."
        )

    def _overall_table(self, baseline: str) -> str:
        pools = [self._pool_share(r.pattern) for r in self.overall]
        lines = [
            [
                r.name,
                f"{r.full}/{len(r.pattern)}",
                f"{r.loss:.4f}",
                f"{r.delta_loss:+.4f}",
                "" if r.ci_low is None else f"[{r.ci_low:+.4f}, {r.ci_high:+.4f}]",
                "-" if r.kl is None else f"{r.kl:.4f}",
                f"{r.agreement:.1%}",
                *([] if not any(pools) else [f"{share:.1%}" if share else ""]),
                str(r.pattern),
            ]
            for r, share in zip(self.overall, pools, strict=True)
        ]
        head = ["pattern", "full", "loss", f"vs {baseline}", "95 % interval", "KL", "same top-1"]
        pool = ["pool of context"] if any(pools) else []
        return table([*head, *pool, f"roles ({self.conditions.summary()})"], lines)

    def _pool_share(self, pattern: Pattern) -> float | None:
        """Return the pool over the longest context; None without R layers."""
        if pattern.pool_share is not None:
            return float(pattern.pool_share)
        pool = pool_of(pattern, self.conditions.k)
        return None if pool is None else self.conditions.share(pool).longest

    def to_json(self) -> dict[str, Any]:
        """Return the content of evidence.json."""
        return {
            "rows": [self._row(row) for row in self.rows],
            "positions": [self._row(row) for row in self.positions],
            "baseline": str(self.baseline),
            "path": self.path,
            "baseline_loss": self.baseline_loss,
            "blind_loss": self.blind_loss,
            "conditions": self.conditions.to_json(),
            **self.facts,
            **({} if self.noise is None else self._about_engine()),
        }

    def _about_engine(self) -> dict[str, Any]:
        return {"noise": self.noise, "noise_kl": self.noise_kl, "notes": list(self.notes)}

    def _row(self, row: Measurement) -> dict[str, Any]:
        pool = pool_of(row.pattern, self.conditions.k)
        return row.to_json() | {"pool": pool, "pool_share": self._pool_share(row.pattern)}


def _table_by_place(head: str, rows: Sequence[Measurement], cell: Any) -> str:
    """Format one line per pattern and one column per place, in the order of the rows."""
    columns = dict.fromkeys(_where_title(r) for r in rows)
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row.name, [row.name]).append(cell(row))
    return table([head, *columns], list(lines.values()))


def _where_title(row: Measurement) -> str:
    if isinstance(row.where, str):
        return row.where
    return "{:.0%} to {:.0%}".format(*row.where)


def _domain_cell(row: Measurement) -> str:
    interval = "" if row.ci_low is None else f" [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
    return f"{row.delta_loss:+.4f}{interval}"


def _recall_cell(row: Measurement) -> str:
    return str(row.recall)


def _position_cell(row: Measurement) -> str:
    """Format a difference; where the context is too short for any, there is a dash."""
    return "-" if row.beyond == 0 and row.delta_loss == 0 else f"{row.delta_loss:+.4f}"


def evaluate(
    model: AnyModel | VllmEngine,
    patterns: Pattern | str | Mapping[str, Pattern | str] | Sequence[Pattern | str],
    batches: Sequence[Batch],
    *,
    against: Pattern | str | None = None,
    seed: int = 0,
    origin: Origin = Origin(),
    progress: bool = False,
) -> Evidence:
    """Compare patterns with the full model, or with another pattern, on the same held-out tokens.

    Args:
        model: a model of a known family, or a running vLLM that holds one
            (`engines.vllm.engine.start`). Where `load` put a delta into it, the patterns run with
            the trained indexers and the baseline with the checkpoint's own.
        patterns: one pattern, several, or a mapping from names to patterns.
        batches: held-out batches (`indexcache.data.batches`).
        against: the baseline; None is what the model does by itself, all F unless it has layers
            without an indexer.
        seed: random seed that the batches were taken with, for the record; nothing here is random.
        origin: where the batches come from, for the record in `conditions`.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: text that chose or trained a pattern, the checkpoint or its delta
            (`data.check_unseen`), sequences or documents on which a role has too little to lose
            (`vacuity.check_batches`), a pattern the model or a pipeline stage of vLLM cannot take,
            weights, indexer scores or a loss that are not finite, or a vLLM in which sharing has no
            effect.

    The table says where the baseline is no better than a blind guess.
    """
    named = _named(patterns)
    subject = subject_of(model)
    base = subject.native if against is None else Pattern.of(against)
    for pattern in [base, *named.values()]:
        check_unseen(batches, pattern.seen)
    subject.check(batches, [base, *named.values()])
    shares = check_batches(batches, subject.topk, [base, *named.values()])
    _note_near_copies(batches)
    conditions = subject.conditions(batches, shares, origin, seed)
    subject.prepare(batches, base)
    sums: dict[str, dict[Key, np.ndarray]] = defaultdict(
        lambda: defaultdict(lambda: np.zeros(len(FIELDS)))
    )
    for name, key, value in subject.sums(batches, base, named, progress=progress):
        sums[name][key] += value
    places: list[str | tuple[float, float]] = [ALL, *sorted({b.domain for b in batches})]
    places += [(i / BUCKETS, (i + 1) / BUCKETS) for i in range(BUCKETS)]
    measured = [
        _measure(
            name,
            pattern,
            where,
            sums[name],
            same=pattern == base and not subject.has_delta,
            noise=_noise(sums[TWIN], where) if subject.twins else None,
        )
        for name, pattern in named.items()
        for where in places
        if _by_unit(sums[name], where)[:, TOKENS].sum()
    ]
    rows = tuple(m for m in measured if isinstance(m.where, str))
    positions = tuple(m for m in measured if not isinstance(m.where, str))
    return Evidence(
        rows,
        positions,
        base,
        conditions.path,
        conditions,
        subject.blind_loss,
        noise=_noise(sums[TWIN], ALL) if subject.twins else None,
        noise_kl=_mean_kl(_by_unit(sums[TWIN], ALL)) if subject.twins else None,
        facts=subject.facts,
        notes=subject.notes,
    )


def _named(
    patterns: Pattern | str | Mapping[str, Pattern | str] | Sequence[Pattern | str],
) -> dict[str, Pattern]:
    if isinstance(patterns, (Pattern, str)):
        patterns = [patterns]
    if not isinstance(patterns, Mapping):
        patterns = {str(p): p for p in patterns}
    if not patterns:
        raise ValueError("There is no pattern to evaluate.")
    return {name: Pattern.of(p) for name, p in patterns.items()}


def _note_near_copies(batches: Sequence[Batch]) -> None:
    """Log how many documents are near copies of others: the interval takes them as independent."""
    groups = document_groups([b for b in batches if not b.answers])
    copies = len(groups) - len(set(groups.values()))
    if copies:
        logger.warning(
            "%d of %d documents share half of their passages or more with another one; forms and "
            "revisions of one text are not independent, so intervals are too narrow and a verdict "
            "says less; give other documents in their place.",
            copies,
            len(groups),
        )


def _measure(
    name: str,
    pattern: Pattern,
    where: str | tuple[float, float],
    sums: Mapping[Key, np.ndarray],
    *,
    same: bool,
    noise: float | None = None,
) -> Measurement:
    """Add up a pattern's sums at one place by document, and make means and an interval of them.

    Args:
        same: the pattern is the baseline, which differs from itself by nothing on any document.
        noise: see `Measurement`.
    """
    by_unit = _by_unit(sums, where)
    loss, delta, _, agree, tokens, beyond, *_ = by_unit.sum(0)
    by_unit = by_unit[by_unit[:, TOKENS] > 0]
    low, high = (0.0, 0.0) if same else bootstrap_interval(by_unit[:, 1], by_unit[:, TOKENS])
    return Measurement(
        name=name,
        pattern=pattern,
        where=where,
        loss=loss / tokens,
        delta_loss=delta / tokens,
        ci_low=low if math.isfinite(low) else None,
        ci_high=high if math.isfinite(high) else None,
        kl=_mean_kl(by_unit),
        agreement=agree / tokens,
        tokens=int(tokens),
        documents=len(by_unit),
        by_document=tuple((float(unit[1]), int(unit[4])) for unit in by_unit),
        beyond=float(beyond / tokens),
        noise=noise,
        recall=recall_of(by_unit, same=same),
    )


def _by_unit(sums: Mapping[Key, np.ndarray], where: str | tuple[float, float]) -> np.ndarray:
    """Add up FIELDS at one place by document, float64 [documents, fields].

    Retrieval has its own rows: it is no part of all text, unless there is no text.
    """
    units: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(FIELDS)))
    text = any(not domain.startswith(DOMAIN) for domain, _, _ in sums)
    for (domain, unit, bucket), value in sums.items():
        own = where == domain
        if text and domain.startswith(DOMAIN) and not own:
            continue
        if own or where in (ALL, (bucket / BUCKETS, (bucket + 1) / BUCKETS)):
            units[domain, unit] += value
    return np.stack([units[k] for k in sorted(units)]) if units else np.zeros((0, len(FIELDS)))


def _mean_kl(by_unit: np.ndarray) -> float | None:
    """Return the KL per token of FIELDS by document; None where an engine gave none."""
    sums = dict(zip(FIELDS, by_unit.sum(0), strict=True))
    return sums["kl"] / sums["tokens"] if math.isfinite(sums["kl"]) else None


def _noise(twin: Mapping[Key, np.ndarray], where: str | tuple[float, float]) -> float:
    """Return two standard errors of the difference of two equal evaluations at one place.

    They are over documents, in nats per token, as `engines.vllm.engine.noise_of` has them.
    """
    by_unit = _by_unit(twin, where)
    return float(2 * np.sqrt((by_unit[:, 1] ** 2).sum()) / by_unit[:, 4].sum())
