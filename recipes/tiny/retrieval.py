"""Write retrieval tasks into training text: copying, key-value recall, recall in two hops.

Real text has few of them, and without them all layers of a tiny model look at the last few tokens.
A task is written into a window of real text, so ordinary text lies between its pieces.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np


class Retrieval:
    """Writes a random task into a window of tokens.

    Args:
        tokenizer: encodes the few words around keys and values.
        vocabulary: number of ids.
        first_id: keys and values have ids from this one on.
    """

    def __init__(self, tokenizer, vocabulary: int, first_id: int = 300):
        def ids(text: str) -> np.ndarray:
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

        self.note = ids("\nNote: ")
        self.equals = ids(" = ")
        self.ask = ids("\nRecall: ")
        self.newline = ids("\n")
        self.vocabulary = vocabulary
        self.first_id = first_id

    def words(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(self.first_id, self.vocabulary, n)

    def __call__(self, window: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a copy of the window, int64 [T + 1], with one task in it."""
        task = rng.choice(3, p=[0.3, 0.5, 0.2])
        return (self.copy, self.recall, self.hops)[task](window.copy(), rng)

    def copy(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for _ in range(rng.integers(1, 5)):
            n = int(rng.integers(min(32, len(x) // 8), min(256, len(x) // 4)))
            source = int(rng.integers(0, len(x) - 2 * n))
            target = int(rng.integers(source + n, len(x) - n + 1))
            x[target : target + n] = x[source : source + n]
        return x

    def write(
        self,
        x: np.ndarray,
        pieces: list[np.ndarray],
        start: int,
        stop: int,
        rng: np.random.Generator,
    ) -> None:
        """Write the pieces in random order to random places of x[start:stop], without overlap."""
        slot = (stop - start) // max(len(pieces), 1)
        for i, j in enumerate(rng.permutation(len(pieces))):
            piece = pieces[j][:slot]
            at = start + i * slot + int(rng.integers(0, slot - len(piece) + 1))
            x[at : at + len(piece)] = piece

    def recall(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count = int(rng.integers(4, 25))
        pairs = [
            (self.words(rng, rng.integers(1, 3)), self.words(rng, rng.integers(1, 4)))
            for _ in range(count)
        ]
        border = int(len(x) * rng.uniform(0.4, 0.7))
        line = [np.concatenate([k, self.equals, v, self.newline]) for k, v in pairs]
        self.write(x, [np.concatenate([self.note, r]) for r in line], 0, border, rng)
        self.write(x, [np.concatenate([self.ask, r]) for r in line], border, len(x), rng)
        return x

    def hops(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        notes, asks = [], []
        for _ in range(int(rng.integers(3, 9))):
            chain = [self.words(rng, 2) for _ in range(3)]
            for a, b in pairwise(chain):
                notes.append(np.concatenate([self.note, a, self.equals, b, self.newline]))
            asks.append(
                np.concatenate(
                    [self.ask, chain[0], self.equals, chain[1], self.equals, chain[2], self.newline]
                )
            )
        border = int(len(x) * rng.uniform(0.5, 0.7))
        self.write(x, notes, 0, border, rng)
        self.write(x, asks, border, len(x), rng)
        return x
