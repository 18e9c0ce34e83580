"""Declare the products of a decoder layer for one token of one sequence, and run each in torch or
Triton.

Dims: E hidden, H heads, c the latent of the keys, n and r the dims of a head without and with RoPE,
J x D the index heads, I the inner dims of an expert, X experts of which k are chosen, T the tokens
of the cache. Vectors and weights have one dtype, rows that follow one another in memory and start
at multiples of 16 bytes. Sums are in fp32 and rounded once, where a vector is returned.

RoPE takes cos and sin [r] as transformers' rotary embedding makes them, rotates neighbouring dims
and leaves them half-split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from indexcache.ops import tuning
from indexcache.ops.dispatch import device_of, has_kernels, use_triton
from indexcache.ops.step import definition

MAX_EXPERTS = 256


def runs(x: Tensor) -> bool:
    """Return whether a step on x's device may take these operations.

    They need the kernels, or the tuning's backend "torch", which runs the definitions anywhere.
    """
    return tuning.current().backend == "torch" or has_kernels(x)


def _run(name: str, backend: str, arguments: tuple[Any, ...]) -> Any:
    """Run an operation on its kernels, or its definition."""
    x = arguments[0]
    if not use_triton(backend, x, name, lambda: None):
        return getattr(definition, name)(*arguments)
    from indexcache.ops.step import host

    with device_of(x):
        return getattr(host, name)(*arguments)


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm: tuple[Tensor, float] | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    normed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute the products of a vector with up to four weights, in one launch.

    Args:
        x: [K]; or [H, K], a vector for each block of one weight [H, N, K] whose blocks may lie
            apart in memory.
        weights: [N_i, K] each, of one dtype, which may differ from x's.
        norm: weight [K] and epsilon of an RMSNorm of x; needs x [K].
        add: [sum N_i], added to the products.
        dtype: of the result; None means x's.
        normed: whether to return norm(x) too.

    Returns:
        [sum N_i] or [H N], and norm(x) [K] or None.
    """
    return _run("products", backend, (x, weights, norm, add, dtype or x.dtype, normed))


def absorb(
    q_Hm: Tensor,
    w_Hnc: Tensor,
    kv: Tensor,
    norm: tuple[Tensor, float],
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    latents_TE: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Make the queries of attention over latents, and write the token's own latent.

    Args:
        q_Hm: queries [H, n + r], before RoPE.
        w_Hnc: the key part of kv_b_proj; heads may lie apart in memory.
        kv: [c + r], the latent before its norm and the rotary key before RoPE.
        norm: weight [c] and epsilon of the latent's RMSNorm.
        rope: cos and sin [r].
        position: int64 of one element, the row of the cache to write.
        latents_TE: the cache [T, c + r].

    Returns:
        [H, c + r].
    """
    return _run("absorb", backend, (q_Hm, w_Hnc, kv, norm, rope, position, latents_TE))


def attend(
    q_HE: Tensor,
    latents_TE: Tensor,
    ids_K: Tensor,
    scale: float,
    w_Hvc: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attend to selected latents as `ops.sparse_mla` does, and multiply with the values' weights.

    The ids are split over programs, and the second launch adds them up, head by head.

    Args:
        q_HE: absorbed queries, E = c + r.
        latents_TE: the cache.
        ids_K: int32, -1 anywhere means none.
        scale: factor of the logits.
        w_Hvc: the value part of kv_b_proj; heads may lie apart in memory.

    Returns:
        [H v].
    """
    return _run("attend", backend, (q_HE, latents_TE, ids_K, scale, w_Hvc))


def index_rows(
    q_JD: Tensor,
    k: Tensor,
    x: Tensor,
    w_JE: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rope: tuple[Tensor, Tensor],
    factor: float,
    interleaved: bool,
    position: Tensor,
    keys_TD: Tensor,
    scales_T: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate and quantise the indexer's queries and key of one token, and write the key.

    Args:
        q_JD, k: outputs of wq_b and wk.
        x, w_JE: the layer's normed input [E], and weights_proj in its own dtype.
        norm: weight, bias [D] and epsilon of the key's LayerNorm.
        rope: cos and sin [r].
        factor: of the weights.
        interleaved: whether RoPE rotates neighbouring dims, otherwise dims r / 2 apart.
        position: int64 of one element, the row to write.
        keys_TD, scales_T: the cache, e4m3 and fp32.

    Returns:
        Queries e4m3 [J, D] and weights fp32 [J] that hold their scales.
    """
    arguments: tuple[Any, ...] = (q_JD, k, x, w_JE, norm, rope, factor, interleaved)
    arguments += (position, keys_TD, scales_T)
    return _run("index_rows", backend, arguments)


def experts(
    x: Tensor,
    y: Tensor,
    logits: Tensor,
    bias: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    topk: int,
    normalise: bool,
    factor: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Add the outputs of the chosen experts and of the shared one to x, in two launches.

    The chosen are the `topk` with the largest sigmoid(logit) + bias, and of equal ones the first.
    Each is weighted with its sigmoid, divided by the sum of the chosen if `normalise`, times
    `factor`.

    Args:
        x: [E], the residual.
        y: [E], the input of router and experts.
        logits, bias: fp32 [X].
        gate_up: [X, 2 I, E], gates first.
        down: [X, E, I].
        shared: gate, up [I_s, E] and down [E, I_s] of the shared expert.
    """
    arguments = (x, y, logits, bias, gate_up, down, shared, topk, normalise, factor)
    return _run("experts", backend, arguments)
