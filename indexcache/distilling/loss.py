"""The distillation losses L_multi, L_avg, L_max and L_cover, streamed over blocks of queries.

One indexer, of an F or R layer, learns the attention of the layers it serves: itself and the S
layers that read its selection (https://arxiv.org/abs/2603.12201).

    q_t = softmax(I_t)
    p_t^(j) = attention of layer j, summed over heads and divided by their number
    L_multi = sum_j weight_j sum_t KL(p_t^(j) || q_t)
    L_avg   = sum_t KL(sum_j weight_j p_t^(j) || q_t)
    L_max   = sum_t KL(m_t / sum_s m_ts || q_t),  m_t = max_j weight_j p_t^(j)
    L_cover = the same with  m_t = sum_j weight_j p_t^(j) / sum_s p_ts^(j) min(k q_ts, 1)

The first two have the gradient sum_t (q_t - sum_j weight_j p_t^(j)) with respect to I, since the
weights sum to 1. L_max and L_cover are no published losses: the mean dilutes what one layer alone
needs. L_cover goes up the sum of the logarithms of what the selection keeps of each layer's
attention: a layer counts the more the less is kept of it, query by query. For each
block of queries the forward pass computes the scores, one layer's attention at a time and their
mean or maximum, and at once the gradients of the indexer's q, k and w. Nothing of size [S, T] is
kept, and the backward pass needs only those three gradients, which are O(T). `ops.index_kl` does
this for one document, and over selections for several at once, whose ids are numbered through.

Shapes: S queries = T keys of one document (query s sees keys 0..s), J index heads, D index dim, H
attention heads, E latent dims, K selected ids, t queries of a block, N keys of a block (N = its
last query + 1, or K).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from indexcache import ops
from indexcache.ops.kl.reference import AttentionTarget, QueryBlock, query_blocks

OBJECTIVES = ("multi", "avg", "max", "cover")

BLOCK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes of all intermediates of a block, by device."""


def distill_loss(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float] | None = None,
    *,
    objective: str = "multi",
    ids_SK: Tensor | None = None,
    topk: int | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """Compute L_multi, L_avg, L_max or L_cover of one indexer on one document.

    Args:
        q_SJD, k_TD, w_SJ: queries, keys and head weights of the indexer (`Family.project`), S = T;
            gradients reach these and nothing else. Products of bf16 are summed in fp32.
        targets: the served layers' attention, of the same document.
        weights: weights of the layers, which sum to 1; None: 1 / len(targets) each.
        objective: one of `OBJECTIVES`; the first two have the same gradient, and their values
            differ by a term that does not depend on the indexer.
        ids_SK: int32 selected ids, distinct in a row, -1 for none: attention and softmax(I) both
            run over this set alone (the sparse stage). None: they run over all visible keys (the
            warm-up).
        topk: size of a selection, for "cover"; None is the width of `ids_SK`.
        spans: the queries (start, stop) to sum over, without overlap; None: all.
        block_bytes: memory of a block (default: `BLOCK_BYTES` of the device).

    Returns:
        fp32 scalar, nats, summed over the queries.

    Raises:
        ValueError: the objective is unknown, shapes do not agree, or weights do not sum to 1.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"The loss is one of {', '.join(OBJECTIVES)}, not {objective!r}.")
    weights = [1 / max(len(targets), 1)] * len(targets) if weights is None else list(weights)
    if not targets or len(weights) != len(targets) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"Every served layer has a weight and they sum to 1, got {len(targets)} layers and the "
            f"weights {weights}."
        )
    length = q_SJD.shape[0]
    lengths = [target.latent_TE.shape[0] for target in targets]
    same_keys = k_TD.shape[0] == length and all(n == length for n in lengths)
    if not same_keys or w_SJ.shape != q_SJD.shape[:2]:
        raise ValueError(
            f"Indexer and attention are of one document: {length} queries, {k_TD.shape[0]} keys, "
            f"weights of {w_SJ.shape[0]}, attention of {lengths}."
        )
    size = block_bytes or _block_bytes(q_SJD)
    return _IndexKl.apply(
        q_SJD, k_TD, w_SJ, tuple(targets), tuple(weights), objective, ids_SK, topk, spans, size
    )


@torch.no_grad()
def attention_kept(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    target: AttentionTarget,
    topk: int,
    block_bytes: int | None = None,
) -> Tensor:
    """Compute the share of a layer's attention that lies on the indexer's `topk` best keys.

    Returns:
        fp32 scalar, summed over the queries.
    """
    total = q_SJD.new_zeros((), dtype=torch.float64)
    for rows in query_blocks(q_SJD, [target], block_bytes or _block_bytes(q_SJD)):
        block = QueryBlock(rows)
        scores = block.scores(q_SJD, k_TD, w_SJ)[1]
        best = scores.topk(min(topk, scores.shape[-1]), -1).indices
        total += block.attention(target).gather(-1, best).sum(dtype=torch.float64)
    return total.float()


@torch.no_grad()
def mean_attention(
    targets: Sequence[AttentionTarget], block_bytes: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the mean over the layers of their attention, block by block.

    Yields:
        The queries of a block and fp32 [t, N], zero where a key is not visible.
    """
    q_SHn = targets[0].q_SHn
    for rows in query_blocks(q_SHn, targets, block_bytes or _block_bytes(q_SHn)):
        block = QueryBlock(rows)
        total = block.attention(targets[0])
        for target in targets[1:]:
            total += block.attention(target)
        yield rows, total / len(targets)


def _block_bytes(x: Tensor) -> int:
    return BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cpu"])


class _IndexKl(torch.autograd.Function):
    """The loss as a function of q, k and w; its forward pass computes their gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        targets: Sequence[AttentionTarget],
        weights: Sequence[float],
        objective: str,
        ids: Tensor | None,
        topk: int | None,
        spans: Sequence[tuple[int, int]] | None,
        block_bytes: int,
    ) -> Tensor:
        value, grads = ops.index_kl(
            q,
            k,
            w,
            targets,
            weights,
            kind=objective,
            ids_SK=ids,
            topk=topk,
            spans=spans,
            gradients=any(ctx.needs_input_grad[:3]),
            block_bytes=block_bytes,
            backend="auto" if ids is None else "torch",  # The sparse stage has no kernel.
        )
        if grads is not None:
            ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(grads, (q, k, w), strict=True)))
        return value.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(g * grad.to(g.dtype) for g in ctx.saved_tensors), *[None] * 7)
