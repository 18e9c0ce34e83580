"""Compute the products of a decoder layer for one token of one sequence with `ops.step`.

`ops.tuned(step=..)` chooses them; they run in the steps of a `Decoder` whose layers compile.
Dims are those of `models/fast/layer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.effective import weight_of
from indexcache.models.family import Family
from indexcache.models.fast.cache import FastLayer
from indexcache.models.mla import Rope, is_stock_norm, split_heads
from indexcache.ops import step
from indexcache.ops.tuning import power

HALVES = (torch.bfloat16, torch.float16, torch.float32)


def _plain(dtype: torch.dtype, *modules: Any) -> bool:
    """Return whether these are linear layers without bias, with contiguous weights of a dtype."""
    return all(
        isinstance(m, nn.Linear)
        and m.bias is None
        and m.weight.dtype == dtype
        and m.weight.is_contiguous()
        for m in modules
    )


def fits_attention(layer: Any, family: Family) -> bool:
    """Return whether `before` and `after` can run a layer that `runs_in_pieces`."""
    a = layer.self_attn
    dtype = a.o_proj.weight.dtype
    sizes = (a.kv_lora_rank, a.qk_rope_head_dim)
    return (
        dtype in HALVES
        and family.rotates_neighbours
        and all(n == power(n) >= 8 for n in sizes)
        and all(map(is_stock_norm, (layer.input_layernorm, a.q_a_layernorm, a.kv_a_layernorm)))
        and _plain(dtype, a.q_a_proj, a.q_b_proj, a.kv_a_proj_with_mqa, a.kv_b_proj, a.o_proj)
    )


def fits_experts(layer: Any, one_choice: bool) -> bool:
    """Return whether `feed` can run a layer that `runs_in_pieces`.

    Args:
        one_choice: `has_one_choice_of_groups` of the router.
    """
    mlp = layer.mlp
    if not one_choice or not hasattr(mlp, "shared_experts"):
        return False
    experts, shared = mlp.experts, mlp.shared_experts
    if not hasattr(experts, "gate_up_proj"):
        return False
    weights = experts.gate_up_proj, experts.down_proj
    dtype = weights[0].dtype
    return (
        dtype in HALVES
        and is_stock_norm(layer.post_attention_layernorm)
        and all(w.dtype == dtype and w.is_contiguous() for w in weights)
        and _plain(dtype, shared.gate_proj, shared.up_proj, shared.down_proj)
        and len(weights[0]) <= step.MAX_EXPERTS
        and mlp.gate.weight.is_contiguous()
        and all(_is_silu(m.act_fn) for m in (experts, shared))
    )


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU) or type(function).__name__ in ("SiLU", "SiLUActivation")


def _norm(norm: Any) -> tuple[Tensor, float]:
    return weight_of(norm), norm.variance_epsilon


def _angles(rope: Rope) -> Rope:
    """Return cos and sin [r] of one token."""
    return rope[0].view(-1), rope[1].view(-1)


def before(
    layer: Any, x: Tensor, rope: Rope, entry: FastLayer, indexer: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Project the input of attention, and write the token's latent to the cache.

    Args:
        x: hidden state [1, 1, E].
        rope: cos and sin [1, 1, r].
        entry: the layer's cache, in a step of a `Decoder`.
        indexer: one that `fits_indexer` and is about to run, to project with the same launches.

    Returns:
        x normed [1, 1, E], the normed latent of the query [1, 1, Q], absorbed queries
        [1, 1, H, c + r], the latents of all tokens [1, T, c + r], and the indexer's queries and key
        as `index` takes them or None.
    """
    a = layer.self_attn
    assert entry.positions is not None
    latents = entry.room(1, 1, a.kv_lora_rank, a.qk_rope_head_dim, x)
    first = [weight_of(a.q_a_proj), weight_of(a.kv_a_proj_with_mqa)]
    second = [weight_of(a.q_b_proj)]
    if indexer is not None:
        first.append(weight_of(indexer.wk))
        second.append(weight_of(indexer.wq_b))
    out, normed = step.products(x.view(-1), first, norm=_norm(layer.input_layernorm), normed=True)
    q_latent, kv, *k = out.split([len(w) for w in first])
    out, q_normed = step.products(q_latent, second, norm=_norm(a.q_a_layernorm), normed=True)
    q, *q_index = out.split([len(w) for w in second])
    assert normed is not None and q_normed is not None
    absorbed = step.absorb(
        q.view(a.num_heads, a.qk_head_dim),
        split_heads(a, weight_of(a.kv_b_proj))[0],
        kv,
        _norm(a.kv_a_layernorm),
        _angles(rope),
        entry.positions,
        latents[0],
    )
    projected = (q_index[0], k[0]) if indexer is not None else None
    x, q_latent = normed.view(1, 1, -1), q_normed.view(1, 1, -1)
    return x, q_latent, absorbed[None, None], latents, projected


def attend(layer: Any, q: Tensor, latents: Tensor, ids: Tensor) -> Tensor:
    """Return the values of attention [H v], for `after`.

    Args:
        q, latents: as `before` returns them.
        ids: int32 [1, 1, K].
    """
    a = layer.self_attn
    w_v = split_heads(a, weight_of(a.kv_b_proj))[1]
    return step.attend(q[0, 0], latents[0], ids[0, 0], a.scaling, w_v)


def after(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """Add attention to x [1, 1, E]: its output [1, 1, H, c], or its values as of `attend`."""
    a = layer.self_attn
    values = out
    if out.dim() > 1:
        values, _ = step.products(out[0, 0], [split_heads(a, weight_of(a.kv_b_proj))[1]])
    return step.products(values, [weight_of(a.o_proj)], add=x.view(-1))[0].view_as(x)


def feed(layer: Any, x: Tensor) -> Tensor:
    """Add the output of router and experts to x [1, 1, E]."""
    mlp, gate = layer.mlp, layer.mlp.gate
    logits, y = step.products(
        x.view(-1),
        [weight_of(gate)],
        norm=_norm(layer.post_attention_layernorm),
        dtype=torch.float32,
        normed=True,
    )
    assert y is not None
    shared = mlp.shared_experts
    return step.experts(
        x.view(-1),
        y,
        logits,
        weight_of(gate, "e_score_correction_bias"),
        weight_of(mlp.experts, "gate_up_proj"),
        weight_of(mlp.experts, "down_proj"),
        (weight_of(shared.gate_proj), weight_of(shared.up_proj), weight_of(shared.down_proj)),
        gate.top_k,
        bool(gate.norm_topk_prob),
        float(gate.routed_scaling_factor),
    ).view_as(x)


def fits_indexer(layer: Any) -> bool:
    """Return whether `before` and `index` can run a layer's indexer with fp8 keys."""
    indexer, dtype = layer.self_attn.indexer, layer.self_attn.o_proj.weight.dtype
    if indexer is None:
        return False
    dim = indexer.head_dim
    return (
        dtype in HALVES
        and _plain(dtype, indexer.wq_b, indexer.wk)
        and isinstance(indexer.weights_proj, nn.Linear)
        and indexer.weights_proj.bias is None
        and indexer.weights_proj.weight.is_contiguous()
        and isinstance(indexer.k_norm, nn.LayerNorm)
        and dim == power(dim) >= 16
    )


def index(
    indexer: Any,
    x: Tensor,
    projected: tuple[Tensor, Tensor],
    rope: Rope,
    interleaved: bool,
    entry: FastLayer,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise one token's queries, and write its key.

    Args:
        x: normed, [1, 1, E].
        projected: queries [H D] and key [D] as `before` returns them.
        entry: the layer's cache, in a step of a `Decoder`, with keys in fp8.

    Returns:
        Queries e4m3 [1, 1, H, D], weights fp32 [1, 1, H], and all keys and scales.
    """
    keys, scales, position = entry.indexer_keys, entry.indexer_scales, entry.positions
    assert keys is not None and scales is not None and position is not None
    keys = entry.room_for_keys(1, keys, scales)
    q, k = projected
    norm = indexer.k_norm
    q_index, w = step.index_rows(
        q.view(indexer.n_heads, indexer.head_dim),
        k,
        x.view(-1),
        weight_of(indexer.weights_proj),
        (norm.weight, norm.bias, norm.eps),
        _angles(rope),
        indexer.n_heads**-0.5 * indexer.softmax_scale,
        interleaved,
        position,
        keys[0],
        scales[0],
    )
    return q_index[None, None], w[None, None], keys, scales
