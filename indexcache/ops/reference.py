"""The definition of every operation, in plain torch. Kernels are tested and timed against this file.

Shapes: B batch, S queries, T keys, H heads (index or attention), D index dim, P candidates of a query, K selected ids,
E latent dim (V value dims, then R rotary dims), G groups of neighbouring queries, U union of a group's ids.

Visibility, the same everywhere: query s of batch entry b stands at position offset[b] + s and sees keys 0 .. offset[b] + s,
at most T. A prefill chunk that starts at token n has offset n; a decode batch has S = 1 and offset = lengths - 1, where
lengths counts the new token; length 0 (offset -1) sees nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 26  # of the largest intermediate, [B, s, H, P] or [B, s, P, D] in fp32
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_GROUP = 128  # value dims that share a scale in an fp8 latent


class Plan(NamedTuple):
    """What neighbouring queries read together; depends on the ids alone. Made once at an F or R layer, read by its S layers.

    union_BGU: int32, distinct ids >= 0 of each group, ascending, then -1. U = group * K.
    mask_BGU: uint8, bit i set where query i of the group selected that id; 0 at -1.
    count_BG: int32, length of the union.
    group: queries in a group; the last group may be short.
    """

    union_BGU: Tensor
    mask_BGU: Tensor
    count_BG: Tensor
    group: int


class Fp8Latent(NamedTuple):
    """A latent cache in fp8: value_BTV e4m3 = latent / scale, scale_BTC fp32 for each FP8_GROUP value dims, rope_BTR as it was."""

    value_BTV: Tensor
    scale_BTC: Tensor
    rope_BTR: Tensor


def index_scores(
    q_BSHD: Tensor, k_BTD: Tensor, w_BSH: Tensor, candidates_BSP: Tensor | None = None
) -> Tensor:
    """Indexer scores I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]) (DeepSeek-V3.2, equation 1), without causality.

    Args:
        q_BSHD, k_BTD: queries and keys of the indexer, any float dtype; products are taken in fp32.
        w_BSH: head weights with every scale in them.
        candidates_BSP: int ids of the keys to score for each query (the pool of the R role); None scores all.

    Returns:
        fp32 [B, S, T], or [B, S, P] in the order of the candidates.
    """
    q, k, w = q_BSHD.float(), k_BTD.float(), w_BSH.float()
    batch, queries, heads, dim = q.shape
    width = k.shape[1] if candidates_BSP is None else candidates_BSP.shape[-1]
    out = q.new_empty(batch, queries, width)
    chunk = max(CHUNK_BYTES // (4 * max(batch, 1) * max(width, 1) * max(heads, dim)), 1)
    rows = torch.arange(batch, device=k.device)[:, None, None]
    for start in range(0, queries, chunk):
        part = slice(start, start + chunk)
        if candidates_BSP is None:
            products = torch.einsum("bshd,btd->bsht", q[:, part], k)
        else:
            products = torch.einsum(
                "bshd,bspd->bshp", q[:, part], k[rows, candidates_BSP[:, part].long()]
            )
        out[:, part] = torch.einsum("bshp,bsh->bsp", products.relu_(), w[:, part])
    return out


def visible_counts(
    offset: int | Tensor, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor:
    """How many keys each query sees, int64 [B, S]; see the top of this file."""
    start = torch.as_tensor(offset, device=device, dtype=torch.int64).expand(batch)
    return (start[:, None] + torch.arange(1, queries + 1, device=device)).clamp(0, keys)


def select(scores_RT: Tensor, allowed_RT: Tensor, k: int) -> Tensor:
    """The k best allowed columns of each row: int32 [R, k], ascending, -1 padded.

    -0 and +0 are equal; NaN counts as -inf; equal scores: the lower column first. An allowed column always beats a
    column that is not, whatever its score.
    """
    rows, width = scores_RT.shape
    out = scores_RT.new_full((rows, k), -1, dtype=torch.int32)
    if not rows or not width or not k:
        return out
    scores = torch.where(scores_RT.isnan(), -torch.inf, scores_RT)
    total = allowed_RT.sum(-1, keepdim=True)
    wanted = total.clamp(max=k)
    # the k-th best value is unique even when the column that holds it is not; not-allowed ones sink as a second -inf
    kth = (
        scores.masked_fill(~allowed_RT, -torch.inf)
        .topk(min(k, width), dim=-1)
        .values.gather(-1, (wanted - 1).clamp(min=0))
    )
    above = allowed_RT & (scores > kth)
    equal = allowed_RT & (scores == kth)
    chosen = above | (equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True)))
    row, column = chosen.nonzero(as_tuple=True)
    out[row, (chosen.cumsum(-1) - 1)[row, column]] = column.int()
    return out


def index_topk(
    q_BSHD: Tensor,
    k_BTD: Tensor,
    w_BSH: Tensor,
    k_scale_BT: Tensor | None,
    topk: int,
    offset: int | Tensor,
    candidates_BSP: Tensor | None = None,
    *,
    pool: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition behind `indexcache.ops.index_topk`, whose docstring is the contract. Memory O(chunk x T)."""
    batch, queries = q_BSHD.shape[:2]
    keys = k_BTD.shape[1]
    widths = [topk, pool] if pool else [topk]
    outs = [q_BSHD.new_full((batch, queries, n), -1, dtype=torch.int32) for n in widths]
    visible = visible_counts(offset, batch, queries, keys, q_BSHD.device)
    span = keys if candidates_BSP is None else candidates_BSP.shape[-1]
    chunk = max(CHUNK_BYTES // (4 * max(span, 1) * q_BSHD.shape[2]), 1)
    for b in range(batch):
        for start in range(0, queries, chunk):
            part = slice(start, start + chunk)
            if candidates_BSP is None:
                # never look at keys that no row of the chunk sees: a cache may hold anything there
                seen = int(visible[b, part].max())
                ids = torch.arange(seen, device=k_BTD.device).expand(
                    visible[b, part].shape[0], seen
                )
                scores = index_scores(
                    q_BSHD[b : b + 1, part], k_BTD[b : b + 1, :seen], w_BSH[b : b + 1, part]
                )[0]
            else:
                ids = candidates_BSP[b, part].long()
                within = ids.clamp(0, max(keys - 1, 0))
                scores = index_scores(
                    q_BSHD[b : b + 1, part], k_BTD[b : b + 1], w_BSH[b : b + 1, part], within[None]
                )[0]
            if k_scale_BT is not None:
                scores = scores * k_scale_BT[b].float()[ids.clamp(min=0)]
            allowed = (ids >= 0) & (ids < visible[b, part, None])
            for out, n in zip(outs, widths, strict=True):
                slots = select(scores, allowed, n)
                if ids.shape[1]:
                    out[b, part] = torch.where(
                        slots < 0, -1, ids.gather(-1, slots.clamp(min=0).long())
                    ).int()
    return (outs[0], outs[1]) if pool else outs[0]


def _attend(
    q_SHE: Tensor, latent_TE: Tensor, ids_SK: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    valid = ids_SK >= 0
    kv = latent_TE[ids_SK.clamp(min=0).long()].float()
    kv = torch.where(
        valid[..., None], kv, 0.0
    )  # a poisoned row 0 must not reach the output through 0 * NaN
    logits = torch.einsum("she,ske->shk", q_SHE.float(), kv) * scale
    logits = logits.masked_fill(~valid[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return torch.einsum("shk,skv->shv", weights, kv[..., :value_dim]).to(q_SHE.dtype), lse


def sparse_mla(
    q_BSHE: Tensor,
    latent_BTE: Tensor | Fp8Latent,
    ids_BSK: Tensor,
    scale: float,
    *,
    value_dim: int = 512,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition behind `indexcache.ops.sparse_mla`, whose docstring is the contract. Differentiable; the plan is not used."""
    if isinstance(latent_BTE, Fp8Latent):
        latent_BTE = dequantize_latent(latent_BTE)
    batch, queries, heads, _ = q_BSHE.shape
    chunk = max(
        CHUNK_BYTES // (4 * max(ids_BSK.shape[-1], 1) * (latent_BTE.shape[-1] + 2 * heads)), 1
    )
    graph = torch.is_grad_enabled() and (q_BSHE.requires_grad or latent_BTE.requires_grad)
    outs, lses = [], []
    for b in range(batch):
        for start in range(0, queries, chunk):
            args = (
                q_BSHE[b, start : start + chunk],
                latent_BTE[b],
                ids_BSK[b, start : start + chunk],
                scale,
                value_dim,
            )
            # the gathered rows are O(S K E): recompute them for the gradient rather than keep them
            out, lse = checkpoint(_attend, *args, use_reentrant=False) if graph else _attend(*args)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return q_BSHE.new_zeros(batch, queries, heads, value_dim), q_BSHE.new_zeros(
            batch, queries, heads, dtype=torch.float32
        )
    return torch.cat(outs).view(batch, queries, heads, value_dim), torch.cat(lses).view(
        batch, queries, heads
    )


def group_queries(ids_BSK: Tensor, group: int) -> Plan:
    """The definition behind `indexcache.ops.group_queries`, whose docstring is the contract."""
    batch, queries, k = ids_BSK.shape
    groups = -(-queries // group)
    ids = torch.nn.functional.pad(ids_BSK, (0, 0, 0, groups * group - queries), value=-1).view(
        batch, groups, group * k
    )
    bits = (1 << torch.arange(group, device=ids.device)).repeat_interleave(k)
    last = torch.iinfo(torch.int32).max
    ids, order = torch.where(ids < 0, last, ids).sort(dim=-1, stable=True)
    bits = torch.where(ids == last, 0, bits.expand(batch, groups, -1).gather(-1, order))
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[..., 1:] = ids[..., 1:] != ids[..., :-1]
    slot = fresh.cumsum(-1) - 1
    union = torch.full_like(ids, -1).scatter(-1, slot, torch.where(ids == last, -1, ids)).int()
    mask = torch.zeros_like(bits).scatter_add(-1, slot, bits).to(torch.uint8)
    return Plan(union.contiguous(), mask, (union >= 0).sum(-1).int(), group)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times the Walsh-Hadamard matrix of order D (a power of two) over sqrt(D): orthogonal, its own inverse.

    In fp32, in x's dtype at the end. Dot products of two rotated vectors are those of the vectors; outliers are spread.
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"The Hadamard rotation needs a power of two as last dim, got {dim}.")
    y = x.float().reshape(-1, dim)
    step = 1
    while step < dim:
        y = y.view(-1, dim // (2 * step), 2, step)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], dim=2)
        step *= 2
    return (y.reshape(x.shape) * dim**-0.5).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates the first 2 r dims of x [..., D] by angles whose cos and sin [..., r] broadcast over x's leading dims.

    Half-split (DeepSeek-V3.2's indexer) turns the pairs (i, i + r); interleaved (GLM-5) the pairs (2 i, 2 i + 1). Each
    layout stays as it came, unlike in transformers, which leaves interleaved input half-split; dot products are the same.
    In fp32, in x's dtype at the end.
    """
    r = cos.shape[-1]
    turned, rest = x[..., : 2 * r].float(), x[..., 2 * r :]
    pairs = turned.unflatten(-1, (r, 2) if interleaved else (2, r))
    a, b = pairs.unbind(-1 if interleaved else -2)
    out = torch.stack(
        [a * cos - b * sin, b * cos + a * sin], dim=-1 if interleaved else -2
    ).flatten(-2)
    return torch.cat([out.to(x.dtype), rest], dim=-1)


def half_split(x: Tensor, half: int) -> Tensor:
    """The first 2 half dims of x [..., D], interleaved pairs, as all first ones and then all second ones."""
    return torch.cat([x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]], dim=-1)


def quantize_fp8(x: Tensor, *, rotate: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (e4m3 [..., D], fp32 scale [...]) with x ~ e4m3 * scale; one scale a vector, amax / 448.

    All zeros gives zeros and scale 1. A vector with an inf or NaN gets scale NaN: its scores are NaN, which rank last.
    `rotate` applies `hadamard` first (to queries and keys alike).
    """
    y = hadamard(x.float()) if rotate else x.float()
    amax = y.abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / FP8_MAX)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return (y / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantize_index_keys(k_BTD: Tensor, *, rotate: bool = False) -> tuple[Tensor, Tensor]:
    """Indexer keys in fp8 with a scale per token: (e4m3 [B, T, D], fp32 [B, T]); see `quantize_fp8`."""
    return quantize_fp8(k_BTD, rotate=rotate)


def quantize_index_queries(
    q_BSHD: Tensor, w_BSH: Tensor, *, rotate: bool = False
) -> tuple[Tensor, Tensor]:
    """Indexer queries in fp8 and the head weights fp32 [B, S, H] with the queries' scales in them (relu lets a positive scale through)."""
    q, scale = quantize_fp8(q_BSHD, rotate=rotate)
    return q, w_BSH.float() * scale


def quantize_latent(latent_BTE: Tensor, value_dim: int = 512) -> Fp8Latent:
    """A latent cache with its value dims in fp8, one scale for each FP8_GROUP of them (fewer dims: one scale)."""
    value, rotary = latent_BTE[..., :value_dim], latent_BTE[..., value_dim:]
    q, scale = quantize_fp8(value.unflatten(-1, (-1, min(FP8_GROUP, value_dim))))
    return Fp8Latent(q.flatten(-2), scale, rotary.contiguous())


def dequantize_latent(latent: Fp8Latent) -> Tensor:
    """[B, T, E] in the dtype of the rotary part."""
    value = (
        latent.value_BTV.float().unflatten(-1, (latent.scale_BTC.shape[-1], -1))
        * latent.scale_BTC[..., None]
    )
    return torch.cat([value.flatten(-2).to(latent.rope_BTR.dtype), latent.rope_BTR], dim=-1)
