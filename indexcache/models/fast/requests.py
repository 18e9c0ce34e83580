"""Check what a forward pass of the fast path is asked for: gradients, outputs, cache, documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, StaticIndexedLayer

from indexcache.models.family import DsaModule
from indexcache.models.fast.cache import HALFWAY, FastCache
from indexcache.models.fast.layer import INFERENCE_ONLY

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments that transformers' collators give for packed documents beside position_ids."""


def check_request(model: DsaModule, embeds: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Check that a pass needs no gradient and no attention weights.

    Raises:
        ValueError: it needs one of them.
    """
    if model.training or (
        torch.is_grad_enabled()
        and (
            any(p.requires_grad for p in model.parameters())
            or (embeds is not None and embeds.requires_grad)
        )
    ):
        raise ValueError(INFERENCE_ONLY)
    asked = kwargs.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise ValueError(
            "The fast path makes no attention weights (output_attentions); run stock for them."
        )


def check_cache(model: DsaModule, cache: Any, batch: int, queries: int) -> int | None:
    """Check that a cache can take the tokens of a pass, and count those that it holds.

    Returns:
        The number of cached tokens; None in a step of a `Decoder`.

    Raises:
        ValueError: a cache of another kind or model, without room, or for another batch.
    """
    if cache is None:
        return 0
    if isinstance(cache, FastCache):
        cache.check_model(model)
        cache.check_room(queries)
        return None if cache.layers[0].positions is not None else cache.layers[0].length
    kind = type(cache).__name__
    entries = getattr(cache, "layers", ())
    if not isinstance(cache, Cache) or not entries:
        raise ValueError(
            f"The fast path takes a FastCache, or a DynamicCache or StaticCache made with "
            f"config=model.config; got {'an empty ' if entries == [] else ''}{kind}."
        )
    needed = model.config.num_hidden_layers  # Generation with early exit lowers it for a while.
    if len(entries) != needed:
        raise ValueError(
            f"This {kind} has {len(entries)} layers, the model has {needed}; start a new one."
        )
    for i, entry in enumerate(entries):
        if not isinstance(entry, DynamicIndexedLayer | StaticIndexedLayer):
            raise ValueError(
                f"Layer {i} of this {kind} is a {type(entry).__name__}, which the fast path cannot "
                "fill with latents; use a FastCache, or a DynamicCache or StaticCache made with "
                "config=model.config."
            )
        if entry.is_initialized and entry.keys is not None and entry.keys.shape[0] != batch:
            raise ValueError(
                f"This {kind} holds {entry.keys.shape[0]} sequences, got {batch}; start a new one."
            )
    if len({entry.get_seq_length() for entry in entries if not entry.is_compileable}) > 1:
        raise ValueError(HALFWAY)
    past = int(cache.get_seq_length())
    room = int(cache.get_max_length())
    if 0 <= room < past + queries:
        raise ValueError(
            f"The cache is full: it was made for {room} tokens, {past + queries} are needed."
        )
    return past


def check_packing(
    positions: Tensor | None, mask: Tensor | None, caching: bool, kwargs: dict[str, Any]
) -> None:
    """Refuse packed documents that stock would not keep apart either.

    Stock finds documents in position_ids, if there is neither a mask nor a cache.

    Raises:
        ValueError: positions restart beside a mask or a cache, or documents come without positions.
    """
    if positions is None:
        given = [name for name in PACKING if kwargs.get(name) is not None]
        if given and mask is None:
            raise ValueError(
                f"{given[0]} is given without position_ids, from which documents are told apart; "
                "pass position_ids that begin at 0 in every document."
            )
        return
    queries = positions.shape[-1]
    if queries == 1 or (mask is None and not caching):
        return
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        return  # Such a mask says what is visible; generation restarts after padding at the right.
    if bool((positions.diff(dim=-1) <= 0).any()):
        what = "a cache is filled" if mask is None else "an attention mask is given"
        raise ValueError(
            f"position_ids restart, which means packed documents, but they are not told apart "
            f"while {what}; pass use_cache=False and no mask, or one document at a time."
        )
