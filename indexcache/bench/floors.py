"""Compute floors: the shortest time that each part of a forward pass can take.

They follow from the sizes of the model and the rates of the device.

The floor of a part is max(operations / rate of matrix products, bytes that must cross HBM / its
rate). Launches, synchronisation and gathers from L2 are not counted.

Symbols: L tokens of a prompt, n tokens in the cache, B sequences, k = index_topk, c the pool
factor, H x D the index heads, h the attention heads, e = kv_lora + rope, E the hidden size, w = 2
bytes of a bf16 weight. `shapes.count_pairs(L, m)` is the sum over t = 1..L of min(t, m).
"""

from __future__ import annotations

from indexcache.bench.storage import BF16, Storage
from indexcache.pattern import Pattern
from indexcache.shapes import Rates, Shape, count_pairs

# The parts that `indexcache.models.timing` times. "indexer" is its projections, "index_topk"
# scores and selection, "plan" the grouping of neighbouring queries, "linears" the projections of
# attention, "mlp" MLPs and experts. "plan" has no floor, because no result depends on it.
PARTS = ("indexer", "index_topk", "plan", "attention", "linears", "mlp", "head", "rest")
INDEX_PARTS = ("indexer", "index_topk")
ELEMENT = 2  # bytes of a latent's element and of an activation


def prefill_floor(
    shape: Shape,
    length: int,
    pattern: Pattern,
    rates: Rates,
    *,
    batch: int = 1,
    index_dtype: str = "fp8",
    storage: Storage = BF16,
) -> dict[str, float]:
    """Compute the floor of each part in milliseconds, for B prompts of L tokens.

    - indexer, per F and R layer: 2 L W operations in bf16, W = weights of wq_b, wk, weights_proj.
    - index_topk, per F layer: 2 H D (pairs(L, L) - pairs(k, k)) operations in the indexer's dtype,
      because rows with at most k keys need no scores. An R layer scores pairs(L, c k) instead. Or 4
      bytes for each id: k per token, and c k more where a pool is written or read.
    - attention, per layer: 2 h (e + kv_lora) pairs(L, k) operations in bf16.
    - linears, per layer: 2 L W operations, W = q_a, q_b, kv_a, kv_b, o (kv_b costs the same
      absorbed).
    - mlp: 2 L times the weights that a token meets, or all of them read once.
    - head: its weights read once, for the logits of the last token.
    - rest: 16 E bytes a token and layer, for two fused passes of residual add and norm that read
      two rows and write two.

    Args:
        pattern: one role per layer of the shape.
        rates: the rates of the device.
        batch: B.
        index_dtype: "fp8", or anything else for bf16.
        storage: bytes of the weights of each part, W in bf16 by default; where weights and
            activations have 8 bits, the operations of that part take the rate of fp8.
    """
    k = shape.topk
    tokens = length * batch
    seconds = dict.fromkeys(PARTS, 0.0)
    publishers = pattern.check(share=False).publishers()
    unscored = count_pairs(min(length, k), k)
    for layer, role in enumerate(pattern.roles):
        if role == "S":
            continue
        pool = (pattern.pool_factor or 0) * k
        pairs = (count_pairs(length, length if role == "F" else pool) - unscored) * batch
        ids = tokens * (k + (pool if role == "R" or layer in publishers else 0))
        compute = shape.index_pair_operations * pairs / _index_rate(rates, index_dtype)
        seconds["index_topk"] += max(compute, 4 * ids / rates.hbm)
        seconds["indexer"] += storage.indexer.seconds(shape.indexer_weights, tokens, rates)
    pairs = count_pairs(length, k) * batch
    seconds["attention"] = shape.layers * shape.latent_pair_operations * pairs / rates.bf16
    return _milliseconds(seconds, shape, tokens, batch, rates, storage)


def decode_floor(
    shape: Shape,
    cached: int,
    pattern: Pattern,
    rates: Rates,
    *,
    batch: int = 1,
    index_dtype: str = "fp8",
    storage: Storage = BF16,
) -> dict[str, float]:
    """Compute the floor of each part in milliseconds, for one step of B sequences of n tokens each.

    - indexer, linears, head: weights read once (w bytes each), or 2 B W operations.
    - index_topk, per F layer: B n keys of D + 4 bytes (fp8) or 2 D bytes read. An R layer reads c k
      keys. Nothing is read while n <= k.
    - attention, per layer: B min(n, k) latents of 2 e bytes read.
    - mlp: the weights of the shared experts, of dense MLPs, and of the experts that B tokens
      meet: x experts of which each token takes p at random make x (1 - (1 - p / x)^B).
    - rest: as in a prefill.

    Args:
        cached: n. The other arguments are those of `prefill_floor`.
    """
    k = shape.topk
    seconds = dict.fromkeys(PARTS, 0.0)
    for role in pattern.check(share=False).roles:
        if role == "S":
            continue
        keys = 0
        if cached > k:
            pool = min((pattern.pool_factor or 0) * k, cached)
            keys = batch * (cached if role == "F" else pool)
        compute = shape.index_pair_operations * keys / _index_rate(rates, index_dtype)
        seconds["index_topk"] += max(compute, keys * shape.index_bytes(index_dtype) / rates.hbm)
        seconds["indexer"] += storage.indexer.seconds(shape.indexer_weights, batch, rates)
    latents = shape.layers * batch * min(cached, k)
    seconds["attention"] = latents * ELEMENT * shape.latent_width / rates.hbm
    return _milliseconds(seconds, shape, batch, batch, rates, storage)


def _milliseconds(
    seconds: dict[str, float],
    shape: Shape,
    tokens: int,
    sequences: int,
    rates: Rates,
    storage: Storage,
) -> dict[str, float]:
    """Add the parts that prefill and decoding share, and convert to milliseconds."""
    linears = storage.attention.seconds(shape.attention_weights, tokens, rates)
    seconds["linears"] = shape.layers * linears
    seconds["mlp"] = _mlp(shape, tokens, rates, storage)
    seconds["head"] = storage.head.seconds(shape.head_weights, sequences, rates)
    seconds["rest"] = shape.layers * 16 * shape.hidden * tokens / rates.hbm
    return {name: 1e3 * value for name, value in seconds.items()}


def _index_rate(rates: Rates, index_dtype: str) -> float:
    return rates.fp8 if index_dtype == "fp8" else rates.bf16


def _mlp(shape: Shape, tokens: int, rates: Rates, storage: Storage) -> float:
    """Compute the seconds of the MLPs of all layers, MoE or dense.

    A layer of experts takes the larger of its operations and of the bytes of the experts that the
    tokens meet.
    """
    met = shape.experts * (1 - (1 - shape.active_experts / shape.experts) ** tokens)
    active = shape.active_experts * shape.expert_weights
    shared = shape.shared_experts * shape.expert_weights
    router = shape.router_weights
    operations = (
        storage.experts.products(active, tokens, rates)
        + storage.shared.products(shared, tokens, rates)
        + storage.router.products(router, tokens, rates)
    )
    read = (
        storage.experts.bytes * met * shape.expert_weights
        + storage.shared.bytes * shared
        + storage.router.bytes * router
    ) / rates.hbm
    dense = storage.dense.seconds(shape.dense_weights, tokens, rates)
    return shape.moe_layers * max(operations, read) + shape.dense_layers * dense
