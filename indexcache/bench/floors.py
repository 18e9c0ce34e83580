"""Floors: the least time each part of a forward pass can take on a device, from the sizes of the model alone.

Every part is max(operations / peak rate, bytes that must cross HBM / its rate); launches, synchronisation and gathers out of
L2 are not in it. Symbols: L tokens of a prompt, n tokens in the cache, B sequences, k = index_topk, c the pool factor, H x D
the index heads, h the attention heads, e = kv_lora + rope, E hidden, w = 2 bytes of a bf16 weight.

    pairs(L, m) = sum over t = 1..L of min(t, m), so pairs(L, L) = L (L + 1) / 2
"""

from __future__ import annotations

from dataclasses import dataclass

from indexcache.models.shapes import Shape
from indexcache.pattern import Pattern

# As `indexcache.models.timing` times them. "indexer": its projections; "index_topk": scores and selection; "plan": the union of
# neighbouring queries (no floor: nothing demands it); "linears": projections of attention; "mlp": MLPs and experts.
PARTS = ("indexer", "index_topk", "plan", "attention", "linears", "mlp", "head", "rest")
INDEX_PARTS = ("indexer", "index_topk")
WEIGHT = 2  # bytes of a weight, of a latent's element and of an activation


@dataclass(frozen=True)
class Device:
    """Rates in operations (a multiply-add is two) and bytes a second, memory in bytes."""

    name: str
    fp8: float
    bf16: float
    hbm: float
    l2: float
    memory: float


# What matrix products and copies reach on one (measured on an H100: bf16 782, copy 3.02); H200: the same chip, faster memory.
DEVICES = {
    "H100": Device("H100", 1450e12, 790e12, 3.02e12, 5.5e12, 80e9),
    "H200": Device("H200", 1450e12, 790e12, 4.3e12, 5.5e12, 141e9),
}


def device_named(name: str) -> Device:
    """Raises ValueError for a GPU whose rates are not known here."""
    if name.upper() not in DEVICES:
        raise ValueError(
            f"The rates of a GPU called {name!r} are not known here; known are {', '.join(DEVICES)}."
        )
    return DEVICES[name.upper()]


def pairs(length: int, most: int) -> int:
    """Sum over t = 1..length of min(t, most)."""
    short = min(length, most)
    return short * (short + 1) // 2 + (length - short) * most


def prefill_floor(
    shape: Shape,
    length: int,
    pattern: Pattern,
    device: Device,
    *,
    batch: int = 1,
    index_dtype: str = "fp8",
) -> dict[str, float]:
    """Milliseconds of each part for a prompt of L tokens (times B).

    - indexer, per F and R layer: 2 L W operations in bf16, W = weights of wq_b, wk, weights_proj.
    - index_topk, per F: 2 H D (pairs(L, L) - pairs(k, k)) operations in the indexer's dtype (rows with at most k keys need no
      scores); per R the same with pairs(L, c k); against 4 bytes for each id written: k per token (c k more where a pool is
      published, and c k read by an R).
    - attention, per layer: 2 h (e + kv_lora) pairs(L, k) operations in bf16.
    - linears, per layer: 2 L W operations, W = q_a, q_b, kv_a, kv_b, o (kv_b absorbed costs the same).
    - mlp: 2 L times the weights a token meets (dense, or router, active and shared experts); at least all of them read once.
    - head: its weights read once (logits of the last token only).
    - rest: 16 E bytes a token and layer, two fused passes of residual add and norm (2 reads, 2 writes each).
    """
    k, tokens = shape.topk, length * batch
    seconds = dict.fromkeys(PARTS, 0.0)
    peak = device.fp8 if index_dtype == "fp8" else device.bf16
    publishers = pattern.publishers()
    beyond = pairs(min(length, k), k)
    for layer, role in enumerate(pattern.roles):
        if role == "S":
            continue
        pool = (pattern.pool_factor or 0) * k
        scored = (pairs(length, length if role == "F" else pool) - beyond) * batch
        ids = tokens * (k + (pool if role == "R" or layer in publishers else 0))
        seconds["index_topk"] += max(
            2 * shape.index_heads * shape.index_dim * scored / peak, 4 * ids / device.hbm
        )
        seconds["indexer"] += _product(shape.indexer_weights, tokens, device)
    seconds["attention"] = (
        shape.layers
        * 2
        * shape.heads
        * (2 * shape.kv_lora + shape.rope)
        * pairs(length, k)
        * batch
        / device.bf16
    )
    seconds["linears"] = shape.layers * _product(shape.attention_weights, tokens, device)
    seconds["mlp"] = _mlp(shape, tokens, device)
    seconds["head"] = _product(shape.head_weights, batch, device)
    seconds["rest"] = shape.layers * 16 * shape.hidden * tokens / device.hbm
    return {p: 1e3 * s for p, s in seconds.items()}


def decode_floor(
    shape: Shape,
    held: int,
    pattern: Pattern,
    device: Device,
    *,
    batch: int = 1,
    index_dtype: str = "fp8",
) -> dict[str, float]:
    """Milliseconds of each part for one step of B sequences with n tokens each.

    - indexer, linears, head: weights read once (w bytes each), or 2 B W operations.
    - index_topk, per F: B n keys of D + 4 bytes (fp8) or 2 D bytes read; per R c k keys; nothing while n <= k.
    - attention, per layer: B min(n, k) latents of 2 e bytes read.
    - mlp: the experts that B tokens meet, E (1 - (1 - p / E)^B) of E when each takes p at random, the shared and the dense ones.
    - rest: as in prefill.
    """
    k = shape.topk
    seconds = dict.fromkeys(PARTS, 0.0)
    peak = device.fp8 if index_dtype == "fp8" else device.bf16
    for role in pattern.roles:
        if role == "S":
            continue
        keys = (
            0
            if held <= k
            else batch * (held if role == "F" else min((pattern.pool_factor or 0) * k, held))
        )
        compute = 2 * shape.index_heads * shape.index_dim * keys / peak
        seconds["index_topk"] += max(compute, keys * shape.index_bytes(index_dtype) / device.hbm)
        seconds["indexer"] += _product(shape.indexer_weights, batch, device)
    seconds["attention"] = (
        shape.layers * batch * min(held, k) * WEIGHT * (shape.kv_lora + shape.rope) / device.hbm
    )
    seconds["linears"] = shape.layers * _product(shape.attention_weights, batch, device)
    seconds["mlp"] = _mlp(shape, batch, device)
    seconds["head"] = _product(shape.head_weights, batch, device)
    seconds["rest"] = shape.layers * 16 * shape.hidden * batch / device.hbm
    return {p: 1e3 * s for p, s in seconds.items()}


def gather_ms(
    shape: Shape, length: int, pattern: Pattern, device: Device, *, index_dtype: str = "fp8"
) -> dict[str, float]:
    """Milliseconds that a prefill's gathers would take through L2 if every query fetched its own: pairs(L, k) latents of 2 e
    bytes a layer for attention, pairs(L, c k) keys an R layer. No floor: neighbouring queries can share what they fetch."""
    reindexed = (
        pattern.roles.count("R")
        * pairs(length, (pattern.pool_factor or 0) * shape.topk)
        * shape.index_bytes(index_dtype)
    )
    latents = shape.layers * pairs(length, shape.topk) * WEIGHT * (shape.kv_lora + shape.rope)
    return {"attention": 1e3 * latents / device.l2, "index_topk": 1e3 * reindexed / device.l2}


def _product(weights: int, tokens: int, device: Device) -> float:
    """Seconds of a product of `tokens` rows with a bf16 matrix of so many weights."""
    return max(2 * weights * tokens / device.bf16, WEIGHT * weights / device.hbm)


def _mlp(shape: Shape, tokens: int, device: Device) -> float:
    sparse = shape.layers - shape.dense_layers
    router = shape.hidden * shape.experts
    active = (shape.active_experts + shape.shared_experts) * shape.expert_weights + router
    met = shape.experts * (1 - (1 - shape.active_experts / shape.experts) ** tokens)
    read = (met + shape.shared_experts) * shape.expert_weights + router
    moe = max(2 * active * tokens / device.bf16, WEIGHT * read / device.hbm)
    return sparse * moe + shape.dense_layers * _product(shape.dense_weights, tokens, device)
