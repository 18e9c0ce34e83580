"""Apply PyTorch's parallelism from outside: torchrun, FSDP2 and activation checkpointing.

Indexers are replicated and their gradients averaged: `fully_shard` on a mesh (replicate = all
processes, shard = 1), one unit each, since they are megabytes. In full mode the backbone is
sharded over all processes, one unit a decoder layer, with fp32 master shards and the compute
dtype by FSDP2's mixed precision, and decoder layers are recomputed in the backward pass unless
the settings say otherwise. One process that computes in fp32 needs none of FSDP2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from indexcache.distilling.forward import run_decoder
from indexcache.distilling.rows import Row
from indexcache.models.family import DsaModule, decoder_layers
from indexcache.models.family import indexers as indexers_of
from indexcache.models.lm import LOGIT_BYTES, counted_losses
from indexcache.models.world import Processes, local_device, world_size


@dataclass(frozen=True)
class World(Processes):
    """This process among the others.

    Attributes:
        device: where it computes.
        grouped: whether there is a process group, and FSDP2 is in use.
    """

    device: torch.device
    grouped: bool

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


@contextmanager
def open_world(device: torch.device, sharded: bool) -> Iterator[World]:
    """Join the processes that torchrun started, or run as one process.

    Args:
        sharded: make a process group even for one process, which mixed precision needs.
    """
    size = world_size()
    rank = int(os.environ.get("RANK", "0"))
    if device.type == "cuda" and device.index is None:  # FSDP2 and set_device need its number.
        index = torch.cuda.current_device() if size == 1 else None
        device = torch.device(local_device("cuda") if index is None else f"cuda:{index}")
    joined_before = dist.is_initialized()
    if (size > 1 or sharded) and not joined_before:
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
        if dist.is_initialized() and not joined_before:
            dist.destroy_process_group()


class RowLoss(nn.Module):
    """The model as the trainer calls it: one module, so that FSDP2 can wrap it.

    Attributes:
        adapted: whether the model has adapters, which train instead of all weights.
    """

    def __init__(self, model: DsaModule, adapted: bool = False):
        super().__init__()
        self.inner = model
        self.adapted = adapted

    def forward(
        self, row: Row, device: torch.device, loss: bool, answers: bool = False
    ) -> tuple[Tensor, int | Tensor]:
        """Return the sum of the next-token losses within documents, in nats, and their number.

        Args:
            loss: False runs the decoder alone and returns (zero, 0).
            answers: only the tokens of the row's answers count, and beside the sum comes whether
                each of them is the most likely one, bool [n] on the CPU.
        """
        hidden = run_decoder(self.inner, row, device)
        if not loss:
            return hidden.new_zeros((), dtype=torch.float32), 0
        if answers:
            counted = torch.zeros(1, len(row.ids), dtype=torch.bool)
            for a, b in row.answers:
                counted[0, a:b] = True
            ids = torch.from_numpy(row.ids)[None]
            losses, right = counted_losses(self.inner, hidden, ids, counted)
            return losses.sum(), right
        return self.of_hidden(hidden, row, device)

    def of_hidden(self, hidden: Tensor, row: Row, device: torch.device) -> tuple[Tensor, int]:
        """Return what `forward` does, from the final hidden states [1, T, E]."""
        total = hidden.new_zeros((), dtype=torch.float32)
        targets = torch.full((len(row.ids),), -100)
        for a, b in row.cuts:
            targets[a : b - 1] = torch.from_numpy(row.ids[a + 1 : b])
        targets = targets.to(device)
        head = self.inner.get_output_embeddings()

        def block_loss(h: Tensor, block_targets: Tensor) -> Tensor:
            logits = head(h).float()
            return F.cross_entropy(logits, block_targets, ignore_index=-100, reduction="sum")

        rows = max(LOGIT_BYTES // (4 * self.inner.config.vocab_size), 1)
        for block in zip(hidden[0].split(rows), targets.split(rows), strict=True):
            if torch.is_grad_enabled():
                total = total + checkpoint(block_loss, *block, use_reentrant=False)
            else:
                total = total + block_loss(*block)
        return total, int((targets >= 0).sum())


def replicate_indexers(indexers: nn.ModuleDict, world: World) -> None:
    """Apply plain data parallelism to the trainable indexers where there is a process group."""
    if world.grouped:
        shape = (world.size, 1)
        names = ("replicate", "shard")
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        for indexer in indexers.values():
            fully_shard(indexer, mesh=mesh)


def place_model(
    row_loss: RowLoss,
    world: World,
    dtype: torch.dtype,
    recompute: bool = True,
    from_first: bool = False,
) -> None:
    """Put the model on its device for training, with FSDP2 where there is a process group.

    Args:
        recompute: apply activation checkpointing.
        from_first: take all weights from the first process, which alone has them.
    """
    model: Any = row_loss.inner
    if world.grouped:
        full = dict(row_loss.state_dict()) if from_first and world.rank == 0 else {}
        _shard(row_loss, world, dtype)
        if from_first and world.size > 1:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(row_loss, full, options=options)
    else:
        row_loss.to(world.device)
    # transformers has had the first name from 5.23 on. It ignores this outside of train mode;
    # `check_trainable` has made sure that the model has no dropout.
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    model.train()


def gather_weights(row_loss: RowLoss) -> dict[str, Tensor]:
    """Return all weights, gathered, on the first process's CPU."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(row_loss, options=options)
    return {name.removeprefix("inner."): value for name, value in weights.items()}


def _shard(row_loss: RowLoss, world: World, dtype: torch.dtype) -> None:
    """Apply FSDP2 over all processes to all but the model's own indexers: their masters train."""
    model: Any = row_loss.inner
    stock_indexers = [indexer for indexer in indexers_of(model) if indexer is not None]
    ignored = {p for indexer in stock_indexers for p in indexer.parameters()}
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(row_loss, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for indexer in stock_indexers:
        indexer.to(world.device)
