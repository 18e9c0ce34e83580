"""Checkpoints of a run, as PyTorch's distributed checkpoints in folders that appear atomically."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from indexcache.distilling.parallel import World
from indexcache.records import publish, writing

Trained = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]
"""Modules that train, each with its optimizer, by name."""


def save_state(
    folder: Path,
    kind: str,
    step: int,
    trained: Trained,
    facts: dict[str, Any],
    world: World,
    *,
    optimizers: bool = True,
) -> None:
    """Write `folder/KIND-STEP` and remove earlier ones of that kind. Every process must call it.

    The folder is written under another name, forced to the disk and renamed: a kill at any moment
    leaves the old or the new one.

    Raises:
        OSError: the disk is full or not writable. Every process raises it, and the old one stays.
        ValueError: the checkpoint cannot be written for another reason.
    """
    tmp = folder / f"{kind}.part"
    path = folder / f"{kind}-{step:08d}"
    if world.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    world.wait()
    values = {name: _state_of(*pair, optimizers) for name, pair in trained.items()}
    state = {**values, "facts": {"step": step, **facts}, "rng": torch.get_rng_state()}
    try:
        with _quiet(), writing(tmp):
            dcp.save(state, checkpoint_id=tmp, no_dist=world.size == 1)
    except CheckpointException as error:
        raise ValueError(f"{path}: this checkpoint cannot be written ({_reason(error)}).") from None
    world.wait()
    if world.rank == 0:
        publish(tmp, path)
        for old in list_states(folder, kind):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
    world.wait()


def list_states(folder: Path, kind: str) -> list[Path]:
    """List the complete checkpoints of a kind, oldest first."""
    return sorted(
        path
        for path in folder.glob(f"{kind}-*")
        if path.is_dir() and path.name[len(kind) + 1 :].isdigit()
    )


def load_state(
    path: Path, trained: Trained, facts: dict[str, Any], world: World, *, optimizers: bool = True
) -> dict[str, Any]:
    """Load a checkpoint into modules and optimizers.

    Args:
        facts: a mapping with the keys of the facts to load; its values are ignored.

    Returns:
        The facts that were saved, and "step".

    Raises:
        ValueError: the checkpoint cannot be read, or belongs to other modules.
    """
    values = {name: _state_of(*pair, optimizers) for name, pair in trained.items()}
    state: dict[str, Any] = {**values, "facts": {"step": 0, **facts}, "rng": torch.get_rng_state()}
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    # A damaged file makes torch raise many types; CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{path}: this checkpoint cannot be read ({_reason(error)}); without it the run begins "
            "again: remove the run folder, or choose another --out."
        ) from None
    for name, (module, optimizer) in trained.items():
        strict = StateDictOptions(strict=not adapters_alone(module))
        set_model_state_dict(module, state[name]["model"], options=strict)
        if optimizers:
            set_optimizer_state_dict(module, optimizer, optim_state_dict=state[name]["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["facts"]


def adapters_alone(module: nn.Module) -> bool:
    """Return whether only adapters of a module train, which are then all that is saved of it."""
    return bool(getattr(module, "adapted", False))


def _state_of(
    module: nn.Module, optimizer: torch.optim.Optimizer, optimizers: bool
) -> dict[str, Any]:
    kept = StateDictOptions(ignore_frozen_params=adapters_alone(module))
    values: dict[str, Any] = {"model": get_model_state_dict(module, options=kept)}
    if optimizers:
        values["optimizer"] = get_optimizer_state_dict(module, optimizer)
    return values


def _reason(error: BaseException) -> str:
    """Say in one short line what an error of torch's checkpoints means."""
    failures = getattr(error, "failures", None)
    text = "; ".join(str(e) for e, _ in failures.values()) if failures else str(error)
    return f"{' '.join(text.split()):.200}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's single-process warning and the tracebacks it logs before raising."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logging.disable(before)
