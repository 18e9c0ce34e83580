"""Compute the projections of multi-head latent attention (MLA), and split its absorbed weights.

Dims: B sequences, S queries, H heads, E hidden, Q and c the latents of queries and keys, n and r
the dims of a head without and with RoPE, v of its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.models.effective import has_stock_forward, linear_map, weight_of

Rope = tuple[Tensor, Tensor]  # cos and sin
Norm = Callable[[Any, Tensor], Tensor]  # applies a norm module


class Projections(NamedTuple):
    """The projections of an attention module's input, in the input's dtype.

    Attributes:
        q_latent: [B, S, Q], normed; the indexer reads it too.
        q_nope: [B, S, H, n].
        q_rot: [B, S, H, r], with RoPE.
        latent: [B, S, c], normed.
        k_rot: [B, S, r], with RoPE, shared by all heads.
    """

    q_latent: Tensor
    q_nope: Tensor
    q_rot: Tensor
    latent: Tensor
    k_rot: Tensor


def stock_norm(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm module as it is."""
    return norm(x)


def is_stock_norm(norm: Any) -> bool:
    """Return whether a module is an RMSNorm with the forward of transformers."""
    return hasattr(norm, "variance_epsilon") and has_stock_forward(norm)


def fused_norm(norm: Any, x: Tensor) -> Tensor:
    """Apply RMSNorm in one kernel; stock launches seven. This is a forward for the norm itself.

    The product with the weight is rounded once, not twice.
    """
    if not torch.compiler.is_compiling() and not has_stock_forward(norm):
        return type(norm).forward(norm, x)  # Its class was changed since.
    return F.rms_norm(x, (x.shape[-1],), weight_of(norm), norm.variance_epsilon)


def project(rotate: Callable[..., Rope], norm: Norm, a: Any, x: Tensor, rope: Rope) -> Projections:
    """Project the input x [B, S, E] of an attention module `a`.

    Args:
        rotate: the family's RoPE of attention (`Family.rotate`).
        norm: `stock_norm` or `fused_norm`.
        rope: cos and sin [B, S, r].
    """
    q_latent = norm(a.q_a_layernorm, a.q_a_proj(x))
    latent, k_rot = a.kv_a_proj_with_mqa(x).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
    q_nope, q_rot = (
        a.q_b_proj(q_latent)
        .unflatten(-1, (-1, a.qk_head_dim))
        .split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
    )
    q_rot, k_rot = rotate(q_rot, k_rot.unsqueeze(2), *rope, unsqueeze_dim=2)
    return Projections(q_latent, q_nope, q_rot, norm(a.kv_a_layernorm, latent), k_rot.squeeze(2))


def head_weights(a: Any, latent: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return kv_b_proj as two weights for each head: keys [H, n, c] and values [H, v, c].

    With them attention runs over latents: queries absorb the first, outputs pass the second.

    Args:
        a: an attention module.
        latent: the latents [.., c] that kv_b_proj would get.

    Returns:
        Both weights, and the bias of the values [H, v] or None. That of the keys adds the same to
        all scores of a query, which changes no weight.

    Raises:
        ValueError: kv_b_proj is not linear, or has hooks.
    """
    where = f"model.layers.{a.layer_idx}.self_attn.kv_b_proj"
    weight, bias = linear_map(a.kv_b_proj, where, latent)
    if bias is not None:
        bias = bias.unflatten(0, (a.num_heads, -1))[:, a.qk_nope_head_dim :]
    return (*split_heads(a, weight), bias)


def split_heads(a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split a weight of kv_b_proj [H (n + v), c] as `head_weights` returns it."""
    w_k, w_v = weight.unflatten(0, (a.num_heads, -1)).split([a.qk_nope_head_dim, a.v_head_dim], 1)
    return w_k, w_v
