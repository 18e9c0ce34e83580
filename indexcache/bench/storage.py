"""How many bytes the weights of each part of a model take, quantised or not.

A floor divides these bytes by the rate of the memory, and the operations by the rate of the
products, which is that of fp8 where both weights and activations have 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from indexcache.configs import Quantization
from indexcache.shapes import Rates, Shape

PLAIN_BYTES = 2.0  # bytes per bf16 weight


@dataclass(frozen=True)
class Part:
    """The weights of one part of a model, as means over its layers.

    Attributes:
        bytes: bytes of a weight, scales included.
        fast: share of the weights whose products run in fp8.
    """

    bytes: float = PLAIN_BYTES
    fast: float = 0.0

    def seconds(self, weights: float, tokens: float, rates: Rates) -> float:
        """Return the seconds of a product of `tokens` rows with a matrix of so many weights."""
        return max(self.products(weights, tokens, rates), self.bytes * weights / rates.hbm)

    def products(self, weights: float, tokens: float, rates: Rates) -> float:
        """Return the seconds of the operations alone."""
        rate = (1 - self.fast) / rates.bf16 + self.fast / rates.fp8  # seconds of an operation
        return 2 * weights * tokens * rate


@dataclass(frozen=True)
class Storage:
    """How the weights of a model are stored, part by part; the default is bf16 everywhere.

    Attributes:
        quantization: what the config says, None for bf16.
    """

    attention: Part = Part()
    indexer: Part = Part()
    dense: Part = Part()
    experts: Part = Part()
    shared: Part = Part()
    router: Part = Part()
    embedding: Part = Part()
    head: Part = Part()
    quantization: Quantization | None = None

    @classmethod
    def of(cls, shape: Shape, quantization: Quantization | None) -> Storage:
        """Count the bytes of every part of a model of this shape.

        All layers are looked at, because a config may exclude some. The first expert of a layer
        stands for all of them.

        Raises:
            ValueError: the config does not say how many bits a weight has.
        """
        if quantization is None:
            return cls()
        layers = range(shape.layers)
        dense = range(shape.dense_layers)
        sparse = range(shape.dense_layers, shape.layers)

        def part(indices: range, matrices: dict[str, tuple[int, int]]) -> Part:
            return _part(quantization, indices, matrices)

        mlp = _mlp(shape.intermediate, shape.hidden)
        expert = _mlp(shape.moe_intermediate, shape.hidden)
        vocabulary = (shape.vocab, shape.hidden)
        return cls(
            attention=part(layers, _attention(shape)),
            indexer=part(layers, _indexer(shape)),
            dense=part(dense, {f"mlp.{name}": size for name, size in mlp.items()}),
            experts=part(sparse, {f"mlp.experts.0.{n}": size for n, size in expert.items()}),
            shared=part(sparse, {f"mlp.shared_experts.{n}": s for n, s in expert.items()}),
            router=part(sparse, {"mlp.gate": (shape.experts, shape.hidden)}),
            embedding=_part(quantization, range(1), {"model.embed_tokens": vocabulary}, ""),
            head=_part(quantization, range(1), {"lm_head": vocabulary}, ""),
            quantization=quantization,
        )

    def weight_bytes(self, shape: Shape) -> float:
        """Return the bytes of all weights, without the layers of multi-token prediction."""
        moe = (
            shape.experts * shape.expert_weights * self.experts.bytes
            + shape.shared_experts * shape.expert_weights * self.shared.bytes
            + shape.router_weights * self.router.bytes
        )
        return (
            shape.layers * shape.attention_weights * self.attention.bytes
            + shape.layers * shape.indexer_weights * self.indexer.bytes
            + shape.dense_layers * shape.dense_weights * self.dense.bytes
            + shape.moe_layers * moe
            + shape.head_weights * (self.embedding.bytes + self.head.bytes)
        )

    @property
    def name(self) -> str:
        """The format in a word, e.g. bf16, or 4-bit awq."""
        q = self.quantization
        if q is None:
            return "bf16"
        return q.method if q.method.startswith("fp8") else f"{q.bits:g}-bit {q.method}"

    def assumed(self, index_dtype: str) -> str:
        """Say in a sentence what was taken for granted about dtypes."""
        rest = f"latents are bf16, the indexers' keys {index_dtype}"
        if self.quantization is None:
            return f"no quantization_config, so weights count as bf16; {rest}"
        rate = "fp8" if any(p.fast for p in (self.attention, self.experts, self.dense)) else "bf16"
        return (
            f"{self.quantization}; embedding, head, router, weights_proj and what the config "
            f"excludes are bf16; products run at the {rate} rate; {rest}"
        )


BF16 = Storage()


def _part(
    quantization: Quantization,
    layers: range,
    matrices: dict[str, tuple[int, int]],
    prefix: str = "model.layers.{}.",
) -> Part:
    """Return the mean of the matrices of one part, by their names, over some layers."""
    total = covered = size = 0.0
    for layer in layers:
        for name, (rows, columns) in matrices.items():
            weights = rows * columns
            total += weights
            if quantization.covers(prefix.format(layer) + name):
                covered += weights
                size += quantization.bytes_of(rows, columns)
            else:
                size += PLAIN_BYTES * weights
    if not total:
        return Part()
    eight = quantization.bits == 8 and quantization.activations == 8 and quantization.floating
    return Part(size / total, covered / total if eight else 0.0)


def _attention(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the projections of attention."""
    s = shape
    sizes = {
        "q_a_proj": (s.q_lora, s.hidden),
        "q_b_proj": (s.heads * (s.nope + s.rope), s.q_lora),
        "kv_a_proj_with_mqa": (s.kv_lora + s.rope, s.hidden),
        "kv_b_proj": (s.heads * (s.nope + s.value), s.kv_lora),
        "o_proj": (s.hidden, s.heads * s.value),
    }
    return {f"self_attn.{name}": size for name, size in sizes.items()}


def _indexer(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the projections of an indexer."""
    s = shape
    sizes = {
        "wq_b": (s.index_heads * s.index_dim, s.q_lora),
        "wk": (s.index_dim, s.hidden),
        "weights_proj": (s.index_heads, s.hidden),
    }
    return {f"self_attn.indexer.{name}": size for name, size in sizes.items()}


def _mlp(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the projections of an MLP or an expert."""
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
