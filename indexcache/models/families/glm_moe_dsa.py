"""GLM-5, 5.1 and 5.2: the indexer rotates neighbours; stock transformers obeys `indexer_types`."""

from __future__ import annotations

from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import apply_rotary_pos_emb_interleave

from indexcache.models.family import Family

FAMILY = Family(
    model_type="glm_moe_dsa",
    native_sharing=True,
    rotate_index=apply_rotary_pos_emb_interleave,
    interleaved=True,
    rotate=apply_rotary_pos_emb_interleave,
    rotates_neighbours=True,
)
