"""Define the distillation loss in plain torch, and the attention that an indexer learns.

Shapes: S queries and T keys of one document, S = T; J index heads of D dims, H attention heads, E
latent dim (V value dims, then R rotary dims), K selected ids, t queries of a block, N its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_KEPT = 0.05
"""In `index_kl` with "cover" a layer counts at most 1 / MIN_KEPT times."""
Gradients = tuple[Tensor, Tensor, Tensor]  # gradients of queries, keys, head weights


class AttentionTarget(NamedTuple):
    """One layer's attention on one document, which an indexer learns.

    Its weights are p = mean_h softmax(scale q_h . latent) (docs/concepts.md#distillation).

    q_SHn: queries with RoPE applied.
    latent_TE: keys that all heads read.
    absorb_Hmc: maps the first m dims of a query to the first c of the latent (the key part of MLA's
        kv_b_proj); None where queries are compared with the keys as they are, n = E.
    scale: factor of the logits.
    lse_SH: fp32, the logarithm of each softmax's denominator where the attention kernel gave it;
        only kernels read it.
    """

    q_SHn: Tensor
    latent_TE: Tensor
    absorb_Hmc: Tensor | None
    scale: float
    lse_SH: Tensor | None = None

    def cut(self, start: int, stop: int) -> AttentionTarget:
        """Return the target of the tokens start..stop - 1 alone."""
        lse = None if self.lse_SH is None else self.lse_SH[start:stop]
        return self._replace(
            q_SHn=self.q_SHn[start:stop], latent_TE=self.latent_TE[start:stop], lse_SH=lse
        )

    def keys(self) -> Tensor:
        """Return the keys that `q_SHn` is compared with.

        They are [T, H, n], or [T, 1, E] where all heads read the same.
        """
        if self.absorb_Hmc is None:
            return self.latent_TE[:, None]
        c = self.absorb_Hmc.shape[2]
        per_head = torch.einsum("tc,hmc->thm", self.latent_TE[:, :c], self.absorb_Hmc)
        shared = self.latent_TE[:, None, c:].expand(-1, per_head.shape[1], -1)
        return torch.cat([per_head, shared], -1)

    def queries(self, rows: slice) -> Tensor:
        """Return these rows' absorbed queries [t, H, E], which are compared with `latent_TE`."""
        q = self.q_SHn[rows]
        if self.absorb_Hmc is None:
            return q
        m = self.absorb_Hmc.shape[1]
        absorbed = torch.einsum("thm,hmc->thc", q[..., :m], self.absorb_Hmc)
        return torch.cat([absorbed, q[..., m:]], -1)


# ---- the distillation loss


def index_kl(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float],
    *,
    kind: str,
    block_bytes: int,
    ids_SK: Tensor | None = None,
    gradients: bool = True,
    topk: int | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Gradients | None]:
    """Define `ops.index_kl`, whose docstring is the contract.

    Queries are processed in blocks, so memory is that of the scores and attention of one block and
    of the gradients.
    """
    inputs = (q_SJD, k_TD, w_SJ)
    total = q_SJD.new_zeros((), dtype=torch.float64)
    grads = None
    if gradients:
        dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in inputs)
        grads = dq, dk, dw
    topk = ids_SK.shape[1] if topk is None and ids_SK is not None else topk
    for rows in query_blocks(q_SJD, targets, block_bytes, ids_SK, spans):
        total += _block_kl(QueryBlock(rows, ids_SK), inputs, targets, weights, kind, topk, grads)
    return total, grads


def _block_kl(
    block: QueryBlock,
    inputs: Gradients,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float],
    kind: str,
    topk: int | None,
    grads: Gradients | None,
) -> Tensor:
    """Compute the loss of a block of queries and add its share of the gradients to `grads`."""
    q, k, w = inputs
    products, scores = block.scores(q, k, w)
    log_q = scores.sub_(scores.logsumexp(-1, keepdim=True))
    chance = log_q.exp().mul_(topk).clamp_(max=1.0) if kind == "cover" and topk else None
    target = torch.zeros_like(log_q)
    # This is the negative entropy of the target, sum p log p.
    entropy = torch.zeros((), dtype=torch.float64, device=log_q.device)
    for layer, weight in zip(targets, weights, strict=True):
        p = block.attention(layer)
        if kind == "max":
            torch.maximum(target, p.mul_(weight), out=target)
        elif chance is not None:
            kept = (p * chance).sum(-1, keepdim=True).clamp_min(MIN_KEPT)
            target.add_(p.div_(kept), alpha=weight)
        else:
            target.add_(p, alpha=weight)
        if kind == "multi":
            entropy = entropy + weight * torch.xlogy(p, p).sum(dtype=torch.float64)
        del p
    if kind in ("max", "cover"):
        target.div_(target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny))
    if kind != "multi":
        entropy = torch.xlogy(target, target).sum(dtype=torch.float64)
    value = entropy - torch.where(target > 0, target * log_q, 0.0).sum(dtype=torch.float64)
    if grads is not None:
        d_scores = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target)
        grads[2][block.rows] = torch.bmm(products, d_scores[..., None])[..., 0]
        d_products = products.gt_(0).mul_(d_scores[:, None]).mul_(w[block.rows].float()[..., None])
        block.add_gradients(d_products, q, k, grads)
    return value


class QueryBlock:
    """A block of one document's queries and the keys they see: all earlier keys, or selected ids.

    Shapes: t queries of the block, N keys of the block (the last query + 1, or K), n heads.
    """

    def __init__(self, rows: slice, ids_SK: Tensor | None = None):
        self.rows = rows
        self.ids = None if ids_SK is None else ids_SK[rows].long().clamp(min=0)
        self.padding = None if ids_SK is None else ids_SK[rows] < 0

    def scores(self, q_SJD: Tensor, k_TD: Tensor, w_SJ: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (relu(q . k) fp32 [t, J, N], index scores fp32 [t, N]).

        Scores are -inf where a key is not visible.
        """
        products = self._products(q_SJD[self.rows], k_TD).relu_()
        scores = torch.bmm(w_SJ[self.rows].float()[:, None], products)[:, 0]
        return products, self._hide_(scores)

    def attention(self, target: AttentionTarget) -> Tensor:
        """Compute p fp32 [t, N], the mean of the heads' attention weights over the visible keys."""
        logits = self._products(target.queries(self.rows), target.latent_TE).mul_(target.scale)
        return self._hide_(logits).softmax(-1).mean(1)

    def add_gradients(self, d_tJN: Tensor, q_SJD: Tensor, k_TD: Tensor, grads: Gradients) -> None:
        """Propagate the gradient of the block's products back to q and k."""
        d, q = d_tJN.to(q_SJD.dtype), q_SJD[self.rows]
        if self.ids is not None:
            grads[0][self.rows] = _product(d, k_TD[self.ids])
            d_keys = _product(d.transpose(1, 2), q)
            grads[1].index_add_(0, self.ids.flatten(), d_keys.flatten(0, 1))
            return
        t, heads, keys = d.shape
        flat = d.view(t * heads, keys)
        grads[0][self.rows] = _product(flat, k_TD[:keys]).view(t, heads, -1)
        grads[1][:keys] += _product(flat.T, q.reshape(t * heads, -1))

    def _products(self, q_tnD: Tensor, k_TD: Tensor) -> Tensor:
        """Multiply every query with every key of the block: fp32 [t, n, N]."""
        if self.ids is not None:
            return _product(q_tnD, k_TD[self.ids].transpose(1, 2))
        t, n, _ = q_tnD.shape
        return _product(q_tnD.reshape(t * n, -1), k_TD[: self.rows.stop].T).view(t, n, -1)

    def _hide_(self, x: Tensor) -> Tensor:
        """Write -inf into x [t, N] or [t, n, N] where a query does not see the key."""
        if self.padding is not None:
            hidden = self.padding if x.dim() == 2 else self.padding[:, None]
            return x.masked_fill_(hidden, -torch.inf)
        t = x.shape[0]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu_(1)
        hidden = future if x.dim() == 2 else future[:, None]
        x[..., self.rows.start :].masked_fill_(hidden, -torch.inf)
        return x


def query_blocks(
    q_SJD: Tensor,
    targets: Sequence[AttentionTarget],
    block_bytes: int,
    ids_SK: Tensor | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Iterator[slice]:
    """Yield slices of queries whose intermediates fit into `block_bytes`.

    The intermediates are two copies of all heads' products, and gathered keys.

    Args:
        spans: the queries (start, stop) to yield, which do not overlap; None: all.
    """
    length, heads, dim = q_SJD.shape
    heads = max(heads, *(t.q_SHn.shape[1] for t in targets))
    gathered = 0 if ids_SK is None else dim + max(t.latent_TE.shape[1] for t in targets)
    width = length if ids_SK is None else ids_SK.shape[1]
    rows = max(block_bytes // (4 * width * (2 * heads + 4 + gathered)), 1)
    for first, last in [(0, length)] if spans is None else spans:
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b, summed and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
