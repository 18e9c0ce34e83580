"""Evidence that a pattern is safe: held-out loss and divergence, paired per token, by document."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.data import ALL, Batch, check_unseen, document_groups
from indexcache.evals.statistics import TOO_FEW, bootstrap_interval
from indexcache.models.applied import delta_of, without_delta
from indexcache.models.conditions import Conditions, Origin, conditions_of
from indexcache.models.family import AnyModel, DsaModule, module_of, native_pattern
from indexcache.models.lm import hidden_states, logit_chunks
from indexcache.models.seam import check_pattern, use_pattern
from indexcache.models.soundness import blind_loss, blindness, check_scores, check_weights
from indexcache.pattern import Pattern
from indexcache.progress import progress as progress_bar
from indexcache.report.tables import table
from indexcache.seen import Seen
from indexcache.vacuity import check_batches, choosing_size, pool_of

BUCKETS = 4  # number of equal parts of a sequence
FIELDS = ("loss", "delta", "kl", "agree", "tokens", "beyond")

logger = logging.getLogger(__name__)

Key = tuple[str, str, int]  # (domain, unit, position bucket)


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
        kl: KL(baseline || pattern), nats per token.
        agreement: share of tokens with the same most likely next token.
        tokens: number of tokens.
        documents: number of documents.
        by_document: per document, the sum of the loss difference and the number of tokens.
        beyond: share of the tokens at which the pattern and the baseline can differ: those that see
            more of their own document than k, or than the pool where all other layers are R. None
            where nobody counted.
    """

    name: str
    pattern: Pattern
    where: str | tuple[float, float]
    loss: float
    delta_loss: float
    ci_low: float | None
    ci_high: float | None
    kl: float
    agreement: float
    tokens: int
    documents: int
    by_document: tuple[tuple[float, int], ...] = field(repr=False)
    beyond: float | None = None

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
    """

    rows: tuple[Measurement, ...]
    positions: tuple[Measurement, ...]
    baseline: Pattern
    path: str
    conditions: Conditions
    blind_loss: float = math.inf

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
        few = {str(r.where): r.documents for r in self.rows if r.ci_low is None}
        if few:
            places = ", ".join(f"{where} ({count})" for where, count in few.items())
            parts.append(f"No interval and no verdict for {places}: {TOO_FEW}.")
        if self.blindness:
            parts.append(self.blindness)
        return "\n\n".join(parts)

    def _overall_table(self, baseline: str) -> str:
        pools = [self._pool_share(r.pattern) for r in self.overall]
        lines = [
            [
                r.name,
                f"{r.full}/{len(r.pattern)}",
                f"{r.loss:.4f}",
                f"{r.delta_loss:+.4f}",
                "" if r.ci_low is None else f"[{r.ci_low:+.4f}, {r.ci_high:+.4f}]",
                f"{r.kl:.4f}",
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
        }

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


def _position_cell(row: Measurement) -> str:
    """Format a difference; where the context is too short for any, there is a dash."""
    return "-" if row.beyond == 0 and row.delta_loss == 0 else f"{row.delta_loss:+.4f}"


def evaluate(
    model: AnyModel,
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
        model: a model of a known family. Where `load` put a delta into it, the patterns run with
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
            (`vacuity.check_batches`), a pattern the model cannot take, or weights, indexer scores
            or a loss that are not finite.

    The table says where the baseline is no better than a blind guess.
    """
    named = _named(patterns)
    delta = delta_of(model)
    has_delta = delta is not None
    module = module_of(model)
    native = native_pattern(module)
    base = native if against is None else Pattern.of(against)
    for pattern in [base, *named.values()]:
        check_pattern(module, pattern)
        check_unseen(batches, pattern.seen)
    check_unseen(batches, Seen.from_json(vars(module.config)))
    if delta is not None:
        check_unseen(batches, delta.pattern.seen)
    check_weights(module, selecting=True)
    shares = check_batches(batches, int(module.config.index_topk), [base, *named.values()])
    _note_near_copies(batches)
    conditions = conditions_of(model, batches, shares, origin, seed=seed)
    sums: dict[str, dict[Key, np.ndarray]] = {
        name: defaultdict(lambda: np.zeros(len(FIELDS))) for name in named
    }
    with progress_bar(len(batches) * (len(named) + 1), "pass", shown=progress) as bar:
        for batch in batches:
            # One batch shows whether the scores of an indexer are finite.
            watch = partial(check_scores, module) if batch is batches[0] else nullcontext
            with watch(), without_delta(model):
                base_hidden = _base_hidden(module, base, native, batch)
            bar.update()
            for name, pattern in named.items():
                # The baseline's own pass is repeated once, to show that two passes are bitwise
                # equal.
                same = pattern == base and not has_delta
                if same and batch is not batches[0]:
                    hidden = base_hidden
                else:
                    with watch(), use_pattern(module, pattern):
                        hidden = hidden_states(module, batch.ids)
                    assert not same or torch.equal(hidden, base_hidden), (
                        "two passes under one pattern differ"
                    )
                # Other indexers choose other tokens as soon as there are more than k.
                k = conditions.k
                size = k if has_delta else choosing_size([pattern, base], k)
                for key, value in _compare(module, base_hidden, hidden, batch, size):
                    sums[name][key] += value
                bar.update()
    places: list[str | tuple[float, float]] = [ALL, *sorted({b.domain for b in batches})]
    places += [(i / BUCKETS, (i + 1) / BUCKETS) for i in range(BUCKETS)]
    measured = [
        _measure(name, pattern, where, sums[name], same=pattern == base and not has_delta)
        for name, pattern in named.items()
        for where in places
    ]
    rows = tuple(m for m in measured if isinstance(m.where, str))
    positions = tuple(m for m in measured if not isinstance(m.where, str))
    return Evidence(rows, positions, base, conditions.path, conditions, blind_loss(module))


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
    groups = document_groups(batches)
    copies = len(groups) - len(set(groups.values()))
    if copies:
        logger.warning(
            "%d of %d documents share half of their passages or more with another one; forms and "
            "revisions of one text are not independent, so intervals are too narrow and a verdict "
            "says less; give other documents in their place.",
            copies,
            len(groups),
        )


def _base_hidden(module: DsaModule, base: Pattern, native: Pattern, batch: Batch) -> Tensor:
    """Compute the baseline's hidden states; the model's native pattern needs no `use_pattern`."""
    if base == native:
        return hidden_states(module, batch.ids)
    with use_pattern(module, base):
        return hidden_states(module, batch.ids)


def _compare(
    module: DsaModule, base_hidden: Tensor, hidden: Tensor, batch: Batch, size: int | None
) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield the sums of FIELDS for each sequence and position bucket.

    Args:
        size: up to this many tokens of context nothing can differ; None: nothing ever differs.
    """
    length = batch.ids.shape[1]
    fields = torch.zeros(len(FIELDS), len(batch.units), length - 1, dtype=torch.float64)
    for chunk, (base_logits, logits) in logit_chunks(module, base_hidden, hidden):
        target = batch.ids[:, chunk.start + 1 : chunk.stop + 1].to(logits.device)[..., None]
        base_log_p = F.log_softmax(base_logits, -1)
        log_p = F.log_softmax(logits, -1)
        base_loss = -base_log_p.gather(-1, target)[..., 0]
        loss = -log_p.gather(-1, target)[..., 0]
        kl = (base_log_p.exp() * (base_log_p - log_p)).sum(-1)
        agree = (base_log_p.argmax(-1) == log_p.argmax(-1)).float()
        beyond = _beyond(batch, chunk, size).to(kl)
        delta = loss.double() - base_loss.double()
        values = (loss, delta, kl, agree, torch.ones_like(kl), beyond)
        fields[..., chunk] = torch.stack([v.double() for v in values]).cpu()
    if not math.isfinite(float(fields.sum())):
        raise ValueError(
            "The loss is not finite on this text: the model gives no finite logits (wrong dtype or "
            "broken weights?)."
        )
    bucket = torch.arange(length - 1) * BUCKETS // (length - 1)
    for row, unit in enumerate(batch.units):
        for i in range(BUCKETS):
            yield (batch.domain, unit, i), fields[:, row, bucket == i].sum(-1).numpy()


def _beyond(batch: Batch, chunk: slice, size: int | None) -> Tensor:
    """Say which tokens see more than `size` tokens of their own document, bool [B, chunk]."""
    own = batch.own_context[:, chunk]
    return torch.zeros_like(own, dtype=torch.bool) if size is None else own > size


def _measure(
    name: str,
    pattern: Pattern,
    where: str | tuple[float, float],
    sums: Mapping[Key, np.ndarray],
    *,
    same: bool,
) -> Measurement:
    """Add up a pattern's sums at one place by document, and make means and an interval of them.

    Args:
        same: the pattern is the baseline, which differs from itself by nothing on any document.
    """
    units: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(FIELDS)))
    for (domain, unit, bucket), value in sums.items():
        if where in (ALL, domain, (bucket / BUCKETS, (bucket + 1) / BUCKETS)):
            units[domain, unit] += value
    by_unit = np.stack([units[k] for k in sorted(units)])
    loss, delta, kl, agree, tokens, beyond = by_unit.sum(0)
    low, high = (0.0, 0.0) if same else bootstrap_interval(by_unit[:, 1], by_unit[:, 4])
    return Measurement(
        name=name,
        pattern=pattern,
        where=where,
        loss=loss / tokens,
        delta_loss=delta / tokens,
        ci_low=low if math.isfinite(low) else None,
        ci_high=high if math.isfinite(high) else None,
        kl=kl / tokens,
        agreement=agree / tokens,
        tokens=int(tokens),
        documents=len(by_unit),
        by_document=tuple((float(unit[1]), int(unit[4])) for unit in by_unit),
        beyond=float(beyond / tokens),
    )
