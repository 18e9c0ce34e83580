"""Declare products with FP8 weights, and gated experts; `indexcache.ops` exports them."""

from __future__ import annotations

from torch import Tensor

from indexcache.ops.dispatch import device_of, use_triton
from indexcache.ops.linear import reference
from indexcache.ops.tuning import current


def block_linear(
    x: Tensor,
    weight_NK: Tensor,
    scale: Tensor | None,
    block: tuple[int, int] = (128, 128),
    *,
    quantized_inputs: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Multiply inputs by a weight that is stored in FP8 with a scale for each block.

    The weight counts as its number times the scale of its block, rounded once to x's dtype.

    Args:
        x: inputs [.., K]; the kernels take bf16 and fp16.
        weight_NK: e4m3 [N, K], or x's dtype without scales.
        scale: fp32 [ceil(N / block[0]), ceil(K / block[1])], or None.
        block: rows and columns that have one scale; the kernels take 128 x 128.
        quantized_inputs: quantise the inputs of more than a few tokens (`tuning.linear.few`) too,
            each 128 neighbours of a token with a scale (`linear.reference.quantize_inputs`), as
            DeepSeek-V3 runs its weights: less exact, and tensor cores have twice the rate.

    Returns:
        [.., N] in x's dtype.

    Raises:
        ValueError: backend "triton" cannot run here.
    """

    quantized_inputs = quantized_inputs and _are_many(x)

    def refuse() -> str | None:
        return _linear().refuse(x, (weight_NK,), (scale,), block)

    if use_triton(backend, x, "block_linear", refuse):
        with device_of(x):
            return _linear().block_linear(x, weight_NK, scale, quantized_inputs)
    return reference.block_linear(x, weight_NK, scale, block, quantized_inputs)


def gated_experts(
    x_TE: Tensor,
    gate_up_X2IE: Tensor,
    gate_up_scale: Tensor | None,
    down_XEI: Tensor,
    down_scale: Tensor | None,
    indices_Tn: Tensor,
    weights_Tn: Tensor,
    block: tuple[int, int] = (128, 128),
    *,
    quantized_inputs: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum the chosen experts of each token: weight * down(silu(gate(x)) * up(x)).

    Args:
        x_TE: tokens.
        gate_up_X2IE: of each of X experts the weight of gate, then of up, e4m3, or x's dtype
            without scales.
        gate_up_scale: fp32 [X, 2, ceil(I / block[0]), ceil(E / block[1])], or None.
        down_XEI: as gate_up.
        down_scale: fp32 [X, ceil(E / block[0]), ceil(I / block[1])], or None.
        indices_Tn: int64 numbers of the experts of each token, distinct in a row.
        weights_Tn: their weights.
        block, quantized_inputs: see `block_linear`; what `down` gets is quantised as well.

    Returns:
        [T, E] in x's dtype. Two runs are bitwise equal.

    Raises:
        ValueError: backend "triton" cannot run here.
    """
    quantized_inputs = quantized_inputs and _are_many(x_TE)
    tensors = x_TE, gate_up_X2IE, gate_up_scale, down_XEI, down_scale, indices_Tn, weights_Tn

    def refuse() -> str | None:
        weights, scales = (gate_up_X2IE, down_XEI), (gate_up_scale, down_scale)
        return _linear().refuse(x_TE, weights, scales, block)

    if use_triton(backend, x_TE, "gated_experts", refuse):
        with device_of(x_TE):
            return _linear().gated_experts(*tensors, quantized_inputs)
    return reference.gated_experts(*tensors, block, quantized_inputs)


def _are_many(x: Tensor) -> bool:
    """Return whether there are more tokens than those whose products only read the weights."""
    return x.numel() > current().linear.few * x.shape[-1]


def _linear():
    from indexcache.ops.linear import host

    return host
