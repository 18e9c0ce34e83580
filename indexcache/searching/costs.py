"""What the roles of a pattern cost at some context, as a share of all layers full.

Counted is the time of the indexers alone: scores, selection, pools and plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.pattern import Pattern
from indexcache.records import read_json

INDEX_PARTS = ("indexer", "index_topk", "plan")  # of a row of `bench`


@dataclass(frozen=True)
class RoleCosts:
    """The cost of a layer by its role, where that of an F layer is 1.

    Attributes:
        context: number of tokens for which they hold.
        publish: what an F layer costs more that publishes a pool.
        reindex: what an R layer costs.
        source: where they come from.
        others: publish and reindex of pools of other sizes, where groups have their own.
    """

    context: int
    publish: float
    reindex: float
    source: str
    others: Mapping[int | Fraction, tuple[float, float]] = field(default_factory=dict)

    def of(self, pattern: Pattern) -> float:
        """Return the cost of a pattern over that of all layers full."""
        total, pools = float(len(pattern.full_layers)), pattern.pools()
        readers = Counter(pattern.source(i) for i, r in enumerate(pattern.roles) if r == "R")
        for layer, size in pools.items():
            publish, reindex = self.others.get(size, (self.publish, self.reindex))
            total += publish + readers[layer] * reindex
        return total / len(pattern)

    def to_json(self) -> dict[str, Any]:
        """Return what a result holds."""
        value: dict[str, Any] = {
            "context": self.context,
            "publish": self.publish,
            "reindex": self.reindex,
            "source": self.source,
        }
        if self.others:
            value["others"] = {str(size): list(pair) for size, pair in self.others.items()}
        return value

    def __str__(self) -> str:
        text = (
            f"Costs are the indexers' share at {self.context} tokens, by {self.source}: an R layer "
            f"{self.reindex:.1%} of an F layer, a pool {self.publish:.1%}"
        )
        for size, (publish, reindex) in self.others.items():
            text += f"; with pools of {size} {reindex:.1%} and {publish:.1%}"
        return f"{text}."

    def beside(self, others: Mapping[int | Fraction, RoleCosts]) -> RoleCosts:
        """Return these costs with those of pools of other sizes."""
        return replace(self, others={s: (c.publish, c.reindex) for s, c in others.items()})


def pool_tokens(pool: int | Fraction, context: int, topk: int) -> int:
    """Return how many tokens the pool of the last query holds."""
    tokens = pool * topk if isinstance(pool, int) else -(-context * pool // 1)
    return min(max(int(tokens), topk), context)


def by_arithmetic(context: int, pool: int | Fraction, topk: int) -> RoleCosts:
    """Return the costs if time were the number of keys that are scored; a pool costs nothing.

    It is the least that any kernel needs, and kernels need more: fit to rows of `bench`.
    """
    share = pool_tokens(pool, context, topk) / context
    return RoleCosts(context, 0.0, share, "arithmetic, the least that is possible")


def fitted(folder: str | Path, context: int, pool: int | Fraction, topk: int) -> RoleCosts:
    """Fit the costs to the rows of a `bench`: its bench.json, or the folder with that.

    A layer of a prefill of L tokens takes L (a + b L) where it is F, L c p more where it publishes
    a pool of p tokens, and L (d + e p) where it is R; no coefficient is below zero.

    Raises:
        ValueError: the file cannot be read, or no row has R layers.
    """
    path = Path(folder)
    path = path / "bench.json" if path.is_dir() else path
    value = read_json(path)
    rows = value.get("rows", []) if isinstance(value, Mapping) else []
    usable = [r for r in rows if isinstance(r, Mapping) and _is_usable(r)]
    if not any("R" in r["pattern"] for r in usable):
        raise ValueError(
            f"{path}: no measured row has R layers, so their cost cannot be fitted; bench a "
            "pattern such as 1/4+R8, or leave the costs to arithmetic."
        )
    features = np.array([_features(Pattern(r["pattern"]), r["context"], topk) for r in usable])
    measured = np.array([sum(r["parts_ms"].get(p, 0.0) for p in INDEX_PARTS) for r in usable])
    from scipy.optimize import nnls

    # Features of very different sizes are brought to one, so that the fit is well conditioned.
    scale = features.max(0)
    scale[scale == 0] = 1.0
    solution = nnls(features / scale / measured[:, None], np.ones(len(usable)))[0]
    a, b, c, d, e = (solution / scale).tolist()
    tokens = pool_tokens(pool, context, topk)
    full = a + b * context
    return RoleCosts(context, c * tokens / full, (d + e * tokens) / full, f"a fit to {path}")


def _is_usable(row: Mapping[str, Any]) -> bool:
    measured = row.get("parts_ms")
    return not row.get("error") and bool(measured) and "pattern" in row and "context" in row


def _features(pattern: Pattern, context: int, topk: int) -> Sequence[float]:
    """Return the factors of the coefficients a to e."""
    full, again = len(pattern.full_layers), pattern.roles.count("R")
    sizes = {i: pool_tokens(size, context, topk) for i, size in pattern.pools().items()}
    reading = [sizes[pattern.source(i)] for i, r in enumerate(pattern.roles) if r == "R"]
    factors = (full, full * context, sum(sizes.values()), again, sum(reading))
    return [float(context) * f for f in factors]
