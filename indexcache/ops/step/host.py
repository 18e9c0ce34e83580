"""Launch the kernels of one token's products; `ops/step/__init__.py` is the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from indexcache.ops.mla import forward
from indexcache.ops.primitives import INTERPRETED, LOG2E
from indexcache.ops.step import kernels
from indexcache.ops.tuning import current, power


def _options(warps: int = 4) -> dict[str, Any]:
    """Return the options of a launch, which all kernels of a step share."""
    pdl = current().step.pdl and not INTERPRETED.value
    return {"PDL": pdl, "num_warps": warps} | ({"launch_pdl": True} if pdl else {})


def _tile(width: int, elements: int, rows: Sequence[int]) -> dict[str, int]:
    """Return the columns KP and rows BN of a tile, and the warps of a program.

    BN divides all of `rows`. A warp takes 256 columns, 16 bytes a thread, so that no vector has to
    change its layout.
    """
    divisor, settings = width & -width, current().step
    columns = min(divisor if divisor >= 512 else power(width), settings.columns)
    if settings.whole:
        columns = power(width)
    count = max(elements // columns, 1)
    while any(n % count for n in rows) or (count > 1 and sum(rows) // count < settings.programs):
        count //= 2
    warps = min(max(columns // 256, 1), current().step.warps)
    return {"KP": columns, "BN": count, "num_warps": warps}


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, float] | None,
    add: Tensor | None,
    dtype: torch.dtype,
    normed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run `ops.step.products`."""
    settings = current().step
    heads, width = x.shape[0] if x.dim() > 1 else 0, x.shape[-1]
    if heads:
        (w,) = weights
        rows = [heads * w.shape[1]]
        block, s_head = w.shape[1], w.stride(0)
    else:
        rows = [len(w) for w in weights]
        block, s_head = 0, 0
    ends = [sum(rows[:i]) for i in range(5)]
    out = torch.empty(sum(rows), dtype=dtype, device=x.device)
    kept = torch.empty_like(x) if normed else None
    # A program stays within one weight, or within one head.
    tile = _tile(width, settings.tile, [block] * heads if heads else rows)
    slots = {f"p_w{i}": weights[i] if i < len(weights) else None for i in range(4)}
    first = {f"n_{i}": ends[i] if i < len(weights) else 0 for i in range(1, 4)}
    arguments: dict[str, Any] = {
        "p_x": x,
        **slots,
        "p_add": add,
        "p_out": out,
        "p_normed": kept,
        **first,
    }
    arguments |= {"p_norm": None if norm is None else norm[0], "eps": norm[1] if norm else 0.0}
    arguments |= {"s_head": s_head, "K": width, "HEAD": block, **_options(), **tile}
    kernels.products[(len(out) // tile["BN"],)](**arguments)
    return out, kept


def absorb(
    q: Tensor,
    w_k: Tensor,
    kv: Tensor,
    norm: tuple[Tensor, float],
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    latents: Tensor,
) -> Tensor:
    """Run `ops.step.absorb`."""
    heads, nope, width = w_k.shape
    rotary = q.shape[-1] - nope
    out = q.new_empty(heads, width + rotary)
    columns = min(64, width)
    arguments: dict[str, Any] = {
        "p_q": q,
        "p_wk": w_k,
        "p_kv": kv,
        "p_norm": norm[0],
        "eps": norm[1],
    }
    arguments |= {"p_cos": rope[0], "p_sin": rope[1], "p_position": position, "p_out": out}
    arguments |= {"p_latent": latents, "s_head": w_k.stride(0), "s_token": latents.stride(0)}
    shape: dict[str, Any] = {"H": heads, "N": nope, "C": width, "R": rotary, "BC": columns}
    shape |= {"NP": power(nope), "HP": power(heads)}
    programs = heads * width // columns + 2
    kernels.absorb[(programs,)](**arguments, **shape, **_options())
    return out


def attend(q: Tensor, latents: Tensor, ids: Tensor, scale: float, w_v: Tensor) -> Tensor:
    """Run `ops.step.attend`."""
    settings = current().mla
    heads, inner, width = w_v.shape
    keys = settings.decode_keys if q.dtype != torch.float32 else settings.keys_fp32
    rows = min(settings.decode_rows, settings.rows)
    if q.dtype == torch.float32:
        rows = min(rows, settings.rows_fp32)
    rows = min(power(heads, 16), rows)
    slots, blocks = len(ids), -(-heads // rows)
    per_split = -(-slots // (min(settings.splits, -(-slots // keys)) * keys)) * keys
    splits = -(-slots // per_split)
    # Parts in the dtype of the weights need no other layout, and rounding them costs what rounding
    # their sum would cost.
    part = q.new_empty(splits, heads, width)
    lse = torch.empty(splits, heads, dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {"p_q": q, "p_latent": latents, "p_ids": ids, "p_bits": None}
    arguments |= {"p_count": None, "p_out": part, "p_lse": lse, "s_lb": 0}
    arguments |= {"s_lt": latents.stride(0), "scale2": scale * LOG2E.value, "n_queries": 1}
    arguments |= {"n_groups": 1, "n_slots": slots, "per_split": per_split, "H": heads, "GROUP": 1}
    rotary = q.shape[1] - width
    arguments |= {"M": rows, "N": keys, "V": width, "R": rotary, "RP": power(rotary, 16)}
    arguments |= {"SPLIT": True, "STAGES": 1, **_options(settings.decode_warps)}
    forward.attend[(blocks, splits, 1)](**arguments)
    out = q.new_empty(heads * inner)
    count = current().step.value_rows
    while inner % count:
        count //= 2
    arguments = {"p_part": part, "p_plse": lse, "p_w": w_v, "p_out": out, "s_head": w_v.stride(0)}
    arguments |= {"H": heads, "V": inner, "C": width, "SPLITS": splits, "SP": power(splits)}
    arguments |= {"CHUNK": min(power(splits), 16), "BN": count, **_options(8)}
    kernels.values[(heads * inner // count,)](**arguments)
    return out


def index_rows(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    w: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rope: tuple[Tensor, Tensor],
    factor: float,
    interleaved: bool,
    position: Tensor,
    keys: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run `ops.step.index_rows`."""
    heads, dim = q.shape
    q_out = torch.empty(heads, dim, dtype=keys.dtype, device=q.device)
    w_out = torch.empty(heads, dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {"p_q": q, "p_k": k, "p_x": x, "p_w": w, "p_norm": norm[0]}
    arguments |= {
        "p_bias": norm[1],
        "eps": norm[2],
        "p_cos": rope[0],
        "p_sin": rope[1],
        "p_position": position,
    }
    arguments |= {"p_q_out": q_out, "p_w_out": w_out, "p_keys": keys, "p_scales": scales}
    shape: dict[str, Any] = {"J": heads, "D": dim, "R": rope[0].shape[-1], "NORM": dim**-0.5}
    shape |= {"K": x.shape[0], "KP": min(power(x.shape[0]), 1024), "INTERLEAVED": interleaved}
    kernels.index_rows[(heads + 1,)](**arguments, factor=factor, **shape, **_options())
    return q_out, w_out


def experts(
    x: Tensor,
    y: Tensor,
    logits: Tensor,
    bias: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    topk: int,
    normalise: bool,
    factor: float,
) -> Tensor:
    """Run `ops.step.experts`."""
    settings = current().step
    count, hidden, inner = down.shape
    shared_inner = shared[2].shape[1]
    h = y.new_empty(shared_inner + topk * inner)
    chosen = torch.empty(topk, dtype=torch.int32, device=y.device)
    weight = torch.empty(topk, dtype=torch.float32, device=y.device)
    tile = _tile(hidden, settings.tile // 2, [shared_inner] + [inner] * topk)
    arguments: dict[str, Any] = {"p_y": y, "p_logits": logits, "p_bias": bias, "p_experts": gate_up}
    arguments |= {"p_gate": shared[0], "p_up": shared[1], "p_out": h, "K": hidden}
    arguments |= {"INNER": inner, "SHARED": shared_inner, "X": count, "XP": power(count)}
    arguments |= {"p_id": chosen, "p_weight": weight, **_options(), **tile}
    kernels.experts_up[(len(h) // tile["BN"],)](**arguments)
    out = torch.empty_like(x)
    tile = _tile(inner, settings.down_tile, [hidden])
    arguments = {"p_h": h, "p_id": chosen, "p_weight": weight, "p_experts": down}
    arguments |= {"p_shared": shared[2], "p_add": x, "p_out": out, "factor": factor}
    arguments |= {"E": hidden, "INNER": inner, "SHARED": shared_inner, "TOPK": topk}
    arguments |= {"NORM": normalise, **_options(), **tile}
    kernels.experts_down[(hidden // tile["BN"],)](**arguments)
    return out
