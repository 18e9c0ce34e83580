"""Clip and mask gradients, sharded or not, and make the optimizers that take steps with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def make_optimizer(
    module: nn.Module, lr: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """Make an optimizer that decays matrices and not vectors."""
    params = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() > 1]
    vectors = [p for p in params if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def clip(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients of some parameters together; return their norm before."""
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def matrices_with_zero_rows(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return every matrix with all-zero rows, and a mask [rows, 1] that is 0 on them.

    The mask has the matrix's dtype and covers the rows that this process holds.
    """
    masks = [
        (p, (local_shard(p) != 0).any(-1, keepdim=True).to(p.dtype))
        for p in module.parameters()
        if p.dim() == 2
    ]
    return [(p, mask) for p, mask in masks if not bool(mask.all())]


def local_shard(x: Tensor) -> Tensor:
    """Return this process's shard, which has whole rows: FSDP2 cuts between rows."""
    return x.to_local() if isinstance(x, DTensor) else x
