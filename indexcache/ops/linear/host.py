"""Launch the kernels of products with FP8 weights and of gated experts."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from indexcache.ops.linear import kernels
from indexcache.ops.linear.reference import GROUP, Block
from indexcache.ops.reference import FP8
from indexcache.ops.tuning import current, power

DTYPES = (torch.bfloat16, torch.float16)


def refuse(
    x: Tensor, weights: tuple[Tensor, ...], scales: tuple[Tensor | None, ...], block: Block
) -> str | None:
    """Return why the kernels cannot take these tensors; None: they can."""
    if x.dtype not in DTYPES:
        return f"the inputs' dtype is {x.dtype}"
    if x.numel() >= 1 << 31:
        return f"the inputs have {x.numel()} elements, which are 2^31 or more"
    for weight, scale in zip(weights, scales, strict=True):
        if scale is None and weight.dtype != x.dtype:
            return f"the weights are {weight.dtype} without scales, the inputs {x.dtype}"
        if scale is not None and weight.dtype != FP8:
            return f"the weights are {weight.dtype} with scales"
        if scale is not None and block != (GROUP, GROUP):
            return f"a scale is for {block[0]} x {block[1]} weights, not for {GROUP} x {GROUP}"
        if not weight.is_contiguous() or (scale is not None and not scale.is_contiguous()):
            return "the weights are not contiguous"
    return None


def block_linear(x: Tensor, weight: Tensor, scale: Tensor | None, quantized_inputs: bool) -> Tensor:
    """Run `ops.block_linear` on the kernels."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(flat), weight.shape[0])
    if not out.numel():
        return out.view(*x.shape[:-1], -1)
    quantized = quantized_inputs and scale is not None
    if len(flat) <= current().linear.few:
        _few(flat, weight[None], scale, out)
    else:
        _many(flat, quantized, weight[None], scale, out, rows=len(flat), rows_each=len(flat))
    return out.view(*x.shape[:-1], -1)


def gated_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    quantized_inputs: bool,
) -> Tensor:
    """Run `ops.gated_experts` on the kernels."""
    tokens, each = indices.shape
    experts, _, inner, width = gate_up.shape
    if tokens * each * max(inner, width) >= 1 << 31:  # The kernels count elements in 32 bits.
        whole = gate_up, gate_up_scale, down, down_scale
        parts = zip(x.chunk(2), indices.chunk(2), weights.chunk(2), strict=True)
        return torch.cat([gated_experts(t, *whole, i, w, quantized_inputs) for t, i, w in parts])
    x, factor = x.contiguous(), weights.float().contiguous()
    hidden = x.new_empty(tokens * each, inner)
    if not x.numel() or not each:
        return torch.zeros_like(x)
    quantized = quantized_inputs and gate_up_scale is not None
    both = gate_up.flatten(1, 2)
    if tokens <= current().linear.few:
        out = torch.empty_like(x)
        chosen = indices.long().contiguous()
        _few(x, both, gate_up_scale, hidden, chosen, SHARE=each, GATED=True)
        _few(hidden, down, down_scale, out, chosen, factor, SUM=each)
        return out
    sorted_experts, order = indices.flatten().sort(stable=True)
    every = torch.arange(experts, device=x.device, dtype=sorted_experts.dtype)
    ends = torch.searchsorted(sorted_experts, every, right=True).int()
    rows = tokens * each
    lists: dict[str, Any] = {"rows": rows, "rows_each": rows // experts, "ends": ends}
    source = (order // each).int()
    _many(x, quantized, both, gate_up_scale, hidden, **lists, source=source, gated=True)
    slots = x.new_empty(rows, width)
    lists |= {"target": order.int(), "factor": factor.flatten()[order]}
    _many(hidden, quantized, down, down_scale, slots, **lists)
    return slots.view(tokens, each, -1).sum(1)


def _few(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    experts: Tensor | None = None,
    factor: Tensor | None = None,
    **constants: Any,
) -> None:
    """Launch `products_of_few` for all rows of out."""
    settings = current().linear
    constants = {"SHARE": 1, "SUM": 1, "GATED": False} | constants
    outputs, k = out.shape[-1], x.shape[-1]
    rows = settings.few_rows
    while rows > 4 and triton.cdiv(outputs, rows) * len(out) < settings.few_programs:
        rows //= 2
    kernels.products_of_few[(triton.cdiv(outputs, rows), len(out))](
        p_x=x,
        p_out=out,
        p_experts=experts,
        p_factor=factor,
        **_weight_arguments(weight, scale),
        **constants,
        BN=rows,
        BK=min(power(k, 128), settings.few_inputs),
        num_warps=settings.few_warps,
    )


def _many(
    x: Tensor,
    quantized: bool,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    rows: int,
    rows_each: int,
    ends: Tensor | None = None,
    source: Tensor | None = None,
    target: Tensor | None = None,
    factor: Tensor | None = None,
    gated: bool = False,
) -> None:
    """Launch `products` for `rows` places, of which an expert has `rows_each` on average."""
    settings = current().linear
    k, experts = x.shape[-1], len(weight)
    x, x_scale = _quantized(x) if quantized else (x, None)
    outputs, tokens, inputs, stages = settings.plain
    if x_scale is not None:
        outputs, tokens, inputs, stages = settings.quantized
    elif scale is not None:
        outputs, tokens, inputs, stages = settings.converted
    tokens = min(tokens, power(rows_each, 32))
    tiles = triton.cdiv(rows, tokens) if ends is None else rows // tokens + min(experts, rows)
    columns = outputs // 2 if gated else outputs
    arguments = _weight_arguments(weight, scale)
    described = settings.described and (scale is None or quantized)
    described = described and k * weight.itemsize % 16 == 0 and weight.data_ptr() % 16 == 0
    if described:
        table = weight.view(-1, k)
        arguments["p_w"] = TensorDescriptor.from_tensor(
            table, [outputs // 2 if gated or quantized else outputs, inputs]
        )
    kernels.products[(triton.cdiv(out.shape[-1], columns), tiles)](
        p_x=x,
        p_x_scale=x_scale,
        p_out=out,
        p_source=source,
        p_target=target,
        p_factor=factor,
        p_ends=ends,
        n_tokens=rows,
        **arguments,
        X=experts,
        XP=power(experts),
        GATED=gated,
        EVEN=k % inputs == 0,
        DESCRIBED=described,
        BN=outputs,
        BM=tokens,
        BK=inputs,
        STAGES=stages,
        num_warps=8 if tokens * outputs >= 128 * 128 else 4,
    )


def _weight_arguments(weight: Tensor, scale: Tensor | None) -> dict[str, Any]:
    """Arguments of both kernels for weights [X, N, K]; scales may have more dims between."""
    experts, n, k = weight.shape
    return {
        "p_w": weight,
        "p_w_scale": scale,
        "N": n,
        "K": k,
        "s_expert": n * k,
        "s_scale_expert": 0 if scale is None else scale.numel() // experts,
    }


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `quantize_groups`: (e4m3 [rows, K], fp32 scales [rows, ceil(K / 128)])."""
    k = x.shape[-1]
    q = torch.empty_like(x, dtype=FP8)
    scale = torch.empty(len(x), -(-k // GROUP), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(scale.numel(), 32),)
    kernels.quantize_groups[grid](x, q, scale, scale.numel(), k, ROWS=32, num_warps=4)
    return q, scale
