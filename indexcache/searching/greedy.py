"""Training-free search: Algorithm 1 of the paper, and its variant for pipeline stages. Nothing else is in here.

`loss` maps a pattern to the language-modelling loss on the calibration batches, the same for every candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from indexcache.pattern import Pattern

Loss = Callable[[Pattern], float]


@dataclass(frozen=True)
class Step:
    """One point of the frontier: the pattern after a flip, its loss, and the layer that was flipped (None: all full)."""

    pattern: Pattern
    loss: float
    flipped: int | None

    @property
    def full(self) -> int:
        return len(self.pattern.full_layers)


def greedy(loss: Loss, layers: int, full: int) -> Iterator[Step]:
    """Yield the nested family of patterns from all full down to `full` full layers.

    c = F^N;  R = {1..N-1};  repeat:  l* = argmin over l in R of loss(c with l -> S);  c[l*] = S;  R -= {l*}.
    Equal losses go to the lower layer.
    """
    yield from greedy_stages(loss, layers, full, starts=(0,))


def greedy_stages(loss: Loss, layers: int, full: int, starts: Sequence[int]) -> Iterator[Step]:
    """The same with the layers cut into pipeline stages: the first layer of each stage stays F, and each round flips
    one layer per stage, stage after stage. One stage is Algorithm 1 itself; P stages take P times fewer evaluations.

    Raises:
        ValueError: fewer full layers than stages, whose first layers always stay full.
    """
    if full < len(starts):
        raise ValueError(
            f"{full} full layers are too few: the first layer of each of the {len(starts)} stages stays full."
        )
    c = Pattern.full(layers)
    yield Step(c, loss(c), None)
    ends = [*starts[1:], layers]
    remaining = [list(range(a + 1, b)) for a, b in zip(starts, ends, strict=True)]
    while len(c.full_layers) > full:
        for candidates in remaining:
            if not candidates or len(c.full_layers) <= full:
                continue
            losses = {layer: loss(c.replace(layer, "S")) for layer in candidates}
            best = min(candidates, key=lambda layer: (losses[layer], layer))
            c = c.replace(best, "S")
            candidates.remove(best)
            yield Step(c, losses[best], best)


def evaluations(layers: int, full: int, starts: Sequence[int] = (0,)) -> int:
    """How many distinct patterns the search will evaluate."""
    count = iter(range(1 << 30))
    seen: set[str] = set()

    def loss(pattern: Pattern) -> float:
        seen.add(str(pattern))
        return float(next(count))

    for _ in greedy_stages(loss, layers, full, starts):
        pass
    return len(seen)
