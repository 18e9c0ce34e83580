"""Refuse models that cannot be distilled, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from indexcache.data import check_context
from indexcache.models.family import (
    DsaModule,
    check_latent_queries,
    decoder_layers,
    family_of,
    missing_indexers,
)
from indexcache.models.seam import in_force
from indexcache.pattern import Pattern


def check_model(
    model: DsaModule, pattern: Pattern, length: int, weights: Sequence[float] | None = None
) -> None:
    """Refuse a model, pattern, row length or layer weights that distillation cannot use.

    Raises:
        ValueError: an unknown family; no latent queries; a pattern of another length, or with F or
            R on a layer that has no indexer; a model under a pattern or on the fast path; another
            number of layer weights; rows that are too short for k or longer than the context.
    """
    family_of(model)
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    pattern.check(layers=len(attentions), without_indexer=missing_indexers(model))
    check_latent_queries(model, "Distillation")
    if in_force(model) or any("forward" in attention.__dict__ for attention in attentions):
        raise ValueError("Distil the model itself: leave use_pattern and undo accelerate first.")
    if weights is not None and len(weights) != len(pattern):
        raise ValueError(f"There are {len(weights)} layer weights for {len(pattern)} layers.")
    if weights is not None and "S" not in pattern.roles:
        raise ValueError(
            f"Under {pattern} no two layers learn from one indexer, so layers have no weights; "
            "leave them out."
        )
    context = int(model.config.max_position_embeddings)
    if length > context:
        raise ValueError(
            f"Rows of {length} tokens are longer than the model's context of {context}; "
            "give a smaller --length."
        )
    check_context(length, int(model.config.index_topk))


def check_trainable(model: DsaModule) -> None:
    """Refuse a model whose backbone cannot be trained here.

    Raises:
        ValueError: its weights are no fp32 masters, or it has dropout, which the recomputation of
            this trainer does not repeat.
    """
    dtypes = {p.dtype for name, p in model.named_parameters() if "indexer" not in name}
    if dtypes != {torch.float32}:
        raise ValueError(
            "Training the whole model needs fp32 master weights; load it in float32 (the compute "
            "dtype is set apart), or train its indexers alone with --freeze-backbone."
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(
            "The model has attention dropout, which this trainer does not do; set "
            "attention_dropout to 0."
        )
