"""Checkpoints of a run: PyTorch's distributed checkpoint in a folder that appears whole or not at all."""

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
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from indexcache.distilling.parallel import World
from indexcache.records import publish, writing

Trained = Mapping[
    str, tuple[nn.Module, torch.optim.Optimizer]
]  # name -> what trains and what trains it


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

    The folder is written under another name, forced to the disk and renamed: a kill at any moment leaves the old or the new one.

    Raises:
        OSError: it cannot be written, e.g. the disk is full; on every process. The old one stays.
        ValueError: it cannot be written for another reason.
    """
    part, whole = folder / f"{kind}.part", folder / f"{kind}-{step:08d}"
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    world.wait()
    values = {name: _values(*pair, optimizers) for name, pair in trained.items()}
    state = {**values, "facts": {"step": step, **facts}, "rng": torch.get_rng_state()}
    try:
        with _quiet(), writing(part):
            dcp.save(state, checkpoint_id=part, no_dist=world.size == 1)
    except CheckpointException as error:
        why = "; ".join(str(e) for e, _ in error.failures.values())
        raise ValueError(
            f"{whole}: this checkpoint cannot be written ({' '.join(why.split()):.200})."
        ) from None
    world.wait()
    if world.rank == 0:
        publish(part, whole)
        for old in found_states(folder, kind):
            if old != whole:
                shutil.rmtree(old, ignore_errors=True)
    world.wait()


def found_states(folder: Path, kind: str) -> list[Path]:
    """The whole checkpoints of a kind, oldest first."""
    return sorted(
        path
        for path in folder.glob(f"{kind}-*")
        if path.is_dir() and path.name[len(kind) + 1 :].isdigit()
    )


def load_state(
    path: Path, trained: Trained, facts: dict[str, Any], world: World, *, optimizers: bool = True
) -> dict[str, Any]:
    """Load a checkpoint into modules and optimizers; the facts that were saved, of the same keys as `facts`.

    Raises:
        ValueError: it cannot be read, or is of other modules.
    """
    values = {name: _values(*pair, optimizers) for name, pair in trained.items()}
    state: dict[str, Any] = {**values, "facts": {"step": 0, **facts}, "rng": torch.get_rng_state()}
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (
        Exception,
        CheckpointException,
    ) as error:  # whatever its parts raise on a damaged file; the latter is no Exception
        why = (
            "; ".join(str(e) for e, _ in error.failures.values())
            if isinstance(error, CheckpointException)
            else str(error)
        )
        raise ValueError(
            f"{path}: this checkpoint cannot be read ({' '.join(why.split()):.200}); without it the run begins again: "
            "remove the run folder, or choose another --out."
        ) from None
    for name, (module, optimizer) in trained.items():
        set_model_state_dict(module, state[name]["model"])
        if optimizers:
            set_optimizer_state_dict(module, optimizer, optim_state_dict=state[name]["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["facts"]


def _values(
    module: nn.Module, optimizer: torch.optim.Optimizer, optimizers: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {"model": get_model_state_dict(module)}
    if optimizers:
        values["optimizer"] = get_optimizer_state_dict(module, optimizer)
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a process alone is meant to be alone, and without the tracebacks that torch logs beside raising."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logging.disable(before)
