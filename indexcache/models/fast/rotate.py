"""Apply RoPE in one kernel for queries and one for keys, where transformers takes fourteen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from indexcache.models.mla import Rope
from indexcache.ops.dispatch import device_of, has_kernels

HALF = (torch.bfloat16, torch.float16)


def fused_rotate(stock: Callable[..., Rope], interleaved: bool) -> Callable[..., Rope]:
    """Return a function that gives the bits of `stock`, by a kernel where one runs.

    Args:
        stock: transformers' RoPE, with the arguments (q, k, cos, sin, unsqueeze_dim=).
        interleaved: whether it rotates neighbouring dims together.
    """

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, unsqueeze_dim: int) -> Rope:
        if torch.compiler.is_compiling() or not fits(q, k, cos, sin, unsqueeze_dim):
            return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        from indexcache.ops.rotary import rotate_pairs

        with device_of(q):
            turned = [rotate_pairs(x, cos, sin, interleaved=interleaved) for x in (q, k)]
        return turned[0], turned[1]

    return rotate


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
    """Return whether the kernel gives the bits of transformers' function for these tensors."""
    tensors = (q, k, cos, sin)
    return (
        has_kernels(q)
        and unsqueeze_dim == 2
        and q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and q.dtype in HALF
        and all(t.dtype == q.dtype and t.device == q.device for t in tensors)
        and all(t.stride(-1) == 1 for t in tensors)
        and cos.stride() == sin.stride()
        and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
