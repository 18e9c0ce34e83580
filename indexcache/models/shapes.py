"""Named model shapes with random weights, and the numbers of a shape from which floors follow.

Weights are drawn on the device in their final dtype, tensor by tensor: the 30B shape is 60 GB in bf16 and exists once.
torch and transformers are imported when a model is made, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indexcache.checkpoint import text_section
from indexcache.records import read_json

if TYPE_CHECKING:
    from torch import nn

STD = 0.02  # of the random weights

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

# "glm-4.7-flash-dsa" is the 30B of the paper (arXiv 2603.12201): GLM-4.7-Flash with GLM-5's indexer.
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
    """Sizes of a DSA model. Counts of weights are per layer; norms are left out (they are 0.01 %)."""

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
        """The shape of a model config, a dict or transformers'.

        Raises:
            ValueError: a size is missing or no positive whole number; the queries are not from a latent.
        """
        values = text_section(config.to_dict() if hasattr(config, "to_dict") else dict(config))
        sizes = {field: _size(values, key) for field, key in _KEYS.items()}
        kinds = values.get("mlp_layer_types")
        if isinstance(kinds, list):
            dense = sum(kind == "dense" for kind in kinds[: sizes["layers"]])
        else:
            dense = min(_size(values, "first_k_dense_replace", least=0), sizes["layers"])
        return cls(dense_layers=dense, **sizes)

    @property
    def attention_weights(self) -> int:
        """Projections of one attention: q_a, q_b, kv_a, kv_b and o."""
        queries = self.hidden * self.q_lora + self.q_lora * self.heads * (self.nope + self.rope)
        latents = self.hidden * (self.kv_lora + self.rope) + self.kv_lora * self.heads * (
            self.nope + self.value
        )
        return queries + latents + self.heads * self.value * self.hidden

    @property
    def indexer_weights(self) -> int:
        """Projections of one indexer: wq_b, wk and weights_proj."""
        return self.q_lora * self.index_heads * self.index_dim + self.hidden * (
            self.index_dim + self.index_heads
        )

    @property
    def dense_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def expert_weights(self) -> int:
        """One routed expert."""
        return 3 * self.hidden * self.moe_intermediate

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them: layers, embedding and head."""
        moe = (
            self.experts + self.shared_experts
        ) * self.expert_weights + self.hidden * self.experts
        sparse = self.layers - self.dense_layers
        attention = self.layers * (self.attention_weights + self.indexer_weights)
        return (
            attention
            + self.dense_layers * self.dense_weights
            + sparse * moe
            + 2 * self.head_weights
        )

    def cache_bytes(self, index_layers: int, *, index_dtype: str = "fp8", element: int = 2) -> int:
        """Bytes of cache that one token takes: (kv_lora + rope) * element in every layer, and index_dim (+ 4 for the scale in
        fp8, * element otherwise) in the layers that run an indexer."""
        return self.layers * (self.kv_lora + self.rope) * element + index_layers * self.index_bytes(
            index_dtype, element
        )

    def index_bytes(self, index_dtype: str, element: int = 2) -> int:
        """Bytes of one indexer key."""
        return self.index_dim + 4 if index_dtype == "fp8" else self.index_dim * element


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


def _size(values: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = values.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < (0 if key in ("qk_nope_head_dim", "n_shared_experts") else least)
    ):
        raise ValueError(
            f"The config's {key} is {value!r:.40}; a DSA model needs a whole number of at least {least} there."
        )
    return value


def read_shape(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(name, config) of a named shape, a config.json, or a checkpoint folder.

    Raises:
        ValueError: it is none of them.
    """
    if str(source) in SHAPES:
        return str(source), dict(SHAPES[str(source)])
    path = Path(source)
    if str(source) == "tiny":
        from indexcache.models.loading import resolve

        path = resolve("tiny")
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{source}: is no config.json, no checkpoint folder and no named shape ({', '.join(SHAPES)})."
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return str(source), config


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config of a named shape, cut to its first `layers`.

    Raises:
        ValueError: unknown name, or more layers than the shape has.
    """
    if name not in SHAPES:
        raise ValueError(f"{name}: no such named shape; there are {', '.join(SHAPES)}.")
    config = dict(SHAPES[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise ValueError(
                f"{name} has {config['num_hidden_layers']} layers; {layers} cannot be taken of them."
            )
        config["num_hidden_layers"] = layers
    return config


def shape_of(source: str | Path, layers: int | None = None) -> Shape:
    """The shape of what `read_shape` reads; a named one cut to its first `layers`.

    Raises:
        ValueError: as `read_shape`, `shape_config` and `Shape.of`; `layers` for a checkpoint.
    """
    if str(source) in SHAPES:
        return Shape.of(shape_config(str(source), layers))
    if layers is not None:
        raise ValueError(
            f"Only a named shape can be cut with --layers ({', '.join(SHAPES)}), not {source}."
        )
    return Shape.of(read_shape(source)[1])


def random_model(
    config: Mapping[str, Any], *, dtype: str = "bfloat16", device: str = "cpu", seed: int = 0
) -> nn.Module:
    """A stock transformers model of this config (of a known family) in eval mode, every matrix N(0, 0.02), norms 1, biases 0.

    Raises:
        ValueError: unknown family or dtype, an unusable device, or one with too little memory.
    """
    import torch
    import transformers

    from indexcache.models.family import families
    from indexcache.models.loading import DTYPES

    values = dict(config)
    kind = values.pop("model_type", None)
    if kind not in families():
        raise ValueError(
            f"The model type {kind!r} is not a DSA family that is known here ({', '.join(sorted(families()))})."
        )
    if dtype not in DTYPES:
        raise ValueError(f"The dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    _check_room(Shape.of(config), DTYPES[dtype].itemsize, device)
    made = transformers.AutoConfig.for_model(kind, **values)
    if families()[kind].native_sharing:
        made.indexer_types = ["full"] * made.num_hidden_layers
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(DTYPES[dtype])
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                made, attn_implementation="sdpa", dtype=DTYPES[dtype]
            )
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.layers:
        layer.self_attn.indexer.weights_proj.float()  # as transformers keeps it when it loads a checkpoint
    model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, STD, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in model.buffers():
            buffer.zero_()
    model.model.rotary_emb = type(model.model.rotary_emb)(made).to(
        device
    )  # its frequencies are buffers, lost on the way
    return model.requires_grad_(False).eval()


def _check_room(shape: Shape, element: int, device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from None
    needed = shape.weights * element
    free: int | None
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _free_host()
    if free is not None and needed > free:
        raise ValueError(
            f"The weights of this shape take {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
            "take fewer layers with --layers."
        )


def _free_host() -> int | None:
    """MemAvailable of Linux; None where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(
                1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable:")
            )
    except (OSError, StopIteration, ValueError, IndexError):
        return None
