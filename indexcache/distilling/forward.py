"""Run a training forward: attention for each packed document, and the losses of the indexers.

While a `DistillForward` is in force, the attention of every decoder layer runs here: dense
(causal, over each document alone) in the warm-up, over the selection of the pattern in the sparse
stage. Each layer hands its queries and latents, detached, to the indexer that serves it. With the
last layer of a group, that indexer's loss is computed and its gradient is taken at once, so that
memory holds one group's queries and latents, never an attention matrix. Everything else in the
model (norms, MLPs, experts, embedding) is stock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from indexcache import ops
from indexcache.distilling.loss import OBJECTIVES, distill_loss
from indexcache.distilling.rows import Row
from indexcache.models.family import DsaModule, decoder_layers, family_of
from indexcache.models.mla import Rope, head_weights, project, stock_norm
from indexcache.models.patch import Patches
from indexcache.models.regions import in_backward
from indexcache.ops import AttentionTarget
from indexcache.pattern import Pattern

Projected = tuple[Tensor, Tensor, Tensor]
"""q, k and w of an indexer."""

LINEAR_MEMORY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""SDPA backends whose memory is linear in the length. We raise rather than fall back to the
quadratic one. cuDNN is excluded: it replans for every document length."""


class DistillForward:
    """One forward pass over one row, and the gradients that the indexers take from it.

    Args:
        indexers: the trainable indexers by layer number, from `trainable_indexers`.
        sparse: attention runs over the selection (sparse stage) instead of over all visible keys
            (warm-up).
        objective: one of `loss.OBJECTIVES` (each F or R layer learns all layers it serves), "own"
            (its own attention alone), or "none" (as "multi", and the indexers have no gradients).
        weights: how much each layer of the model counts in its group; None: all the same.
        answer_weight: weight of an additional loss, the mean over the queries of a row that must
            find an answer; `losses` do not count it.

    Attributes:
        losses: by layer, each indexer's loss in the last pass, fp32 scalars, nats a token.
    """

    def __init__(
        self,
        model: DsaModule,
        pattern: Pattern,
        indexers: nn.ModuleDict,
        *,
        sparse: bool,
        objective: str = "multi",
        weights: Sequence[float] | None = None,
        answer_weight: float = 0.0,
    ):
        self.answer_weight = answer_weight
        self.pattern = pattern
        self.indexers = indexers
        self.sparse = sparse
        self.objective = objective
        self.topk = int(model.config.index_topk)
        self.publishers = pattern.publishers()
        self.groups = served_layers(pattern, own=objective == "own")
        self.owner = {i: layer for layer, group in self.groups.items() for i in group}
        counts = [1.0] * len(pattern) if weights is None else weights
        self.weights = {
            layer: [counts[i] / sum(counts[j] for j in group) for i in group]
            for layer, group in self.groups.items()
        }
        self.losses: dict[int, Tensor] = {}
        # True from the start of a row to the end of its forward pass, and not in the
        # recomputations of the backward pass, which come after.
        self.collecting = False
        self.gradient_scale = 1.0
        self.cuts: tuple[tuple[int, int], ...] = ()
        self.asked: tuple[tuple[int, int], ...] = ()
        # (start, stop, number) of documents that run as a batch: all of a row where they have one
        # length, in the sparse stage, whose selections tell them apart.
        self.blocks: list[tuple[int, int, int]] = []
        self._selected: dict[int, list[Tensor]] = {}
        self._pool: list[Tensor] = []
        self._projected: dict[int, Projected] = {}
        self._targets: dict[int, list[AttentionTarget]] = {}

    @contextmanager
    def row(self, row: Row, *, collect: bool, gradient_scale: float = 1.0) -> Iterator[None]:
        """Run the forward pass of one row inside this context.

        Args:
            collect: compute each indexer's loss and gradients, times `gradient_scale`.
        """
        self.cuts = row.cuts
        self.asked = row.asked if self.answer_weight else ()
        self.blocks = [(a, b, 1) for a, b in row.cuts]
        if self.sparse and len({b - a for a, b in row.cuts}) == 1:
            self.blocks = [(0, len(row.ids), len(row.cuts))]
        self.collecting = collect
        self.gradient_scale = gradient_scale
        self.losses.clear()
        self._selected.clear()
        self._projected.clear()
        self._targets.clear()
        try:
            yield
        finally:
            self.collecting = False
            self._pool = []
            self._projected.clear()
            self._targets.clear()

    def run_indexer(self, layer: int, x: Tensor, q_latent: Tensor, rope: Rope) -> None:
        """Run the indexer of an F or R layer, on detached inputs, where this pass needs it."""
        needed = self.collecting or (self.sparse and layer not in self._selected)
        if self.pattern[layer] == "S" or not needed:
            return
        indexer = self.indexers[str(layer)]
        cos, sin = rope
        with torch.enable_grad() if self.collecting else torch.no_grad(), _saved_apart():
            q, k, w = indexer(x.detach(), q_latent.detach(), (cos.detach(), sin.detach()))
        if self.collecting:
            self._projected[layer] = (q, k, w)
        if self.sparse:
            self._select(layer, q.detach(), k.detach(), w.detach())

    def _select(self, layer: int, q: Tensor, k: Tensor, w: Tensor) -> None:
        """Select the top k of every document; an F layer with R layers behind it makes pools."""
        publishes = layer in self.publishers
        pool_size = self.topk * (self.pattern.pool_factor or 0) if publishes else 0
        selections = []
        for i, (a, b, number) in enumerate(self.blocks):
            q_B, k_B, w_B = (x[0, a:b].unflatten(0, (number, -1)) for x in (q, k, w))
            pool = self._pool[i] if self.pattern[layer] == "R" else None
            selections.append(
                ops.index_topk(q_B, k_B, w_B, None, self.topk, 0, pool, pool=pool_size)
            )
        self._selected[layer] = [selection.ids for selection in selections]
        if publishes:
            self._pool = [s.pool for s in selections if s.pool is not None]

    def resume(self, ids: dict[int, list[Tensor]], pool: list[Tensor]) -> None:
        """Put the selections and the pool in force that layers left in an earlier pass."""
        self._selected.update(ids)
        self._pool = pool

    def left(self) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return what `resume` takes: the last selection that was made, and the pool."""
        last = max(self._selected, default=None)
        return {} if last is None else {last: self._selected[last]}, self._pool

    def selection(self, layer: int) -> list[Tensor]:
        """Return the ids that this layer attends over: int32 [documents, n, k] by block."""
        return self._selected[self.pattern.source(layer) if self.pattern[layer] == "S" else layer]

    def add_target(self, layer: int, target: AttentionTarget) -> None:
        """Hand over one layer's attention; the last layer of a group finishes the group."""
        if not self.collecting or layer not in self.owner:
            return
        owner = self.owner[layer]
        self._targets.setdefault(owner, []).append(target)
        if layer == self.groups[owner][-1]:
            self._finish_group(owner, self._targets.pop(owner))

    def _finish_group(self, owner: int, targets: list[AttentionTarget]) -> None:
        """Compute the loss of the indexer of layer `owner` on its group, and its gradients."""
        q, k, w = self._projected.pop(owner)

        def summed(block: int, spans: list[tuple[int, int]] | None = None) -> Tensor:
            a, b, _ = self.blocks[block]
            return distill_loss(
                q[0, a:b],
                k[0, a:b],
                w[0, a:b],
                [target.cut(a, b) for target in targets],
                self.weights[owner],
                objective=self.objective if self.objective in OBJECTIVES else "multi",
                ids_SK=_flat(self._selected[owner][block]) if self.sparse else None,
                topk=self.topk,
                spans=spans,
            )

        with torch.enable_grad(), _saved_apart():
            loss = torch.stack([summed(i) for i in range(len(self.blocks))]).sum() / q.shape[1]
            trained = loss
            for i, (a, b, _) in enumerate(self.blocks):
                if spans := [(x - a, y - a) for x, y in self.asked if a <= x < b]:
                    count = sum(y - x for x, y in self.asked)
                    trained = trained + summed(i, spans) * (self.answer_weight / count)
            if loss.requires_grad:
                (trained * self.gradient_scale).backward()
        self.losses[owner] = loss.detach()


def served_layers(pattern: Pattern, own: bool = False) -> dict[int, tuple[int, ...]]:
    """Return, for each F and R layer, the layers whose attention its indexer learns.

    These are itself and the S layers that read its selection. An F layer does not learn for the R
    layers that search its pool: each of those learns its own attention.

    Args:
        own: each F and R layer learns itself alone.
    """
    return {
        i: tuple(
            j
            for j, role in enumerate(pattern.roles)
            if j == i or (role == "S" and pattern.source(j) == i and not own)
        )
        for i, role in enumerate(pattern.roles)
        if role != "S"
    }


def _saved_apart() -> AbstractContextManager[Any]:
    """Save tensors for the backward pass here, and not by an activation checkpoint around it."""
    if torch.is_grad_enabled():
        return saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
    return nullcontext()


@contextmanager
def attention_replaced(model: DsaModule, forward: DistillForward) -> Iterator[None]:
    """Let `forward` compute the attention of every layer, until the context is left."""
    family = family_of(model)
    with Patches() as patches:
        for i, layer in enumerate(decoder_layers(model)):
            attention = layer.self_attn
            patches.replace(
                attention,
                _attention_forward(attention, i, forward, family.rotate, family.native_sharing),
            )
        yield


def run_decoder(model: DsaModule, row: Row, device: torch.device | str) -> Tensor:
    """Return the final hidden states [1, T, E] of one row.

    Positions start anew at every document.
    """
    ids = torch.from_numpy(row.ids)[None].to(device)
    return model.model(
        input_ids=ids, use_cache=False, **decoder_arguments(model, row, device)
    ).last_hidden_state


def decoder_arguments(model: DsaModule, row: Row, device: torch.device | str) -> dict[str, Any]:
    """Return the positions of a row for the decoder, int64 [1, T], and masks that mask nothing."""
    positions = torch.cat([torch.arange(b - a) for a, b in row.cuts])[None].to(device)
    # With a mask for every layer type, transformers makes none; the attention here needs none.
    masks = dict.fromkeys({*model.config.layer_types, "indexed_attention"})
    return {"position_ids": positions, "attention_mask": masks}


def _attention_forward(
    attention: Any, layer: int, forward: DistillForward, rotate: Any, returns_ids: bool
) -> Any:
    """Make the function that replaces the forward of a layer's attention, for this thread."""
    owner = threading.get_ident()

    def attention_forward(
        hidden_states: Tensor, position_embeddings: Rope, *_: Any, **__: Any
    ) -> tuple[Tensor | None, ...]:
        # A backward pass recomputes layers in a thread of autograd's where there is a GPU.
        if threading.get_ident() != owner and not in_backward():
            raise ValueError(
                "This model is being distilled in another thread; run it after that, or a copy."
            )
        x = hidden_states
        q_latent, q_nope, q_rot, latent, k_rot = project(
            rotate, stock_norm, attention, x, position_embeddings
        )
        forward.run_indexer(layer, x, q_latent, position_embeddings)
        w_k, w_v, bias = head_weights(attention, latent)
        lse = None
        if forward.sparse:
            q = torch.cat([torch.einsum("bthm,hmc->bthc", q_nope, w_k), q_rot], -1)
            out = _sparse(
                attention, q, torch.cat([latent, k_rot], -1), w_v, forward.selection(layer)
            )
            out = out if bias is None else out + bias
        else:
            q = torch.cat([q_nope, q_rot], -1)
            out, lse = _dense(attention, q, latent, k_rot, forward.cuts)
            lse = None if bias is not None else lse  # It has the keys' bias, the target has not.
        if forward.collecting:
            forward.add_target(layer, _target(attention, q_nope, q_rot, latent, k_rot, w_k, lse))
        out = attention.o_proj(out.flatten(2))
        return (out, None, None) if returns_ids else (out, None)

    return attention_forward


@torch.no_grad()
def _target(
    attention: Any,
    q_nope: Tensor,
    q_rot: Tensor,
    latent: Tensor,
    k_rot: Tensor,
    w_k: Tensor,
    lse: Tensor | None,
) -> AttentionTarget:
    """Return the detached tensors from which a layer's attention is computed."""
    if not attention.qk_nope_head_dim:
        return AttentionTarget(q_rot[0].detach(), k_rot[0].detach(), None, attention.scaling, lse)
    q = torch.cat([q_nope, q_rot], -1)[0].detach()
    keys = torch.cat([latent, k_rot], -1)[0].detach()
    # The weight is copied, because FSDP2 frees a sharded one before the group ends.
    return AttentionTarget(q, keys, w_k.detach().clone(), attention.scaling, lse)


def _sparse(
    attention: Any, q_BSHE: Tensor, latent_BTE: Tensor, w_v: Tensor, ids: list[Tensor]
) -> Tensor:
    """Attend in MQA form over each document's selection: [1, T, H, v]."""
    outs = []
    start = 0
    for ids_BSk in ids:
        batch, length, _ = ids_BSk.shape
        documents = slice(start, start + batch * length)
        out, *_ = ops.sparse_mla(
            q_BSHE[0, documents].unflatten(0, (batch, length)),
            latent_BTE[0, documents].unflatten(0, (batch, length)),
            ids_BSk,
            attention.scaling,
            value_dim=attention.kv_lora_rank,
        )
        outs.append(out.flatten(0, 1))
        start = documents.stop
    return torch.einsum("bthc,hvc->bthv", torch.cat(outs)[None], w_v)


def _flat(ids_BSk: Tensor) -> Tensor:
    """Number the ids of a batch of documents through: int32 [B S, k]."""
    first = torch.arange(len(ids_BSk), device=ids_BSk.device, dtype=ids_BSk.dtype)
    moved = ids_BSk + first[:, None, None] * ids_BSk.shape[1]
    return torch.where(ids_BSk < 0, ids_BSk, moved).flatten(0, 1)


def _dense(
    attention: Any, q_BTHD: Tensor, latent: Tensor, k_rot: Tensor, cuts: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor | None]:
    """Attend causally within each document, by torch's fused kernels, in memory linear in T.

    Returns:
        [1, T, H, v], and the log-sum-exp of each query's logits, fp32 [T, H], where the kernels
        give it.
    """
    k_nope, v = (
        attention.kv_b_proj(latent)
        .unflatten(-1, (attention.num_heads, -1))
        .split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
    )
    k = torch.cat([k_nope, k_rot[:, :, None].expand(-1, -1, attention.num_heads, -1)], -1)
    # These kernels need one width for q, k and v.
    width = max(q_BTHD.shape[-1], attention.v_head_dim)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).transpose(1, 2) for t in (q_BTHD, k, v))
    outs, lses = zip(
        *(_causal(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], attention.scaling) for i, j in cuts),
        strict=True,
    )
    lse = None if any(x is None for x in lses) else torch.cat(lses, 2)[0].T
    return torch.cat(outs, 2).transpose(1, 2)[..., : attention.v_head_dim], lse


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attend within one document [1, H, n, width].

    The log-sum-exp [1, H, n] comes along where nothing needs a gradient and flash attention runs.
    """
    plain = q.is_cuda and q.shape[-1] % 8 == 0 and not torch.is_grad_enabled()
    if plain and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, False)):
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash_attention(q, k, v, 0.0, True, scale=scale)
        return out, lse
    with sdpa_kernel(LINEAR_MEMORY) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None
