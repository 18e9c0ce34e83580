"""Find weights that make numbers meaningless: not finite, or an indexer that ranks nothing.

An indexer full of NaN selects arbitrary tokens, so all losses stay finite and are wrong. The same
holds for the bias by which a router chooses its experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from indexcache.models.family import AnyModel, indexers, module_of
from indexcache.models.fp8 import SCALE_SUFFIX
from indexcache.vacuity import blindness as blindness  # It is said of any model's results.

SELECTING = (".indexer.", ".mlp.gate.")
"""Parts of the names of tensors that only choose: of tokens, and of experts."""

LARGE = 1 << 30
"""Max elements of which the least and the largest are sought at once."""


def check_weights(model: AnyModel, where: str = "", *, selecting: bool = False) -> None:
    """Refuse weights that hold NaN or infinities, and indexer matrices of one value.

    It takes one pass over the weights.

    Args:
        model: a loaded model. Weights on the device "meta" are passed over.
        where: what begins the error message.
        selecting: look at indexers and routers alone, whose faults leave the loss finite.

    Raises:
        ValueError: the message names the first such weight, indexers first.
    """
    check_tensors(module_of(model).state_dict(), where, selecting=selecting)


def check_tensors(
    tensors: Mapping[str, Tensor], where: str = "", *, selecting: bool = False
) -> None:
    """Refuse weights by their names in the model, as `check_weights` does.

    Raises:
        ValueError: the message names the first such weight, indexers first.
    """
    named = {n: t for n, t in tensors.items() if t.is_floating_point()}
    chosen = {n: t for n, t in named.items() if any(part in n for part in SELECTING)}
    for name, tensor in (chosen if selecting else chosen | named).items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        low, high = extremes(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong = tensor.detach().float()
            wrong = wrong[~torch.isfinite(wrong)]
            raise ValueError(
                f"{where}{'the' if where else 'The'} weight {name} is not finite: {len(wrong)} of "
                f"{tensor.numel()} values, the first of which is {float(wrong[0])}"
                f"{_overflow(tensor)}."
            )
        ranks_nothing = low == high and (tensor.dim() > 1 or (low == 0 and "norm.weight" in name))
        scales = name.endswith(SCALE_SUFFIX)
        if ".indexer." in name and ranks_nothing and tensor.numel() > 1 and not scales:
            raise ValueError(
                f"{where}{'the' if where else 'The'} weight {name} holds {low + 0.0:g} alone, "
                "so its indexer ranks nothing; the checkpoint lacks trained weights for it."
            )


def _overflow(tensor: Tensor) -> str:
    if tensor.dtype != torch.float16 or bool(torch.isnan(tensor).any()):
        return ""
    return " (float16 ends at 65504; load it as bfloat16 or float32)"


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the largest value of a tensor; NaN if it holds one."""
    tensor = tensor.detach()
    if tensor.dim() > 2 and tensor.numel() > LARGE:  # The experts of a layer, one by one.
        found = [value for part in tensor for value in extremes(part)]
        return (min(found), max(found)) if all(map(math.isfinite, found)) else (math.nan, math.nan)
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return float(low), float(high)


@contextmanager
def check_scores(model: AnyModel) -> Iterator[None]:
    """Refuse, at the end, indexer scores that were not finite in the passes inside the context.

    Queries, keys and weights of every indexer that ran are looked at, as its projections give
    them: so it costs little, and holds for both paths.

    Raises:
        ValueError: a projection gave NaN or infinities, or numbers whose products overflow fp32.
    """
    largest: dict[int, dict[str, Tensor]] = {}
    handles = []

    def watch(layer: int, part: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen = largest.setdefault(layer, {})
            value = output.detach().abs().amax().float()
            seen[part] = torch.maximum(seen[part], value) if part in seen else value

        return hook

    for i, indexer in enumerate(indexers(model)):
        if indexer is None:
            continue
        for part in ("wq_b", "k_norm", "weights_proj"):
            handles.append(getattr(indexer, part).register_forward_hook(watch(i, part)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for layer, seen in sorted(largest.items()):
        values = {part: float(v) for part, v in seen.items()}
        bad = [part for part, v in values.items() if not math.isfinite(v)]
        product = math.prod(values.values()) * _terms(indexers(model)[layer])
        if bad or product > torch.finfo(torch.float32).max:
            what = f"{bad[0]} gives NaN or infinities" if bad else "its scores overflow fp32"
            raise ValueError(
                f"The indexer of layer {layer} has no finite scores on this text ({what}), so its "
                "selection is arbitrary: broken weights, or a dtype that overflows?"
            )


def _terms(indexer: nn.Module) -> int:
    return int(getattr(indexer, "n_heads", 1)) * int(getattr(indexer, "head_dim", 1))


def blind_loss(model: AnyModel) -> float:
    """Return the loss of a model that gives every token the same probability: ln(vocabulary)."""
    return math.log(max(int(module_of(model).config.vocab_size), 1))
