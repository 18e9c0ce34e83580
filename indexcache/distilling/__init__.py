"""Training-aware sharing: indexers learn the attention of every layer they serve."""

from indexcache.distilling.delta import apply_delta
from indexcache.distilling.loss import attention_kept, distill_loss
from indexcache.distilling.oracle import measure_kept, oracle_states
from indexcache.distilling.rows import Row, pack_rows
from indexcache.distilling.settings import DistillSettings
from indexcache.distilling.trainer import DistillResult, distill

__all__ = [
    "DistillResult",
    "DistillSettings",
    "Row",
    "apply_delta",
    "attention_kept",
    "distill",
    "distill_loss",
    "measure_kept",
    "oracle_states",
    "pack_rows",
]
