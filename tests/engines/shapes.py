"""Real shapes of configs, and the schedules that the engines run, written by hand."""

from __future__ import annotations

from typing import Any

QUARTER = "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS"
"""The published 1/4 pattern of GLM-5 (arXiv:2603.12201v1, appendix B)."""

SHIPPED = "FFF" + "SSSF" * 18 + "SSS"
"""What GLM-5.2 ships: frequency 4 with offset 3."""

DEEPSEEK = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "index_topk": 2048,
}
GLM = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "index_topk": 2048,
}


def types(roles: str) -> list[str]:
    """Return roles as indexer_types holds them."""
    return [{"F": "full", "S": "shared"}[role] for role in roles]


STOPS = "stops"

SHAPES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "DeepSeek-V3.2": (
        DEEPSEEK | {"num_nextn_predict_layers": 1},
        {"transformers": "F" * 61, "vllm": "F" * 61, "sglang": "F" * 61, "tensorrt-llm": "F" * 61},
    ),
    "GLM-5": (
        GLM | {"num_nextn_predict_layers": 1},
        {"transformers": "F" * 78, "vllm": "F" * 78, "sglang": "F" * 78, "atom": "F" * 78},
    ),
    "GLM-5.1 with a pattern": (
        GLM | {"index_topk_pattern": QUARTER, "index_topk_freq": 1},
        {"transformers": QUARTER, "vllm": QUARTER, "sglang": QUARTER, "llama.cpp": "F" * 78},
    ),
    "GLM-5.2": (
        GLM
        | {
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "index_topk_pattern": None,
            "indexer_types": types(SHIPPED),
            "num_nextn_predict_layers": 1,
        },
        dict.fromkeys(
            ("transformers", "vllm", "sglang", "tensorrt-llm", "atom", "llama.cpp"), SHIPPED
        ),
    ),
    "GLM-5.2 with one key replaced": (
        GLM | {"index_topk_pattern": QUARTER, "indexer_types": types(SHIPPED)},
        {
            "transformers": SHIPPED,
            "vllm": QUARTER,
            "sglang": SHIPPED,
            "tensorrt-llm": QUARTER,
            "atom": SHIPPED,
            "llama.cpp": SHIPPED,
        },
    ),
    "GLM-5.3-Flash": (
        {
            "architectures": ["Glm5NextForConditionalGeneration"],
            "model_type": "glm5_next",
            "text_config": {
                "model_type": "glm5_next_text",
                "num_hidden_layers": 45,
                "num_attention_heads": 64,
                "index_topk": 2048,
            },
        },
        dict.fromkeys(("transformers", "vllm", "sglang"), "---F" * 11 + "-"),
    ),
    "Hy4": (
        {
            "architectures": ["HYV4ForCausalLM"],
            "model_type": "hy_v4",
            "num_hidden_layers": 10,
            "num_attention_heads": 64,
            "index_topk": 2048,
            "index_topk_pattern": "FSFSFSFSFS",
        },
        dict.fromkeys(("transformers", "vllm", "sglang"), "FFSSSFSSSF"),
    ),
    "multimodal nesting": (
        {
            "model_type": "some_vl",
            "index_topk_pattern": "F" + "S" * 60,
            "text_config": DEEPSEEK | {"index_topk_freq": 30, "index_skip_topk_offset": 1},
        },
        {
            "transformers": "F" * 61,
            "vllm": ("F" + "S" * 29) * 2 + "F",
            "sglang": ("F" + "S" * 29) * 2 + "F",
            "atom": "FF" + "S" * 29 + "F" + "S" * 29,
        },
    ),
    "lower case": (
        DEEPSEEK | {"index_topk_pattern": "f" + "s" * 60},
        {
            "transformers": "F" * 61,
            "vllm": "F" * 61,
            "sglang": "F" * 61,
            "tensorrt-llm": "F" + "S" * 60,
        },
    ),
    "61 characters on 78 layers": (
        GLM | {"index_topk_pattern": QUARTER[:61]},
        {
            "transformers": STOPS,
            "vllm": QUARTER[:61] + "F" * 17,
            "sglang": QUARTER[:61] + "F" * 17,
            "tensorrt-llm": QUARTER[:61] + "F" * 17,
        },
    ),
    "78 characters on 61 layers": (
        DEEPSEEK | {"index_topk_pattern": QUARTER},
        {"transformers": "F" * 61, "vllm": QUARTER[:61], "sglang": QUARTER[:61]},
    ),
    "multimodal GLM-5.2": (
        {
            "model_type": "some_vl",
            "num_nextn_predict_layers": 1,
            "text_config": GLM
            | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "indexer_types": types(SHIPPED)},
        },
        dict.fromkeys(("transformers", "vllm", "sglang", "tensorrt-llm", "llama.cpp"), SHIPPED),
    ),
    "MTP counted in": (
        DEEPSEEK | {"index_topk_pattern": "FS" * 30 + "F" + "S", "num_nextn_predict_layers": 1},
        {"transformers": "F" * 61, "vllm": "FS" * 30 + "F", "sglang": "FS" * 30 + "F"},
    ),
    "DeepSeek-V4.1": (
        {
            "architectures": ["DeepseekV41ForCausalLM"],
            "model_type": "deepseek_v41",
            "num_hidden_layers": 8,
            "num_attention_heads": 64,
            "compress_ratios": [0, 0, 1, 2, 1, 2, 1, 2, 0],
            "index_source_layer_ids": [2, 5],
            "kv_source_layer_ids": [2, 3],
            "index_topk_pattern": "FFFFFFFF",
        },
        {"vllm": "--FSSFSS", "sglang": "--FSSFSS"},
    ),
    "MiniMax-M3": (
        {
            "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
            "model_type": "minimax_m3_vl",
            "text_config": {
                "num_hidden_layers": 10,
                "num_attention_heads": 64,
                "sparse_attention_config": {"sparse_attention_freq": [0] * 3 + [1] * 7},
                "use_index_cache": True,
                "index_topk_freq": 3,
            },
        },
        {
            "transformers": "---FFFFFFF",
            "vllm (CUDA)": "---FFFFFFF",
            "vllm (ROCm)": "---FSSFSSF",
            "sglang": "---FFFFFFF",
        },
    ),
    "frequency without offset": (
        GLM | {"num_hidden_layers": 10, "index_topk_freq": 4},
        dict.fromkeys(("transformers", "vllm", "sglang", "tensorrt-llm", "atom"), "FFSSSFSSSF"),
    ),
}
"""By name: the config, and what engines run of it; an engine that stops has `STOPS`."""
