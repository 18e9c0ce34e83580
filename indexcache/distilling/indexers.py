"""The indexers under training: fp32 master weights beside the model, computing in the model's dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indexcache.models.family import Family, decoder_layers, family_of, indexers
from indexcache.pattern import Pattern


class Student(nn.Module):
    """The fp32 master of one layer's indexer.

    Calling it: x [B, S, E] and q_resid [B, S, Q] (detached by the caller), (cos, sin) -> q [B, S, J, D], k [B, S, D] in `dtype`
    and w fp32 [B, S, J] with both scales, as the stock indexer computes them; differentiable in the master weights.
    """

    def __init__(self, family: Family, indexer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.family, self.dtype = family, dtype
        self.indexer = copy.deepcopy(indexer).float().requires_grad_(True)

    def forward(
        self, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, w = self.family.project(_Cast(self.indexer, self.dtype), x, q_resid, rope)  # type: ignore[arg-type]
        return q, k.clone(), w  # a view would be unsafe to hand out through FSDP2


class _Cast:
    """An indexer as its projections see it: weights cast to the compute dtype, but for weights_proj, which stock keeps in fp32."""

    def __init__(self, indexer: nn.Module, dtype: torch.dtype):
        self._indexer, self._dtype = indexer, dtype

    def __getattr__(self, name: str) -> Any:
        part, dtype = getattr(self._indexer, name), self._dtype
        if name == "weights_proj" or not isinstance(part, (nn.Linear, nn.LayerNorm)):
            return part
        bias = None if part.bias is None else part.bias.to(dtype)
        if isinstance(part, nn.Linear):
            return lambda x: F.linear(x, part.weight.to(dtype), bias)
        return lambda x: F.layer_norm(
            x, part.normalized_shape, part.weight.to(dtype), bias, part.eps
        )


def make_students(model: nn.Module, pattern: Pattern, dtype: torch.dtype) -> nn.ModuleDict:
    """A student for every F and R layer of the pattern, by layer number (a string); S layers get none."""
    family = family_of(model)
    return nn.ModuleDict(
        {
            str(i): Student(family, m, dtype)
            for i, m in enumerate(indexers(model))
            if pattern[i] != "S"
        }
    )


def indexer_names(model: nn.Module, layer: int) -> dict[str, str]:
    """Name inside the indexer -> name in the checkpoint, for one layer."""
    prefix = f"model.layers.{layer}.self_attn.indexer."
    return {
        name: prefix + name
        for name, _ in decoder_layers(model)[layer].self_attn.indexer.named_parameters()  # type: ignore[union-attr, operator]
    }


@torch.no_grad()
def write_back(model: nn.Module, students: nn.ModuleDict) -> None:
    """Copy the masters into the model's indexers, in the dtype those have. Every process must call it."""
    for layer, student in students.items():
        target = dict(indexers(model)[int(layer)].named_parameters())
        for name, p in student.indexer.named_parameters():  # type: ignore[union-attr, operator]
            target[name].copy_(p.full_tensor() if isinstance(p, DTensor) else p)
