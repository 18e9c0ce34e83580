"""The small Llama that the tests of the SmolLM2 recipe rewrite."""

from __future__ import annotations

LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DIGEST = "of the file"
