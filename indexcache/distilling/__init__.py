"""Training-aware sharing: indexers that learn the attention of every layer they serve (method: multi-layer distillation)."""

from indexcache.distilling.delta import apply_delta
from indexcache.distilling.kept import measure_kept
from indexcache.distilling.loss import attention_kept, distill_loss
from indexcache.distilling.oracle import oracle_states
from indexcache.distilling.rows import Row, pack_rows
from indexcache.distilling.settings import DistillSettings
from indexcache.distilling.trainer import distill_pattern

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
