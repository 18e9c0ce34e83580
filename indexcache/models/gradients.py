"""Estimate what every layer loses by reading every earlier layer's selection, by one backward pass.

With all layers full, a layer's attention output is o. Over the selection of another layer it would
be o + d, and to second order the predictions then differ from the full model's by half of d' H d,
where H is the Fisher information of o. For a sequence that is 1/2 sum_t (g_t . d_t)^2, with g the
gradient of the sequence's loss: one backward pass gives it for all layers. The term of first order,
g . d, is left out: it vanishes on average where a model fits its text, and what is left of it is
noise (on `tiny` its rank correlation with the true losses is about 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indexcache import ops
from indexcache.models.family import DsaModule, decoder_layers, family_of, input_device
from indexcache.models.lm import hidden_states, summed_loss
from indexcache.models.mla import Rope, head_weights, project, stock_norm
from indexcache.models.patch import Patches
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern


def pair_passes(layers: int) -> float:
    """Return what the estimate costs, in forward passes.

    They are one for the selections, one with its backward pass, which counts two more, and the
    attention of every pair, each counted as a whole layer.
    """
    return 1 + 3 + (layers - 1) / 2


def pair_losses(
    model: DsaModule,
    inputs: Sequence[Tensor],
    counted: Sequence[Tensor],
    weights: Sequence[np.ndarray],
) -> np.ndarray:
    """Estimate what each layer loses by reading each earlier layer's selection.

    Args:
        model: the transformers model, on the stock or the fast path.
        inputs: token ids int64 [B, T] of every batch.
        counted: for every batch the tokens whose loss counts, bool [B, T].
        weights: for every batch, by how much the objective rises with the sum of the losses of each
            sequence, float64 [B].

    Returns:
        float64 [layers, layers]: row s, column l is what layer l loses with the selection of layer
        s < l, in the unit of the objective; 0 elsewhere.
    """
    layers = len(decoder_layers(model))
    found = np.zeros((layers, layers))
    decoder = model.model
    masks = dict.fromkeys({*model.config.layer_types, "indexed_attention"})  # Nothing reads them.
    for ids, own, weight in zip(inputs, counted, weights, strict=True):
        with use_pattern(model, Pattern.full(layers), capture=True) as seam:
            hidden_states(model, ids)
            selections = [_causal(seam.selections[i]) for i in range(layers)]
        device = input_device(model.get_input_embeddings())
        with torch.enable_grad(), _attention_watched(model, selections, weight, found):
            x = model.get_input_embeddings()(ids.to(device)).detach().requires_grad_()
            # Stock's decoder, also on the fast path, whose own is for inference.
            hidden = (
                type(decoder)
                .forward(decoder, inputs_embeds=x, use_cache=False, attention_mask=masks)
                .last_hidden_state
            )
            # Hooks read the gradients on their way; those of weights are not computed.
            torch.autograd.grad(summed_loss(model, hidden, ids, own), x)
    return found / 2


def _causal(ids_BSk: Tensor) -> Tensor:
    """Replace the ids of future keys, which stock leaves in short rows, by -1."""
    at = torch.arange(ids_BSk.shape[1], device=ids_BSk.device)[:, None]
    return ids_BSk.masked_fill(ids_BSk > at, -1)


@contextmanager
def _attention_watched(
    model: DsaModule, selections: Sequence[Tensor], weight_B: np.ndarray, found: np.ndarray
) -> Iterator[None]:
    """Let attention run over given selections, and add up the estimates in a backward pass."""
    family = family_of(model)
    with Patches() as patches:
        for i, layer in enumerate(decoder_layers(model)):
            forward = _forward(i, layer.self_attn, family, selections, weight_B, found)
            patches.replace(layer.self_attn, forward)
        yield


def _forward(
    layer: int,
    attention: Any,
    family: Any,
    selections: Sequence[Tensor],
    weight_B: np.ndarray,
    found: np.ndarray,
) -> Any:
    """Make the function that replaces the forward of a layer's attention."""

    def attend(q_BSHE: Tensor, latent_BTE: Tensor, source: int) -> Tensor:
        ids = selections[source].to(q_BSHE.device)
        width = attention.kv_lora_rank
        return ops.sparse_mla(q_BSHE, latent_BTE, ids, attention.scaling, value_dim=width)[0]

    def attention_forward(
        hidden_states: Tensor, position_embeddings: Rope, *_: Any, **__: Any
    ) -> tuple[Tensor | None, ...]:
        _q, q_nope, q_rot, latent, k_rot = project(
            family.rotate, stock_norm, attention, hidden_states, position_embeddings
        )
        w_k, w_v, bias = head_weights(attention, latent)
        q = torch.cat([torch.einsum("bthm,hmc->bthc", q_nope, w_k), q_rot], -1)
        keys = torch.cat([latent, k_rot], -1)
        out = attend(q, keys, layer)
        q, keys, own = q.detach(), keys.detach(), out.detach()

        @torch.no_grad()
        def watch(gradient: Tensor) -> None:
            for source in range(layer):
                change = (attend(q, keys, source) - own).float()
                along_BT = (gradient.float() * change).sum((-2, -1))
                squares = (along_BT**2).sum(-1).double().cpu().numpy()
                found[source, layer] += float(squares @ weight_B)

        out.register_hook(watch)
        values = torch.einsum("bthc,hvc->bthv", out, w_v)
        values = values if bias is None else values + bias
        result = attention.o_proj(values.flatten(2))
        return (result, None, None) if family.native_sharing else (result, None)

    return attention_forward
