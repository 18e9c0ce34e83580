"""A search that measures less: races, a queue of old gains, joint flips, and swaps.

Like `greedy` it flips layers to S until few are full, but it does not measure every candidate on
the whole text in every round:

- racing: candidates meet growing parts of the text; those that are clearly worse leave by a paired
  test, and the race ends when the rest is not expected to matter.
- lazy: only the candidate that promises most is measured again. The others keep their old value,
  and are measured where it is below the new one.
- together: two thirds of the flips that are left to the next budget are made at once, where
  together they lose what they lost alone.
- swaps: at the budgets 1/2, 1/4, .. and at the last one, a full layer and a shared one change
  places where that loses less.

Without all four it is `greedy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from indexcache.pattern import Pattern, full_count
from indexcache.searching.greedy import FrontierPoint, candidates_of
from indexcache.searching.samples import Difference, Parts, Samples
from indexcache.searching.settings import Savings

RELATIVE = 0.1
"""Part of what a flip loses by which another may lose less without being preferred to it."""
SHIFTS, OTHERS = 2, 3  # swaps of neighbours, and other ones, that are tried at a budget, ..
ROUNDS = 4  # so many times at most
FAR = 4.0
"""Beside a change, a flip that lost so many times what the best ones lost is not measured again."""


@dataclass(frozen=True)
class Gain:
    """What a flip loses, as it was measured last.

    Attributes:
        flip: the trunk of that time with the flip.
        base: the trunk of that time.
        part: the part of the text on which it was measured.
        value: the difference of the objective, nats per token.
    """

    flip: Pattern
    base: Pattern
    part: Parts
    value: float


@dataclass
class FastSearch:
    """The state of a search.

    Args:
        samples: measures patterns.
        full: number of full layers at the end.
        starts: the first layers of the pipeline stages, which stay full.
        savings: which savings are on, and how much they may cost.
        noise: how far two evaluations of one pattern lie apart, nats per token.
        fixed: further layers that stay full.
    """

    samples: Samples
    full: int
    starts: Sequence[int]
    savings: Savings
    noise: float = 0.0
    fixed: Sequence[int] = ()
    trunk: Pattern = field(init=False)
    loss: float = field(init=False)
    known: bool = field(init=False, default=True)  # whether the loss is that of the whole text
    gains: dict[int, Gain] = field(init=False, default_factory=dict)  # of full layers
    losses: dict[int, Gain] = field(init=False, default_factory=dict)  # of layers that were flipped
    returns: dict[int, float] = field(init=False, default_factory=dict)
    """By how much the loss changes where a shared layer becomes full again, in nats per token."""
    stale: set[int] = field(init=False, default_factory=set)  # layers beside a change since then

    def __post_init__(self) -> None:
        if self.full < len({*self.starts, *self.fixed}):
            raise ValueError(
                f"{self.full} full layers are too few: the first layer of each of the "
                f"{len(self.starts)} stages stays full."
            )
        layers = self.samples.layers
        self.trunk = self.samples.full
        # Differences below this are not worth telling apart: what may be lost in all, by flip.
        self.slack = max(self.savings.tolerance / max(layers - self.full, 1), self.noise)
        self.parts = self.samples.parts() if self.savings.racing else [self.samples.whole]
        self.small = self.parts[0]  # where joint flips are compared
        if self.savings.racing and (sketch := self.samples.sketch()):
            self.parts = [sketch, *self.parts]
        self.budgets = {full_count(layers, 1 / 2**i) for i in range(1, 10)} | {self.full}

    def run(self) -> Iterator[FrontierPoint]:
        """Yield a point for every number of full layers, from all down to `full`.

        The loss of a point between two that were measured is estimated.
        """
        self.samples.rebase(self.trunk)
        self.loss = self.samples.evaluate(self.trunk).loss
        yield FrontierPoint(self.trunk, self.loss)
        while self.left:
            stages = self.candidates()
            if self.savings.together and (group := self.joint(stages)):
                yield from self.step(group, [i for stage in stages for i in stage])
                continue
            for number in range(len(stages)):
                candidates = self.candidates()[number]
                if candidates and self.left:
                    last = len(self.trunk.full_layers) - 1 in self.budgets
                    yield from self.step([self.race(candidates, renew=last)], candidates)

    def candidates(self) -> list[list[int]]:
        """Return the full layers of every pipeline stage that may be flipped."""
        stages = candidates_of(self.samples.layers, self.starts, self.fixed)
        return [[i for i in stage if self.trunk[i] == "F"] for stage in stages]

    @property
    def left(self) -> int:
        """The number of layers still to flip."""
        return len(self.trunk.full_layers) - self.full

    def flipped(self, layers: Sequence[int]) -> Pattern:
        """Return the trunk with layers flipped to S."""
        pattern = self.trunk
        for layer in layers:
            pattern = pattern.replace(layer, "S")
        return pattern

    def step(self, layers: Sequence[int], candidates: Sequence[int]) -> Iterator[FrontierPoint]:
        """Flip one of the candidates, or several at once, and refine at a budget."""
        before, count = self.loss, len(self.trunk.full_layers)
        others = [self.gains[i].value for i in candidates if i not in layers]
        patterns = [self.flipped(layers[: i + 1]) for i in range(len(layers))]
        part = self.gains[layers[0]].part
        self.losses |= {i: self.gains.pop(i) for i in layers}
        expected = [self.losses[i].value for i in layers]
        self.trunk = patterns[-1]
        self.touch(layers)
        self.samples.rebase(self.trunk)
        self.loss, self.known = before + sum(expected), False
        budget = count - len(layers) in self.budgets
        if part == self.samples.whole or budget:
            self.loss, self.known = self.samples.evaluate(self.trunk).loss, True
        # What a joint flip loses is divided as its parts promised.
        each = [max(e, 1e-12) for e in expected]
        for i, pattern in enumerate(patterns[:-1]):
            loss = before + (self.loss - before) * sum(each[: i + 1]) / sum(each)
            yield FrontierPoint(pattern, loss, layers[i], estimated=True)
        if budget and self.savings.swaps:
            self.refine()
        yield FrontierPoint(
            self.trunk,
            self.loss,
            layers[-1],
            margin=min(others) - expected[-1] if others else None,
            estimated=not self.known,
        )

    def touch(self, layers: Sequence[int]) -> None:
        """Forget what flips beside a change have lost before.

        What a layer loses depends most on the source that it would read and on the layers that it
        serves, so it may have become cheaper, which no old value shows.
        """
        full = self.trunk.full_layers
        for layer in layers:
            before = max((i for i in full if i < layer), default=0)
            after = min((i for i in full if i > layer), default=len(self.trunk) - 1)
            self.stale.update(range(before, after + 1))

    def old(self, layers: Sequence[int], many: int = 1) -> set[int]:
        """Return the layers whose flips have to be measured, whatever they promise.

        Beside a change they are those that lost at most `FAR` times what the best `many` lost.
        """
        if not self.savings.lazy:
            return set(layers)
        lost = sorted(self.gains[i].value for i in layers if i in self.gains)[:many]
        far = FAR * (max(lost, default=0.0) + self.slack)
        return {
            i
            for i in layers
            if i not in self.gains or (i in self.stale and self.gains[i].value <= far)
        }

    def race(self, candidates: Sequence[int], renew: bool = False) -> int:
        """Measure flips on growing parts until one is the best, or near enough to it; return it.

        Where the queue is lazy, the flip that promises most is measured, and another one only where
        what it lost before is less than what this one loses now. `renew` measures all of them on
        the smallest part, because any may have become cheaper.
        """
        gains = self.gains
        alive = set(candidates)
        fresh = set(candidates) if renew else self.old(candidates)
        rate = self.savings.error_rate / max(len(candidates) - 1, 1)
        best = -1
        for part in self.parts:
            while True:
                if not fresh & alive:
                    fresh.add(min(alive, key=self.order))
                runners = sorted(fresh & alive)
                self.measure(runners, part)
                best = min(runners, key=self.order)
                slack = self.near(gains[best].value)
                apart = {i: self.apart(i, best) for i in sorted(alive) if i != best}
                # It promises more beside the best on a part, or against all that is known of it.
                old = [
                    i
                    for i in apart
                    if i not in fresh
                    and min(apart[i].value, gains[i].value - gains[best].value) < -slack
                ]
                if not old:
                    break
                fresh.add(min(old, key=lambda i: (apart[i].value, i)))
            if part == self.parts[0] != self.small:
                apart = pooled(apart)
            # Those leave that are clearly worse, or hardly better where they are better.
            rivals = {i for i, d in apart.items() if d.low(rate) <= 0 and d.missed() > slack}
            alive = {best, *rivals}
            if not rivals:
                break
        return best

    def order(self, layer: int) -> tuple[float, int]:
        """Sort layers by what their flip loses; of equal ones the lowest is first."""
        return (self.gains[layer].value, layer)

    def near(self, lost: float) -> float:
        """Return by how much less another flip may lose than one that loses `lost`."""
        return self.slack + (RELATIVE * max(lost, 0.0) if self.savings.tolerance else 0.0)

    def apart(self, layer: int, best: int) -> Difference:
        """Compare what two flips lose, on the part on which both were measured."""
        own, other = self.gains[layer], self.gains[best]
        part = min(own.part, other.part, key=len)
        return self.samples.difference([own.flip, other.base], [own.base, other.flip], part)

    def joint(self, stages: Sequence[Sequence[int]]) -> list[int]:
        """Return flips that lose together what they lost alone; none where no two of them do.

        Stages take turns, and each as many.

        They are the first two thirds of those that are left to the next budget, by what each of
        them lost when it was measured last, so the flips that matter at the budget are still raced.
        What they lose together is compared on the part on which each was measured alone.
        """
        samples = self.samples
        count = len(self.trunk.full_layers)
        room = min(count - b for b in self.budgets if b < count)
        if room < 2:
            return []
        every = [i for stage in stages for i in stage]
        self.measure(list(self.old(every, room)), self.parts[0])
        each = sum(map(bool, stages))  # Whole turns are flipped.
        # Those that promise most on the sketch are measured on more.
        self.measure([i for i in self.turns(stages)[:room] if not self.known_on(i)], self.small)
        order = self.turns([[i for i in stage if self.known_on(i)] for stage in stages])
        many = min(-(-2 * room // 3), room - 1) // each * each
        while many > 1:
            group = order[:many]
            pattern = self.flipped(group)
            samples.measure([samples.full, self.trunk, pattern], self.small)
            alone = [self.gains[i] for i in group]
            lost = [samples.difference([g.flip], [g.base], self.small).value for g in alone]
            together = samples.difference([pattern], [self.trunk], self.small).value
            if together <= sum(lost) + sum(self.near(x) for x in lost):
                return group
            many = many // 2 // each * each
        return []

    def turns(self, stages: Sequence[Sequence[int]]) -> list[int]:
        """Return layers by what their flips lost, stages in turn."""
        turns = zip_longest(*(sorted(stage, key=self.order) for stage in stages))
        return [i for turn in turns for i in turn if i is not None]

    def known_on(self, layer: int) -> bool:
        """Return whether a flip was measured on the part where joint flips are compared."""
        return layer in self.gains and len(self.gains[layer].part) >= len(self.small)

    def measure(self, layers: Sequence[int], part: Parts) -> None:
        """Measure what single flips lose on a part, and remember it."""
        flips = {i: self.trunk.replace(i, "S") for i in sorted(layers)}
        self.samples.measure([self.samples.full, self.trunk, *flips.values()], part)
        for i, flip in flips.items():
            lost = self.samples.difference([flip], [self.trunk], part).value
            self.gains[i] = Gain(flip, self.trunk, part, lost)
            self.stale.discard(i)

    def refine(self) -> None:
        """Let full and shared layers change places while that loses less on the whole text."""
        for _ in range(ROUNDS):
            swaps = self.swaps()
            if not swaps:
                return
            best = race_swaps(self.samples, self.trunk, swaps, self.parts, self.savings.error_rate)
            if best is None:
                return
            dropped, restored = best
            self.trunk = swaps[best]
            self.samples.rebase(self.trunk)
            self.loss = self.samples.evaluate(self.trunk).loss
            for source, to, layer in (
                (self.losses, self.gains, restored),
                (self.gains, self.losses, dropped),
            ):
                if layer in source:
                    to[layer] = source.pop(layer)
            self.touch(best)

    def swaps(self) -> dict[tuple[int, int], Pattern]:
        """Propose swaps: (layer to flip to S, layer to make full again) and their patterns.

        They are those that promise most: the full layer lost little when it was measured last, and
        the shared one, full again on a small part of the text, gains much. Neighbours, which do
        similar work, come first.
        """
        samples, part = self.samples, self.parts[0]
        staying = {*self.starts, *self.fixed}
        full = [i for i in self.trunk.full_layers if i not in staying]
        self.measure(list(self.old(full, SHIFTS + OTHERS)), part)
        shared = [j for j in range(samples.layers) if self.trunk[j] == "S"]
        new = {
            j: self.trunk.replace(j, "F")
            for j in shared
            if not self.savings.lazy or j in self.stale or j not in self.returns
        }
        samples.measure([samples.full, self.trunk, *new.values()], part)
        self.returns |= {
            j: samples.difference([p], [self.trunk], part).value for j, p in new.items()
        }
        self.stale -= set(shared)
        pairs = [
            (self.gains[i].value + self.returns[j], i, j)
            for i in self.trunk.full_layers
            for j in shared
            if i in self.gains and self.stage(i) == self.stage(j)
        ]
        order = [(i, j) for _, i, j in sorted(pairs)]
        shifts = [p for p in order if abs(p[0] - p[1]) == 1][:SHIFTS]
        others = [p for p in order if abs(p[0] - p[1]) > 1][:OTHERS]
        return {(i, j): self.trunk.replace(j, "F").replace(i, "S") for i, j in (*shifts, *others)}

    def stage(self, layer: int) -> int:
        """Return the first layer of the pipeline stage of a layer."""
        return max(start for start in self.starts if start <= layer)


def pooled(apart: Mapping[int, Difference]) -> dict[int, Difference]:
    """Give differences one error, from all of them, where few sequences tell it of each alone."""
    errors = [d for d in apart.values() if math.isfinite(d.error)]
    if not errors:
        return dict(apart)
    error = math.sqrt(sum(d.error**2 for d in errors) / len(errors))
    freedom = sum(d.freedom for d in errors)
    return {i: replace(d, error=max(error, d.error), freedom=freedom) for i, d in apart.items()}


def race_swaps(
    samples: Samples,
    trunk: Pattern,
    swaps: Mapping[tuple[int, int], Pattern],
    parts: Sequence[Parts],
    error_rate: float,
) -> tuple[int, int] | None:
    """Return the swap that loses least and less than the trunk on all text; None without one.

    On every part those stay that may still lose less than the trunk, at most half of them; after
    the first part, they lost less on it.
    """
    alive = list(swaps)
    for number, part in enumerate(parts):
        samples.measure([samples.full, trunk, *(swaps[s] for s in alive)], part)
        lost = {s: samples.difference([swaps[s]], [trunk], part) for s in alive}
        alive = [s for s in alive if lost[s].low(error_rate / len(swaps)) < 0]
        alive = [s for s in alive if not number or lost[s].value < 0]
        alive = sorted(alive, key=lambda s: (lost[s].value, s))[: -(-len(alive) // 2)]
        if not alive:
            return None
    return alive[0]
