"""A training forward of a loaded model: attention per packed document, and what it leaves for the indexers.

While a `Lesson` is in force, the attention of every decoder layer runs here: dense (causal, over each document alone) in the
warm-up, over the selection of the pattern in the sparse stage. Each layer hands its queries and latents, detached, to the
indexer that serves it. When the last layer of a group has come by, that indexer's loss is computed and its gradient is
taken at once, so that what is held is one group's queries and latents, never an attention matrix. The rest of the model
(norms, MLPs, experts, embedding) is stock.
"""

from __future__ import annotations

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
from indexcache.distilling.loss import distill_loss
from indexcache.distilling.rows import Row
from indexcache.models.family import decoder_layers, family_of
from indexcache.models.mla import head_weights, project, stock_norm
from indexcache.models.patch import Patches
from indexcache.ops import AttentionTarget
from indexcache.pattern import Pattern

# in memory; an error before the rest. cuDNN is left out: it would plan anew for each of the many lengths that documents have
LINEAR = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class Lesson:
    """One forward pass over one row, and the gradients that the indexers take from it.

    Args:
        students: by layer number, `indexcache.distilling.indexers.make_students`.
        sparse: attention over the selection (sparse stage) instead of over everything (warm-up).
        kind: "multi" or "avg" (each F or R layer learns all layers it serves), or "own" (its own attention alone).
        weights: how much each layer of the model counts in its group; None: all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        students: nn.ModuleDict,
        *,
        sparse: bool,
        kind: str = "multi",
        weights: Sequence[float] | None = None,
    ):
        self.pattern, self.students, self.sparse, self.kind = pattern, students, sparse, kind
        self.topk = int(model.config.index_topk)  # type: ignore[union-attr, arg-type]
        self.publishers = pattern.publishers()
        self.groups = served_layers(pattern, own=kind == "own")
        self.owner = {i: layer for layer, group in self.groups.items() for i in group}
        each = [1.0] * len(pattern) if weights is None else weights
        self.weights = {
            layer: [each[i] / sum(each[j] for j in group) for i in group]
            for layer, group in self.groups.items()
        }
        self.learning = False  # between `row` and the end of the forward pass; a recomputation in backward comes after
        self.cuts: tuple[tuple[int, int], ...] = ()
        self.factor = 1.0  # of the gradients
        self.losses: dict[int, Tensor] = {}  # fp32 scalars, nats a token, of the last pass
        self._selected: dict[int, list[Tensor]] = {}  # ids of each F and R layer, per document
        self._pool: list[Tensor] = []
        self._projected: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._teachers: dict[int, list[AttentionTarget]] = {}

    @contextmanager
    def row(self, row: Row, *, learn: bool, factor: float = 1.0) -> Iterator[None]:
        """Around the forward pass of one row. `learn`: take gradients, each loss times `factor`."""
        self.cuts, self.learning, self.factor = row.cuts, learn, factor
        for held in (self.losses, self._selected, self._projected, self._teachers):
            held.clear()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.learning, self._pool = False, []
            self._projected.clear()
            self._teachers.clear()

    def index(self, layer: int, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Run the indexer of an F or R layer, on detached inputs, where this pass needs it."""
        if self.pattern[layer] == "S" or not (
            self.learning or (self.sparse and layer not in self._selected)
        ):
            return
        with torch.enable_grad() if self.learning else torch.no_grad(), _own_graph():
            q, k, w = self.students[str(layer)](
                x.detach(), q_resid.detach(), tuple(r.detach() for r in rope)
            )
        if self.learning:
            self._projected[layer] = (q, k, w)
        if self.sparse:
            self._select(layer, q.detach(), k.detach(), w.detach())

    def _select(self, layer: int, q: Tensor, k: Tensor, w: Tensor) -> None:
        publishes, chosen, pool = layer in self.publishers, [], []
        size = self.topk * (self.pattern.pool_factor or 0) if publishes else 0
        for i, (a, b) in enumerate(self.cuts):
            candidates = self._pool[i] if self.pattern[layer] == "R" else None
            found = ops.index_topk(
                q[:, a:b], k[:, a:b], w[:, a:b], None, self.topk, 0, candidates, pool=size
            )
            chosen.append(found.ids)
            if found.pool is not None:
                pool.append(found.pool)
        self._selected[layer] = chosen
        if publishes:
            self._pool = pool

    def ids(self, layer: int) -> list[Tensor]:
        """The selection that this layer attends over: int32 [1, n, k] for each document."""
        return self._selected[self.pattern.source(layer) if self.pattern[layer] == "S" else layer]

    def teach(self, layer: int, teacher: AttentionTarget) -> None:
        """Hand over one layer's attention; with the last layer of a group, its indexer learns."""
        if not self.learning or layer not in self.owner:
            return
        owner = self.owner[layer]
        self._teachers.setdefault(owner, []).append(teacher)
        if layer != self.groups[owner][-1]:
            return
        self._learn(owner, self._teachers.pop(owner))

    def _learn(self, owner: int, teachers: list[AttentionTarget]) -> None:
        """The loss of the indexer of layer `owner` on its group's attention, and its gradients."""
        q, k, w = self._projected.pop(owner)
        with torch.enable_grad(), _own_graph():
            parts = []
            for i, (a, b) in enumerate(self.cuts):
                ids = self._selected[owner][i][0] if self.sparse else None
                cut = [t.cut(a, b) for t in teachers]
                kind = "avg" if self.kind == "avg" else "multi"
                parts.append(
                    distill_loss(
                        q[0, a:b],
                        k[0, a:b],
                        w[0, a:b],
                        cut,
                        self.weights[owner],
                        kind=kind,
                        ids_SK=ids,
                    )
                )
            loss = torch.stack(parts).sum() / q.shape[1]
            (loss * self.factor).backward()
        self.losses[owner] = loss.detach()


def served_layers(pattern: Pattern, own: bool = False) -> dict[int, tuple[int, ...]]:
    """For each F and R layer the layers whose attention its indexer learns: itself and the S layers that read its selection
    (`own`: itself alone). An F layer does not learn for the R layers that search its pool: each of those learns its own."""
    return {
        i: tuple(
            j
            for j, role in enumerate(pattern.roles)
            if j == i or (role == "S" and pattern.source(j) == i and not own)
        )
        for i, role in enumerate(pattern.roles)
        if role != "S"
    }


def _own_graph() -> AbstractContextManager:
    """Keep the saved tensors of what runs inside out of the hands of an activation checkpoint around it."""
    return (
        saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
        if torch.is_grad_enabled()
        else nullcontext()
    )


@contextmanager
def teaching(model: nn.Module, lesson: Lesson) -> Iterator[None]:
    """Replace `forward` of every layer's attention, until the context is left."""
    returns_ids = family_of(model).native_sharing
    rotate = family_of(model).rotate
    with Patches() as patches:
        for i, layer in enumerate(decoder_layers(model)):
            attention: Any = layer.self_attn
            patches.replace(
                attention, _attention_forward(attention, i, lesson, rotate, returns_ids)
            )
        yield


def run_decoder(model: Any, row: Row, device: torch.device | str) -> Tensor:
    """Final hidden states [1, T, E] of one row; positions start anew at every document."""
    ids = torch.from_numpy(row.ids)[None].to(device)
    positions = torch.cat([torch.arange(b - a) for a, b in row.cuts])[None].to(device)
    masks = dict.fromkeys(
        {*model.config.layer_types, "indexed_attention"}
    )  # none is made: attention here needs none
    return model.model(
        input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False
    ).last_hidden_state


def _attention_forward(a: Any, layer: int, lesson: Lesson, rotate: Any, returns_ids: bool):
    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, **__: Any
    ):
        x = hidden_states
        q_latent, q_nope, q_rot, latent, k_rot = project(
            rotate, stock_norm, a, x, position_embeddings
        )
        lesson.index(layer, x, q_latent, position_embeddings)
        w_k, w_v = head_weights(a)
        if lesson.sparse:
            out = _sparse(
                a,
                torch.cat([torch.einsum("bthm,hmc->bthc", q_nope, w_k), q_rot], -1),
                latent,
                k_rot,
                w_v,
                lesson.ids(layer),
            )
            lse = None
        else:
            out, lse = _dense(a, torch.cat([q_nope, q_rot], -1), latent, k_rot, lesson.cuts)
        if lesson.learning:
            lesson.teach(layer, _teacher(a, q_nope, q_rot, latent, k_rot, w_k, lse))
        out = a.o_proj(out.flatten(2))
        return (out, None, None) if returns_ids else (out, None)

    return forward


@torch.no_grad()
def _teacher(
    a: Any,
    q_nope: Tensor,
    q_rot: Tensor,
    latent: Tensor,
    k_rot: Tensor,
    w_k: Tensor,
    lse: Tensor | None,
) -> AttentionTarget:
    if not a.qk_nope_head_dim:
        return AttentionTarget(q_rot[0].detach(), k_rot[0].detach(), None, a.scaling, lse)
    q, keys = torch.cat([q_nope, q_rot], -1)[0].detach(), torch.cat([latent, k_rot], -1)[0].detach()
    return AttentionTarget(
        q, keys, w_k.detach().clone(), a.scaling, lse
    )  # a copy: sharded weights are gone when the group ends


def _sparse(
    a: Any, q_BSHE: Tensor, latent: Tensor, k_rot: Tensor, w_v: Tensor, ids: list[Tensor]
) -> Tensor:
    """MLA in MQA form over each document's selection: [1, T, H, v]."""
    latents, outs, start = torch.cat([latent, k_rot], -1), [], 0
    for some in ids:
        part = slice(start, start + some.shape[1])
        outs.append(
            ops.sparse_mla(
                q_BSHE[:, part], latents[:, part], some, a.scaling, value_dim=a.kv_lora_rank
            )[0]
        )
        start = part.stop
    return torch.einsum("bthc,hvc->bthv", torch.cat(outs, 1), w_v)


def _dense(
    a: Any, q_BTHD: Tensor, latent: Tensor, k_rot: Tensor, cuts: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each document, by torch's fused kernels, which hold no [T, T] tensor: [1, T, H, v]; and the log-sum-exp
    of each query's logits, fp32 [T, H], where they give it."""
    k_nope, v = (
        a.kv_b_proj(latent)
        .unflatten(-1, (a.num_heads, -1))
        .split([a.qk_nope_head_dim, a.v_head_dim], -1)
    )
    k = torch.cat([k_nope, k_rot[:, :, None].expand(-1, -1, a.num_heads, -1)], -1)
    width = max(q_BTHD.shape[-1], a.v_head_dim)  # those kernels want one width for q, k and v
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).transpose(1, 2) for t in (q_BTHD, k, v))
    outs, sums = zip(
        *(_causal(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], a.scaling) for i, j in cuts),
        strict=True,
    )
    lse = None if any(x is None for x in sums) else torch.cat(sums, 2)[0].T
    return torch.cat(outs, 2).transpose(1, 2)[..., : a.v_head_dim], lse


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attention of one document [1, H, n, width], and its log-sum-exp [1, H, n] where nothing needs a gradient and flash attention runs."""
    plain = q.is_cuda and q.shape[-1] % 8 == 0 and not torch.is_grad_enabled()
    if plain and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, False)):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[
            :2
        ]  # type: ignore[no-any-return]
    with sdpa_kernel(LINEAR) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None
