"""Training-free search: Algorithm 1 of the paper, and its variant for pipeline stages.

`loss` maps a pattern to the language-modelling loss on the calibration batches, the same batches
for every candidate.
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
    """

    pattern: Pattern
    loss: float
    flipped: int | None = None
    tied: tuple[int, ...] = ()
    margin: float | None = None

    @property
    def full(self) -> int:
        """Number of full layers."""
        return len(self.pattern.full_layers)


def greedy(
    loss: Loss, layers: int, full: int, starts: Sequence[int] = (0,), noise: float = 0.0
) -> Iterator[FrontierPoint]:
    """Yield the nested family of patterns from all full down to `full` full layers.

    pattern = F^N;  candidates = {1..N-1};  repeat:
        l* = argmin over l in candidates of loss(pattern with l -> S)
        pattern[l*] = S;  candidates -= {l*}

    Of losses that are equal up to `noise`, nats per token, the lowest layer wins. The noise is 0
    where an evaluation repeats bit for bit.

    `starts` are the first layers of the pipeline stages. The first layer of each stage stays F, and
    each round flips one layer per stage, stage after stage. One stage is Algorithm 1 itself; P
    stages take P times fewer evaluations.

    Raises:
        ValueError: fewer full layers than stages, whose first layers always stay full.
    """
    if full < len(starts):
        raise ValueError(
            f"{full} full layers are too few: the first layer of each of the {len(starts)} stages "
            "stays full."
        )
    pattern = Pattern.full(layers)
    yield FrontierPoint(pattern, loss(pattern))
    ends = [*starts[1:], layers]
    remaining = [list(range(a + 1, b)) for a, b in zip(starts, ends, strict=True)]
    while len(pattern.full_layers) > full:
        for candidates in remaining:
            if not candidates or len(pattern.full_layers) <= full:
                continue
            losses = {layer: loss(pattern.replace(layer, "S")) for layer in candidates}
            smallest = min(losses.values())
            equal = [layer for layer in sorted(candidates) if losses[layer] <= smallest + noise]
            best, *tied = equal
            others = [losses[layer] for layer in candidates if layer != best]
            margin = min(others) - losses[best] if others else None
            pattern = pattern.replace(best, "S")
            candidates.remove(best)
            yield FrontierPoint(pattern, losses[best], best, tuple(tied), margin)


def evaluations(layers: int, full: int, starts: Sequence[int] = (0,)) -> int:
    """Count the patterns that `greedy` evaluates: all full, and the candidates of every flip."""
    count = 1
    full_now = layers
    remaining = [b - a - 1 for a, b in zip(starts, [*starts[1:], layers], strict=True)]
    while full_now > max(full, len(starts)):
        for stage, candidates in enumerate(remaining):
            if candidates and full_now > full:
                count += candidates
                remaining[stage] -= 1
                full_now -= 1
    return count
