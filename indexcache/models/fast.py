"""The fast path: sparse attention of a loaded transformers model without the [B, S, H, T] scores and the dense mask.

Stock transformers holds the scores of every index head and scatters the ids into a mask over all keys. Here the same
weights run through `indexcache.ops`: the indexer's scores in chunks, exact top-k, and attention in MQA form over the
gathered latents. The cache is transformers' own, filled with latents; `use_pattern` and `model.generate` work as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from indexcache import ops
from indexcache.models.family import decoder_layers, family_of, indexers
from indexcache.models.seam import in_force
from indexcache.models.selector import StockSelector, choose_selector


@dataclass(frozen=True)
class Padding:
    """All that is left of an attention mask: how many positions at the left of each sequence are padding."""

    left: tuple[int, ...] | None = None

    def groups(self, batch: int) -> list[tuple[slice, int]]:
        """(rows, padding) of neighbouring sequences with the same padding."""
        if self.left is None:
            return [(slice(0, batch), 0)]
        starts = [i for i in range(batch) if i == 0 or self.left[i] != self.left[i - 1]]
        return [(slice(a, b), self.left[a]) for a, b in zip(starts, [*starts[1:], batch], strict=True)]


class FastSelector(StockSelector):
    """Selections by `ops.index_topk`. Ids are int32 [B, S, k], ascending, -1 where a row has fewer than k keys."""

    path = "fast"

    def full(self, layer: int, indexer: Any, x: Tensor, q_resid: Tensor, rope, mask: Any, positions, cache: Any, pool: int = 0):
        return self._select(layer, indexer, x, q_resid, rope, mask, cache, pool)

    def reindex(self, layer: int, indexer: Any, x: Tensor, q_resid: Tensor, rope, mask: Any, cache: Any, pool: Tensor) -> Tensor:
        return self._select(layer, indexer, x, q_resid, rope, mask, cache, 0, pool)[0]

    @torch.no_grad()
    def _select(self, layer, indexer, x, q_resid, rope, mask: Padding, cache, pool: int, candidates: Tensor | None = None):
        q, k, w = self.family.project(indexer, x, q_resid, rope)
        if cache is not None:
            k = cache.update_indexer(k, layer)
        k = k.to(q.dtype)
        parts = []
        for rows, left in mask.groups(x.shape[0]):
            inner = None if candidates is None else _shift(candidates[rows], -left)
            offset = k.shape[1] - x.shape[1] - left
            found = ops.index_topk(q[rows], k[rows, left:], w[rows], None, indexer.index_topk, offset, inner, pool=pool)
            parts.append([_shift(ids, left) for ids in (found if isinstance(found, tuple) else (found,))])
        ids = torch.cat([p[0] for p in parts])
        return ids, torch.cat([p[1] for p in parts]) if pool else None


def _shift(ids: Tensor, by: int) -> Tensor:
    return ids if by == 0 else torch.where(ids < 0, ids, ids + by)


class Accelerated:
    """A model on the fast path. `undo()` (or leaving it as a context) restores stock, also after an exception."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._before: list[tuple[nn.Module, Any]] = []

    def undo(self) -> None:
        """Restore the stock model; calling it twice changes nothing. Raises ValueError under a pattern."""
        if self._before and in_force(self.model):
            raise ValueError("Leave use_pattern before undoing accelerate: the pattern is in force on the fast path.")
        for module, forward in reversed(self._before):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        if self._before:
            choose_selector(self.model, None)
            _running.discard(self.model)
        self._before.clear()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _replace(self, module: nn.Module, forward: Any) -> None:
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


_running: WeakSet[nn.Module] = WeakSet()


def accelerate(model: nn.Module) -> Accelerated:
    """Turn a loaded model to the fast path, until `undo`. Weights, module tree and state dict stay as they are.

    Results differ from stock by rounding, and where two keys have all but the same indexer score, by which of them is
    selected. Inference only; attention weights are not returned.

    Raises:
        ValueError: unknown family, a model that is accelerated already or under a pattern, one without latent queries.
    """
    family = family_of(model)
    if model in _running:
        raise ValueError("This model is accelerated already; undo that first.")
    if in_force(model):
        raise ValueError("Call accelerate outside of use_pattern; patterns then apply to the accelerated model.")
    layers = decoder_layers(model)
    if any(getattr(layer.self_attn, "q_a_proj", None) is None for layer in layers):
        raise ValueError("The fast path needs queries from a latent (q_lora_rank); this model has none.")
    selector = FastSelector(model)
    done = Accelerated(model)
    try:
        done._replace(model.model, _model_forward(model))  # type: ignore[arg-type]
        for i, (layer, indexer) in enumerate(zip(layers, indexers(model), strict=True)):
            done._replace(layer.self_attn, _attention_forward(layer.self_attn, family.native_sharing))  # type: ignore[arg-type]
            if indexer is not None:
                done._replace(indexer, _indexer_forward(selector, i, indexer))
        choose_selector(model, selector)
        _running.add(model)
    except BaseException:
        done.undo()
        raise
    return done


def _model_forward(model: Any):
    """The decoder's forward with a `Padding` in the place of the dense causal mask."""
    stock, names = model.model.forward, set(model.config.layer_types) | {"indexed_attention"}

    def forward(input_ids=None, attention_mask=None, *args: Any, **kwargs: Any):
        if model.training or (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())):
            raise ValueError("The fast path is for inference: call model.eval() and use torch.no_grad().")
        padding = padding_of(attention_mask)
        return stock(input_ids, dict.fromkeys(names, padding), *args, **kwargs)

    return forward


def padding_of(mask: Any) -> Padding:
    """A [B, T] mask (1: token, 0: padding) as the padding at its left; padding at the right needs none, causality hides it.

    Raises:
        ValueError: a mask of another form, or holes between tokens.
    """
    if mask is None:
        return Padding()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("The fast path takes an attention mask [batch, tokens] of ones and zeros, or none.")
    held = mask.bool()
    left = held.int().argmax(-1)
    count = held.sum(-1)
    last = mask.shape[1] - held.flip(-1).int().argmax(-1)
    if bool((count == 0).any()) or bool((last - left != count).any()):
        raise ValueError("The attention mask has a sequence without tokens or with holes; the fast path takes padding at the ends.")
    return Padding(tuple(left.tolist())) if int(left.max()) else Padding()


def _indexer_forward(selector: FastSelector, layer: int, indexer: Any):
    def forward(x: Tensor, q_resid: Tensor, rope, mask: Padding, position_ids=None, past_key_values=None) -> Tensor:
        return selector.full(layer, indexer, x, q_resid, rope, mask, position_ids, past_key_values)[0]

    return forward


def _attention_forward(attention: Any, returns_ids: bool):
    """MLA in MQA form: queries absorb kv_b_proj's key part, attention runs over latents, its value part comes after."""
    a = attention
    rotate = family_of(a).rotate

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Padding,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        **_: Any,
    ):
        batch, queries, _width = hidden_states.shape
        q_resid = a.q_a_layernorm(a.q_a_proj(hidden_states))
        q = a.q_b_proj(q_resid).view(batch, queries, -1, a.qk_head_dim)
        q_pass, q_rot = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
        latent, k_rot = a.kv_a_proj_with_mqa(hidden_states).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
        latent = a.kv_a_layernorm(latent).unsqueeze(1)
        q_rot, k_rot = rotate(q_rot, k_rot.unsqueeze(2), *position_embeddings, unsqueeze_dim=2)
        k_rot = k_rot.transpose(1, 2)
        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, a.layer_idx)
            if latent.shape[-1] != a.kv_lora_rank:
                raise ValueError("This cache was filled by stock transformers, which caches expanded keys and values; start a new one.")
        if a.indexer is not None:
            ids = a.indexer(hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values=past_key_values)
        elif prev_topk_indices is not None:
            ids = prev_topk_indices
        else:
            raise ValueError("A shared layer needs the selection of a full layer before it.")
        w_k, w_v = a.kv_b_proj.weight.view(a.num_heads, -1, a.kv_lora_rank).split([a.qk_nope_head_dim, a.v_head_dim], 1)
        absorbed = torch.cat([torch.einsum("bshn,hnc->bshc", q_pass, w_k), q_rot], -1)
        cached = torch.cat([latent, k_rot], -1)[:, 0]
        out, _lse = ops.sparse_mla(absorbed, cached, ids, a.scaling, value_dim=a.kv_lora_rank)
        out = a.o_proj(torch.einsum("bshc,hvc->bshv", out, w_v).flatten(2))
        return (out, None, ids) if returns_ids else (out, None)

    return forward
