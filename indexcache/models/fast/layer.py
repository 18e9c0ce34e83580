"""What a decoder layer computes on the fast path: MLA in MQA form, routers and experts, whole or for one token.

With one row a product is a reading of its weights, and a layer is two dozen short kernels. `CompiledStep` runs what lies between the
cache, the selection and attention in three pieces of torch.compile with coordinate descent, which writes such products itself
and fuses them with norms, RoPE, the gathering of experts and residuals.

Dims: B sequences, S queries, T keys, H heads, E hidden, Q and c the latents of queries and keys, n and r the dims of a head
without and with RoPE, v of its values, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache import ops
from indexcache.models.family import either
from indexcache.models.fast.cache import FastCache
from indexcache.models.mla import head_weights, project, weight_of
from indexcache.models.timing import timed

# Wraps a function before it is installed: `torch.compile`, or the identity.
Wrap = Callable[[Any], Any]


@dataclass(frozen=True)
class Padding:
    """All that is left of an attention mask: how many positions at the left of each sequence are padding."""

    left: tuple[int, ...] | None = None

    def groups(self, batch: int) -> list[tuple[slice, int]]:
        """(rows, padding) of neighbouring sequences with the same padding."""
        if self.left is None:
            return [(slice(0, batch), 0)]
        starts = [i for i in range(batch) if i == 0 or self.left[i] != self.left[i - 1]]
        return [
            (slice(a, b), self.left[a]) for a, b in zip(starts, [*starts[1:], batch], strict=True)
        ]


class SharedGroups:
    """What neighbouring queries read together (`ops.group_queries`), computed once per selection.

    A shared layer gets the very ids of its source, and with them the groups.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.groups: ops.QueryGroups | None = None

    def of(self, ids: Tensor, group: int) -> ops.QueryGroups | None:
        """Return the groups of `group` queries for these ids; None for groups of one."""
        if self.ids is not ids:
            self.ids, self.groups = ids, None
            if group > 1:
                with timed("plan"):
                    self.groups = ops.group_queries(ids, group)
        return self.groups

    def clear(self) -> None:
        self.ids = self.groups = None


def has_one_choice_of_groups(module: Any) -> bool:
    """A router that chooses among groups of experts, and must take them all."""
    return hasattr(module, "e_score_correction_bias") and getattr(
        module, "num_group", 0
    ) == getattr(module, "topk_group", None)


def route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stock's choice of experts without the choice of groups, in a third of the kernels: (logits, weights, indices)."""
    x, weight = x.view(-1, router.hidden_dim), weight_of(router)
    # products of bf16 are exact in fp32, in which tensor cores add them up; a compiled product of one row is a sum in fp32 anyway
    one = x.shape[0] == 1 and torch.compiler.is_compiling()
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and not one:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(x.float(), weight.float())
    scores = logits.sigmoid()
    indices = torch.topk(
        scores + router.e_score_correction_bias, k=router.top_k, dim=-1, sorted=False
    )[1]
    weights = scores.gather(1, indices)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, indices


def attention_forward(attention: Any, returns_ids: bool, projection: Any, shared: SharedGroups):
    """MLA in MQA form: queries absorb kv_b_proj's key part, attention runs over latents, its value part comes after."""
    a = attention

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Padding,
        cache: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ):
        cache = either(cache, past_key_values)
        batch, queries, _width = hidden_states.shape
        with timed("linears"):
            q_latent, q_nope, q_rot, latent, k_rot = projection(
                a, hidden_states, position_embeddings
            )
            latents = _cached(cache, a, latent, k_rot)
        ids = _selected(
            a,
            hidden_states,
            q_latent,
            position_embeddings,
            attention_mask,
            position_ids,
            cache,
            prev_topk_indices,
        )
        groups = shared.of(ids, ops.query_group(ids, a.num_heads))
        with timed("linears"):
            w_k, w_v = head_weights(a)
            absorbed = q_nope.new_empty(batch, queries, a.num_heads, latents.shape[-1])
            _heads_times(q_nope, w_k, absorbed[..., : a.kv_lora_rank])
            absorbed[..., a.kv_lora_rank :] = q_rot
            del q_nope, q_rot
        with timed("attention"):
            out, _lse = ops.sparse_mla(
                absorbed, latents, ids, a.scaling, value_dim=a.kv_lora_rank, groups=groups
            )
            del absorbed
        with timed("linears"):
            values = out.new_empty(batch, queries, a.num_heads, a.v_head_dim)
            _heads_times(out, w_v.transpose(1, 2), values)
            out = a.o_proj(values.flatten(2))
        return (out, None, ids) if returns_ids else (out, None)

    return forward


def _selected(
    a: Any,
    x: Tensor,
    q_latent: Tensor,
    rope,
    padding: Padding,
    position_ids,
    cache: Any,
    before: Tensor | None,
) -> Tensor:
    """The ids of a layer: its indexer's, or those that the layer before it passed on."""
    if a.indexer is not None:
        return a.indexer(x, q_latent, rope, padding, position_ids, cache)
    if before is None:
        raise ValueError("A shared layer needs the selection of a full layer before it.")
    return before


def _cached(cache: Any, a: Any, latent: Tensor, k_rot: Tensor) -> Tensor:
    """Latents of all tokens [B, T, c + r], these [B, S, c] and [B, S, r] being the last."""
    if isinstance(cache, FastCache):
        return cache.layers[a.layer_idx].store(latent, k_rot)
    if cache is None:
        return torch.cat([latent, k_rot], -1)
    held, held_rot = cache.update(latent.unsqueeze(1), k_rot.unsqueeze(1), a.layer_idx)
    if held.shape[-1] != a.kv_lora_rank:
        raise ValueError(
            "This cache was filled by stock transformers, which caches expanded keys and values; start a new one."
        )
    return torch.cat([held, held_rot], -1)[:, 0]


def _heads_times(x_BSHm: Tensor, w_Hmn: Tensor, out_BSHn: Tensor) -> None:
    """out[.., h, :] = x[.., h, :] @ w[h], written in place: no copy of x or out in another order of dimensions."""
    heads = w_Hmn.shape[0]
    x, out = (
        t.view(t.shape[0] * t.shape[1], heads, t.shape[-1]).transpose(0, 1)
        for t in (x_BSHm, out_BSHn)
    )
    torch.bmm(x, w_Hmn, out=out)


@dataclass(frozen=True)
class CompiledStep:
    """The pieces of a layer for one token of one sequence, all in the model's dtype; x is the hidden state [1, 1, E].

    before: (layer, x, (cos, sin) [1, 1, r]) -> x normed [1, 1, E], q_latent [1, 1, Q], absorbed queries [1, 1, H, c + r], latent
        [1, 1, c], rotary key [1, 1, r].
    after: (layer, x, attention's output [1, 1, H, c]) -> x with attention added.
    feed: (layer, x) -> x with the MLP added.
    """

    before: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    after: Callable[..., Tensor]
    feed: Callable[..., Tensor]

    @staticmethod
    def of(rotate: Any, norm: Any) -> CompiledStep:
        """norm: `fused_norm` or `stock_norm`."""
        wrap = wrap_step()
        return CompiledStep(
            wrap(partial(_before, rotate, norm)), wrap(_after), wrap(partial(_feed, norm))
        )


def runs_in_pieces(layer: Any) -> bool:
    """A step's pieces read weights and skip forwards: not where somebody put a forward or a hook, or chose other experts."""
    chosen = getattr(
        getattr(getattr(layer.mlp, "experts", None), "config", None),
        "_experts_implementation",
        None,
    )
    touched = any(
        "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in layer.modules()
    )
    return not touched and chosen in (None, "eager", "grouped_mm", "batched_mm")


def wrap_step() -> Wrap:
    """torch.compile for one row: products are written as reductions, each tuned on the device at the first step."""
    return partial(torch.compile, dynamic=True, options={"coordinate_descent_tuning": True})


def _before(
    rotate: Any, norm: Any, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a = layer.self_attn
    x = norm(layer.input_layernorm, x)
    q_latent, q_nope, q_rot, latent, k_rot = project(rotate, norm, a, x, rope)
    q = torch.einsum("bshn,hnc->bshc", q_nope, head_weights(a)[0])
    return x, q_latent, torch.cat([q, q_rot], -1), latent, k_rot


def _after(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    a = layer.self_attn
    return x + a.o_proj(torch.einsum("bshc,hvc->bshv", out, head_weights(a)[1]).flatten(2))


def _feed(norm: Any, layer: Any, x: Tensor) -> Tensor:
    y, mlp = norm(layer.post_attention_layernorm, x), layer.mlp
    if not hasattr(mlp, "experts"):
        return x + _mlp_of_one(mlp, y)
    _logits, weights, indices = mlp.gate(y)
    return (
        x
        + _experts_of_one(mlp.experts, y[0], indices[0], weights[0])
        + _mlp_of_one(mlp.shared_experts, y)
    )


def _experts_of_one(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `batched_mm_experts_forward` of transformers, for one token x [1, E] with its experts [k] (indices int64, weights fp32):
    compiled, gathering is a part of the products."""
    gate, up = (weight_of(experts, "gate_up_proj")[indices] @ x[0]).chunk(2, -1)
    out = weight_of(experts, "down_proj")[indices] @ _stored(experts.act_fn(gate) * up)[..., None]
    return (out[..., 0] * weights[:, None]).sum(0).to(x.dtype)


def _mlp_of_one(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_stored(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def _stored(x: Tensor) -> Tensor:
    """x, which the compiler then writes to memory; otherwise each row of the next product computes all of it again."""
    return torch.as_strided(x, x.shape, x.stride())


def layer_forward(layer: Any, returns_ids: bool, step: CompiledStep):
    """A decoder layer's forward: one token of one sequence with a `FastCache` in a step's pieces, otherwise as it was."""
    a, stock = layer.self_attn, layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any):
        cache = either(kwargs.get("cache"), kwargs.get("past_key_values"))
        if args or hidden_states.shape[:2] != (1, 1) or not isinstance(cache, FastCache):
            return stock(hidden_states, *args, **kwargs)
        rope = kwargs["position_embeddings"]
        with timed("linears"):
            x, q_latent, q, latent, k_rot = step.before(layer, hidden_states, rope)
            latents = _cached(cache, a, latent, k_rot)
        padding, positions, before = (
            kwargs.get(n) for n in ("attention_mask", "position_ids", "prev_topk_indices")
        )
        ids = _selected(a, x, q_latent, rope, padding or Padding(), positions, cache, before)
        with timed("attention"):
            out, _lse = ops.sparse_mla(q, latents, ids, a.scaling, value_dim=a.kv_lora_rank)
        with timed("linears"):
            x = step.after(layer, hidden_states, out)
        with timed("mlp"):
            x = step.feed(layer, x)
        return (x, ids) if returns_ids else x

    return forward
