"""Refuse models that cannot be distilled, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from indexcache.data import Batch
from indexcache.distilling.adapters import check_peft
from indexcache.distilling.rows import Row, check_beyond
from indexcache.distilling.settings import DistillSettings
from indexcache.models.family import (
    DsaModule,
    check_latent_queries,
    decoder_layers,
    family_of,
    missing_indexers,
)
from indexcache.models.seam import in_force
from indexcache.models.soundness import check_weights
from indexcache.models.stream.loading import stream_of
from indexcache.pattern import Pattern
from indexcache.records import number_of
from indexcache.vacuity import check_batches, check_context, pool_of


def check_run(
    model: DsaModule,
    pattern: Pattern,
    rows: Sequence[Row],
    settings: DistillSettings,
    held_out: Sequence[Batch],
    processes: int,
) -> float:
    """Refuse a run that cannot work, and return the share of queries that see more than k tokens.

    Raises:
        ValueError: see `DistillSettings.check`, `check_model`, `check_beyond`, `check_trainable`
            and, for the held-out text, `vacuity.check_batches`; or there are no rows, or of
            several lengths; there is no held-out text for the evaluations; or the processes cannot
            share the rows evenly; or an indexer's weights are not finite.
    """
    settings.check()
    if settings.lora:
        check_peft()
    check_weights(model, selecting=True)
    length = len(rows[0].ids) if rows else 0
    if not rows or any(len(row.ids) != length for row in rows):
        raise ValueError("The training rows are all of one length, and there is at least one.")
    longest = max(b - a for row in rows for a, b in row.cuts)
    check_model(model, pattern, length, settings.layer_weights, longest)
    topk = int(model.config.index_topk)
    # In the warm-up stage attention is dense, and no R layer chooses from a pool.
    beyond = check_beyond(rows, topk, pool_of(pattern, topk) if settings.sparse else None)
    if settings.eval_every and held_out:
        check_batches(held_out, topk, [pattern])
    if settings.eval_every and not held_out:
        raise ValueError(
            "There is no held-out text to evaluate on; give some, or set eval_every to 0."
        )
    if settings.answer_weight and not any(row.answers for row in rows):
        raise ValueError(
            "answer_weight counts the queries that must find an answer, and no training row has "
            "one: mix in retrieval (--retrieval and --retrieval-share), or leave it out."
        )
    if settings.rows % processes:
        raise ValueError(
            f"A step has {settings.rows} rows, which {processes} processes cannot share evenly; "
            "change --batch-tokens."
        )
    if any(b.answers for b in held_out) and all(b.answers for b in held_out):
        raise ValueError("Beside retrieval an evaluation has held-out text, whose loss decides.")
    if stream_of(model) is not None:
        check_streamed(settings, processes, retrieval=any(b.answers for b in held_out))
    if not settings.frozen:
        check_trainable(model)
    return beyond


def check_streamed(settings: DistillSettings, processes: int, *, retrieval: bool = False) -> None:
    """Refuse to train more of a streamed model than its indexers in the warm-up.

    Args:
        retrieval: whether the answers found are to be counted.

    Raises:
        ValueError: another stage, several processes, or retrieval.
    """
    if retrieval:
        raise ValueError(
            "The answers found are not counted where layers are streamed; leave out --retrieval, "
            "or load the model whole (--no-stream)."
        )
    if settings.stage != "warmup":
        raise ValueError(
            "The layers of a streamed model are read one at a time, which trains indexers in the "
            "warmup stage alone: in the sparse stage hidden states change while they learn. Load "
            "the model whole (--no-stream), or take --stage warmup."
        )
    if processes > 1:
        raise ValueError(
            "One process trains the indexers of a streamed model; start it without torchrun."
        )


def check_model(
    model: DsaModule,
    pattern: Pattern,
    length: int,
    weights: Sequence[float] | None = None,
    longest: int | None = None,
) -> None:
    """Refuse a model, pattern, row length or layer weights that distillation cannot use.

    Args:
        length: number of tokens of a row.
        longest: that of the longest document; None: a row is one.

    Raises:
        ValueError: an unknown family; no latent queries; a pattern of another length, or with F or
            R on a layer that has no indexer; a model under a pattern or on the fast path, or with
            adapters; another number of layer weights; rows that are too short for k or longer than
            the context.
    """
    family_of(model)
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    pattern.check(layers=len(attentions), share=False, without_indexer=missing_indexers(model))
    check_latent_queries(model, "Distillation")
    if in_force(model) or any("forward" in attention.__dict__ for attention in attentions):
        raise ValueError("Distil the model itself: leave use_pattern and undo accelerate first.")
    if any("base_layer" in module._modules for module in model.modules()):
        raise ValueError(
            "Distillation trains and saves weights by their names in the checkpoint, and this "
            "model has adapters: merge them first (merge_and_unload)."
        )
    if weights is not None and len(weights) != len(pattern):
        raise ValueError(f"There are {len(weights)} layer weights for {len(pattern)} layers.")
    if weights is not None and "S" not in pattern.roles:
        raise ValueError(
            f"Under {pattern} no two layers learn from one indexer, so layers have no weights; "
            "leave them out."
        )
    context = int(model.config.max_position_embeddings)
    if (longest or length) > context:
        raise ValueError(
            f"Rows of {longest or length} tokens are longer than the model's context of {context}; "
            "give a smaller --length."
        )
    check_context(length, int(model.config.index_topk))


def check_trainable(model: DsaModule) -> None:
    """Refuse a model whose backbone cannot be trained here.

    Raises:
        ValueError: its weights are not fp32, or it has dropout, which the recomputation of this
            trainer does not repeat.
    """
    dtypes = {p.dtype for name, p in model.named_parameters() if "indexer" not in name}
    if dtypes != {torch.float32}:
        raise ValueError(
            "Training the whole model needs fp32 master weights; load it in float32 (the compute "
            "dtype is set separately), or train its indexers alone with --freeze-backbone."
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(
            "The model has attention dropout, which this trainer does not support; set "
            "attention_dropout to 0."
        )


def check_entry(entry: dict[str, Any], pattern: Pattern) -> None:
    """Raise ValueError, KeyError or TypeError for a line of a journal that no trainer has written.

    Args:
        entry: the line.
        pattern: the pattern that is trained for, whose F and R layers have a loss each.
    """
    if "step" not in entry:
        return  # The trainer refuses it with a better sentence.
    step = entry["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r:.60}")
    if "held_out" in entry:
        number_of(entry, "held_out")
    if "loss" in entry:
        for key in ("loss", "tokens", *([] if entry["lm_loss"] is None else ["lm_loss"])):
            number_of(entry, key)
        losses = entry["kl"]
        if not isinstance(losses, list) or len(losses) != len(pattern) - pattern.roles.count("S"):
            raise ValueError("kl is no list with a loss for every layer that is trained")
        for loss in losses:
            number_of({"kl": loss}, "kl")
