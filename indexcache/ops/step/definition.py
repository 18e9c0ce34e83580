"""Define the products of one token in plain torch; `ops/step/__init__.py` is the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from indexcache.ops.reference import half_split, quantize_fp8, rope, sparse_mla


def rms_norm(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """Normalise x [.., K] in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm[1]) * norm[0].float()


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, float] | None,
    add: Tensor | None,
    dtype: torch.dtype,
    normed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Define `ops.step.products`."""
    y = x.float() if norm is None else rms_norm(x, norm)
    if x.dim() > 1:
        out = (weights[0].float() @ y[..., None]).flatten()
    else:
        out = torch.cat([w.float() @ y for w in weights])
    if add is not None:
        out = out + add.float()
    return out.to(dtype), y.to(x.dtype) if normed else None


def absorb(
    q: Tensor,
    w_k: Tensor,
    kv: Tensor,
    norm: tuple[Tensor, float],
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    latents: Tensor,
) -> Tensor:
    """Define `ops.step.absorb`."""
    nope, width = w_k.shape[1:]
    half = (q.shape[1] - nope) // 2
    cos, sin = (t.float()[:half] for t in rotation)
    ends = torch.cat([q[:, nope:], kv[None, width:]]).float()
    ends = half_split(rope(ends, cos, sin, interleaved=True), half)
    row = torch.cat([rms_norm(kv[:width], norm), ends[-1]]).to(latents.dtype)
    latents.index_copy_(0, position.view(1), row[None])
    absorbed = torch.einsum("hn,hnc->hc", q[:, :nope].float(), w_k.float())
    return torch.cat([absorbed, ends[:-1]], 1).to(q.dtype)


def attend(q: Tensor, latents: Tensor, ids: Tensor, scale: float, w_v: Tensor) -> Tensor:
    """Define `ops.step.attend`."""
    inputs = q[None, None].float(), latents[None].float(), ids[None, None]
    out, _lse = sparse_mla(*inputs, scale, value_dim=w_v.shape[2])
    return (w_v.float() @ out[0, 0, :, :, None]).flatten().to(q.dtype)


def index_rows(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    w: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rotation: tuple[Tensor, Tensor],
    factor: float,
    interleaved: bool,
    position: Tensor,
    keys: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """Define `ops.step.index_rows`."""
    weight, bias, eps = norm
    half = rotation[0].shape[-1] // 2
    cos, sin = (t.float()[:half] for t in rotation)
    k = torch.nn.functional.layer_norm(k.float(), k.shape, weight.float(), bias.float(), eps)
    rows = torch.cat([q, k[None].to(q.dtype)]).float()
    rows = rope(rows, cos, sin, interleaved=interleaved)
    rows = half_split(rows, half) if interleaved else rows
    rows, scale = quantize_fp8(rows.to(q.dtype), rotate=True)
    keys.view(torch.uint8).index_copy_(0, position.view(1), rows[-1:].view(torch.uint8))
    scales.index_copy_(0, position.view(1), scale[-1:])
    return rows[:-1], w.float() @ x.float() * factor * scale[:-1]


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
    """Define `ops.step.experts`."""

    def mlp(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = torch.nn.functional.silu(gate.float() @ y.float()) * (up.float() @ y.float())
        return down.float() @ h.to(y.dtype).float()

    scores = logits.float().sigmoid()
    chosen = (scores + bias.float()).sort(descending=True, stable=True).indices[:topk]
    weights = scores[chosen]
    if normalise:
        weights = weights / (weights.sum() + 1e-20)
    inner = down.shape[2]
    out = x.float() + mlp(*shared)
    for weight, i in zip(weights * factor, chosen.tolist(), strict=True):
        out = out + weight * mlp(gate_up[i, :inner], gate_up[i, inner:], down[i])
    return out.to(x.dtype)
