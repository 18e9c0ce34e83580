"""Add up what was compared by document, and make rows with intervals of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from indexcache.data import ALL
from indexcache.data.retrieval import DOMAIN
from indexcache.evals.recall import Recall, recall_of
from indexcache.evals.statistics import bootstrap_interval
from indexcache.evals.subject import BUCKETS, FIELDS, TOKENS, Key
from indexcache.pattern import Pattern

Where = str | tuple[float, float]
ALL_RETRIEVAL = f"{DOMAIN}{ALL}"
"""The place of all kinds of retrieval together."""


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
        length: number of tokens of the sequences; None where nobody said.
        beyond: share of the tokens at which the pattern and the baseline can differ: those that see
            more of their own document than k, or than the pool where all other layers are R. None
            where nobody counted.
        kl_ci: the interval of the KL over documents, as that of the loss.
        flips_ci: that of the share of tokens with another most likely next token.
        noise: how far two evaluations of all layers full lie apart on the same tokens, two standard
            errors over documents, nats per token; None where evaluations repeat bit for bit.
        recall: the answers found; None where nothing was asked.
    """

    name: str
    pattern: Pattern
    where: Where
    loss: float
    delta_loss: float
    ci_low: float | None
    ci_high: float | None
    kl: float | None
    agreement: float
    tokens: int
    documents: int
    by_document: tuple[tuple[float, int], ...] = field(repr=False)
    length: int | None = None
    beyond: float | None = None
    kl_ci: tuple[float, float] | None = None
    flips_ci: tuple[float, float] | None = None
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
            "length": self.length,
            "loss": self.loss,
            "delta_loss": self.delta_loss,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "kl": self.kl,
            "kl_ci": None if self.kl_ci is None else list(self.kl_ci),
            "agreement": self.agreement,
            "flips": 1 - self.agreement,
            "flips_ci": None if self.flips_ci is None else list(self.flips_ci),
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


def measure(
    name: str,
    pattern: Pattern,
    where: Where,
    length: int,
    sums: Mapping[Key, np.ndarray],
    *,
    same: bool,
    noise: float | None = None,
) -> Measurement:
    """Add up a pattern's sums at one place by document, and make means and intervals of them.

    Args:
        length: number of tokens of the sequences.
        same: the pattern is the baseline, which differs from itself by nothing on any document.
        noise: see `Measurement`.
    """
    by_unit = by_document(sums, where, length)
    loss, delta, _, agree, tokens, beyond, *_ = by_unit.sum(0)
    by_unit = by_unit[by_unit[:, TOKENS] > 0]
    count = by_unit[:, TOKENS]
    low, high = (0.0, 0.0) if same else _interval(by_unit[:, 1], count) or (None, None)
    kl = mean_kl(by_unit)
    whole = isinstance(where, str)
    return Measurement(
        name=name,
        pattern=pattern,
        where=where,
        loss=loss / tokens,
        delta_loss=delta / tokens,
        ci_low=low,
        ci_high=high,
        kl=kl,
        agreement=agree / tokens,
        tokens=int(tokens),
        documents=len(by_unit),
        by_document=tuple((float(unit[1]), int(unit[4])) for unit in by_unit),
        length=length,
        beyond=float(beyond / tokens),
        kl_ci=_interval(by_unit[:, 2], count) if whole and kl is not None else None,
        flips_ci=_interval(count - by_unit[:, 3], count) if whole else None,
        noise=noise,
        recall=recall_of(by_unit, same=same) if whole else None,
    )


def _interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """Return the interval over documents; None for too few of them."""
    low, high = bootstrap_interval(sums, counts)
    return (low, high) if math.isfinite(low) else None


def by_document(sums: Mapping[Key, np.ndarray], where: Where, length: int) -> np.ndarray:
    """Add up FIELDS at one place and length by document, float64 [documents, fields].

    Retrieval has its own rows: it is no part of all text, unless there is no text.
    """
    units: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(FIELDS)))
    text = any(not domain.startswith(DOMAIN) for domain, *_ in sums)
    for (domain, unit, tokens, bucket), value in sums.items():
        asked = domain.startswith(DOMAIN)
        own = where == domain or (asked and where == ALL_RETRIEVAL)
        if tokens != length or (text and asked and not own):
            continue
        if own or where in (ALL, (bucket / BUCKETS, (bucket + 1) / BUCKETS)):
            units[domain, unit] += value
    return np.stack([units[k] for k in sorted(units)]) if units else np.zeros((0, len(FIELDS)))


def mean_kl(by_unit: np.ndarray) -> float | None:
    """Return the KL per token of FIELDS by document; None where an engine gave none."""
    sums = dict(zip(FIELDS, by_unit.sum(0), strict=True))
    return sums["kl"] / sums["tokens"] if math.isfinite(sums["kl"]) else None


def noise_at(twin: Mapping[Key, np.ndarray], where: Where, length: int) -> float:
    """Return two standard errors of the difference of two equal evaluations at one place.

    They are over documents, in nats per token, as `engines.vllm.engine.noise_of` has them.
    """
    by_unit = by_document(twin, where, length)
    return float(2 * np.sqrt((by_unit[:, 1] ** 2).sum()) / by_unit[:, 4].sum())
