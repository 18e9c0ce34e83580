"""Compute a decoder layer on the fast path: MLA in MQA form, routers, experts.

For one token a product takes as long as reading its weights, and a layer is two dozen short
kernels. `CompiledStep` therefore runs all but the cache, the selection and attention in three
functions under torch.compile with coordinate descent. The compiler fuses the products of one row
with norms, RoPE, the gathering of experts and residuals.

Dims: B sequences, S queries, T keys, H heads, E hidden, Q and c the latents of queries and keys, n
and r the dims of a head without and with RoPE, v of its values, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache import ops
from indexcache.models.blocks import BlockExperts
from indexcache.models.effective import has_stock_forward, is_plain, weight_of
from indexcache.models.family import Family, either
from indexcache.models.fast import token
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.visible import Visible
from indexcache.models.mla import Norm, Projections, Rope, head_weights, project, split_heads
from indexcache.models.selector import on_device
from indexcache.models.timing import timed
from indexcache.ops.step import runs
from indexcache.ops.tuning import current

INFERENCE_ONLY = "The fast path is for inference: call model.eval() and use torch.no_grad()."

# Wraps a function before it is installed: `torch.compile`, or the identity.
Wrap = Callable[[Any], Any]


def has_one_choice_of_groups(module: Any) -> bool:
    """Return whether a module is transformers' router and must choose all groups of experts."""
    return (
        "e_score_correction_bias" in module.__dict__.get("_buffers", ())
        and has_stock_forward(module)
        and getattr(module, "num_group", 0) == getattr(module, "topk_group", None)
    )


def route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts as stock does, without the choice of groups, in a third of the kernels.

    Returns:
        Logits [B S, experts], and weights and indices [B S, k].
    """
    if not torch.compiler.is_compiling() and not has_stock_forward(router):
        return type(router).forward(router, x)  # Its class was changed since.
    x = x.view(-1, router.hidden_dim)
    weight = weight_of(router)
    # Products of bf16 are exact in fp32, in which tensor cores add them up. A compiled product of
    # one row is a sum in fp32 anyway.
    compiled_row = x.shape[0] == 1 and torch.compiler.is_compiling()
    plain = not compiled_row and not x.requires_grad  # The product in fp32 has no gradient.
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and plain:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(x.float(), weight.float())
    scores = logits.sigmoid()
    indices = torch.topk(
        scores + weight_of(router, "e_score_correction_bias"), k=router.top_k, dim=-1, sorted=False
    )[1]
    weights = scores.gather(1, indices)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, indices


def attention_forward(
    a: Any, returns_ids: bool, projection: Callable[[Any, Tensor, Rope], Projections]
) -> Callable[..., Any]:
    """Make the forward of an attention module `a`: MLA in MQA form.

    Queries absorb the key part of kv_b_proj, attention runs over latents, and its output passes the
    value part.

    Args:
        returns_ids: return the selection as well, as families with native sharing do.
        projection: `mla.project` for this family.
    """

    def forward(
        hidden_states: Tensor,
        position_embeddings: Rope,
        attention_mask: Visible,
        cache: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: ops.Selection | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple:
        cache = either(cache, past_key_values)
        batch, queries, _width = hidden_states.shape
        if not has_stock_forward(a):
            raise ValueError(f"{type(a).__name__} replaced the forward that the fast path runs.")
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ValueError(INFERENCE_ONLY)
        with timed("linears"):
            q_latent, q_nope, q_rot, latent, k_rot = projection(
                a, hidden_states, position_embeddings
            )
            latents = _cached(cache, a, latent, k_rot, attention_mask.total)
        selection = _selection(
            a,
            hidden_states,
            q_latent,
            position_embeddings,
            attention_mask,
            position_ids,
            cache,
            prev_topk_indices,
        )
        with timed("linears"):
            w_k, w_v, bias = head_weights(a, latent)
            absorbed = latents.new_empty(batch, queries, a.num_heads, latents.shape[-1])
            _heads_times(q_nope, w_k, absorbed[..., : a.kv_lora_rank])
            absorbed[..., a.kv_lora_rank :] = q_rot
            del q_nope, q_rot
        with timed("attention"), without_autocast(absorbed):
            out, _lse = ops.sparse_mla(
                absorbed,
                latents,
                selection.ids,
                a.scaling,
                value_dim=a.kv_lora_rank,
                groups=selection.groups,
            )
            del absorbed
        with timed("linears"):
            values = out.new_empty(batch, queries, a.num_heads, a.v_head_dim)
            _heads_times(out, w_v.transpose(1, 2), values)
            if bias is not None:
                values += bias
            out = a.o_proj(values.flatten(2))
        return (out, None, selection) if returns_ids else (out, None)

    return forward


def _selection(
    a: Any,
    x: Tensor,
    q_latent: Tensor,
    rope: Rope,
    visible: Visible,
    position_ids: Tensor | None,
    cache: Any,
    previous: ops.Selection | None,
) -> ops.Selection:
    """Return the selection of a layer's indexer, or else the one of the layer before."""
    if a.indexer is not None:
        selection = a.indexer(x, q_latent, rope, visible, position_ids, cache)
        # An indexer whose forward another library replaced returns ids.
        return ops.Selection(selection) if isinstance(selection, Tensor) else selection
    if previous is None:
        raise ValueError("A shared layer needs the selection of a full layer before it.")
    return on_device(previous, x.device)


def _cached(cache: Any, a: Any, latent: Tensor, k_rot: Tensor, total: int | None = None) -> Tensor:
    """Append latents [B, S, c] and rotary keys [B, S, r]; return all tokens' [B, T, c + r].

    Raises:
        ValueError: the cache holds something else than the latents of T = `total` tokens.
    """
    if isinstance(cache, FastCache):
        return cache.layers[a.layer_idx].store(latent, k_rot)
    if cache is None:
        return torch.cat([latent, k_rot], -1)
    entry = cache.layers[a.layer_idx]
    held = entry.keys if entry.is_initialized else None
    if held is not None and (held.shape[1] != 1 or held.shape[-1] != a.kv_lora_rank):
        raise ValueError(
            f"This cache holds {held.shape[1]} heads of {held.shape[-1]} values a token, got a "
            f"latent of {a.kv_lora_rank}: another model filled it, or a transformers that caches "
            "expanded keys; start a new one."
        )
    if held is not None and held.dtype != latent.dtype:
        raise ValueError(
            f"This cache holds {held.dtype}, the model gives {latent.dtype}; start a new one."
        )
    latents, rotary = cache.update(latent.unsqueeze(1), k_rot.unsqueeze(1), a.layer_idx)
    total = latents.shape[2] if total is None else total
    # A static cache returns its whole capacity, whose end holds nothing.
    latents, rotary = latents[:, :, :total], rotary[:, :, :total]
    if latents.shape != (len(latent), 1, total, a.kv_lora_rank):
        raise ValueError(
            f"This cache returned {list(latents.shape)} for {len(latent)} sequences of {total} "
            f"latents of {a.kv_lora_rank}; start a new one."
        )
    return torch.cat([latents, rotary], -1)[:, 0]


def _heads_times(x_BSHm: Tensor, w_Hmn: Tensor, out_BSHn: Tensor) -> None:
    """Write out[.., h, :] = x[.., h, :] @ w[h] without copies of x or out in another order."""
    heads = w_Hmn.shape[0]
    x, out = (
        t.view(t.shape[0] * t.shape[1], heads, t.shape[-1]).transpose(0, 1)
        for t in (x_BSHm.to(out_BSHn.dtype), out_BSHn)
    )
    with without_autocast(x):
        torch.bmm(x, w_Hmn.to(x.dtype), out=out)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Compute in the dtypes that the tensors have, as kernels do, also inside of autocast."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@dataclass(frozen=True)
class CompiledStep:
    """The compiled functions of a layer for one token of one sequence.

    All tensors have the model's dtype; x is the hidden state [1, 1, E].

    Attributes:
        before: (layer, x, (cos, sin) [1, 1, r]) -> x normed, q_latent [1, 1, Q], absorbed queries
            [1, 1, H, c + r], latent [1, 1, c], rotary key [1, 1, r].
        after: (layer, x, attention's output [1, 1, H, c]) -> x with attention added.
        feed: (layer, x) -> x with the MLP added.
    """

    before: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    after: Callable[..., Tensor]
    feed: Callable[..., Tensor]

    @staticmethod
    def of(rotate: Callable[..., Rope], norm: Norm) -> CompiledStep:
        """Compile the functions; `rotate` and `norm` are those of `mla.project`."""
        wrap = wrap_step()
        return CompiledStep(
            wrap(partial(_before, rotate, norm)), wrap(_after), wrap(partial(_feed, norm))
        )


def runs_in_pieces(layer: Any) -> bool:
    """Return whether `CompiledStep` may run this layer.

    Its functions read weights and skip forwards, so they must not run where a forward does more
    than stock's, or another implementation of experts was chosen.
    """
    config = getattr(getattr(layer.mlp, "experts", None), "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    plain = all(is_plain(m) for m in layer.modules()) and layer.self_attn.kv_b_proj.bias is None
    return plain and implementation in (None, "eager", "grouped_mm", "batched_mm")


def wrap_step() -> Wrap:
    """Return a torch.compile that writes products of one row as reductions.

    It tunes each of them on the device at the first step.
    """
    return partial(torch.compile, dynamic=True, options={"coordinate_descent_tuning": True})


def _before(
    rotate: Callable[..., Rope], norm: Norm, layer: Any, x: Tensor, rope: Rope
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a = layer.self_attn
    x = norm(layer.input_layernorm, x)
    q_latent, q_nope, q_rot, latent, k_rot = project(rotate, norm, a, x, rope)
    q = torch.einsum("bshn,hnc->bshc", q_nope, split_heads(a, weight_of(a.kv_b_proj))[0])
    return x, q_latent, torch.cat([q, q_rot], -1), latent, k_rot


def _after(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    a = layer.self_attn
    w_v = split_heads(a, weight_of(a.kv_b_proj))[1]
    return x + a.o_proj(torch.einsum("bshc,hvc->bshv", out, w_v).flatten(2))


def _feed(norm: Norm, layer: Any, x: Tensor) -> Tensor:
    mlp = layer.mlp
    y = norm(layer.post_attention_layernorm, x)
    if not hasattr(mlp, "experts"):
        return x + _mlp_of_one(mlp, y)
    _logits, weights, indices = mlp.gate(y)
    return (
        x
        + _experts_of_one(mlp.experts, y[0], indices[0], weights[0])
        + _mlp_of_one(mlp.shared_experts, y)
    )


def _experts_of_one(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Run the experts of one token x [1, E], as transformers' `batched_mm_experts_forward` does.

    Compiled, gathering is fused into the products. Indices are int64 [k], weights fp32 [k].
    """
    if isinstance(experts, BlockExperts):
        if not experts.fuses(x):
            return experts(x, indices[None], weights[None])[0]
        gate_up, down = (experts.chosen(n, indices, x.dtype) for n in ("gate_up_proj", "down_proj"))
        act = F.silu
    else:
        gate_up = weight_of(experts, "gate_up_proj")[indices]
        down, act = weight_of(experts, "down_proj")[indices], experts.act_fn
    gate, up = (gate_up @ x[0]).chunk(2, -1)
    out = down @ _materialised(act(gate) * up)[..., None]
    return (out[..., 0] * weights[:, None]).sum(0).to(x.dtype)


def _mlp_of_one(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_materialised(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def _materialised(x: Tensor) -> Tensor:
    """Make the compiler write x to memory; else each row of the next product computes it again."""
    return torch.as_strided(x, x.shape, x.stride())


def layer_forward(
    layer: Any, family: Family, step: CompiledStep, indexes: Callable[[], bool]
) -> Callable[..., Any]:
    """Make the forward of a decoder layer: `step` for one token of one sequence, else stock.

    The step needs a `FastCache`. In a `Decoder` the kernels of `ops.step` take its place where the
    tuning says so.

    Args:
        indexes: returns whether the layer's indexer is about to compare keys in fp8.
    """
    a = layer.self_attn
    stock = layer.forward
    returns_ids = family.native_sharing
    fits_attention = token.fits_attention(layer, family)
    fits_experts = hasattr(layer.mlp, "experts") and token.fits_experts(
        layer, has_one_choice_of_groups(layer.mlp.gate)
    )

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = either(kwargs.get("cache"), kwargs.get("past_key_values"))
        if args or hidden_states.shape[:2] != (1, 1) or not isinstance(cache, FastCache):
            return stock(hidden_states, *args, **kwargs)
        rope = kwargs["position_embeddings"]
        entry = cache.layers[a.layer_idx]
        tuning = current().step
        in_decoder = (
            entry.positions is not None
            and runs(hidden_states)
            and not torch.is_autocast_enabled(hidden_states.device.type)
        )
        by_kernels = in_decoder and fits_attention and tuning.products
        with timed("linears"):
            if by_kernels:
                ready = tuning.indexer and entry.indexer_scales is not None and indexes()
                x, q_latent, q, latents, projected = token.before(
                    layer, hidden_states, rope, entry, a.indexer if ready else None
                )
            else:
                projected = None
                x, q_latent, q, latent, k_rot = step.before(layer, hidden_states, rope)
                latents = _cached(cache, a, latent, k_rot)
        visible = kwargs.get("attention_mask") or Visible()
        visible.memory["projected"] = projected
        positions = kwargs.get("position_ids")
        previous = kwargs.get("prev_topk_indices")
        selection = _selection(a, x, q_latent, rope, visible, positions, cache, previous)
        with timed("attention"):
            if by_kernels and tuning.attention:
                out = token.attend(layer, q, latents, selection.ids)
            else:
                out, _lse = ops.sparse_mla(
                    q, latents, selection.ids, a.scaling, value_dim=a.kv_lora_rank
                )
        with timed("linears"):
            x = (token if by_kernels else step).after(layer, hidden_states, out)
        with timed("mlp"):
            by_kernels = in_decoder and fits_experts and tuning.experts
            x = (token if by_kernels else step).feed(layer, x)
        return (x, selection) if returns_ids else x

    return forward
