"""A search among F, R and S: the move that loses least for the cost that it saves, again and again.

Moves are F to R, F to S, R to S, and where pools of several sizes are allowed the pool of a group
to a smaller one. As in the fast search, what a move loses is measured on a small part of the text
first, and on the whole text when it is about to be made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from indexcache.pattern import Pattern
from indexcache.searching.costs import RoleCosts
from indexcache.searching.fast import OTHERS, RELATIVE, ROUNDS, SHIFTS, race_swaps
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.samples import Parts, Samples
from indexcache.searching.settings import Savings

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # costs at which roles are swapped
Move = tuple[int, str]
"""A layer and its new role; behind an @ the pool of its group where the move decides that."""


@dataclass
class MixedSearch:
    """The state of a search among three roles.

    Args:
        samples: measures patterns.
        costs: the cost of a pattern.
        sizes: the sizes that pools may have, the largest first.
        fixed: layers that stay full: the first one of every pipeline stage, and others.
        savings: whether moves are measured on parts of the text, and lazily.
        cost: the search ends where a pattern costs no more than this share of all full, ..
        most_loss: .. or loses more than this, nats per token above all full; None for no limit.
    """

    samples: Samples
    costs: RoleCosts
    sizes: Sequence[int | Fraction]
    fixed: frozenset[int]
    savings: Savings
    cost: float
    most_loss: float | None = None
    trunk: Pattern = field(init=False)
    lost: dict[Move, float] = field(init=False, default_factory=dict)

    def run(self) -> Iterator[FrontierPoint]:
        """Yield a point after every move, and all full before them."""
        self.trunk = self.samples.full
        self.samples.rebase(self.trunk)
        first = loss = self.samples.evaluate(self.trunk).loss
        yield FrontierPoint(self.trunk, loss, cost=self.costs.of(self.trunk))
        while self.costs.of(self.trunk) > self.cost and (moves := self.moves()):
            move = self.choose(moves)
            before, self.trunk = self.costs.of(self.trunk), moves[move]
            self.forget(move)
            self.samples.rebase(self.trunk)
            after = self.costs.of(self.trunk)
            if self.savings.swaps and any(before > b >= after for b in (*BUDGETS, self.cost)):
                self.refine()
            loss = self.samples.evaluate(self.trunk).loss
            if self.most_loss is not None and loss - first > self.most_loss:
                return
            yield FrontierPoint(self.trunk, loss, move[0], cost=self.costs.of(self.trunk))

    def moves(self) -> dict[Move, Pattern]:
        """Return the moves that save something, and their patterns."""
        now = self.costs.of(self.trunk)
        result = {}
        for layer, role in enumerate(self.trunk.roles):
            for name, pattern in self.changed(layer, role):
                if self.costs.of(pattern) < now:
                    result[layer, name] = pattern
        return result

    def changed(self, layer: int, role: str) -> Iterator[tuple[str, Pattern]]:
        """Yield the names of the moves of a layer, and the patterns after them."""
        pools = self.trunk.pools()
        for size in self.sizes if layer in pools else ():
            if size < pools[layer]:
                yield f"F@{size}", with_pools(self.trunk.roles, pools | {layer: size})
        if layer in self.fixed or role == "S":
            return
        yield "S", self.trunk.replace(layer, "S")
        if role == "R":
            return
        roles = f"{self.trunk.roles[:layer]}R{self.trunk.roles[layer + 1 :]}"
        source = max(i for i in self.trunk.full_layers if i < layer)
        if source in pools:
            yield "R", with_pools(roles, pools)
            return
        for size in self.sizes:
            name = "R" if len(self.sizes) == 1 else f"R@{size}"
            yield name, with_pools(roles, {**pools, source: size})

    def choose(self, moves: dict[Move, Pattern]) -> Move:
        """Return the move that loses least for what it saves."""
        now, samples = self.costs.of(self.trunk), self.samples
        saved = {m: now - self.costs.of(p) for m, p in moves.items()}

        def price(move: Move) -> tuple[float, float, Move]:
            return (max(self.lost[move], 0.0) / saved[move], -saved[move], move)

        part = samples.parts()[0] if self.savings.racing and self.savings.lazy else samples.whole
        new = [m for m in moves if m not in self.lost or not self.savings.lazy]
        samples.measure([samples.full, self.trunk, *(moves[m] for m in new)], part)
        for m in new:
            self.lost[m] = samples.difference([moves[m]], [self.trunk], part).value
        fresh = set() if part != samples.whole or self.savings.lazy else set(moves)
        while True:
            best = min(moves, key=price)
            others = [price(m)[0] for m in moves if m not in fresh and m != best]
            near = (1 + RELATIVE * bool(self.savings.tolerance)) * min(others, default=math.inf)
            if best in fresh or not others:
                break
            samples.measure([samples.full, self.trunk, moves[best]], samples.whole)
            self.lost[best] = samples.difference([moves[best]], [self.trunk], samples.whole).value
            fresh.add(best)
            if price(best)[0] <= near:
                break
        return best

    def refine(self) -> None:
        """Let a full layer and another one change roles while that loses less on all text."""
        samples = self.samples
        parts = samples.parts() if self.savings.racing else [samples.whole]
        for _ in range(ROUNDS):
            swaps = self.swaps(parts[0])
            best = race_swaps(samples, self.trunk, swaps, parts, self.savings.error_rate)
            if best is None:
                return
            self.trunk = swaps[best]
            samples.rebase(self.trunk)
            self.lost = {m: lost for m, lost in self.lost.items() if m[0] not in best}

    def swaps(self, part: Parts) -> dict[tuple[int, int], Pattern]:
        """Propose the swaps that promise most and cost no more, by (full layer, other layer)."""
        trunk, samples = self.trunk, self.samples
        free = [i for i in range(len(trunk)) if i not in self.fixed]
        single = {i: trunk.replace(i, "S" if trunk[i] == "F" else "F") for i in free}
        samples.measure([samples.full, trunk, *single.values()], part)
        change = {i: samples.difference([p], [trunk], part).value for i, p in single.items()}
        found = {
            (i, j): trunk.replace(j, "F").replace(i, trunk[j])
            for i in free
            for j in free
            if trunk[i] == "F" != trunk[j]
        }
        most = self.costs.of(trunk) + 1e-9
        some = [swap for swap, p in found.items() if self.costs.of(p) <= most]
        some.sort(key=lambda swap: (change[swap[0]] + change[swap[1]], swap))
        return {swap: found[swap] for swap in some[: SHIFTS + OTHERS]}

    def forget(self, move: Move) -> None:
        """Keep what the layer's other moves lose beyond the one that is made."""
        layer, role = move
        made = self.lost.pop(move)
        if role[0] == "R" and (layer, "S") in self.lost:
            self.lost[layer, "S"] -= made
        if role[0] != "F":
            for other in [m for m in self.lost if m[0] == layer and m[1] != "S" and m != move]:
                del self.lost[other]


def with_pools(roles: str, pools: Mapping[int, int | Fraction]) -> Pattern:
    """Return the pattern with these roles, whose full layers publish these pools if any is read."""
    if "R" not in roles:
        return Pattern(roles)
    own = [pools[i] for i in sorted(Pattern(roles).publishers())]
    if len(set(own)) == 1:
        return Pattern(roles, own[0])
    return Pattern(roles, tuple(size for size in own if isinstance(size, Fraction)))
