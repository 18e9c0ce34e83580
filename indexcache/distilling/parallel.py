"""PyTorch's own parallelism, applied from outside: torchrun's processes, FSDP2, activation checkpointing.

Indexers are replicated and their gradients averaged: `fully_shard` on a mesh (replicate = all processes, shard = 1), one unit
each, since they are megabytes. In full mode the rest of the model is sharded over all processes, one unit a decoder layer, with
fp32 master shards and the compute dtype by FSDP2's mixed precision, and decoder layers are recomputed in the backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from indexcache.distilling.forward import run_decoder
from indexcache.distilling.rows import Row
from indexcache.models.family import decoder_layers, indexers
from indexcache.models.lm import LOGIT_BYTES


@dataclass(frozen=True)
class World:
    """This process among the others. `grouped`: there is a process group, and FSDP2 is in use."""

    rank: int
    size: int
    device: torch.device
    grouped: bool

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agree(self, refusal: Exception | None) -> None:
        """Raise on every process what the first one refuses; the others' argument does not count."""
        box = [refusal]
        if self.size > 1:
            dist.broadcast_object_list(box)
        if box[0] is not None:
            raise box[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """The processes of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """`cuda` becomes this process's own GPU under torchrun; anything else stays."""
    return (
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if device == "cuda" and world_size() > 1
        else device
    )


@contextmanager
def open_world(device: torch.device, sharded: bool) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; `sharded` asks for a process group even then."""
    size, rank = world_size(), int(os.environ.get("RANK", "0"))
    if device.type == "cuda" and device.index is None:  # FSDP2 and set_device want its number
        device = torch.device(
            own_device("cuda") if size > 1 else f"cuda:{torch.cuda.current_device()}"
        )
    begun = dist.is_initialized()
    if (size > 1 or sharded) and not begun:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if size > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, device, dist.is_initialized())
    finally:
        if dist.is_initialized() and not begun:
            dist.destroy_process_group()


class Causal(nn.Module):
    """The model as the trainer calls it, one module so that FSDP2 can wrap it: a row to (sum of the next-token losses, their
    count), within documents only; to (zero, zero) where only the decoder has to run."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, row: Row, device: torch.device, loss: bool) -> tuple[Tensor, int]:
        hidden = run_decoder(self.inner, row, device)
        if not loss:
            return hidden.new_zeros((), dtype=torch.float32), 0
        targets = torch.full((len(row.ids),), -100)
        for a, b in row.cuts:
            targets[a : b - 1] = torch.from_numpy(row.ids[a + 1 : b])
        targets, head = targets.to(device), self.inner.get_output_embeddings()  # type: ignore[operator]

        def part_loss(h: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(head(h).float(), wanted, ignore_index=-100, reduction="sum")

        rows = max(LOGIT_BYTES // (4 * self.inner.config.vocab_size), 1)  # type: ignore[union-attr, operator, arg-type]
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, wanted in zip(hidden[0].split(rows), targets.split(rows), strict=True):
            total = total + (
                checkpoint(part_loss, h, wanted, use_reentrant=False)
                if torch.is_grad_enabled()
                else part_loss(h, wanted)
            )
        return total, int((targets >= 0).sum())


def shard_students(students: nn.ModuleDict, world: World) -> None:
    """Plain data parallelism for the indexers; nothing to do in a process alone."""
    if world.grouped:
        mesh = init_device_mesh(
            world.device.type, (world.size, 1), mesh_dim_names=("replicate", "shard")
        )
        for student in students.values():
            fully_shard(student, mesh=mesh)


def shard_model(causal: Causal, world: World, dtype: torch.dtype) -> None:
    """FSDP2 over all processes, and activation checkpointing. The model's own indexers are left out: their masters train."""
    model = causal.inner
    kept = {p for m in indexers(model) if m is not None for p in m.parameters()}
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=kept)
    fully_shard(causal, mesh=mesh, mp_policy=policy, ignored_params=kept)
    for m in indexers(model):
        if m is not None:
            m.to(world.device)
    enable = "activation_checkpointing_enable"  # its name from 5.23 on
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    model.train()  # without it transformers ignores the line above; these models have no dropout (checked by the trainer)
