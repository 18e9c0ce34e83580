"""What the rest of the package must know of a model family, and the registry of those it knows."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.pattern import Pattern

Projection = Callable[
    [nn.Module, Tensor, Tensor, tuple[Tensor, Tensor] | None], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Family:
    """One model family of transformers with a lightning indexer in `model.layers[i].self_attn.indexer`.

    Attributes:
        model_type: as in config.json.
        native_sharing: stock transformers reads `indexer_types` for it.
        project: (indexer, hidden [B, S, E], q_resid [B, S, Q], (cos, sin)) -> q [B, S, H, D], k [B, S, D] with RoPE
            applied, and w fp32 [B, S, H] with both scales (H^-0.5 and D^-0.5) in it; the arithmetic of the stock indexer. Given
            None for (cos, sin), q and k come without RoPE.
        interleaved: the indexer's RoPE turns neighbouring dims together, not dims half of the rotary part apart.
        rotate: RoPE of the attention's queries and shared key, transformers' own function (q, k, cos, sin, unsqueeze_dim=).
    """

    model_type: str
    native_sharing: bool
    project: Projection
    interleaved: bool
    rotate: Callable[..., tuple[Tensor, Tensor]]


def project_with(
    rotate: Callable[..., tuple[Tensor, Tensor]],
    indexer: Any,
    x: Tensor,
    q_resid: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The released indexer's projections; families differ in the layout of RoPE, which `rotate` applies."""
    heads, dim, rotated = indexer.n_heads, indexer.head_dim, indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).unflatten(-1, (heads, dim))
    k = indexer.k_norm(indexer.wk(x))
    if rope is not None:
        q_rot, k_rot = rotate(q[..., :rotated], k[..., None, :rotated], *rope, unsqueeze_dim=2)
        q = torch.cat([q_rot, q[..., rotated:]], dim=-1)
        k = torch.cat([k_rot.squeeze(2), k[..., rotated:]], dim=-1)
    w = indexer.weights_proj(x.to(indexer.weights_proj.weight.dtype)).float() * (
        heads**-0.5 * indexer.softmax_scale
    )
    return q, k, w


@cache
def families() -> dict[str, Family]:
    """Every family in `indexcache.models.families`, by model_type: a family is added by adding one module there."""
    package = importlib.import_module("indexcache.models.families")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        found[family.model_type] = family
    return found


def family_of(model: Any) -> Family:
    """The family of a loaded model (or config).

    Raises:
        ValueError: no family of that model_type is known.
    """
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type not in families():
        known = ", ".join(sorted(families()))
        raise ValueError(
            f"The model type {model_type!r} is not a DSA family that is known here ({known})."
        )
    return families()[model_type]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, without multi-token-prediction layers."""
    return model.model.layers  # type: ignore[union-attr, return-value]


def either(cache: Any, past_key_values: Any) -> Any:
    """The cache that transformers hands over: its name is `cache` from 5.24 on, `past_key_values` before."""
    return past_key_values if cache is None else cache


def native_pattern(model: nn.Module) -> Pattern:
    """What the model does by itself: F where a layer has an indexer, S where it has none."""
    return Pattern("".join("S" if indexer is None else "F" for indexer in indexers(model)))


def indexers(model: nn.Module) -> list[Any]:
    """The indexer module of each decoder layer; None where the checkpoint shares natively."""
    return [layer.self_attn.indexer for layer in decoder_layers(model)]  # type: ignore[union-attr, misc]
