"""Run as one of the processes that torchrun started, or alone."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from indexcache.process import end_with_torchrun

PATIENCE = timedelta(days=2)
"""How long processes wait for each other: one has more of a round to compute than another."""


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def first(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def agree(self, refusal: Exception | None) -> None:
        """Raise the first process's refusal on every process, if it has one."""
        if (refusal := self.first(refusal)) is not None:
            raise refusal

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes(0, 1)


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Say whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: str) -> str:
    """Turn `cuda` into this process's GPU under torchrun; anything else stays."""
    if device == "cuda" and world_size() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def join() -> Processes:
    """Join the processes that torchrun started, which exchange Python objects alone.

    They stay joined until this process ends.
    """
    size = world_size()
    if size > 1 and not dist.is_initialized():
        end_with_torchrun()
        dist.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_part)
    return Processes(int(os.environ.get("RANK", "0")), size)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
