"""Everything that needs triton, behind one import: what the dispatch in ops/__init__.py calls."""

from __future__ import annotations

from indexcache.ops.groups_host import group_queries
from indexcache.ops.index.host import index_topk
from indexcache.ops.index.host import refuse as refuse_index
from indexcache.ops.index.scores_host import pool_group
from indexcache.ops.index_kl_host import refuse as refuse_warm_up
from indexcache.ops.index_kl_host import warm_up
from indexcache.ops.mla.host import refuse as refuse_mla
from indexcache.ops.mla.host import sparse_mla
from indexcache.ops.quantize_host import quantize
from indexcache.ops.quantize_host import refuse as refuse_quantize

__all__ = [
    "group_queries",
    "index_topk",
    "pool_group",
    "quantize",
    "refuse_index",
    "refuse_mla",
    "refuse_quantize",
    "refuse_warm_up",
    "sparse_mla",
    "warm_up",
]
