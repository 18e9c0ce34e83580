"""The distillation losses (method: L_multi and L_avg), streamed over blocks of queries.

One indexer, of an F or R layer, learns the attention of the layers it serves: itself and the S layers that read its selection.

    q_t = softmax(I_t),  p_t^(j) = attention of layer j, summed over heads and divided by their number
    L_multi = sum_j weight_j sum_t KL(p_t^(j) || q_t)          L_avg = sum_t KL(sum_j weight_j p_t^(j) || q_t)

Both have the gradient sum_t (q_t - sum_j weight_j p_t^(j)) with respect to I, since the weights sum to 1. So a block of queries
holds its scores, one layer's attention and their mean, turns the difference into gradients of the indexer's q, k and w on
the spot, and is dropped: nothing of size [S, T] outlives its block, nothing is kept for the backward pass but those three
gradients, O(T), and the backward pass computes nothing twice.

Shapes: S queries = T keys of one document (query s sees keys 0..s), J index heads, D index dim, H attention heads, E latent
dims, K selected ids, t queries of a block, N keys of a block (N = its last query + 1, or K).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from indexcache import ops

KINDS = ("multi", "avg")
BACKEND = "auto"  # of the warm-up: tests ask for "triton" in its interpreter, or for "torch"
BLOCK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}  # of all intermediates of a block


class Teacher(NamedTuple):
    """What the attention weights of one layer follow from, for one document: p = mean_h softmax(scale q_h . latent).

    q_SHn: queries with RoPE applied. latent_TE: keys that all heads read. absorb_Hmc: turns the first m dims of a query into
    the first c of the latent (MLA's kv_b_proj, key part); None where queries compare with the keys as they are (n = E).
    lse_SH: fp32, the logarithm of each softmax's denominator, where the attention's kernel gave it; only the fused warm-up reads it.
    """

    q_SHn: Tensor
    latent_TE: Tensor
    absorb_Hmc: Tensor | None
    scale: float
    lse_SH: Tensor | None = None

    def cut(self, start: int, stop: int) -> Teacher:
        """The same for the tokens start..stop - 1 alone."""
        lse = None if self.lse_SH is None else self.lse_SH[start:stop]
        return self._replace(
            q_SHn=self.q_SHn[start:stop], latent_TE=self.latent_TE[start:stop], lse_SH=lse
        )

    def keys(self) -> Tensor:
        """What the queries compare with as they are: [T, H, n], or [T, 1, E] where all heads read the same."""
        if self.absorb_Hmc is None:
            return self.latent_TE[:, None]
        c = self.absorb_Hmc.shape[2]
        own = torch.einsum("tc,hmc->thm", self.latent_TE[:, :c], self.absorb_Hmc)
        return torch.cat([own, self.latent_TE[:, None, c:].expand(-1, own.shape[1], -1)], -1)

    def queries(self, rows: slice) -> Tensor:
        """Absorbed queries [t, H, E]."""
        q = self.q_SHn[rows]
        if self.absorb_Hmc is None:
            return q
        m = self.absorb_Hmc.shape[1]
        return torch.cat(
            [torch.einsum("thm,hmc->thc", q[..., :m], self.absorb_Hmc), q[..., m:]], -1
        )


def distill_loss(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    teachers: Sequence[Teacher],
    weights: Sequence[float] | None = None,
    *,
    kind: str = "multi",
    ids_SK: Tensor | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """L_multi or L_avg of one indexer on one document (method.md section 4, equations 1 and 2).

    Args:
        q_SJD, k_TD, w_SJ: queries, keys and head weights of the indexer (`Family.project`), S = T; gradients reach these and
            nothing else. Products of bf16 are summed in fp32.
        teachers: the served layers' attention, of the same document.
        weights: of the layers, summing to 1; None: 1 / len(teachers) each.
        kind: "multi" or "avg"; the same gradient, values that differ by what does not depend on the indexer.
        ids_SK: int32 selected ids, distinct in a row, -1 for none: attention and softmax(I) both over this set alone (the
            sparse stage). None: over all visible keys (the warm-up).
        block_bytes: memory of a block (default: `BLOCK_BYTES` of the device).

    Returns:
        fp32 scalar, nats, summed over the queries.

    Raises:
        ValueError: an unknown kind, shapes that do not agree, weights that do not sum to 1.
    """
    if kind not in KINDS:
        raise ValueError(f"The loss is one of {', '.join(KINDS)}, not {kind!r}.")
    weights = [1 / max(len(teachers), 1)] * len(teachers) if weights is None else list(weights)
    if not teachers or len(weights) != len(teachers) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"Every served layer has a weight and they sum to 1, got {len(teachers)} layers and the weights {weights}."
        )
    length = q_SJD.shape[0]
    if (
        k_TD.shape[0] != length
        or w_SJ.shape != q_SJD.shape[:2]
        or any(t.latent_TE.shape[0] != length for t in teachers)
    ):
        raise ValueError(
            f"Indexer and attention are of one document: {length} queries, {k_TD.shape[0]} keys, weights of "
            f"{w_SJ.shape[0]}, attention of {[t.latent_TE.shape[0] for t in teachers]}."
        )
    size = block_bytes or BLOCK_BYTES.get(q_SJD.device.type, BLOCK_BYTES["cpu"])
    return _Streamed.apply(q_SJD, k_TD, w_SJ, tuple(teachers), tuple(weights), kind, ids_SK, size)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def attention_kept(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    teacher: Teacher,
    topk: int,
    block_bytes: int | None = None,
) -> Tensor:
    """The share of a layer's attention that the indexer's `topk` best keys hold, fp32, summed over the queries."""
    size = block_bytes or BLOCK_BYTES.get(q_SJD.device.type, BLOCK_BYTES["cpu"])
    total = q_SJD.new_zeros((), dtype=torch.float64)
    for rows in _blocks(q_SJD, [teacher], None, size):
        block = _Block(rows, None)
        scores = _index(block, q_SJD, k_TD, w_SJ)[1]
        best = scores.topk(min(topk, scores.shape[-1]), -1).indices
        total += _attention(block, teacher).gather(-1, best).sum(dtype=torch.float64)
    return total.float()


@torch.no_grad()
def mean_attention(
    teachers: Sequence[Teacher], block_bytes: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(queries, fp32 [t, N]) block by block: the mean over the layers of their attention, zero where a key is not visible."""
    q = teachers[0].q_SHn
    for rows in _blocks(
        q, teachers, None, block_bytes or BLOCK_BYTES.get(q.device.type, BLOCK_BYTES["cpu"])
    ):
        block = _Block(rows, None)
        total = _attention(block, teachers[0])
        for teacher in teachers[1:]:
            total += _attention(block, teacher)
        yield rows, total / len(teachers)


class _Streamed(torch.autograd.Function):
    """(q, k, w, teachers) to the loss and the gradients of q, k and w, block by block; in ops/distill.py where that runs."""

    @staticmethod
    def forward(ctx: Any, q, k, w, teachers, weights, kind, ids, size):  # type: ignore[override]
        wanted = any(ctx.needs_input_grad[:3])
        grads = (
            [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, w)]
            if wanted
            else None
        )
        value = None
        if ids is None:
            layers = [(t.q_SHn, t.keys, t.scale, t.lse_SH) for t in teachers]
            value = ops.warm_up(
                q, k, w, layers, weights, kind == "multi", grads, size, backend=BACKEND
            )
        if value is None:
            value = q.new_zeros((), dtype=torch.float64)
            for rows in _blocks(q, teachers, ids, size):
                value += _one_block(_Block(rows, ids), q, k, w, teachers, weights, kind, grads)
        if grads is not None:
            ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(grads, (q, k, w), strict=True)))
        return value.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return (*(g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None, None)


def _one_block(
    block: _Block, q, k, w, teachers, weights, kind: str, grads: list[Tensor] | None
) -> Tensor:
    """The loss of a block of queries; its share of the gradients is added to `grads`."""
    products, scores = _index(block, q, k, w)
    target = torch.zeros_like(scores)
    entropy = torch.zeros(
        (), dtype=torch.float64, device=scores.device
    )  # of the target, negative: sum p log p
    for teacher, weight in zip(teachers, weights, strict=True):
        p = _attention(block, teacher)
        target.add_(p, alpha=weight)
        if kind == "multi":
            entropy = entropy + weight * torch.xlogy(p, p).sum(dtype=torch.float64)
        del p
    if kind == "avg":
        entropy = torch.xlogy(target, target).sum(dtype=torch.float64)
    log_q = scores.sub_(scores.logsumexp(-1, keepdim=True))
    value = entropy - torch.where(target > 0, target * log_q, 0.0).sum(dtype=torch.float64)
    if grads is not None:
        d_scores = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target)
        grads[2][block.rows] = torch.bmm(products, d_scores[..., None])[..., 0]
        d_products = products.gt_(0).mul_(d_scores[:, None]).mul_(w[block.rows].float()[..., None])
        block.backward(d_products, q, k, grads)
    return value


def _index(block: _Block, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(relu(q . k) fp32 [t, J, N], scores I fp32 [t, N], -inf where not visible)."""
    products = block.products(q[block.rows], k).relu_()
    scores = torch.bmm(w[block.rows].float()[:, None], products)[:, 0]
    return products, block.hide_(scores)


def _attention(block: _Block, teacher: Teacher) -> Tensor:
    """p fp32 [t, N]: the heads' attention weights, averaged, which sums to 1 over the visible keys."""
    logits = block.products(teacher.queries(block.rows), teacher.latent_TE).mul_(teacher.scale)
    return block.hide_(logits).softmax(-1).mean(1)


class _Block:
    """A block of queries and the keys they may see: 0..last query (dense), or each query's own ids."""

    def __init__(self, rows: slice, ids_SK: Tensor | None):
        self.rows = rows
        self.ids = None if ids_SK is None else ids_SK[rows].long().clamp(min=0)
        self.none = None if ids_SK is None else ids_SK[rows] < 0

    def products(self, q_tnD: Tensor, k_TD: Tensor) -> Tensor:
        """fp32 [t, n, N]: every query with every key of the block."""
        if self.ids is not None:
            return _product(q_tnD, k_TD[self.ids].transpose(1, 2))
        t, n, _ = q_tnD.shape
        return _product(q_tnD.reshape(t * n, -1), k_TD[: self.rows.stop].T).view(t, n, -1)

    def hide_(self, x: Tensor) -> Tensor:
        """-inf, in place, where a query of x [t, N] or [t, n, N] does not see the key."""
        if self.none is not None:
            return x.masked_fill_(self.none if x.dim() == 2 else self.none[:, None], -torch.inf)
        t = x.shape[0]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu_(1)
        x[..., self.rows.start :].masked_fill_(
            future if x.dim() == 2 else future[:, None], -torch.inf
        )
        return x

    def backward(self, d_tJN: Tensor, q: Tensor, k: Tensor, grads: list[Tensor]) -> None:
        d, q = d_tJN.to(q.dtype), q[self.rows]
        if self.ids is not None:
            grads[0][self.rows] = _product(d, k[self.ids])
            grads[1].index_add_(0, self.ids.flatten(), _product(d.transpose(1, 2), q).flatten(0, 1))
            return
        t, heads, keys = d.shape
        flat = d.view(t * heads, keys)
        grads[0][self.rows] = _product(flat, k[:keys]).view(t, heads, -1)
        grads[1][:keys] += _product(flat.T, q.reshape(t * heads, -1))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _blocks(
    q: Tensor, teachers: Sequence[Teacher], ids: Tensor | None, size: int
) -> Iterator[slice]:
    """Slices of queries whose intermediates fit into `size` bytes: of the products of all heads twice, and what is gathered."""
    length, heads, dim = q.shape
    heads = max(heads, *(t.q_SHn.shape[1] for t in teachers))
    gathered = 0 if ids is None else dim + max(t.latent_TE.shape[1] for t in teachers)
    width = length if ids is None else ids.shape[1]
    rows = max(size // (4 * width * (2 * heads + 4 + gathered)), 1)
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))
