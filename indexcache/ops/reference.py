"""Define the operations in plain torch; kernels are tested and timed against them.

The definitions of FP8 products, of the distillation loss and of a step of one token lie in the
folders of their kernels: `linear/`, `kl/` and `step/`.

Shapes: B batch, S queries, T keys, H heads (index or attention), D index dim, P candidates of a
query, K selected ids, E latent dim (V value dims, then R rotary dims), G groups of neighbouring
queries, U union of a group's ids.

Visibility, the same everywhere: query s of batch entry b stands at position offset[b] + s and sees
keys 0 .. offset[b] + s, at most T. A prefill chunk that starts at token n has offset n; a decode
batch has S = 1 and offset = lengths - 1, where lengths counts the new token; length 0 (offset -1)
sees nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from indexcache.ops.shares import pool_sizes, pool_width

# Max bytes of an intermediate, [B, s, H, P] or [B, s, P, D] in fp32.
CHUNK_BYTES = 1 << 26
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class QueryGroups(NamedTuple):
    """The ids that neighbouring queries read together; layers share them with the selection.

    union_BGU: int32, the distinct ids >= 0 of each group, ascending, then -1. U = group * K.
    mask_BGU: uint8; bit i is set where query i of the group selected that id, 0 at -1.
    count_BG: int32, the length of the union.
    group: queries per group; the last group may be short.
    """

    union_BGU: Tensor
    mask_BGU: Tensor
    count_BG: Tensor
    group: int


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens that an indexer selected, as it passes them to attention.

    ids: int32 [B, S, k], ascending in each row, -1 padded at the end. Stock indexers give falling
        order of score instead, and pad with ids in the future.
    pool: int32 [B, S, P] in the same form, the candidates that an F layer publishes to its R
        layers.
    groups: the query groups of `ids`; None where each query is processed by itself.
    """

    ids: Tensor
    pool: Tensor | None = None
    groups: QueryGroups | None = None


def index_scores(
    q_BSHD: Tensor, k_BTD: Tensor, w_BSH: Tensor, candidates_BSP: Tensor | None = None
) -> Tensor:
    """Compute indexer scores I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), without causality.

    This is equation 1 of DeepSeek-V3.2.

    Args:
        q_BSHD, k_BTD: queries and keys of the indexer, any float dtype; products are in fp32.
        w_BSH: head weights with every scale in them.
        candidates_BSP: int ids of the keys to score for each query (the pool of the R role); None
            scores all.

    Returns:
        fp32 [B, S, T], or [B, S, P] in the order of the candidates.
    """
    q, k, w = q_BSHD.float(), k_BTD.float(), w_BSH.float()
    batch, queries, heads, dim = q.shape
    width = k.shape[1] if candidates_BSP is None else candidates_BSP.shape[-1]
    out = q.new_empty(batch, queries, width)
    chunk = max(CHUNK_BYTES // (4 * max(batch, 1) * max(width, 1) * max(heads, dim)), 1)
    entry = torch.arange(batch, device=k.device)[:, None, None]
    for start in range(0, queries, chunk):
        rows = slice(start, start + chunk)
        if candidates_BSP is None:
            products = torch.einsum("bshd,btd->bsht", q[:, rows], k)
        else:
            products = torch.einsum(
                "bshd,bspd->bshp", q[:, rows], k[entry, candidates_BSP[:, rows].long()]
            )
        out[:, rows] = torch.einsum("bshp,bsh->bsp", products.relu_(), w[:, rows])
    return out


def visible_counts(
    offset: int | Tensor, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor:
    """Count the keys that each query sees, int64 [B, S]; see the top of this file."""
    start = torch.as_tensor(offset, device=device, dtype=torch.int64).expand(batch)
    return (start[:, None] + torch.arange(1, queries + 1, device=device)).clamp(0, keys)


def select(scores_RT: Tensor, allowed_RT: Tensor, k: int, counts_R: Tensor | None = None) -> Tensor:
    """Select the k best allowed columns of each row: int32 [R, k], ascending, -1 padded.

    counts_R: int64, the number of columns that each row takes, at most k; the default is k.

    -0 and +0 are equal; NaN counts as -inf; of equal scores the lower column comes first. An
    allowed column always beats one that is not, whatever its score.
    """
    rows, width = scores_RT.shape
    out = scores_RT.new_full((rows, k), -1, dtype=torch.int32)
    if not rows or not width or not k:
        return out
    scores = torch.where(scores_RT.isnan(), -torch.inf, scores_RT)
    total = allowed_RT.sum(-1, keepdim=True)
    count = total.clamp(max=k)
    if counts_R is not None:
        count = torch.minimum(count, counts_R[:, None])
    # The k-th best value is unique even when its column is not. Columns that are not allowed become
    # -inf, as NaN does.
    kth = (
        scores.masked_fill(~allowed_RT, -torch.inf)
        .topk(min(k, width), dim=-1)
        .values.gather(-1, (count - 1).clamp(min=0))
    )
    above = allowed_RT & (scores > kth)
    equal = allowed_RT & (scores == kth)
    selected = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    row, column = selected.nonzero(as_tuple=True)
    out[row, (selected.cumsum(-1) - 1)[row, column]] = column.int()
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
    pool: int | Fraction = 0,
) -> Selection:
    """Define `ops.index_topk`, whose docstring is the contract. Memory is O(chunk x T)."""
    batch, queries = q_BSHD.shape[:2]
    keys = k_BTD.shape[1]
    widths = [topk, pool_width(pool, keys, topk)] if pool else [topk]
    outs = [q_BSHD.new_full((batch, queries, n), -1, dtype=torch.int32) for n in widths]
    visible = visible_counts(offset, batch, queries, keys, q_BSHD.device)
    span = keys if candidates_BSP is None else candidates_BSP.shape[-1]
    chunk = max(CHUNK_BYTES // (4 * max(span, 1) * q_BSHD.shape[2]), 1)
    for b in range(batch):
        for start in range(0, queries, chunk):
            rows = slice(start, start + chunk)
            q, k, w = q_BSHD[b : b + 1, rows], k_BTD[b : b + 1], w_BSH[b : b + 1, rows]
            limits = visible[b, rows]
            if candidates_BSP is None:
                # Keys that no row of the chunk sees are not read: a cache may hold anything there.
                seen = int(limits.max())
                ids = torch.arange(seen, device=k_BTD.device).expand(len(limits), seen)
                scores = index_scores(q, k[:, :seen], w)[0]
            else:
                ids = candidates_BSP[b, rows].long()
                scores = index_scores(q, k, w, ids.clamp(0, max(keys - 1, 0))[None])[0]
            if k_scale_BT is not None:
                scores = scores * k_scale_BT[b].float()[ids.clamp(min=0)]
            allowed = (ids >= 0) & (ids < limits[:, None])
            sizes = pool_sizes(pool, limits, topk) if isinstance(pool, Fraction) else None
            for out, n, counts in zip(outs, widths, (None, sizes), strict=False):
                slots = select(scores, allowed, n, counts)
                if ids.shape[1]:
                    out[b, rows] = torch.where(
                        slots < 0, -1, ids.gather(-1, slots.clamp(min=0).long())
                    ).int()
    return Selection(outs[0], outs[1] if pool else None)


def _attend(
    q_SHE: Tensor, latent_TE: Tensor, ids_SK: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    valid = ids_SK >= 0
    kv = latent_TE[ids_SK.clamp(min=0).long()].float()
    # A NaN in row 0 must not reach the output through 0 * NaN.
    kv = torch.where(valid[..., None], kv, 0.0)
    logits = torch.einsum("she,ske->shk", q_SHE.float(), kv) * scale
    logits = logits.masked_fill(~valid[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return torch.einsum("shk,skv->shv", weights, kv[..., :value_dim]).to(q_SHE.dtype), lse


def sparse_mla(
    q_BSHE: Tensor, latent_BTE: Tensor, ids_BSK: Tensor, scale: float, *, value_dim: int = 512
) -> tuple[Tensor, Tensor]:
    """Define `ops.sparse_mla`, whose docstring is the contract. Differentiable."""
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
            # The gathered rows are O(S K E): they are recomputed for the gradient, not kept.
            out, lse = checkpoint(_attend, *args, use_reentrant=False) if graph else _attend(*args)
            outs.append(out)
            lses.append(lse)
    shape = (batch, queries, heads)
    if not outs:
        return q_BSHE.new_zeros(*shape, value_dim), q_BSHE.new_zeros(shape, dtype=torch.float32)
    return torch.cat(outs).view(*shape, value_dim), torch.cat(lses).view(shape)


def group_queries(ids_BSK: Tensor, group: int) -> QueryGroups:
    """Define `ops.group_queries`, whose docstring is the contract."""
    batch, queries, k = ids_BSK.shape
    groups = -(-queries // group)
    lacking = groups * group - queries
    ids = torch.nn.functional.pad(ids_BSK, (0, 0, 0, lacking), value=-1)
    ids = ids.view(batch, groups, group * k)
    bits = (1 << torch.arange(group, device=ids.device)).repeat_interleave(k)
    last = torch.iinfo(torch.int32).max
    ids, order = torch.where(ids < 0, last, ids).sort(dim=-1, stable=True)
    bits = torch.where(ids == last, 0, bits.expand(batch, groups, -1).gather(-1, order))
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[..., 1:] = ids[..., 1:] != ids[..., :-1]
    slot = fresh.cumsum(-1) - 1
    union = torch.full_like(ids, -1).scatter(-1, slot, torch.where(ids == last, -1, ids)).int()
    mask = torch.zeros_like(bits).scatter_add(-1, slot, bits).to(torch.uint8)
    return QueryGroups(union.contiguous(), mask, (union >= 0).sum(-1).int(), group)


def group_pages(
    ids_SK: Tensor, requests_S: Tensor, table_RP: Tensor, group: int, page: int, page_rows: int
) -> QueryGroups:
    """Define `ops.group_pages`, whose docstring is the contract."""
    reach = table_RP.shape[1] * page
    request = requests_S.long()[:, None]
    seen = (ids_SK >= 0) & (ids_SK < reach)
    # One number names a request and a position, in the order that the union has.
    token = torch.where(seen, request * reach + ids_SK, -1)
    last = torch.iinfo(torch.int64).max
    token = torch.where(token < 0, last, token).sort(dim=-1).values
    token[:, 1:] = torch.where(token[:, 1:] == token[:, :-1], last, token[:, 1:])
    names, token = token.unique(return_inverse=True)  # int32 takes the ranks of the names
    token = torch.where(names[token] == last, -1, token).int()
    union, mask, count, _ = group_queries(ascending(token)[None], group)
    at = names[union.clamp_min(0).long()].clamp_max(max(table_RP.numel() * page - 1, 0))
    block = table_RP.reshape(-1)[at // page].long() if table_RP.numel() else torch.zeros_like(at)
    slots = torch.where(union < 0, -1, block * page_rows + at % page).int()
    return QueryGroups(slots, mask, count, group)


def ascending(ids: Tensor) -> Tensor:
    """Sort ids that have -1 anywhere into the order that `group_queries` takes."""
    last = torch.iinfo(torch.int32).max
    ids = torch.where(ids < 0, last, ids).sort(dim=-1).values
    return torch.where(ids == last, -1, ids)


def hadamard(x: Tensor) -> Tensor:
    """Multiply x [..., D] with the Walsh-Hadamard matrix over sqrt(D); D is a power of two.

    The matrix is orthogonal and its own inverse: dot products of rotated vectors are those of the
    vectors, and outliers are spread. Computed in fp32, returned in x's dtype.

    Raises:
        ValueError: D is no power of two.
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
    """Rotate the first 2 r dims of x [..., D] by angles given as cos and sin [..., r].

    cos and sin broadcast over x's leading dims. Half-split RoPE (DeepSeek-V3.2's indexer) rotates
    the pairs (i, i + r), interleaved RoPE (GLM-5) the pairs (2 i, 2 i + 1). Each layout is kept,
    unlike in transformers, which leaves interleaved input half-split; dot products are the same.
    Computed in fp32, returned in x's dtype.
    """
    r = cos.shape[-1]
    rotary, unrotated = x[..., : 2 * r].float(), x[..., 2 * r :]
    pairs = rotary.unflatten(-1, (r, 2) if interleaved else (2, r))
    a, b = pairs.unbind(-1 if interleaved else -2)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    out = torch.stack(rotated, dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat([out.to(x.dtype), unrotated], dim=-1)


def half_split(x: Tensor, half: int) -> Tensor:
    """Reorder the first 2 half dims of x [..., D]: interleaved pairs become two halves."""
    return torch.cat([x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]], dim=-1)


def quantize_fp8(x: Tensor, *, rotate: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] to (e4m3 [..., D], fp32 scale [...]) with x ~ e4m3 * scale.

    Each vector has one scale, amax / 448. All zeros give zeros and scale 1. A vector with an inf or
    NaN gets scale NaN: its scores are NaN, which rank last. `rotate` applies `hadamard` first; it
    must be the same for queries and keys.
    """
    y = hadamard(x.float()) if rotate else x.float()
    amax = y.abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / FP8_MAX)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return (y / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantize_index(
    x_BSHD: Tensor,
    cos_BSr: Tensor | None,
    sin_BSr: Tensor | None,
    *,
    rotate: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Define `ops.quantize_index_keys` and `ops.quantize_index_queries`; see their docstrings."""
    if cos_BSr is not None and sin_BSr is not None:
        cos, sin = cos_BSr[:, :, None].float(), sin_BSr[:, :, None].float()
        x_BSHD = rope(x_BSHD, cos, sin, interleaved=interleaved)
        if interleaved:
            x_BSHD = half_split(x_BSHD, cos_BSr.shape[-1])
    return quantize_fp8(x_BSHD, rotate=rotate)
