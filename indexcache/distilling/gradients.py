"""Clip and mask gradients, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
