"""Read block-scaled FP8, the format of the official DeepSeek-V3.2 and GLM-5 checkpoints.

A matrix is stored as e4m3 numbers [rows, columns] under its own name, and the scales of its blocks
as [ceil(rows / 128), ceil(columns / 128)] under that name with `_scale_inv` behind it. A weight is
its number times the scale of its block; the last block of rows and of columns may be partial, as in
`kv_a_proj_with_mqa`, whose 576 rows are 4.5 blocks. Only torch is needed, on any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from indexcache.configs import Quantization

SCALE_SUFFIX = "_scale_inv"
WEIGHT_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
ELEMENTS = 1 << 24
"""Max elements that are dequantised at once, so that little memory is needed beside the result."""

Block = tuple[int, int]  # rows and columns that have one scale


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Return the shape of a weight's scales; leading dims, e.g. of experts, stay."""
    *leading, rows, columns = shape
    return *leading, -(-rows // block[0]), -(-columns // block[1])


def dequantize(
    weight: Tensor,
    scale_inv: Tensor,
    block: Block,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each block of a weight by its scale, in fp32, and round once to `dtype`.

    Args:
        weight: float8_e4m3fn [.., R, C].
        scale_inv: one scale for each block, of any floating-point dtype,
            [.., ceil(R / block[0]), ceil(C / block[1])].
        block: rows and columns of a block.
        dtype: dtype of the result.
        out: takes the result, [.., R, C] of any dtype; None makes a tensor of `dtype`.

    Returns:
        The weight [.., R, C] on the device of `weight`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if weight.dim() < 2 or tuple(scale_inv.shape) != scale_shape(tuple(weight.shape), block):
        raise ValueError(
            f"A weight {tuple(weight.shape)} in blocks of {block[0]} x {block[1]} has scales "
            f"{tuple(scale_inv.shape)}, which do not fit."
        )
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = scale_inv.to(weight.device).float()
    if weight.dim() > 2:
        for part, w, s in zip(out, weight, scales, strict=True):
            dequantize(w, s, block, dtype, part)
        return out
    rows, columns = weight.shape
    blocks = max(ELEMENTS // max(block[0] * columns, 1), 1)
    if rows % block[0] == columns % block[1] == 0 and out.is_contiguous():
        # Whole blocks take two kernels: one converts, one multiplies and rounds.
        w, to = (
            t.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
            for t in (weight.contiguous(), out)
        )
        for first in range(0, len(scales), blocks):
            span = slice(first, first + blocks)
            torch.mul(w[span].float(), scales[span, None, :, None], out=to[span])
        return out
    wide = scales.repeat_interleave(block[1], 1)[:, :columns]
    for first in range(0, len(wide), blocks):
        span = slice(first * block[0], min((first + blocks) * block[0], rows))
        tall = wide[first : first + blocks].repeat_interleave(block[0], 0)
        out[span] = weight[span].float().mul_(tall[: span.stop - span.start])
    return out


def block_of(
    quantization: Quantization | None, section: Mapping[str, Any] | None, where: str = ""
) -> Block | None:
    """Return the block of a quantisation that is read here; None without one.

    Args:
        quantization: what `checkpoint.config_facts` says of the checkpoint.
        section: the `quantization_config` of its config.json.
        where: what begins the error message, e.g. the folder.

    Raises:
        ValueError: it is any other quantisation, which the message names.
    """
    if quantization is None:
        return None
    problem = _unreadable(quantization, section or {})
    if problem is not None:
        raise ValueError(
            f"{where}the weights are quantised as {problem}, which is not read here; give the "
            "checkpoint with bf16 weights, or in FP8 with a scale for each block of 128 x 128."
        )
    return quantization.block


def _unreadable(quantization: Quantization, section: Mapping[str, Any]) -> str | None:
    """Name a quantisation that is not read here; None for block-scaled FP8."""
    if quantization.method != "fp8":
        return str(quantization)
    fmt = section.get("fmt") or "e4m3"
    if "e4m3" not in str(fmt).lower():
        return f"fp8 in the format {fmt!r:.40}"
    scheme = section.get("activation_scheme") or "dynamic"
    if scheme != "dynamic":
        return f"fp8 with the activation scheme {scheme!r:.40}"
    if quantization.block is None:
        return "fp8 with one scale for a whole tensor (there is no weight_block_size)"
    return None
