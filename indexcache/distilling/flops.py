"""Floating-point operations of a training token, and the device's peak: what MFU is the quotient of."""

from __future__ import annotations

import torch

from indexcache.distilling.forward import served_layers
from indexcache.distilling.settings import DistillSettings
from indexcache.models.shapes import Shape
from indexcache.pattern import Pattern

PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}  # bf16 without sparsity, from the data sheets


def peak(device: torch.device) -> float | None:
    """bf16 operations a second of this device, where they are known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAKS.items() if key in name), None)


def flops_per_token(
    shape: Shape, pattern: Pattern, settings: DistillSettings, length: int
) -> float:
    """Operations that the computation needs, per token of a document of `length` tokens (half of it is visible on average).
    Recomputation is not counted. Matrix products only: two operations a weight, three times that with a backward pass."""
    moe = (
        shape.active_experts + shape.shared_experts
    ) * shape.expert_weights + shape.hidden * shape.experts
    weights = (
        shape.layers * shape.attention_weights
        + shape.dense_layers * shape.dense_weights
        + (shape.layers - shape.dense_layers) * moe
    )
    keys = min(shape.topk, length / 2) if settings.sparse else length / 2
    if settings.sparse:  # over latents, absorbed
        attention = 2 * shape.heads * (2 * shape.kv_lora + shape.rope) * keys
    else:
        attention = 2 * shape.heads * (shape.nope + shape.rope + shape.value) * keys
    backbone = (
        2 * weights + shape.layers * attention + (0 if settings.frozen else 2 * shape.head_weights)
    )
    groups = served_layers(pattern, own=settings.loss == "own")
    teachers = sum(len(group) for group in groups.values())
    pairs = 2 * shape.index_heads * shape.index_dim
    student = 3 * (2 * shape.indexer_weights + pairs * keys) + (
        pairs * length / 2 if settings.sparse else 0
    )
    teacher = 2 * shape.heads * (shape.nope + shape.rope) * keys
    return (1 if settings.frozen else 3) * backbone + len(groups) * student + teachers * teacher
