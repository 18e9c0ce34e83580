"""Define products with weights in block-scaled FP8, and gated experts, in plain torch.

Dims: T tokens, N outputs, K inputs, X experts, I inner dims of an expert, n experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.ops.reference import FP8, FP8_MAX

Block = tuple[int, int]  # rows and columns that have one scale
GROUP = 128  # neighbouring inputs of a token that have one scale, where inputs are quantised


def dequantized(weight: Tensor, scale: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    """Multiply each block of a weight by its scale in fp32 and round once to `dtype`.

    torch.compile can fuse it into a product of one row, which then reads one byte an element.

    Args:
        weight: e4m3 [.., N, K]; any dtype without a scale.
        scale: [.., ceil(N / block[0]), ceil(K / block[1])], or None for an unquantised weight.
    """
    if scale is None:
        return weight.to(dtype)
    rows, columns = weight.shape[-2:]
    if rows % block[0] == columns % block[1] == 0:
        blocks = weight.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0])).float()
        return (blocks * scale.float()[..., :, None, :, None]).flatten(-2).flatten(-3, -2).to(dtype)
    # Views alone: the compiler makes whole numbers of them, and no list of indices.
    wide = scale.float().unsqueeze(-1).expand(*scale.shape, block[1]).flatten(-2)[..., :columns]
    tall = wide.unsqueeze(-2).expand(*wide.shape[:-1], block[0], columns).flatten(-3, -2)
    return (weight.float() * tall[..., :rows, :]).to(dtype)


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise inputs [.., K] as DeepSeek-V3 does: e4m3, with a scale for each 128 neighbours.

    Returns:
        e4m3 [.., K] and fp32 scales [.., ceil(K / 128)]: the largest magnitude over 448, and 1
        where all are 0.
    """
    width = x.shape[-1]
    groups = F.pad(x.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scale = torch.where(largest == 0, 1.0, largest / FP8_MAX)
    q = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return q.flatten(-2)[..., :width].contiguous(), scale


def rounded_inputs(x: Tensor) -> Tensor:
    """Round inputs to what `quantize_inputs` keeps of them, fp32 [.., K]."""
    q, scale = quantize_inputs(x)
    return q.float() * scale.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]


def block_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, block: Block, quantized_inputs: bool
) -> Tensor:
    """Define `ops.block_linear`."""
    if quantized_inputs:
        return F.linear(rounded_inputs(x), dequantized(weight, scale, block, torch.float32)).to(
            x.dtype
        )
    return F.linear(x, dequantized(weight, scale, block, x.dtype))


def gated_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    block: Block,
    quantized_inputs: bool,
) -> Tensor:
    """Define `ops.gated_experts`, in the order in which transformers loops over experts."""
    out = torch.zeros_like(x)
    for e in indices.unique().tolist():
        slot, token = torch.where((indices == e).t())
        scales = (None, None) if gate_up_scale is None else gate_up_scale[e]
        gate, up = (
            block_linear(x[token], w, scale, block, quantized_inputs)
            for w, scale in zip(gate_up[e], scales, strict=True)
        )
        scale = None if down_scale is None else down_scale[e]
        y = block_linear(F.silu(gate) * up, down[e], scale, block, quantized_inputs)
        out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out
