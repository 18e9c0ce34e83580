"""What a distillation run does, its learning-rate schedule, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from indexcache.data import check_context
from indexcache.models.family import decoder_layers, family_of, indexers
from indexcache.models.loading import DTYPES
from indexcache.models.seam import in_force
from indexcache.pattern import Pattern

STAGES = ("warmup", "sparse")
LOSSES = ("multi", "avg", "own")
MOST = 1e30  # of a learning rate or a layer's weight: sums and products of some are finite in fp32
FLOOR = 0.05  # of the peak learning rate, at the end


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What a run does.

    stage: "warmup" (dense attention, KL over all visible keys, only indexers train) or "sparse" (attention and KL over the selection).
    freeze_backbone: in the sparse stage too, only indexers train; otherwise the language-modelling loss trains the rest.
    loss: "multi" or "avg" (each F and R layer learns all layers it serves), or "own" (its own attention alone).
    layer_weights: how much each layer of the model counts where several learn from one indexer ("multi", "avg"), relative to the
        others of its group; None: all the same, as the paper has it.
    keep_zeros: rows of the indexers' matrices that hold nothing but zeros are no parameters: they stay zero.
    rows: packed rows of a step, all processes together.
    clip: of the gradient norm, of each indexer and of the rest apart. warmup: fraction of the steps over which the learning rate rises.
    compute_dtype: of full mode, whose master weights are fp32; frozen, a model computes in the dtype it was loaded in.
    eval_every, save_every: in steps; eval_every 0 is never.
    """

    stage: str = "warmup"
    freeze_backbone: bool = False
    loss: str = "multi"
    layer_weights: tuple[float, ...] | None = None
    keep_zeros: bool = False
    steps: int = 1000
    rows: int = 4
    lr: float = 2e-3
    backbone_lr: float = 1e-5
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.03
    compute_dtype: str = "float32"
    eval_every: int = 100
    save_every: int = 50
    seed: int = 0

    @property
    def sparse(self) -> bool:
        return self.stage == "sparse"

    @property
    def frozen(self) -> bool:
        """Only the indexers train."""
        return self.freeze_backbone or not self.sparse

    def scale(self, step: int) -> float:
        """The learning rate of a step (0-based) as a fraction of its peak: linear warm-up, then cosine to `FLOOR`."""
        rising = max(round(self.warmup * self.steps), 1)
        if step < rising:
            return (step + 1) / rising
        return FLOOR + (1 - FLOOR) * 0.5 * (
            1 + math.cos(math.pi * (step - rising) / max(self.steps - rising, 1))
        )

    def check(self) -> None:
        """Raises ValueError for values that mean nothing."""
        for x in self.layer_weights or ():
            if not 0 < x <= MOST:
                raise ValueError(f"A layer's weight must be above 0 and at most {MOST:g}, not {x}.")
        if self.layer_weights and self.loss == "own":
            raise ValueError(
                "With the loss own an indexer learns one layer alone, so layers have no weights; leave them out."
            )
        for name, choices in (
            ("stage", STAGES),
            ("loss", LOSSES),
            ("compute_dtype", tuple(DTYPES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}."
                )
        for name, least in (
            ("steps", 1),
            ("rows", 1),
            ("save_every", 1),
            ("eval_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("lr", "backbone_lr", "clip"):
            if not 0 < getattr(self, name) <= MOST:
                raise ValueError(
                    f"{name} must be above 0 and at most {MOST:g}, not {getattr(self, name)}."
                )
        if not 0 <= self.warmup <= 1 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"warmup lies in 0..1 and weight_decay is not negative, got {self.warmup} and {self.weight_decay}."
            )


def check_model(
    model: Any, pattern: Pattern, length: int, weights: Sequence[float] | None = None
) -> None:
    """Refuse what cannot be distilled.

    Raises:
        ValueError: unknown family, no latent queries, a pattern of another length or with F or R on a layer that has no
            indexer, a model under a pattern or on the fast path, layer weights of another number, rows that are too short for k
            or longer than the context.
    """
    family_of(model)
    missing = [i for i, indexer in enumerate(indexers(model)) if indexer is None]
    pattern.check(layers=len(indexers(model)), without_indexer=missing)
    if any(getattr(layer.self_attn, "q_a_proj", None) is None for layer in decoder_layers(model)):
        raise ValueError(
            "Distillation needs queries from a latent (q_lora_rank); this model has none."
        )
    if in_force(model) or any(
        "forward" in layer.self_attn.__dict__ for layer in decoder_layers(model)
    ):
        raise ValueError("Distil the model itself: leave use_pattern and undo accelerate first.")
    if weights is not None and len(weights) != len(pattern):
        raise ValueError(f"There are {len(weights)} layer weights for {len(pattern)} layers.")
    if weights is not None and "S" not in pattern.roles:
        raise ValueError(
            f"Under {pattern} no two layers learn from one indexer, so layers have no weights; leave them out."
        )
    context = int(model.config.max_position_embeddings)
    if length > context:
        raise ValueError(
            f"Rows of {length} tokens are longer than the model's context of {context}; give a smaller --length."
        )
    check_context(length, int(model.config.index_topk))


def check_trainable(model: Any) -> None:
    """Refuse a model whose rest cannot be trained here.

    Raises:
        ValueError: weights that are not fp32 masters, or dropout, which the recomputation of this trainer does not repeat.
    """
    dtypes = {p.dtype for name, p in model.named_parameters() if "indexer" not in name}
    if dtypes != {torch.float32}:
        raise ValueError(
            "Training the whole model needs fp32 master weights; load it in float32 (the compute dtype is apart), or train "
            "its indexers alone with --freeze-backbone."
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(
            "The model has attention dropout, which this trainer does not do; set attention_dropout to 0."
        )
