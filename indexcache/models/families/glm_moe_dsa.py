"""GLM-5, 5.1 and 5.2: the indexer rotates neighbours; stock transformers obeys `indexer_types`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import apply_rotary_pos_emb_interleave

from indexcache.models.family import Family, project_with


def project(
    indexer: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return project_with(apply_rotary_pos_emb_interleave, indexer, x, q_resid, rope)


FAMILY = Family(
    model_type="glm_moe_dsa",
    native_sharing=True,
    project=project,
    interleaved=True,
    rotate=apply_rotary_pos_emb_interleave,
    rotates_neighbours=True,
)
