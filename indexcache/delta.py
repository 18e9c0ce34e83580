"""Read a delta: the indexers that `distill` trained for a checkpoint, in one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from indexcache.checkpoint import fingerprint, read_header
from indexcache.pattern import Pattern
from indexcache.seen import Seen

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "indexcache-delta-1"
ADAPTERS = "adapters"
"""Metadata of indexers that were trained beside adapters: the name of the adapters' folder."""


def check_delta(
    path: str | Path, base: str | Path | None, layers: int, *, adapted: bool = False
) -> Pattern:
    """Read the header of a delta, and check that it belongs to a checkpoint.

    Args:
        path: the file.
        base: the checkpoint's folder; None checks none.
        layers: the number of its layers.
        adapted: whether the model has adapters on it.

    Returns:
        The pattern that its indexers were trained for, with the text they were trained on.

    Raises:
        ValueError: there is no such delta, or it has another base or number of layers, or belongs
            to adapters that the model lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such delta; give the delta.safetensors of a distillation."
        )
    metadata = read_header(path).metadata
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    try:
        pattern = Pattern(metadata["pattern"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(pattern) != layers:
        raise ValueError(f"{path}: the delta is for {len(pattern)} layers, the model has {layers}.")
    if metadata.get(ADAPTERS) and not adapted:
        raise ValueError(
            f"{path}: these indexers were trained beside adapters and are wrong without them; use "
            "the checkpoint that the same run wrote, or put the adapters on the model first, in "
            "Python, with peft."
        )
    digest = metadata.get("base_digest")
    if base is not None and digest and digest != fingerprint(Path(base)):
        raise ValueError(
            f"{path}: the delta belongs to another checkpoint ({metadata.get('base')}) than {base}."
        )
    return pattern.chosen_on(Seen.from_metadata(metadata))


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a delta, by their plain names in the checkpoint, and its metadata.

    Raises:
        ValueError: it cannot be read, or is no delta.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: the delta cannot be read ({reason}).") from None
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    return tensors, metadata


def check_finite(path: Path, name: str, value: Tensor) -> None:
    """Raise ValueError if a tensor of a delta has values that are not finite."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{path}: the tensor {name:.120} has values that are not finite.")


def delta_digest(path: str | Path) -> str:
    """Return the sha256 of a delta's file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def untrained(trained_for: Pattern, pattern: Pattern) -> list[int]:
    """List the layers that run an indexer under `pattern` and have none in the delta."""
    roles = zip(pattern.roles, trained_for.roles, strict=True)
    return [i for i, (role, trained) in enumerate(roles) if role != "S" and trained == "S"]
