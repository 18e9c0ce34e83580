"""Read the sizes of the pools that full layers publish for R layers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from indexcache.pattern.counts import positive

DEFAULT_POOL_FACTOR = 8
MAX_POOL_FACTOR = 999_999
Pool = int | Fraction | tuple[Fraction, ...]
"""The size of pools: a factor of k, a share of what a query sees, or the share of each pool."""


def split_pool(roles: str, pool_factor: Any) -> tuple[str, Pool | None]:
    """Cut a string of roles at its @, and check the pool, which may be an argument instead."""
    roles, mark, text = roles.partition("@")
    if mark:
        if pool_factor is not None:
            raise ValueError("The pool factor was given twice: behind the @ and as an argument.")
        pool_factor = parse_pool(text)
    if isinstance(pool_factor, (Fraction, tuple)):
        for share in pool_factor if isinstance(pool_factor, tuple) else (pool_factor,):
            if not isinstance(share, Fraction) or not 0 < share < 1:
                raise ValueError(
                    f"A pool that is a share of the context is above 0 and below 1, not {share!s}."
                )
    elif pool_factor is not None:
        positive("The pool factor of a pattern", pool_factor)
        if pool_factor > MAX_POOL_FACTOR:
            raise ValueError(
                f"The pool factor of a pattern is at most {MAX_POOL_FACTOR}, not {pool_factor}."
            )
    return roles, pool_factor


def parse_pool(text: str) -> Pool | str:
    """Read the size of a pool: 8 is a factor of k, 1/8 a share; anything else stays a text.

    Several shares, as in 1/8,1/16, become a tuple.
    """
    if "," in text:
        sizes = [parse_pool(part) for part in text.split(",")]
        shares = tuple(size for size in sizes if isinstance(size, Fraction))
        return shares if len(shares) == len(sizes) else text
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if re.fullmatch("[0-9]{1,9}/0*[1-9][0-9]{0,8}", text):
        return Fraction(text)
    return text
