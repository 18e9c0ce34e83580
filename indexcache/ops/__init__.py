"""Operations of sparse attention with shared indexers: the contracts, and the dispatch to torch or Triton.

Legend of the shapes and the rule of visibility: `indexcache.ops.reference`, which defines every operation. `backend`:
"torch" runs the definition, "triton" the kernels or raises ValueError with the reason, "auto" the kernels where they can
run and otherwise the definition, saying why once for each reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from indexcache.ops import reference
from indexcache.ops.reference import (
    Fp8Latent,
    Plan,
    dequantize_latent,
    index_scores,
    quantize_latent,
    rope,
)

__all__ = [
    "Fp8Latent",
    "Plan",
    "dequantize_latent",
    "group_queries",
    "index_scores",
    "index_topk",
    "pool_group",
    "quantize_index_keys",
    "quantize_index_queries",
    "quantize_latent",
    "rope",
    "sparse_mla",
    "warm_up",
]

BACKENDS = ("auto", "torch", "triton")
GROUP_MAX = 8  # bits in a plan's mask


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
    plan: Plan | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selection: for each query the ids of its `topk` best visible keys (method.md section 1, T[t]).

    Scores are I[t, s] = k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s]), summed in fp32. The result is exact with respect to
    the scores of the backend that ran: it is their true top-k, two runs are bitwise equal. Between backends scores differ by
    rounding, so near ties may differ.

    Args:
        q_BSHD: queries, bf16, fp16, fp32 or e4m3 (scales in w, see `quantize_index_queries`); S any, S = 1 is decode.
        k_BTD: keys, dtype of q; keys that no query sees are not read for selection and may hold anything.
        w_BSH: fp32 head weights with every scale in them; any sign.
        k_scale_BT: fp32 scale of each key, or None.
        topk: ids to return, > 0.
        offset: position of the first query, an int or int tensor [B] (see `reference`).
        candidates_BSP: the pool of the R role: int32 ids, ascending in each row, -1 padded at the end, distinct. Only these are
            scored. Ids that are not visible are passed over. What an earlier call returned fits.
        plan: `group_queries(candidates_BSP, pool_group(..))`, for a pool that several layers use; made here when missing.
        pool: when > 0, return also the ids of the `pool` best from the same pass (what an F layer publishes to its R layers).

    Returns:
        int32 [B, S, topk], or that and int32 [B, S, pool]: ascending, -1 padded at the end. A row with at most k visible keys
        (candidates) takes them all. Ties go to the lower position; -0 equals +0; NaN scores count as -inf, +inf ranks first.
    """
    _check_index(q_BSHD, k_BTD, w_BSH, k_scale_BT, topk, candidates_BSP, pool, plan)
    if _use_triton(
        backend,
        q_BSHD,
        "index_topk",
        lambda kernels: kernels.refuse_index(q_BSHD, k_BTD, topk, pool),
    ):
        with _at(q_BSHD):
            return _kernels().index_topk(
                q_BSHD, k_BTD, w_BSH, k_scale_BT, topk, offset, candidates_BSP, pool=pool, plan=plan
            )
    with torch.no_grad():
        return reference.index_topk(
            q_BSHD, k_BTD, w_BSH, k_scale_BT, topk, offset, candidates_BSP, pool=pool
        )


def pool_group(q_BSHD: Tensor, k_BTD: Tensor) -> int:
    """How many neighbouring queries `index_topk` scores together inside their pools, the group of its plan; 1: it takes none."""
    if q_BSHD.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return 1
    return _kernels().pool_group(q_BSHD, k_BTD)


def sparse_mla(
    q_BSHE: Tensor,
    latent_BTE: Tensor | Fp8Latent,
    ids_BSK: Tensor,
    scale: float,
    *,
    value_dim: int = 512,
    plan: Plan | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its selected latents, MLA in MQA form: all heads read one latent per token.

    logits[h, i] = scale q[h] . latent[ids[i]]; out[h] = softmax(logits[h]) @ latent[ids, :value_dim].

    Args:
        q_BSHE: absorbed queries, bf16 (fp16, fp32 on torch); E = value_dim + rotary dims.
        latent_BTE: the latent cache in q's dtype, or an `Fp8Latent` (forward only).
        ids_BSK: int32, distinct in a row, -1 anywhere means none. Causality is the ids' business: they are all attended.
        scale: of the logits.
        plan: `group_queries(ids_BSK, ..)` of the same ids, for long queries with few heads; made here when missing.
        deterministic: make the gradient of the latents bitwise repeatable (slower); the forward pass always is.

    Returns:
        out [B, S, H, value_dim] in q's dtype, lse fp32 [B, S, H] (natural logarithm). A row without ids gives zeros and -inf.
        Differentiable in q and latent through out (lse carries no gradient on Triton).
    """
    _check_mla(q_BSHE, latent_BTE, ids_BSK, value_dim, plan)
    if _use_triton(
        backend,
        q_BSHE,
        "sparse_mla",
        lambda kernels: kernels.refuse_mla(q_BSHE, latent_BTE, value_dim),
    ):
        with _at(q_BSHE):
            return _kernels().sparse_mla(
                q_BSHE,
                latent_BTE,
                ids_BSK,
                scale,
                value_dim=value_dim,
                plan=plan,
                deterministic=deterministic,
            )
    return reference.sparse_mla(q_BSHE, latent_BTE, ids_BSK, scale, value_dim=value_dim, plan=plan)


def group_queries(ids_BSK: Tensor, group: int, *, backend: str = "auto") -> Plan:
    """The union of the ids of each `group` neighbouring queries, with a bit for each query; see `Plan`.

    Args:
        ids_BSK: int32, ascending in each row and -1 padded at the end, as `index_topk` returns them.
        group: 1 to 8.
    """
    if not 1 <= group <= GROUP_MAX:
        raise ValueError(f"A group is 1 to {GROUP_MAX} queries (bits of a mask), got {group}.")
    if _use_triton(backend, ids_BSK, "group_queries", lambda kernels: None):
        with _at(ids_BSK):
            return _kernels().group_queries(ids_BSK, group)
    return reference.group_queries(ids_BSK, group)


def quantize_index_keys(
    k_BTD: Tensor,
    *,
    rotate: bool = False,
    cos_BTr: Tensor | None = None,
    sin_BTr: Tensor | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Indexer keys for the cache: `rope` where cos and sin are given, Hadamard where asked, then `reference.quantize_fp8`, in one pass.

    Interleaved dims leave RoPE half-split, as transformers does it, so that what is rotated there and what is rotated here agree.

    Returns:
        e4m3 [B, T, D] and fp32 scales [B, T].
    """
    q, scale = _quantize(k_BTD.unsqueeze(2), rotate, cos_BTr, sin_BTr, interleaved, backend)
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
    """Indexer queries: as `quantize_index_keys`, with the scales multiplied into the head weights.

    Returns:
        e4m3 [B, S, H, D] and fp32 weights [B, S, H].
    """
    q, scale = _quantize(q_BSHD, rotate, cos_BSr, sin_BSr, interleaved, backend)
    return q, w_BSH.float() * scale


def _quantize(
    x_BSHD: Tensor,
    rotate: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if (cos is None) != (sin is None):
        raise ValueError("Give both cos and sin, or neither.")
    if _use_triton(backend, x_BSHD, "quantize", lambda kernels: kernels.refuse_quantize(x_BSHD)):
        with _at(x_BSHD):
            return _kernels().quantize(x_BSHD, rotate, cos, sin, interleaved)
    if cos is not None and sin is not None:
        x_BSHD = reference.rope(
            x_BSHD, cos[:, :, None].float(), sin[:, :, None].float(), interleaved=interleaved
        )
        if interleaved:
            x_BSHD = reference.half_split(x_BSHD, cos.shape[-1])
    return reference.quantize_fp8(x_BSHD, rotate=rotate)


def warm_up(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    layers: Sequence[tuple[Tensor, Callable[[], Tensor], float, Tensor | None]],
    weights: Sequence[float],
    multi: bool,
    grads: list[Tensor] | None,
    block_bytes: int,
    *,
    backend: str = "auto",
) -> Tensor | None:
    """Loss and gradients of one indexer that learns the dense attention of `layers` on one document (`distill.loss.distill_loss`).

    Args:
        q_SJD, k_TD, w_SJ: the indexer's queries, keys and head weights.
        layers: of each, its queries [S, H, n], how to get its keys [T, H, n] or [T, 1, n], the scale of the logits, and where it is
            known the log-sum-exp of the visible logits, fp32 [S, H].
        weights: of the layers, summing to 1.
        multi: L_multi, else L_avg (method.md section 4).
        grads: fp32 zeros, contiguous, in the shapes of q, k and w: filled in.
        block_bytes: memory of two fp32 matrices [queries of a chunk, T].

    Returns:
        fp64 scalar, nats, summed over the queries; None where the kernels do not run and torch has to (`distill.loss`).
    """
    if not _use_triton(
        backend,
        q_SJD,
        "the distillation loss",
        lambda kernels: kernels.refuse_warm_up(q_SJD, *(q for q, *_ in layers)),
    ):
        return None
    with _at(q_SJD):
        return _kernels().warm_up(q_SJD, k_TD, w_SJ, layers, weights, multi, grads, block_bytes)


# ---- dispatch


def _at(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _kernels():
    from indexcache.ops import launch

    return launch


@functools.cache
def _say_once(operation: str, reason: str) -> None:
    warnings.warn(f"{operation} runs the torch definition: {reason}", stacklevel=4)


def interpreted() -> bool:
    """Triton's CPU interpreter was asked for (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _use_triton(backend: str, x: Tensor, operation: str, refuse) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "torch":
        return False
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif x.device.type != "cuda" and not interpreted():
        reason = f"the tensors are on {x.device.type}, the kernels run on cuda"
    elif x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (9, 0):
        reason = f"the kernels need compute capability 9.0, this device has {torch.cuda.get_device_capability(x.device)}"
    elif x.device.type != "cuda" and backend == "auto":
        return False  # the interpreter is for tests, which ask for it by name
    else:
        reason = refuse(_kernels())
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(
            f"{operation}: backend 'triton' cannot run here: {reason}; use backend='torch' or 'auto'."
        )
    if x.device.type == "cuda":  # on a CPU torch is what everybody expects
        _say_once(operation, reason)
    return False


def _check_index(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    scale: Tensor | None,
    topk: int,
    candidates: Tensor | None,
    pool: int,
    plan: Plan | None,
) -> None:
    if q.dim() != 4 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"index_topk: want q [B, S, H, D] and k [B, T, D], got {tuple(q.shape)} and {tuple(k.shape)}."
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
            f"index_topk: want candidates [B, S, P] with B, S = {tuple(q.shape[:2])}, got {tuple(candidates.shape)}."
        )
    if plan is not None and (
        candidates is None or plan.union_BGU.shape[1] != -(-q.shape[1] // plan.group)
    ):
        raise ValueError("index_topk: the plan is for other candidates.")
    if topk < 1 or pool < 0:
        raise ValueError(
            f"index_topk: topk must be positive and pool not negative, got {topk} and {pool}."
        )


def _check_mla(
    q: Tensor, latent: Tensor | Fp8Latent, ids: Tensor, value_dim: int, plan: Plan | None
) -> None:
    dim = (
        latent.value_BTV.shape[-1] + latent.rope_BTR.shape[-1]
        if isinstance(latent, Fp8Latent)
        else latent.shape[-1]
    )
    if q.dim() != 4 or q.shape[-1] != dim or not 0 < value_dim <= dim:
        raise ValueError(
            f"sparse_mla: want q [B, S, H, {dim}] for these latents and 0 < value_dim <= {dim}, got {tuple(q.shape)}, {value_dim}."
        )
    if ids.dim() != 3 or ids.shape[:2] != q.shape[:2] or ids.dtype != torch.int32:
        raise ValueError(
            f"sparse_mla: want int32 ids [B, S, K] with B, S = {tuple(q.shape[:2])}, got {ids.dtype} {tuple(ids.shape)}."
        )
    if isinstance(latent, Fp8Latent) and latent.value_BTV.shape[-1] != value_dim:
        raise ValueError(
            f"sparse_mla: the fp8 latents hold {latent.value_BTV.shape[-1]} value dims, value_dim is {value_dim}."
        )
    if plan is not None and plan.union_BGU.shape[1] != -(-ids.shape[1] // plan.group):
        raise ValueError(
            f"sparse_mla: the plan is for other ids: {plan.union_BGU.shape[1]} groups of {plan.group}, {ids.shape[1]} queries."
        )
