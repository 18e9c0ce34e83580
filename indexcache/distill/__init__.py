"""Training-aware sharing: indexers that learn the attention of every layer they serve (method: multi-layer distillation)."""

from indexcache.distill.delta import apply_delta
from indexcache.distill.kept import measure_kept
from indexcache.distill.loss import attention_kept, distill_loss
from indexcache.distill.oracle import oracle_states
from indexcache.distill.rows import Row, pack_rows
from indexcache.distill.settings import DistillSettings
from indexcache.distill.trainer import distill_pattern

__all__ = [
    "DistillSettings",
    "Row",
    "apply_delta",
    "attention_kept",
    "distill_loss",
    "distill_pattern",
    "measure_kept",
    "oracle_states",
    "pack_rows",
]
