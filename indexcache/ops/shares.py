"""Count the ids of pools that are a share of what each query sees."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor


def pool_width(pool: int | Fraction, total: int, topk: int) -> int:
    """Return the number of ids in the largest pool among `total` keys.

    Args:
        pool: that number, or the pool's share of what a query sees, which is at least k ids.
    """
    if isinstance(pool, int):
        return pool
    return min(max(-(-total * pool.numerator // pool.denominator), topk), total)


def pool_sizes(share: Fraction, seen: Tensor, topk: int) -> Tensor:
    """Return how many ids the pool of each query holds: its share, rounded up, at least k.

    Args:
        seen: the number of keys that each query sees, int64 of any shape.
    """
    return (-(-seen * share.numerator // share.denominator)).clamp(min=topk)
