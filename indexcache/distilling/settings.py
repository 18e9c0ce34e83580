"""The settings of a distillation, its learning-rate schedule, and what a run refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from indexcache.data import check_context
from indexcache.models.family import (
    DsaModule,
    check_latent_queries,
    decoder_layers,
    family_of,
    missing_indexers,
)
from indexcache.models.loading import DTYPES
from indexcache.models.seam import in_force
from indexcache.pattern import Pattern

Stage = Literal["warmup", "sparse"]
Objective = Literal["multi", "avg", "own"]

MAX_RATE = 1e30
"""Upper bound of learning rates and layer weights; it keeps fp32 sums and products finite."""

FINAL_RATE = 0.05
"""The learning rate ends at this fraction of its peak."""

FILE_KEYS = {"objective": "loss", "lr_warmup": "warmup"}
"""Fields that settings.json and result.json have under another key."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """The settings of a distillation run."""

    stage: Stage = "warmup"
    """warmup: attention is dense, the KL runs over all visible keys, and only indexers train.
    sparse: attention and KL run over the selection."""

    freeze_backbone: bool = False
    """Train nothing but the indexers in the sparse stage too. Otherwise the language-modelling
    loss trains all other weights."""

    objective: Objective = "multi"
    """multi, avg: an indexer learns all layers it serves (the two have the same gradient).
    own: an indexer learns the attention of its own layer alone."""

    layer_weights: tuple[float, ...] | None = None
    """How much each layer of the model counts in what its indexer learns, relative to the other
    layers of its group. By default all count the same, as in the paper."""

    keep_zeros: bool = False
    """Keep the rows of the indexers' matrices that are all zero as they are, so that they take no
    room in a packed delta."""

    steps: int = 1000
    """Number of optimizer steps."""

    rows: int = 4
    """Number of packed rows of a step, over all processes."""

    lr: float = 2e-3
    """Peak learning rate of the indexers; it rises linearly, then falls as a cosine."""

    backbone_lr: float = 1e-5
    """Peak learning rate of all other weights."""

    weight_decay: float = 0.0
    """Weight decay of matrices; vectors have none."""

    clip: float = 1.0
    """Max norm of the gradients, of each indexer by itself and of the backbone by itself."""

    lr_warmup: float = 0.03
    """Fraction of the steps over which the learning rate rises."""

    compute_dtype: str = "float32"
    """The dtype that full mode computes in, with fp32 master weights. With a frozen backbone the
    dtype that the model was loaded in counts instead."""

    eval_every: int = 100
    """Number of steps between evaluations on held-out text; 0 means none, and the last indexers
    are the result."""

    save_every: int = 50
    """Number of steps between checkpoints that a killed run goes on from."""

    seed: int = 0
    """Random seed of the order of the rows."""

    @property
    def sparse(self) -> bool:
        """Whether attention and KL run over the selection."""
        return self.stage == "sparse"

    @property
    def frozen(self) -> bool:
        """Whether only the indexers train."""
        return self.freeze_backbone or not self.sparse

    def lr_scale(self, step: int) -> float:
        """Return the learning rate of a step (0-based) as a fraction of its peak.

        It rises linearly over the first `lr_warmup` of the steps, then falls as a cosine to
        `FINAL_RATE`.
        """
        rising = max(round(self.lr_warmup * self.steps), 1)
        if step < rising:
            return (step + 1) / rising
        angle = math.pi * (step - rising) / max(self.steps - rising, 1)
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(angle))

    def to_json(self) -> dict[str, Any]:
        """Return the settings under the keys that settings.json has."""
        return {FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: a field is out of its range; the message names it.
        """
        for weight in self.layer_weights or ():
            if not 0 < weight <= MAX_RATE:
                raise ValueError(
                    f"A layer's weight must be above 0 and at most {MAX_RATE:g}, not {weight}."
                )
        if self.layer_weights and self.objective == "own":
            raise ValueError(
                "With the loss own an indexer learns one layer alone, so layers have no weights; "
                "leave them out."
            )
        choices = {
            "stage": get_args(Stage),
            "objective": get_args(Objective),
            "compute_dtype": tuple(DTYPES),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}.")
        minimum = {"steps": 1, "rows": 1, "save_every": 1, "eval_every": 0, "seed": 0}
        for name, bound in minimum.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {value}.")
        for name in ("lr", "backbone_lr", "clip"):
            if not 0 < (value := getattr(self, name)) <= MAX_RATE:
                raise ValueError(f"{name} must be above 0 and at most {MAX_RATE:g}, not {value}.")
        if not 0 <= self.lr_warmup <= 1:
            raise ValueError(f"lr_warmup lies in 0..1, got {self.lr_warmup}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is finite and not negative, got {self.weight_decay}.")


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
