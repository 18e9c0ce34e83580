"""A search among F, R and S: the move that loses least for the cost that it saves, again and again.

Moves are F to R, F to S and R to S. As in the fast search, what a move loses is measured on a small
part of the text first, and on the whole text when it is about to be made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from indexcache.pattern import Pattern
from indexcache.searching.costs import RoleCosts
from indexcache.searching.fast import RELATIVE
from indexcache.searching.greedy import FrontierPoint
from indexcache.searching.samples import Samples
from indexcache.searching.settings import Savings

Move = tuple[int, str]  # a layer, and its new role
LATER = {"F": "RS", "R": "S", "S": ""}


@dataclass
class MixedSearch:
    """The state of a search among three roles.

    Args:
        samples: measures patterns.
        costs: the cost of a pattern.
        pool: the size of the pools of R layers.
        fixed: layers that stay full: the first one of every pipeline stage, and others.
        savings: whether moves are measured on parts of the text, and lazily.
        cost: the search ends where a pattern costs no more than this share of all full, ..
        most_loss: .. or loses more than this, nats per token above all full; None for no limit.
    """

    samples: Samples
    costs: RoleCosts
    pool: int | Fraction
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
            pattern = moves[move]
            self.forget(move)
            self.trunk = pattern
            self.samples.rebase(pattern)
            loss = self.samples.evaluate(pattern).loss
            if self.most_loss is not None and loss - first > self.most_loss:
                return
            yield FrontierPoint(pattern, loss, move[0], cost=self.costs.of(pattern))

    def moves(self) -> dict[Move, Pattern]:
        """Return the moves that save something, and their patterns."""
        now = self.costs.of(self.trunk)
        result = {}
        for layer, role in enumerate(self.trunk.roles):
            for new in LATER[role] if layer not in self.fixed else "":
                roles = self.trunk.roles[:layer] + new + self.trunk.roles[layer + 1 :]
                pattern = Pattern(roles, self.pool if "R" in roles else None)
                if self.costs.of(pattern) < now:
                    result[layer, new] = pattern
        return result

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

    def forget(self, move: Move) -> None:
        """Keep what the layer's other move loses beyond the one that is made."""
        layer, role = move
        made = self.lost.pop(move)
        if role == "R" and (layer, "S") in self.lost:
            self.lost[layer, "S"] -= made
        elif role == "S":
            self.lost.pop((layer, "R"), None)
