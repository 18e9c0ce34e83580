"""Count the operations of a training token, and look up the device's peak rate, for the MFU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from indexcache.distilling.forward import served_layers
from indexcache.distilling.rows import Row
from indexcache.distilling.settings import DistillSettings
from indexcache.pattern import Pattern
from indexcache.shapes import Shape, peak_of


def peak(device: torch.device) -> float | None:
    """Return the device's bf16 operations a second; None where they are not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def flops_per_token(
    shape: Shape, pattern: Pattern, settings: DistillSettings, length: int
) -> float:
    """Count the floating-point operations that training on one token needs.

    Only matrix products count: two operations a weight, and three times that with a backward
    pass, which is twice with frozen weights in it. Recomputation does not count.

    Args:
        length: tokens of the document; half of them are visible on average.
    """
    keys = min(shape.topk, length / 2) if settings.sparse else length / 2
    pair = shape.latent_pair_operations if settings.sparse else shape.full_pair_operations
    weights = 2 * shape.backbone_weights
    pairs = shape.layers * pair * keys
    backbone = weights + pairs
    if not settings.frozen:
        # Weights beside adapters need no gradients; the adapters themselves do not count.
        passes = 2 if settings.lora else 3
        backbone = passes * (weights + 2 * shape.head_weights) + 3 * pairs

    passes = 1 if settings.objective == "none" else 3
    indexer = passes * (2 * shape.indexer_weights + shape.index_pair_operations * keys)
    if settings.sparse:  # The selection scores all visible keys.
        indexer += shape.index_pair_operations * length / 2

    groups = served_layers(pattern, own=settings.objective == "own")
    targets = sum(len(group) for group in groups.values())
    target = shape.logit_pair_operations * keys
    return backbone + len(groups) * indexer + targets * target


def flops_of_rows(
    shape: Shape, pattern: Pattern, settings: DistillSettings, rows: Sequence[Row]
) -> float:
    """Count the operations that training on some rows needs, document by document."""
    lengths = [b - a for row in rows for a, b in row.cuts]
    return sum(n * flops_per_token(shape, pattern, settings, n) for n in lengths)
