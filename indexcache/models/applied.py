"""Put the trained indexers of a delta into a loaded model, and take them out for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indexcache.delta import check_delta, check_finite, delta_digest, read_delta
from indexcache.models.family import AnyModel, indexers, module_of
from indexcache.pattern import Pattern


@dataclass(frozen=True, eq=False)
class AppliedDelta:
    """A delta that is in a model.

    Attributes:
        path: its file.
        digest: sha256 of that file.
        pattern: the pattern that its indexers were trained for, with the text.
        own: the checkpoint's own weights that the delta replaced, by name.
    """

    path: Path
    digest: str
    pattern: Pattern
    own: dict[str, Tensor] = field(repr=False)

    @classmethod
    def put(cls, model: AnyModel, path: str | Path, base: str | Path) -> AppliedDelta:
        """Apply a delta, and keep what it replaces; see `apply_delta`."""
        tensors, _ = read_delta(path)
        named = dict(module_of(model).named_parameters())
        own = {name: named[name].detach().clone() for name in tensors if name in named}
        pattern = apply_delta(model, path, base=base)
        return cls(Path(path), delta_digest(path), pattern, own)


def delta_of(model: Any) -> AppliedDelta | None:
    """Return the delta that `load` put into a model; None for a module or a model without one."""
    delta = getattr(model, "delta", None)
    return delta if isinstance(delta, AppliedDelta) else None


@contextmanager
def without_delta(model: Any) -> Iterator[None]:
    """Give a model its own indexers again within the block, where a delta replaced them."""
    delta = delta_of(model)
    if delta is None:
        yield
        return
    named = dict(module_of(model).named_parameters())
    trained = {name: named[name].detach().clone() for name in delta.own}
    _copy(delta.own, named)
    try:
        yield
    finally:
        _copy(trained, named)


@torch.no_grad()
def _copy(values: dict[str, Tensor], named: dict[str, Any]) -> None:
    for name, value in values.items():
        named[name].copy_(value)


def indexer_names(model: AnyModel, layer: int) -> dict[str, str]:
    """Map the names of parameters inside a layer's indexer to their names in the checkpoint."""
    prefix = f"model.layers.{layer}.self_attn.indexer."
    return {name: prefix + name for name, _ in indexers(model)[layer].named_parameters()}


@torch.no_grad()
def apply_delta(model: AnyModel, path: str | Path, *, base: str | Path | None = None) -> Pattern:
    """Put the indexers of a delta into a loaded model, in the dtype its own indexers have.

    Args:
        base: the folder the model was loaded from; if given, it must be the checkpoint that the
            delta belongs to.

    Returns:
        The pattern that the indexers were trained for, with the text they were trained on.

    Raises:
        ValueError: there is no such delta, it has another base, its tensors are not the indexers
            of the pattern's F and R layers in this model, or values are not finite. Nothing is
            changed then.
    """
    path = Path(path)
    tensors, _ = read_delta(path)
    layers = indexers(model)
    adapted = any("base_layer" in module._modules for module in module_of(model).modules())
    pattern = check_delta(path, base, len(layers), adapted=adapted)
    targets: dict[str, Tensor] = {}
    complete: set[int] = set()
    for layer, indexer in enumerate(layers):
        if indexer is not None:
            parameters = dict(indexer.named_parameters())
            names = indexer_names(model, layer)
            targets |= {full_name: parameters[name] for name, full_name in names.items()}
            if set(names.values()) <= set(tensors):
                complete.add(layer)
    for name, value in tensors.items():
        if name not in targets or targets[name].shape != value.shape:
            raise ValueError(
                f"{path}: the tensor {name:.120} has no place in this model's indexers (shape "
                f"{tuple(value.shape)})."
            )
        check_finite(path, name, value)
    incomplete = {i for i, role in enumerate(pattern.roles) if role != "S"} - complete
    if incomplete:
        raise ValueError(
            f"{path}: the delta is for {pattern}, but has no whole indexer of this model's layer "
            f"{min(incomplete)}."
        )
    for name, value in tensors.items():
        targets[name].copy_(value)
    return pattern
