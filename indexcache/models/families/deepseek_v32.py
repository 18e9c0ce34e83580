"""DeepSeek-V3.2: the indexer rotates halves, unlike attention; stock transformers cannot share."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from indexcache.models.family import Family, project_with


def project(
    indexer: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return project_with(apply_rotary_pos_emb, indexer, x, q_resid, rope)


FAMILY = Family(
    model_type="deepseek_v32",
    native_sharing=False,
    project=project,
    interleaved=False,
    rotate=apply_rotary_pos_emb_interleave,
    rotates_neighbours=True,
)
