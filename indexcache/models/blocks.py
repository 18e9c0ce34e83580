"""Hold weights in block-scaled FP8 as modules that multiply by them without a dequantised copy.

`replace_kept` puts them where transformers has linear layers and experts. They compute through
`ops.block_linear` and `ops.gated_experts`, so on a CPU they give what dequantised weights give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from indexcache import ops
from indexcache.models.weights import expert_parts
from indexcache.ops.linear.reference import dequantized
from indexcache.ops.reference import FP8

Block = tuple[int, int]
WAYS = ("dequantize", "keep", "both")
"""`load` makes bf16 copies of FP8 weights, keeps them, or quantises inputs to FP8 as well."""
SILU = ("silu", "swish")
ABSORBED = "kv_b_proj"
"""Attention over latents absorbs this matrix head by head, and heads are no whole blocks."""


def _frozen(*shape: int, dtype: torch.dtype, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class BlockLinear(nn.Module):
    """A linear layer whose weight is in FP8.

    Attributes:
        weight: e4m3 [N, K].
        weight_scale_inv: fp32 [ceil(N / block[0]), ceil(K / block[1])].
        bias: [N], or None.
        quantized_inputs: see `ops.block_linear`.
        may_fuse: whether torch.compile may fuse the scales into a product of one row, in place of
            calling the operation.
    """

    may_fuse = True

    def __init__(self, linear: nn.Linear, block: Block, quantized_inputs: bool):
        super().__init__()
        device = linear.weight.device
        n, k = linear.weight.shape
        self.in_features, self.out_features = k, n
        self.block, self.quantized_inputs = block, quantized_inputs
        self.weight = _frozen(n, k, dtype=FP8, device=device)
        self.weight_scale_inv = _frozen(
            _blocks(n, block[0]), _blocks(k, block[1]), dtype=torch.float32, device=device
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            out = _traced_linear(self, x)
        else:
            out = ops.block_linear(
                x,
                self.weight,
                self.weight_scale_inv,
                self.block,
                quantized_inputs=self.quantized_inputs,
            )
        return out if self.bias is None else out + self.bias


class BlockExperts(nn.Module):
    """The experts of a layer, gated by SiLU, whose weights are in FP8.

    Attributes:
        gate_up_proj: e4m3 [X, 2, I, E], the gates and what they gate.
        gate_up_proj_scale_inv: fp32 [X, 2, blocks of I, blocks of E].
        down_proj: e4m3 [X, E, I].
        down_proj_scale_inv: fp32 [X, blocks of E, blocks of I].
        quantized_inputs, may_fuse: as `BlockLinear` has them.
    """

    may_fuse = True

    def __init__(self, experts: Any, block: Block, quantized_inputs: bool):
        super().__init__()
        device = experts.down_proj.device
        count, width, inner = experts.down_proj.shape
        self.num_experts, self.block, self.quantized_inputs = count, block, quantized_inputs
        self.gate_up_proj = _frozen(count, 2, inner, width, dtype=FP8, device=device)
        self.down_proj = _frozen(count, width, inner, dtype=FP8, device=device)
        rows, columns = _blocks(inner, block[0]), _blocks(width, block[1])
        scales: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.gate_up_proj_scale_inv = _frozen(count, 2, rows, columns, **scales)
        rows, columns = _blocks(width, block[0]), _blocks(inner, block[1])
        self.down_proj_scale_inv = _frozen(count, rows, columns, **scales)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights and scales as `ops.gated_experts` takes them."""
        return (
            self.gate_up_proj,
            self.gate_up_proj_scale_inv,
            self.down_proj,
            self.down_proj_scale_inv,
        )

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.indexcache.gated_experts(
                x, *self.tensors, indices, weights, *self.block, self.quantized_inputs
            )
        quantized = self.quantized_inputs
        return ops.gated_experts(
            x, *self.tensors, indices, weights, self.block, quantized_inputs=quantized
        )

    def fuses(self, x: Tensor) -> bool:
        """Return whether torch.compile may fuse `chosen` into a product with x."""
        weights = self.gate_up_proj, self.down_proj
        return self.may_fuse and all(_fuses(x, w, self.block) for w in weights)

    def chosen(self, name: str, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights [n, rows, columns] of some experts; compiled, they are never written.

        Args:
            name: gate_up_proj, whose rows are those of gates and of what they gate, or down_proj.
            indices: int64 [n].
        """
        # Torch indexes bytes everywhere, and e4m3 on few devices.
        weight = getattr(self, name).view(torch.uint8)[indices].view(FP8)
        scale = getattr(self, f"{name}_scale_inv")[indices]
        found = dequantized(weight, scale, self.block, dtype)
        return found.flatten(1, 2) if name == "gate_up_proj" else found


def _fuses(x: Tensor, weight: Tensor, block: Block) -> bool:
    """Return whether torch.compile may fuse a weight's scales into a product.

    Torch's code for CPUs (2.13) leaves the last columns of a partial block out.
    """
    whole = weight.shape[-2] % block[0] == weight.shape[-1] % block[1] == 0
    return whole or x.is_cuda


def _traced_linear(linear: BlockLinear, x: Tensor) -> Tensor:
    """Multiply inside of torch.compile: a single row is fused, more rows take the kernels."""
    one = x.numel() == x.shape[-1] and linear.may_fuse
    if one and _fuses(x, linear.weight, linear.block):
        weight = dequantized(linear.weight, linear.weight_scale_inv, linear.block, x.dtype)
        return F.linear(x, weight)
    return torch.ops.indexcache.block_linear(
        x, linear.weight, linear.weight_scale_inv, *linear.block, linear.quantized_inputs
    )


@library.custom_op("indexcache::block_linear", mutates_args=())
def _opaque_linear(
    x: Tensor, weight: Tensor, scale: Tensor, rows: int, columns: int, quantized: bool
) -> Tensor:
    return ops.block_linear(x, weight, scale, (rows, columns), quantized_inputs=quantized)


@_opaque_linear.register_fake
def _(x, weight, scale, rows, columns, quantized):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@library.custom_op("indexcache::gated_experts", mutates_args=())
def _opaque_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    rows: int,
    columns: int,
    quantized: bool,
) -> Tensor:
    return ops.gated_experts(
        x,
        gate_up,
        gate_up_scale,
        down,
        down_scale,
        indices,
        weights,
        (rows, columns),
        quantized_inputs=quantized,
    )


@_opaque_experts.register_fake
def _(x, gate_up, gate_up_scale, down, down_scale, indices, weights, rows, columns, quantized):
    return torch.empty_like(x)


def runs_in_one(experts: Any) -> bool:
    """Return whether `run_in_one` computes what transformers' experts compute."""
    fields = experts.__dict__
    shape = {"has_gate": True, "has_bias": False, "is_concatenated": True, "is_transposed": False}
    return (
        all(fields.get(name) is value for name, value in shape.items())
        and not fields.get("has_post_expert_norm")
        and not fields.get("_is_expert_parallel")
        and getattr(experts.config, "hidden_act", None) in SILU
        and "gate_up_proj" in experts._parameters
    )


def run_in_one(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' experts by `ops.gated_experts`. This is a forward for the module."""
    gate_up = experts.gate_up_proj.unflatten(1, (2, -1))
    tensors = gate_up, None, experts.down_proj, None, indices, weights
    if torch.compiler.is_compiling():
        return torch.ops.indexcache.gated_experts(x, *tensors, 128, 128, False)
    return ops.gated_experts(x, *tensors)


def replace_kept(
    module: nn.Module, block: Block, kept: Callable[[str], bool], quantized_inputs: bool
) -> dict[str, BlockLinear | BlockExperts]:
    """Put `BlockLinear` and `BlockExperts` where weights shall stay in FP8.

    Args:
        module: transformers' model, on the device where the new parameters shall be, e.g. "meta".
        kept: says of the name of a tensor in a checkpoint whether it stays; all experts of a layer
            stay, or none.

    Returns:
        The new modules by their names; their parameters hold nothing yet.

    Raises:
        ValueError: experts that are not gated by SiLU.
    """
    found: dict[str, BlockLinear | BlockExperts] = {}
    for name, part in list(module.named_modules()):
        if type(part) is nn.Linear and not name.endswith(ABSORBED) and kept(f"{name}.weight"):
            found[name] = BlockLinear(part, block, quantized_inputs)
        elif name.endswith(".experts") and all(map(kept, expert_names(name, part))):
            act = getattr(getattr(part, "config", None), "hidden_act", None)
            if act not in SILU:
                raise ValueError(f"{name}: experts in FP8 must be gated by silu, not {act!r}.")
            found[name] = BlockExperts(part, block, quantized_inputs)
    for name, part in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, part)
    return found


def expert_names(name: str, experts: Any) -> list[str]:
    """List the names of the experts' tensors in a checkpoint."""
    return [
        part
        for leaf in ("gate_up_proj", "down_proj")
        for part in expert_parts(f"{name}.{leaf}", tuple(getattr(experts, leaf).shape))
    ]


def fp8_way(module: nn.Module) -> str:
    """Return what became of a model's weights in FP8, as `load` names it."""
    kept = [m for m in module.modules() if isinstance(m, BlockLinear | BlockExperts)]
    if not kept:
        return "dequantize"
    return "both" if any(m.quantized_inputs for m in kept) else "keep"
