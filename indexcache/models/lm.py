"""Hidden states and token losses of a loaded model, without ever holding the logits of a whole sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.models.family import AnyModel, module_of

LOGIT_BYTES = 1 << 27  # fp32 logits that are held at once


@torch.no_grad()
def hidden_states(model: AnyModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, E] (after the last norm) of one forward pass without a cache."""
    module = module_of(model)
    device = module.get_input_embeddings().weight.device
    return module.model(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state


@torch.no_grad()
def logit_chunks(model: AnyModel, *hidden_BTE: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """For each chunk of positions: (its slice, fp32 logits [B, t, V] of every hidden tensor given). The last position
    predicts nothing that is known and is left out."""
    head = module_of(model).get_output_embeddings()
    batch, length, _ = hidden_BTE[0].shape
    chunk = max(LOGIT_BYTES // (4 * batch * head.weight.shape[0]), 1)
    for start in range(0, length - 1, chunk):
        part = slice(start, min(start + chunk, length - 1))
        yield part, [head(h[:, part].to(head.weight.device)).float() for h in hidden_BTE]


@torch.no_grad()
def token_losses(model: AnyModel, hidden_BTE: Tensor, ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood of every next token, fp32 [B, T - 1], nats."""
    out = hidden_BTE.new_empty(ids_BT.shape[0], ids_BT.shape[1] - 1, dtype=torch.float32)
    for part, (logits,) in logit_chunks(model, hidden_BTE):
        target = ids_BT[:, part.start + 1 : part.stop + 1].to(logits.device)
        losses = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        )  # rows: over dim 1 of [B, V, t] it is far slower
        out[:, part] = losses.view(target.shape).to(out.device)
    return out
