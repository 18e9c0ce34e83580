"""Training-free search: Algorithm 1 of the paper, and its variant for pipeline stages.

`loss` maps a pattern to the language-modelling loss on the calibration batches, the same batches
for every candidate. The candidates of a round are asked for together, so that what computes the
losses may share work between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from indexcache.pattern import Pattern

Loss = Callable[[Pattern], float]


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the frontier of patterns.

    Attributes:
        pattern: the pattern after a flip.
        loss: its loss, nats per token.
        flipped: the layer that was flipped to S; None for all full.
        tied: the other layers whose flip costs the same up to the noise of an evaluation.
        margin: how much more the best of the other layers would have cost, nats per token; None
            where there was no other.
        estimated: whether the loss was not measured on the whole text.
        cost: the indexers' cost over that of all full, where a search counts it.
    """

    pattern: Pattern
    loss: float
    flipped: int | None = None
    tied: tuple[int, ...] = ()
    margin: float | None = None
    estimated: bool = False
    cost: float | None = None

    @property
    def full(self) -> int:
        """Number of full layers."""
        return len(self.pattern.full_layers)


def together(loss: Loss, patterns: Sequence[Pattern], trunk: Pattern | None = None) -> list[float]:
    """Return the losses of several patterns.

    Args:
        loss: a function of one pattern; where it has a method `together`, that is called.
        patterns: the patterns.
        trunk: a pattern from which each of them differs little; None where there is none.
    """
    many = getattr(loss, "together", None)
    return [loss(p) for p in patterns] if many is None else many(patterns, trunk)


def greedy(
    loss: Loss,
    layers: int,
    full: int,
    starts: Sequence[int] = (0,),
    noise: float = 0.0,
    fixed: Sequence[int] = (),
) -> Iterator[FrontierPoint]:
    """Yield the nested family of patterns from all full down to `full` full layers.

    pattern = F^N;  candidates = {1..N-1};  repeat:
        l* = argmin over l in candidates of loss(pattern with l -> S)
        pattern[l*] = S;  candidates -= {l*}

    Of losses that are equal up to `noise`, nats per token, the lowest layer wins. The noise is 0
    where an evaluation repeats bit for bit.

    `starts` are the first layers of the pipeline stages. The first layer of each stage stays F, and
    each round flips one layer per stage, stage after stage. One stage is Algorithm 1 itself; P
    stages take P times fewer evaluations. `fixed` are further layers that stay full.

    Raises:
        ValueError: fewer full layers than stages, whose first layers always stay full.
    """
    if full < len({*starts, *fixed}):
        raise ValueError(
            f"{full} full layers are too few: the first layer of each of the {len(starts)} stages "
            "stays full."
        )
    pattern = Pattern.full(layers)
    remaining = [list(own) for own in candidates_of(layers, starts, fixed)]
    # Where losses are computed together, all full goes with the first round, which begins at it.
    shared = hasattr(loss, "together") and layers > full
    first = next((c for c in remaining if c), []) if shared else []
    both = [pattern, *(pattern.replace(layer, "S") for layer in first)]
    base, *others = together(loss, both, pattern)
    known = dict(zip(first, others, strict=True))
    yield FrontierPoint(pattern, base)
    while len(pattern.full_layers) > full:
        for candidates in remaining:
            if not candidates or len(pattern.full_layers) <= full:
                continue
            tried = [pattern.replace(layer, "S") for layer in candidates]
            losses = known or dict(zip(candidates, together(loss, tried, pattern), strict=True))
            known = {}
            smallest = min(losses.values())
            equal = [layer for layer in sorted(candidates) if losses[layer] <= smallest + noise]
            best, *tied = equal
            others = [losses[layer] for layer in candidates if layer != best]
            margin = min(others) - losses[best] if others else None
            pattern = pattern.replace(best, "S")
            candidates.remove(best)
            yield FrontierPoint(pattern, losses[best], best, tuple(tied), margin)


def candidates_of(
    layers: int, starts: Sequence[int] = (0,), fixed: Sequence[int] = ()
) -> list[list[int]]:
    """Return the layers of every pipeline stage that may be flipped."""
    ends = [*starts[1:], layers]
    pairs = zip(starts, ends, strict=True)
    return [[i for i in range(a + 1, b) if i not in fixed] for a, b in pairs]


def rounds(
    layers: int, full: int, starts: Sequence[int] = (0,), fixed: Sequence[int] = ()
) -> list[int]:
    """Return the number of candidates of every flip of `greedy`."""
    counts = []
    full_now = layers
    remaining = [len(own) for own in candidates_of(layers, starts, fixed)]
    while full_now > max(full, len({*starts, *fixed})):
        for stage, candidates in enumerate(remaining):
            if candidates and full_now > full:
                counts.append(candidates)
                remaining[stage] -= 1
                full_now -= 1
    return counts


def evaluations(
    layers: int, full: int, starts: Sequence[int] = (0,), fixed: Sequence[int] = ()
) -> int:
    """Count the patterns that `greedy` evaluates: all full, and the candidates of every flip."""
    return 1 + sum(rounds(layers, full, starts, fixed))
