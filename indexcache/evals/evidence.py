"""The result of an evaluation: patterns beside a baseline, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from indexcache.data import ALL
from indexcache.evals.measurement import Measurement
from indexcache.evals.statistics import TOO_FEW
from indexcache.models.conditions import Conditions
from indexcache.models.soundness import blindness
from indexcache.pattern import Pattern
from indexcache.report.tables import table
from indexcache.vacuity import Share, pool_of


@dataclass(frozen=True)
class Evidence:
    """Patterns compared with a baseline on held-out text.

    Attributes:
        rows: every pattern on all domains together ("all"), on each domain, on each kind of
            retrieval and on all of these together, for each length of the sequences.
        positions: every pattern on each quarter of the sequence, over all domains.
        baseline: the pattern that all others are compared with.
        path: "stock" or "fast", the code that ran.
        conditions: what all of it holds for.
        blind_loss: the loss of a blind guess among all tokens of the vocabulary, nats per token.
        noise: that of all text, see `Measurement`.
        noise_kl: the KL between the two evaluations of all layers full, nats per token.
        facts: what ran the model, where that was an engine.
        notes: what must be known of the numbers, in sentences.
        shares: the share of the context that k and each pool are, by length of the text.
        retrieval: the retrieval sequences: kinds, lengths, digest; empty without any.
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
    shares: Mapping[int, tuple[Share, ...]] = field(default_factory=dict)
    retrieval: Mapping[str, Any] = field(default_factory=dict)

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
        """Every pattern on all domains together, for each length."""
        return tuple(row for row in self.rows if row.where == ALL)

    def label(self, row: Measurement) -> str:
        """Return the name of a row's pattern, with the length where there are several."""
        several = len({r.length for r in self.rows}) > 1
        return f"{row.name}, {row.length} tokens" if several else row.name

    def table(self, baseline: str = "full") -> str:
        """Format tables: the patterns overall, by domain, by position and by kind of retrieval.

        A dash stands where no query sees more than the roles choose from, so nothing can differ.

        Where documents are too few for an interval, or the baseline is no better than a blind
        guess, the last lines say so.

        Args:
            baseline: what the heads of the tables call the baseline.
        """
        by_domain = [row for row in self.rows if row.where != ALL]
        parts = [
            self._overall_table(baseline),
            self._by_place(f"vs {baseline}, by domain", by_domain, _domain_cell),
            self._by_place(f"vs {baseline}, by position", self.positions, _position_cell),
        ]
        asked = [row for row in by_domain if row.recall is not None]
        if asked:
            parts.append(self._by_place(f"answers found, vs {baseline}", asked, _recall_cell))
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
                self.label(r),
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

    def _by_place(
        self, head: str, rows: Sequence[Measurement], cell: Callable[[Measurement], str]
    ) -> str:
        """Format one line per pattern and one column per place, in the order of the rows."""
        columns = dict.fromkeys(_where_title(r) for r in rows)
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            lines.setdefault(self.label(row), {})[_where_title(row)] = cell(row)
        cells = [[label, *(own.get(c, "") for c in columns)] for label, own in lines.items()]
        return table([head, *columns], cells)

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
            **({"retrieval": dict(self.retrieval)} if self.retrieval else {}),
            **({} if self.noise is None else self._about_engine()),
        }

    def _about_engine(self) -> dict[str, Any]:
        return {"noise": self.noise, "noise_kl": self.noise_kl, "notes": list(self.notes)}

    def _row(self, row: Measurement) -> dict[str, Any]:
        pool = pool_of(row.pattern, self.conditions.k)
        return row.to_json() | {"pool": pool, "pool_share": self._pool_share(row.pattern)}


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
