"""Define the rates of devices, the sizes of models, and the operations that a model needs.

Benchmarks, floors, cost predictions and the trainer's MFU all read their numbers here. This module
imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexcache.checkpoint import resolve
from indexcache.configs import text_section
from indexcache.records import read_json


@dataclass(frozen=True)
class Rates:
    """Rates of a device in operations and bytes a second, where a multiply-add is two operations.

    Attributes:
        name: the device, or where the rates come from.
        fp8: operations a second of an fp8 matrix product.
        bf16: operations a second of a bf16 matrix product.
        hbm: bytes a second between the GPU and its main memory.
        l2: bytes a second out of the L2 cache.
        memory: bytes of main memory; 0 if unknown.
    """

    name: str
    fp8: float
    bf16: float
    hbm: float
    l2: float
    memory: float


@dataclass(frozen=True)
class Device:
    """A GPU: the peak of its data sheet, and the rates that work on it can reach.

    Attributes:
        name: a word of the name that CUDA gives the device.
        peak: bf16 operations a second without sparsity, from the data sheet. MFU is a share of it.
        reachable: rates that matrix products and copies reach; floors divide by them. None if
            not measured.
    """

    name: str
    peak: float
    reachable: Rates | None = None


# Measured on an H100: bf16 products 782 TFLOP/s, copies 3.02 TB/s. An H200 is the same chip with
# faster memory.
DEVICES = {
    "H100": Device("H100", 989e12, Rates("H100", 1450e12, 790e12, 3.02e12, 5.5e12, 80e9)),
    "H200": Device("H200", 989e12, Rates("H200", 1450e12, 790e12, 4.3e12, 5.5e12, 141e9)),
    "B200": Device("B200", 2250e12),
    "A100": Device("A100", 312e12),
}


def peak_of(cuda_name: str) -> float | None:
    """Return the bf16 peak of a device with this CUDA name, in operations a second.

    It is None for a device that `DEVICES` does not hold.
    """
    return next((device.peak for name, device in DEVICES.items() if name in cuda_name), None)


def reachable_of(cuda_name: str) -> Rates | None:
    """Return the reachable rates of a device with this CUDA name.

    They are None for a device that `DEVICES` does not hold, and for the PCIe and NVL cards, which
    have the same names and are slower.
    """
    words = set(cuda_name.split())
    if words & {"PCIe", "NVL"}:
        return None
    return next((device.reachable for name, device in DEVICES.items() if name in words), None)


def rates_named(name: str) -> Rates:
    """Return the reachable rates of a GPU by its short name, in any case.

    Raises:
        ValueError: the rates of that GPU are not known.
    """
    reachable = {key: device.reachable for key, device in DEVICES.items() if device.reachable}
    if name.upper() not in reachable:
        raise ValueError(
            f"The rates of a GPU called {name!r} are not known here; known are "
            f"{', '.join(reachable)}."
        )
    return reachable[name.upper()]


_GLM = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "n_shared_experts": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 202752,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

# "glm-4.7-flash-dsa" is the 30B model of the paper (arXiv 2603.12201): GLM-4.7-Flash with the
# indexer of GLM-5.
SHAPES: dict[str, dict[str, Any]] = {
    "glm-4.7-flash-dsa": _GLM
    | {
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
    },
    "glm-5": _GLM
    | {
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    },
    "deepseek-v3.2": {
        "model_type": "deepseek_v32",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "tiny-random": _GLM
    | {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 8192,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 32,
    },
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a DSA model, and the counts that follow from them.

    `_KEYS` maps each field to its key in a config. Norms, 0.01 % of the weights, are not counted.
    Operations are those of matrix products; a multiply-add is two.
    """

    layers: int
    dense_layers: int
    hidden: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    index_heads: int
    index_dim: int
    topk: int
    intermediate: int
    experts: int
    active_experts: int
    shared_experts: int
    moe_intermediate: int
    vocab: int
    context: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the shape of a model config, a mapping or a config object of transformers.

        Raises:
            ValueError: a size is missing or is no positive whole number, or the queries do not come
                from a latent.
        """
        values = text_section(config.to_dict() if hasattr(config, "to_dict") else dict(config))
        sizes = {field: _size(values, key) for field, key in _KEYS.items()}
        kinds = values.get("mlp_layer_types")
        if isinstance(kinds, list):
            dense = sum(kind == "dense" for kind in kinds[: sizes["layers"]])
        else:
            dense = min(_size(values, "first_k_dense_replace", minimum=0), sizes["layers"])
        return cls(dense_layers=dense, **sizes)

    @property
    def moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return self.layers - self.dense_layers

    @property
    def attention_weights(self) -> int:
        """Weights of one attention's projections: q_a, q_b, kv_a, kv_b and o."""
        queries = self.hidden * self.q_lora + self.q_lora * self.heads * (self.nope + self.rope)
        latents = self.hidden * (self.kv_lora + self.rope)
        heads = self.kv_lora * self.heads * (self.nope + self.value)
        return queries + latents + heads + self.heads * self.value * self.hidden

    @property
    def indexer_weights(self) -> int:
        """Weights of one indexer's projections: wq_b, wk and weights_proj."""
        queries = self.q_lora * self.index_heads * self.index_dim
        return queries + self.hidden * (self.index_dim + self.index_heads)

    @property
    def dense_weights(self) -> int:
        """Weights of one dense MLP."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.moe_intermediate

    @property
    def router_weights(self) -> int:
        """Weights of one router."""
        return self.hidden * self.experts

    @property
    def active_moe_weights(self) -> int:
        """Weights of one MoE layer that a token meets: router, active and shared experts."""
        experts = self.active_experts + self.shared_experts
        return experts * self.expert_weights + self.router_weights

    @property
    def head_weights(self) -> int:
        """Weights of the language model head, as many as the embedding has."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """Weights of all layers, the embedding and the head."""
        experts = self.experts + self.shared_experts
        moe = experts * self.expert_weights + self.router_weights
        return (
            self.layers * (self.attention_weights + self.indexer_weights)
            + self.dense_layers * self.dense_weights
            + self.moe_layers * moe
            + 2 * self.head_weights
        )

    @property
    def backbone_weights(self) -> int:
        """Weights that a token meets in all layers without their indexers, the head left out."""
        return (
            self.layers * self.attention_weights
            + self.dense_layers * self.dense_weights
            + self.moe_layers * self.active_moe_weights
        )

    @property
    def latent_pair_operations(self) -> int:
        """Operations of one layer's attention over latents (absorbed) for a query and a key."""
        return 2 * self.heads * (2 * self.kv_lora + self.rope)

    @property
    def logit_pair_operations(self) -> int:
        """Operations of one layer's attention logits over full keys for a query and a key."""
        return 2 * self.heads * (self.nope + self.rope)

    @property
    def full_pair_operations(self) -> int:
        """Operations of one layer's attention over full keys and values for a query and a key."""
        return self.logit_pair_operations + 2 * self.heads * self.value

    @property
    def index_pair_operations(self) -> int:
        """Operations of one indexer's score for a query and a key."""
        return 2 * self.index_heads * self.index_dim

    @property
    def latent_width(self) -> int:
        """Elements of one token's latent in the cache, the rotary key included."""
        return self.kv_lora + self.rope

    def cache_bytes(self, index_layers: int, *, index_dtype: str = "fp8", element: int = 2) -> int:
        """Return the bytes of cache that one token takes.

        Args:
            index_layers: number of layers that run an indexer and so keep its keys.
            index_dtype: "fp8", or anything else for keys of `element` bytes an element.
            element: bytes of one element of a latent.
        """
        latents = self.layers * self.latent_width * element
        return latents + index_layers * self.index_bytes(index_dtype, element)

    def index_bytes(self, index_dtype: str, element: int = 2) -> int:
        """Return the bytes of one indexer key; an fp8 key has a scale of 4 bytes."""
        return self.index_dim + 4 if index_dtype == "fp8" else self.index_dim * element


def count_pairs(length: int, max_keys: int) -> int:
    """Return the number of pairs of a query and a key.

    It is the sum over t = 1..length of min(t, max_keys). `count_pairs(L, L)` is L (L + 1) / 2, the
    pairs of causal attention over L tokens.
    """
    short = min(length, max_keys)
    return short * (short + 1) // 2 + (length - short) * max_keys


_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "index_heads": "index_n_heads",
    "index_dim": "index_head_dim",
    "topk": "index_topk",
    "intermediate": "intermediate_size",
    "experts": "n_routed_experts",
    "active_experts": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "moe_intermediate": "moe_intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}


def _size(values: Mapping[str, Any], key: str, minimum: int = 1) -> int:
    value = values.get(key)
    if key in ("qk_nope_head_dim", "n_shared_experts"):
        minimum = 0
    if not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"The config's {key} is {value!r:.40}; a DSA model needs a whole number of at least "
            f"{minimum} there."
        )
    return value


def read_shape(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Return (name, config) of a named shape, a config.json, a checkpoint folder or `tiny`.

    Raises:
        ValueError: the source is none of them.
    """
    if str(source) in SHAPES:
        return str(source), dict(SHAPES[str(source)])
    path = resolve("tiny") if str(source) == "tiny" else Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{source}: is no config.json, no checkpoint folder and no named shape "
            f"({', '.join(SHAPES)})."
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return str(source), config


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """Return the config of a named shape, cut to its first `layers` layers unless that is None.

    Raises:
        ValueError: the name is unknown, or the shape has fewer layers.
    """
    if name not in SHAPES:
        raise ValueError(f"{name}: no such named shape; there are {', '.join(SHAPES)}.")
    config = dict(SHAPES[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise ValueError(
                f"{name} has {config['num_hidden_layers']} layers; {layers} cannot be taken of "
                "them."
            )
        config["num_hidden_layers"] = layers
    return config


def shape_of(source: str | Path, layers: int | None = None) -> Shape:
    """Return the shape of a source as in `read_shape`; a named one can be cut to `layers` layers.

    Raises:
        ValueError: as `read_shape`, `shape_config` and `Shape.of`, or `layers` for a checkpoint.
    """
    if str(source) in SHAPES:
        return Shape.of(shape_config(str(source), layers))
    if layers is not None:
        raise ValueError(
            f"Only a named shape can be cut with --layers ({', '.join(SHAPES)}), not {source}."
        )
    return Shape.of(read_shape(source)[1])
