"""indexcache: sharing patterns for models with DeepSeek Sparse Attention.

It finds a pattern, measures what it costs, and exports it. Importing the package is fast and
changes nothing: torch and transformers are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Type checkers and editors see the names that `_HOME` loads lazily.
    # ruff: noqa: F401
    from indexcache.distilling.delta import apply_delta
    from indexcache.distilling.settings import DistillSettings
    from indexcache.distilling.training import distill
    from indexcache.evals.evaluate import evaluate
    from indexcache.evals.overlap import overlap
    from indexcache.exporting import export
    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.fast.cache import FastCache
    from indexcache.models.fast.decode import Decoder
    from indexcache.models.fast.prefill import prefill
    from indexcache.models.loading import load
    from indexcache.models.seam import use_pattern
    from indexcache.pattern import Pattern
    from indexcache.searching.run import search
    from indexcache.searching.settings import SearchSettings

__version__ = "0.1.0"

_HOME = {
    "Decoder": "indexcache.models.fast.decode",
    "DistillSettings": "indexcache.distilling.settings",
    "FastCache": "indexcache.models.fast.cache",
    "Pattern": "indexcache.pattern",
    "SearchSettings": "indexcache.searching.settings",
    "accelerate": "indexcache.models.fast.accelerate",
    "apply_delta": "indexcache.distilling.delta",
    "distill": "indexcache.distilling.training",
    "evaluate": "indexcache.evals.evaluate",
    "export": "indexcache.exporting",
    "load": "indexcache.models.loading",
    "overlap": "indexcache.evals.overlap",
    "prefill": "indexcache.models.fast.prefill",
    "search": "indexcache.searching.run",
    "use_pattern": "indexcache.models.seam",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'indexcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
