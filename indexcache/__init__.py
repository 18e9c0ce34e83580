"""indexcache: sharing patterns for DeepSeek-Sparse-Attention models - find one, prove it safe, export it.

Importing the package is fast and changes nothing; torch and transformers are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from indexcache.pattern import Pattern

if TYPE_CHECKING:
    from indexcache.evals.evaluate import evaluate_pattern
    from indexcache.evals.overlap import measure_overlap
    from indexcache.exporting import export_pattern
    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.loading import load_model
    from indexcache.models.seam import use_pattern
    from indexcache.searching.run import SearchSettings, search_pattern

__version__ = "0.1.0"
__all__ = [
    "Pattern",
    "SearchSettings",
    "accelerate",
    "evaluate_pattern",
    "export_pattern",
    "load_model",
    "measure_overlap",
    "search_pattern",
    "use_pattern",
]
_HOME = {
    "SearchSettings": "indexcache.searching.run",
    "accelerate": "indexcache.models.fast.accelerate",
    "evaluate_pattern": "indexcache.evals.evaluate",
    "export_pattern": "indexcache.exporting",
    "load_model": "indexcache.models.loading",
    "measure_overlap": "indexcache.evals.overlap",
    "search_pattern": "indexcache.searching.run",
    "use_pattern": "indexcache.models.seam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'indexcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
