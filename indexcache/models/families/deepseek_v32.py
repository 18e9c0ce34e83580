"""DeepSeek-V3.2: the indexer rotates halves, unlike attention; stock transformers cannot share."""

from __future__ import annotations

from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from indexcache.models.family import Family

FAMILY = Family(
    model_type="deepseek_v32",
    native_sharing=False,
    rotate_index=apply_rotary_pos_emb,
    interleaved=False,
    rotate=apply_rotary_pos_emb_interleave,
    rotates_neighbours=True,
)
