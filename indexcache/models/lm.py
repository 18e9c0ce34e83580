"""Compute hidden states and token losses without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from indexcache.models.family import AnyModel, input_device, module_of

LOGIT_BYTES = 1 << 27
"""Max bytes of fp32 logits that exist at once."""


@torch.no_grad()
def hidden_states(model: AnyModel, ids_BT: Tensor) -> Tensor:
    """Return the final hidden states [B, T, E], after the last norm, of a pass without a cache.

    Args:
        model: a model of any known family; the pattern in force applies.
        ids_BT: int64 token ids [B, T], on any device.
    """
    module = module_of(model)
    device = input_device(module.get_input_embeddings())
    return module.model(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state


@torch.no_grad()
def logit_chunks(model: AnyModel, *hidden_BTE: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield chunks of t positions: their slice, and fp32 logits [B, t, V] of every hidden tensor.

    The last position is left out, because the token that it predicts is unknown.
    """
    head = module_of(model).get_output_embeddings()
    batch, length, _ = hidden_BTE[0].shape
    device = input_device(head)
    chunk = max(LOGIT_BYTES // (4 * batch * head.weight.shape[0]), 1)
    for start in range(0, length - 1, chunk):
        span = slice(start, min(start + chunk, length - 1))
        yield span, [head(h[:, span].to(device)).float() for h in hidden_BTE]


@torch.no_grad()
def token_losses(model: AnyModel, hidden_BTE: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood of every next token, fp32 [B, T - 1], in nats."""
    out = hidden_BTE.new_empty(ids_BT.shape[0], ids_BT.shape[1] - 1, dtype=torch.float32)
    for span, (logits,) in logit_chunks(model, hidden_BTE):
        target = ids_BT[:, span.start + 1 : span.stop + 1].to(logits.device)
        # cross_entropy over dim 1 of [B, V, t] is far slower than over rows [B t, V].
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        out[:, span] = losses.view(target.shape).to(out.device)
    return out


def counted_losses(
    model: AnyModel, hidden_BTE: Tensor, ids_BT: Tensor, counted_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses of the tokens that count, without the logits of the others.

    Args:
        model, hidden_BTE, ids_BT: as in `token_losses`.
        counted_BT: which tokens count, bool [B, T]; never the first.

    Returns:
        n losses in nats, fp32, and whether each token is the most likely one, bool [n], both on the
        CPU, in the order of rows and then of tokens.
    """
    losses, right = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for target, (logits,) in _counted_logits(model, ids_BT, counted_BT, hidden_BTE):
        losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
        right.append((logits.argmax(-1) == target).cpu())
    return torch.cat(losses), torch.cat(right)


def counted_kl(
    model: AnyModel, base_BTE: Tensor, hidden_BTE: Tensor, ids_BT: Tensor, counted_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(base || hidden) of the predictions of the tokens that count, as `counted_losses`.

    Args:
        base_BTE: the final hidden states [B, T, E] to compare with.
    """
    kl, right = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for target, (base, logits) in _counted_logits(model, ids_BT, counted_BT, base_BTE, hidden_BTE):
        base_log_p, log_p = F.log_softmax(base, -1), F.log_softmax(logits, -1)
        kl.append((base_log_p.exp() * (base_log_p - log_p)).sum(-1).cpu())
        right.append((logits.argmax(-1) == target).cpu())
    return torch.cat(kl), torch.cat(right)


def summed_loss(model: AnyModel, hidden_BTE: Tensor, ids_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Return the sum of the losses of the tokens that count, fp32, in nats, with a gradient.

    The backward pass computes the logits again, a chunk at a time.
    """
    head = module_of(model).get_output_embeddings()

    def loss_of(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    row, at = (x.to(hidden_BTE.device) for x in counted_BT.nonzero(as_tuple=True))
    targets = ids_BT.to(hidden_BTE.device)[row, at]
    states = hidden_BTE[row, at - 1]
    chunk = max(LOGIT_BYTES // (4 * head.weight.shape[0]), 1)
    pairs = zip(states.split(chunk), targets.split(chunk), strict=True)
    sums = [checkpoint(loss_of, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum()


@torch.no_grad()
def _counted_logits(
    model: AnyModel, ids_BT: Tensor, counted_BT: Tensor, *hidden_BTE: Tensor
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield chunks of the tokens that count: their ids [n], and fp32 logits [n, V] of each."""
    head = module_of(model).get_output_embeddings()
    device = input_device(head)
    row, at = counted_BT.nonzero(as_tuple=True)
    targets = ids_BT[row, at].to(device)
    chunk = max(LOGIT_BYTES // (4 * len(hidden_BTE) * head.weight.shape[0]), 1)
    for start in range(0, len(row), chunk):
        span = slice(start, start + chunk)
        states = [h[row[span].to(h.device), at[span].to(h.device) - 1] for h in hidden_BTE]
        yield targets[span], [head(x.to(device)).float() for x in states]


def found_answers(
    right: Tensor | Sequence[bool], counted_BT: Tensor, answers: Sequence[Sequence[tuple[int, int]]]
) -> np.ndarray:
    """Count the answers that greedy decoding gives, int64 [B].

    It gives an answer exactly if each of its tokens is the most likely one after the right ones, so
    nothing is generated.

    Args:
        right: of `counted_losses`, for the same tokens.
        counted_BT: which tokens count; those of the answers do.
        answers: the places of the answers of each row.
    """
    table = np.zeros(tuple(counted_BT.shape), bool)
    table[counted_BT.numpy()] = np.asarray(right)
    return np.array(
        [sum(bool(table[row, a:b].all()) for a, b in spans) for row, spans in enumerate(answers)],
        np.int64,
    )
