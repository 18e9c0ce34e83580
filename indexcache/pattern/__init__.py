"""A sharing pattern: the role of every decoder layer, as one immutable value.

    F  full      runs its indexer over all past tokens and keeps the top k; it publishes a pool,
                 the top c*k or a share of what a query sees, when R layers follow
    R  re-index  scores only the pool of the nearest F with its own indexer, and keeps the top k
    S  shared    runs no indexer; it reuses the selection of the nearest F or R before it

F and S are those of the paper (section 3). Layer index i is 0-based and means `model.layers.i`;
multi-token-prediction layers are outside the pattern.
"""

from __future__ import annotations

from indexcache.pattern.counts import DEFAULT_SKIP_OFFSET, full_count, stage_starts
from indexcache.pattern.pools import Pool, parse_pool
from indexcache.pattern.reading import MAX_FILE
from indexcache.pattern.value import Pattern

__all__ = [
    "DEFAULT_SKIP_OFFSET",
    "MAX_FILE",
    "Pattern",
    "Pool",
    "full_count",
    "parse_pool",
    "stage_starts",
]
