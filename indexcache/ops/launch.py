"""Everything that needs triton, behind one import: what the dispatch in ops/__init__.py calls."""

from __future__ import annotations

from indexcache.ops.launch_distill import refuse as refuse_warm_up
from indexcache.ops.launch_distill import warm_up
from indexcache.ops.launch_index import index_topk
from indexcache.ops.launch_index import refuse as refuse_index
from indexcache.ops.launch_mla import refuse as refuse_mla
from indexcache.ops.launch_mla import sparse_mla
from indexcache.ops.launch_plan import group_queries
from indexcache.ops.launch_quantize import quantize
from indexcache.ops.launch_quantize import refuse as refuse_quantize
from indexcache.ops.launch_scores import pool_group

__all__ = [
    "group_queries", "index_topk", "pool_group", "quantize", "refuse_index", "refuse_mla", "refuse_quantize", "refuse_warm_up",
    "sparse_mla", "warm_up",
]  # fmt: skip
