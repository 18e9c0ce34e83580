"""Training-aware sharing: indexers learn the attention of every layer they serve.

Names are imported when they are first used, so that reading the settings does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Type checkers and editors see the names that `_HOME` loads lazily.
    # ruff: noqa: F401
    from indexcache.distilling.delta import apply_delta
    from indexcache.distilling.loss import attention_kept, distill_loss
    from indexcache.distilling.oracle import measure_kept, oracle_states
    from indexcache.distilling.result import DistillResult
    from indexcache.distilling.rows import Row, pack_rows
    from indexcache.distilling.run import distill_checkpoint
    from indexcache.distilling.settings import DistillSettings
    from indexcache.distilling.training import distill

_HOME = {
    "DistillResult": "result",
    "DistillSettings": "settings",
    "Row": "rows",
    "apply_delta": "delta",
    "attention_kept": "loss",
    "distill": "training",
    "distill_checkpoint": "run",
    "distill_loss": "loss",
    "measure_kept": "oracle",
    "oracle_states": "oracle",
    "pack_rows": "rows",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'indexcache.distilling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"indexcache.distilling.{_HOME[name]}"), name)
