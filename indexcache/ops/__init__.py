"""Declare the operations of sparse attention, and run each in torch or Triton.

`indexcache.ops.reference` defines the operations, the legend of the shapes and the rule of
visibility. Every operation takes a `backend`: "torch" runs the definition; "triton" runs the
kernels, or raises ValueError with the reason why it cannot; "auto" runs the kernels where they can
run and otherwise the definition, and warns once for each reason.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from indexcache.ops import reference
from indexcache.ops.dispatch import device_of, has_kernels, use_triton
from indexcache.ops.kl import reference as kl_reference
from indexcache.ops.kl.reference import AttentionTarget, Gradients
from indexcache.ops.products import block_linear, gated_experts
from indexcache.ops.reference import QueryGroups, Selection, index_scores, rope
from indexcache.ops.tuning import tuned

__all__ = [
    "AttentionTarget",
    "QueryGroups",
    "Selection",
    "block_linear",
    "gated_experts",
    "group_pages",
    "group_queries",
    "index_kl",
    "index_scores",
    "index_topk",
    "pool_group",
    "quantize_index_keys",
    "quantize_index_queries",
    "query_group",
    "rope",
    "sparse_mla",
    "tuned",
]

MAX_GROUP = 8  # bits of a mask in `QueryGroups`


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
    groups: QueryGroups | None = None,
    backend: str = "auto",
) -> Selection:
    """Select for each query the ids of its `topk` best visible keys (docs/concepts.md#selection).

    Scores are I[t, s] = k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s]), summed in fp32
    (DeepSeek-V3.2, equation 1). The result is exact with respect to the scores of the backend that
    ran: it is their true top-k, and two runs are bitwise equal. Between backends scores differ by
    rounding, so near ties may differ.

    Args:
        q_BSHD: queries, bf16, fp16, fp32 or e4m3 (with their scales in w, see
            `quantize_index_queries`); S = 1 in decoding.
        k_BTD: keys in q's dtype; keys that no query sees may hold anything.
        w_BSH: fp32 head weights with every scale in them; any sign.
        k_scale_BT: fp32 scale of each key, or None.
        topk: number of ids to return, > 0.
        offset: position of the first query, an int or int tensor [B] (see `reference`).
        candidates_BSP: the pool of the R role (docs/concepts.md#roles): int32 ids, distinct,
            ascending in each row, -1 padded at the end, as an earlier call returned them. Only
            these are scored; ids that are not visible are skipped.
        pool: when > 0, return also the ids of the `pool` best from the same pass, which an F layer
            publishes to its R layers. A fraction is the share of the keys that a query sees,
            rounded up; such a pool has at least `topk` ids, and `candidates_BSP` is None.
        groups: `group_queries(candidates_BSP, pool_group(..))`, for a pool that several layers use;
            computed here when None.

    Returns:
        `Selection` with ids int32 [B, S, topk] and, where asked for, pool int32 [B, S, pool], or
        [B, S, ceil(pool T)] of a share: ascending, -1 padded at the end. A row with at most k
        visible keys (candidates) takes them all. Ties go to the lower position; -0 equals +0; NaN
        scores count as -inf; +inf ranks first.

    Raises:
        ValueError: shapes or dtypes that do not agree; backend "triton" cannot run here.
    """
    _check_index(q_BSHD, k_BTD, w_BSH, k_scale_BT, topk, candidates_BSP, pool, groups)
    inputs = q_BSHD, k_BTD, w_BSH, k_scale_BT, topk, offset, candidates_BSP
    if use_triton(
        backend, q_BSHD, "index_topk", lambda: _index().refuse_index(q_BSHD, k_BTD, topk, pool)
    ):
        with device_of(q_BSHD):
            return _index().run_index_topk(*inputs, pool=pool, groups=groups)
    with torch.no_grad():
        return reference.index_topk(*inputs, pool=pool)


def pool_group(q_BSHD: Tensor, k_BTD: Tensor) -> int:
    """Return how many neighbouring queries `index_topk` scores together inside their pools.

    1 means that it scores each query by itself.
    """
    if not has_kernels(q_BSHD):
        return 1
    from indexcache.ops.index.scores_host import neighbours

    return neighbours(q_BSHD, k_BTD)


def sparse_mla(
    q_BSHE: Tensor,
    latent_BTE: Tensor,
    ids_BSK: Tensor,
    scale: float,
    *,
    value_dim: int = 512,
    groups: QueryGroups | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from every query to its selected latents: MLA in MQA form (DeepSeek-V3.2, equation 2).

    All heads read one latent per token. logits[h, i] = scale q[h] . latent[ids[i]];
    out[h] = softmax(logits[h]) @ latent[ids, :value_dim].

    Args:
        q_BSHE: absorbed queries, bf16, fp16 or fp32; E = value_dim + rotary dims.
        latent_BTE: the latent cache in q's dtype.
        ids_BSK: int32, distinct in a row, -1 anywhere means none. All ids are attended to, so they
            must be causal.
        scale: factor of the logits.
        groups: `group_queries(ids_BSK, query_group(..))` of the same ids, where several layers use
            them; computed here when None.
        deterministic: make the gradient of the latents bitwise repeatable, which is slower; the
            forward pass always is.

    Returns:
        out [B, S, H, value_dim] in q's dtype and lse fp32 [B, S, H] (natural logarithm). A row
        without ids gives zeros and -inf. Differentiable in q and latent through out; lse carries
        no gradient on Triton.

    Raises:
        ValueError: shapes or dtypes that do not agree; backend "triton" cannot run here.
    """
    _check_mla(q_BSHE, latent_BTE, ids_BSK, value_dim, groups)
    inputs = q_BSHE, latent_BTE, ids_BSK, scale
    if use_triton(
        backend, q_BSHE, "sparse_mla", lambda: _mla().refuse(q_BSHE, latent_BTE, value_dim)
    ):
        with device_of(q_BSHE):
            return _mla().sparse_mla(
                *inputs, value_dim=value_dim, groups=groups, deterministic=deterministic
            )
    return reference.sparse_mla(*inputs, value_dim=value_dim)


def query_group(ids_BSK: Tensor, heads: int) -> int:
    """Return how many neighbouring queries share a program of `sparse_mla`.

    1 means no grouping: on a CPU, in decoding and with many heads.
    """
    return _mla().query_group(ids_BSK, heads) if has_kernels(ids_BSK) else 1


def group_queries(ids_BSK: Tensor, group: int, *, backend: str = "auto") -> QueryGroups:
    """Unite the ids of every `group` neighbouring queries, and mark which queries have each id.

    Args:
        ids_BSK: int32, ascending in each row, -1 padded at the end, as `index_topk` returns them.
        group: 1 to 8.

    Returns:
        `QueryGroups`, which defines the fields.

    Raises:
        ValueError: a group of another size; backend "triton" cannot run here.
    """
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"A group is 1 to {MAX_GROUP} queries (bits of a mask), got {group}.")
    if use_triton(backend, ids_BSK, "group_queries", lambda: None):
        from indexcache.ops.groups import group_queries

        with device_of(ids_BSK):
            return group_queries(ids_BSK, group)
    return reference.group_queries(ids_BSK, group)


def group_pages(
    ids_SK: Tensor,
    requests_S: Tensor,
    table_RP: Tensor,
    group: int,
    *,
    page: int = 64,
    page_rows: int | None = None,
    backend: str = "auto",
) -> QueryGroups:
    """Unite ids as `group_queries` does, for a batch of requests whose cache lies in pages.

    `sparse_mla` reads the result beside the whole cache as one batch entry [1, rows, E]. Queries of
    several requests may share a group; they share no ids.

    Args:
        ids_SK: int32 positions in the query's own request, in any order, -1 anywhere for none; ids
            beyond the request's pages count as none, and an id that comes twice counts once.
        requests_S: int32, the request of each query, ascending.
        table_RP: int32 [requests, pages], the page that holds positions page * p and after.
        group: 1 to 8.
        page: positions of a page, a multiple of 32.
        page_rows: rows of the cache from the start of a page to the start of the next; None is
            `page`, and more where other layers' pages lie between.

    Returns:
        `QueryGroups` with one batch entry, in which ids are rows of the cache. A union is in order
        of (request, position), whatever rows hold them.

    Raises:
        ValueError: a group of another size, or shapes and dtypes that do not agree; backend
            "triton" cannot run here.
    """
    page_rows = page if page_rows is None else page_rows
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"A group is 1 to {MAX_GROUP} queries (bits of a mask), got {group}.")
    if page < 1 or page % 32 or page_rows < page:
        raise ValueError(
            f"group_pages: a page must be a multiple of 32 positions, and page_rows at least as "
            f"many, got {page} and {page_rows}."
        )
    tensors = (ids_SK, requests_S, table_RP)
    if [t.dim() for t in tensors] != [2, 1, 2] or len(ids_SK) != len(requests_S):
        raise ValueError(
            "group_pages: want ids [S, K], requests [S] and a table [R, P], got "
            f"{', '.join(str(tuple(t.shape)) for t in tensors)}."
        )
    if any(t.dtype != torch.int32 for t in tensors):
        raise ValueError(
            "group_pages: ids, requests and the table must be int32, got "
            f"{', '.join(str(t.dtype) for t in tensors)}."
        )
    if use_triton(backend, ids_SK, "group_pages", lambda: None):
        from indexcache.ops.pages import group_pages

        with device_of(ids_SK):
            return group_pages(*tensors, group, page, page_rows)
    return reference.group_pages(*tensors, group, page, page_rows)


def quantize_index_keys(
    k_BTD: Tensor,
    *,
    rotate: bool = False,
    cos_BTr: Tensor | None = None,
    sin_BTr: Tensor | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantise indexer keys for the cache: `rope`, Hadamard, `reference.quantize_fp8`, in one pass.

    Interleaved dims leave RoPE half-split, as transformers does it, so that keys rotated there and
    here agree.

    Args:
        k_BTD: keys of any float dtype.
        rotate: multiply with the Hadamard matrix (`reference.hadamard`), as DeepSeek-V3.2 does.
        cos_BTr, sin_BTr: cosines and sines of the RoPE angles; None: no RoPE.
        interleaved: RoPE rotates the pairs (2 i, 2 i + 1), not (i, i + r).

    Returns:
        e4m3 [B, T, D] and fp32 scales [B, T].

    Raises:
        ValueError: one of cos and sin without the other; backend "triton" cannot run here.
    """
    q, scale = _quantize(k_BTD.unsqueeze(2), cos_BTr, sin_BTr, rotate, interleaved, backend)
    return q.squeeze(2), scale.squeeze(2)


def quantize_index_queries(
    q_BSHD: Tensor,
    w_BSH: Tensor,
    *,
    rotate: bool = False,
    cos_BSr: Tensor | None = None,
    sin_BSr: Tensor | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantise indexer queries as `quantize_index_keys` does keys; w takes their scales.

    Returns:
        e4m3 [B, S, H, D] and fp32 weights [B, S, H].

    Raises:
        ValueError: as `quantize_index_keys`.
    """
    q, scale = _quantize(q_BSHD, cos_BSr, sin_BSr, rotate, interleaved, backend)
    return q, w_BSH.float() * scale


def _quantize(
    x_BSHD: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if (cos is None) != (sin is None):
        raise ValueError("Give both cos and sin, or neither.")
    options = {"rotate": rotate, "interleaved": interleaved}
    if use_triton(backend, x_BSHD, "quantize", lambda: _quantization().refuse(x_BSHD)):
        with device_of(x_BSHD):
            return _quantization().quantize(x_BSHD, cos, sin, **options)
    return reference.quantize_index(x_BSHD, cos, sin, **options)


def index_kl(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float],
    *,
    kind: str = "multi",
    block_bytes: int = 1 << 26,
    ids_SK: Tensor | None = None,
    gradients: bool = True,
    topk: int | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Gradients | None]:
    """Compute how far an indexer is from the attention it learns (docs/concepts.md#distillation).

    With q_t = softmax(I_t) over the keys that query t sees, and p_t^(j) the attention of target j,
    averaged over its heads: "multi" is sum_j weight_j sum_t KL(p_t^(j) || q_t), "avg" is
    sum_t KL(sum_j weight_j p_t^(j) || q_t). Both have the same gradient. The others have no kernel:
    "max" is sum_t KL(max_j weight_j p_t^(j), normalised || q_t), and "cover" is
    sum_t KL(sum_j weight_j p_t^(j) / kept_t^(j), normalised || q_t), where kept_t^(j) is what a
    selection of `topk` keys keeps of p_t^(j) about now, sum_s p_ts^(j) min(topk q_ts, 1), at least
    `kl.reference.MIN_KEPT`, and has no gradient.

    Args:
        q_SJD, k_TD, w_SJ: queries, keys and head weights of the indexer on one document, S = T.
        targets: attention of the layers that read the indexer's selection, of the same document.
        weights: one for each target, summing to 1.
        kind: "multi", "avg", "max" or "cover".
        block_bytes: memory of the intermediates of a block of queries.
        ids_SK: int32 selected ids, distinct in a row, -1 for none: attention and softmax(I) are
            over this set alone. None: over all visible keys, the only form with kernels.
        gradients: whether to compute the gradients too.
        topk: size of a selection, for "cover"; None is the width of `ids_SK`.
        spans: the queries (start, stop) to sum over, which do not overlap; None: all. There is no
            kernel for some.

    Returns:
        fp64 scalar, nats, summed over the queries; gradients of q, k and w in fp32, or None.

    Raises:
        ValueError: backend "triton" cannot run here; or "cover" has neither ids nor topk.
    """
    if kind == "cover" and topk is None and ids_SK is None:
        raise ValueError('"cover" needs topk, the size of a selection, where no ids are given.')
    refuse = functools.partial(_kl_reason, q_SJD, targets, ids_SK, kind, spans)
    options: dict[str, Any] = {"kind": kind, "block_bytes": block_bytes, "gradients": gradients}
    if use_triton(backend, q_SJD, "index_kl", refuse):
        from indexcache.ops.kl.host import index_kl

        with device_of(q_SJD):
            return index_kl(q_SJD, k_TD, w_SJ, targets, weights, **options)
    options |= {"ids_SK": ids_SK, "topk": topk, "spans": spans}
    return kl_reference.index_kl(q_SJD, k_TD, w_SJ, targets, weights, **options)


def _kl_reason(
    q_SJD: Tensor,
    targets: Sequence[AttentionTarget],
    ids_SK: Tensor | None,
    kind: str,
    spans: Sequence[tuple[int, int]] | None,
) -> str | None:
    from indexcache.ops.kl.host import refuse

    if kind in ("max", "cover"):
        return f"they compute the mean of the layers' attention, not what {kind!r} learns"
    if spans is not None:
        return "they sum over all queries"
    if ids_SK is not None:
        return "they compare all visible keys, not a selection"
    return refuse(q_SJD, *(t.q_SHn for t in targets))


# ---- dispatch: the host sides of the kernels need triton and are imported when first used


def _index():
    from indexcache.ops.index import host

    return host


def _mla():
    from indexcache.ops.mla import host

    return host


def _quantization():
    from indexcache.ops import quantize

    return quantize


def _check_index(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    scale: Tensor | None,
    topk: int,
    candidates: Tensor | None,
    pool: int | Fraction,
    groups: QueryGroups | None,
) -> None:
    if q.dim() != 4 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"index_topk: want q [B, S, H, D] and k [B, T, D], got {tuple(q.shape)} and "
            f"{tuple(k.shape)}."
        )
    if q.dtype != k.dtype:
        raise ValueError(f"index_topk: q and k must have one dtype, got {q.dtype} and {k.dtype}.")
    if w.shape != q.shape[:3]:
        raise ValueError(
            f"index_topk: want w [B, S, H] = {tuple(q.shape[:3])}, got {tuple(w.shape)}."
        )
    if scale is not None and scale.shape != k.shape[:2]:
        raise ValueError(
            f"index_topk: want k_scale [B, T] = {tuple(k.shape[:2])}, got {tuple(scale.shape)}."
        )
    if candidates is not None and (candidates.dim() != 3 or candidates.shape[:2] != q.shape[:2]):
        raise ValueError(
            f"index_topk: want candidates [B, S, P] with B, S = {tuple(q.shape[:2])}, got "
            f"{tuple(candidates.shape)}."
        )
    if groups is not None and (
        candidates is None or groups.union_BGU.shape[1] != -(-q.shape[1] // groups.group)
    ):
        raise ValueError("index_topk: the groups belong to other candidates.")
    if topk < 1 or pool < 0:
        raise ValueError(
            f"index_topk: topk must be positive and pool not negative, got {topk} and {pool}."
        )
    if isinstance(pool, Fraction) and (candidates is not None or pool >= 1):
        raise ValueError(
            f"index_topk: a pool of a share, here {pool}, is less than 1 and of all keys, so "
            "candidates must be None."
        )


def _check_mla(
    q: Tensor, latent: Tensor, ids: Tensor, value_dim: int, groups: QueryGroups | None
) -> None:
    dim = latent.shape[-1]
    if q.dim() != 4 or q.shape[-1] != dim or not 0 < value_dim <= dim:
        raise ValueError(
            f"sparse_mla: want q [B, S, H, {dim}] for these latents and 0 < value_dim <= {dim}, "
            f"got {tuple(q.shape)}, {value_dim}."
        )
    if ids.dim() != 3 or ids.shape[:2] != q.shape[:2] or ids.dtype != torch.int32:
        raise ValueError(
            f"sparse_mla: want int32 ids [B, S, K] with B, S = {tuple(q.shape[:2])}, got "
            f"{ids.dtype} {tuple(ids.shape)}."
        )
    if groups is not None and groups.union_BGU.shape[1] != -(-ids.shape[1] // groups.group):
        raise ValueError(
            f"sparse_mla: the groups belong to other ids: {groups.union_BGU.shape[1]} groups of "
            f"{groups.group}, {ids.shape[1]} queries."
        )
