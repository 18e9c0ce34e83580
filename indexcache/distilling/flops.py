"""Floating-point operations of a training token, and the device's peak: what MFU is the quotient of."""

from __future__ import annotations

import torch

from indexcache.distilling.forward import served_layers
from indexcache.distilling.settings import DistillSettings
from indexcache.pattern import Pattern
from indexcache.shapes import Shape, peak_of


def peak(device: torch.device) -> float | None:
    """bf16 operations a second of this device, where they are known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def flops_per_token(
    shape: Shape, pattern: Pattern, settings: DistillSettings, length: int
) -> float:
    """Operations that the computation needs, per token of a document of `length` tokens (half of it is visible on average).
    Recomputation is not counted. Matrix products only: two operations a weight, three times that with a backward pass."""
    keys = min(shape.topk, length / 2) if settings.sparse else length / 2
    if settings.sparse:  # over latents, absorbed
        attention = shape.latent_pair_operations * keys
    else:
        attention = shape.full_pair_operations * keys
    backbone = (
        2 * shape.backbone_weights
        + shape.layers * attention
        + (0 if settings.frozen else 2 * shape.head_weights)
    )
    groups = served_layers(pattern, own=settings.objective == "own")
    teachers = sum(len(group) for group in groups.values())
    pairs = shape.index_pair_operations
    student = 3 * (2 * shape.indexer_weights + pairs * keys) + (
        pairs * length / 2 if settings.sparse else 0
    )
    teacher = shape.logit_pair_operations * keys
    return (1 if settings.frozen else 3) * backbone + len(groups) * student + teachers * teacher
