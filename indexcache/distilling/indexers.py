"""The indexers that train: fp32 master weights beside the model, computing in its dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indexcache.models.family import AnyModel, Family, family_of
from indexcache.models.family import indexers as indexers_of
from indexcache.pattern import Pattern


class TrainableIndexer(nn.Module):
    """The fp32 master of one layer's indexer."""

    indexer: nn.Module

    def __init__(self, family: Family, indexer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.family = family
        self.dtype = dtype
        self.indexer = copy.deepcopy(indexer).float().requires_grad_(True)

    def forward(
        self, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project as the stock indexer does, differentiable in the master weights.

        Args:
            x: hidden states [B, S, E], detached by the caller.
            q_resid: the queries' latents [B, S, Q], detached by the caller.
            rope: (cos, sin).

        Returns:
            q [B, S, J, D] and k [B, S, D] in `dtype`, and w fp32 [B, S, J] with both scales.
        """
        cast: Any = _Cast(self.indexer, self.dtype)
        q, k, w = self.family.project(cast, x, q_resid, rope)
        return q, k.clone(), w  # FSDP2 must not be handed a view.


class _Cast:
    """An indexer whose weights are cast to the compute dtype where its projections read them.

    weights_proj stays fp32, as in the stock model.
    """

    def __init__(self, indexer: nn.Module, dtype: torch.dtype):
        self._indexer = indexer
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._indexer, name)
        dtype = self._dtype
        if name == "weights_proj" or not isinstance(value, (nn.Linear, nn.LayerNorm)):
            return value
        weight = value.weight
        bias = None if value.bias is None else value.bias.to(dtype)
        if isinstance(value, nn.Linear):
            return lambda x: F.linear(x, weight.to(dtype), bias)
        return lambda x: F.layer_norm(x, value.normalized_shape, weight.to(dtype), bias, value.eps)


def trainable_indexers(model: AnyModel, pattern: Pattern, dtype: torch.dtype) -> nn.ModuleDict:
    """Make a `TrainableIndexer` for every F and R layer, under the layer's number as a string."""
    family = family_of(model)
    return nn.ModuleDict(
        {
            str(i): TrainableIndexer(family, indexer, dtype)
            for i, indexer in enumerate(indexers_of(model))
            if pattern[i] != "S"
        }
    )


@torch.no_grad()
def write_back(model: AnyModel, indexers: nn.ModuleDict) -> None:
    """Copy the masters into the model's indexers, in the dtype those have.

    Every process must call it.
    """
    for layer, trained in indexers.items():
        target = dict(indexers_of(model)[int(layer)].named_parameters())
        assert isinstance(trained, TrainableIndexer)
        for name, p in trained.indexer.named_parameters():
            target[name].copy_(p.full_tensor() if isinstance(p, DTensor) else p)
