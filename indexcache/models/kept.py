"""Load a checkpoint whose FP8 weights stay in FP8."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.blocks import BlockExperts, BlockLinear, replace_kept
from indexcache.models.family import DsaModule
from indexcache.models.weights import Weights, expert_parts

_EXPERT = re.compile(r".*\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def load_kept(
    module: DsaModule, weights: Weights, device: str, *, quantized_inputs: bool, indexers: bool
) -> None:
    """Give a model on `meta` its weights, and leave those in FP8 that a product reads.

    kv_b_proj, which attention absorbs, is dequantised.

    Args:
        module: the model of the checkpoint's config in the dtypes in which it shall be.
        weights: the checkpoint's tensors.
        device: where the model computes.
        quantized_inputs: see `ops.block_linear`.
        indexers: whether those of the indexers stay in FP8 too.

    Raises:
        ValueError: no weight is in FP8, the tensors are not those of the model, or scales make no
            sense.
    """
    stored = weights.check(module)
    if weights.block is None or not weights.scales:
        raise ValueError(
            f"{weights.folder}: no weight is stored in block-scaled FP8, so none can be kept in "
            "it; load it without that."
        )

    def kept(name: str) -> bool:
        return stored.get(name) in weights.scales and (indexers or ".indexer." not in name)

    found = replace_kept(module, weights.block, kept, quantized_inputs)
    inside = tuple(f"{name}." for name in found)
    for name, part in found.items():
        part.to_empty(device=device)
        if isinstance(part, BlockLinear):
            _put(weights, stored[f"{name}.weight"], part.weight.data, part.weight_scale_inv.data)
            if part.bias is not None:
                bias = weights.read(stored[f"{name}.bias"], dtype=part.bias.dtype, device=device)
                part.bias.data = bias
        else:
            _fill_experts(weights, part, name, stored)
    for name, tensor in module.state_dict().items():
        if name.startswith(inside) or not tensor.is_meta:
            continue
        value = _read(weights, name, tensor, stored, device)
        if value is not None:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).load_state_dict({leaf: value}, strict=False, assign=True)
    head: Any = module.get_output_embeddings()
    if head.weight.is_meta:  # It is tied.
        head.weight = module.get_input_embeddings().weight
    rotary: Any = module.model.rotary_emb
    module.model.rotary_emb = type(rotary)(module.config).to(device)
    module.requires_grad_(False).eval()


def _fill_experts(weights: Weights, part: BlockExperts, name: str, stored: dict[str, str]) -> None:
    for plain, own in stored.items():
        match = _EXPERT.fullmatch(plain) if plain.startswith(f"{name}.") else None
        if match is None:
            continue
        expert = int(match[1])
        if match[2] == "down_proj":
            _put(weights, own, part.down_proj[expert], part.down_proj_scale_inv[expert])
        else:
            half = int(match[2] == "up_proj")
            scale = part.gate_up_proj_scale_inv[expert, half]
            _put(weights, own, part.gate_up_proj[expert, half], scale)


def _put(weights: Weights, name: str, weight: Tensor, scale: Tensor) -> None:
    """Copy an FP8 weight and its scales to their places."""
    found, scales = weights.read_blocks(name)
    weight.view(torch.uint8).copy_(found.view(torch.uint8))
    scale.copy_(scales)


def _read(
    weights: Weights, name: str, like: Tensor, stored: dict[str, str], device: str
) -> nn.Parameter | Tensor | None:
    """Read a tensor that is not kept in FP8; None for a tied head."""
    if name in stored:
        return weights.read(stored[name], dtype=like.dtype, device=device)
    parts = expert_parts(name, tuple(like.shape))
    if not parts:
        return None
    fused = torch.empty(like.shape, dtype=like.dtype, device=device)
    places = fused.view(len(parts), -1, like.shape[-1])
    for part, place in zip(parts, places, strict=True):
        place.copy_(weights.read(stored[part], dtype=like.dtype, device=device))
    return fused
