"""Say what streaming will take before it begins: passes, bytes, memory and hours."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from indexcache.checkpoint import read_config
from indexcache.configs import text_section
from indexcache.data import Batch
from indexcache.models.loading import DTYPES, open_weights
from indexcache.models.stream.reader import Reader
from indexcache.models.stream.store import taken
from indexcache.models.weights import Weights
from indexcache.pattern import Pattern
from indexcache.report.tables import table
from indexcache.shapes import Shape, count_pairs

SHARE = 0.5
"""Share of the rate of a large matrix product that a layer is thought to reach."""
SAMPLE = 4 << 30
"""Max bytes that are read to measure a disk."""


@dataclass(frozen=True)
class Round:
    """One pass over the layers.

    Attributes:
        states: states that are alive at its end.
        state_layers: layers that run, over all states.
        full: share of the states' layers that are full.
        share: share of the text that they run over.
    """

    states: int
    state_layers: float
    full: float
    share: float = 1.0

    @classmethod
    def of_patterns(cls, patterns: Sequence[Pattern]) -> Round:
        """Return the pass over some patterns, which are one state as long as they are equal."""
        layers = len(patterns[0])
        signatures = [p.signature() for p in patterns]
        alive = [len({s[: i + 1] for s in signatures}) for i in range(layers)]
        full = sum(p.roles.count("F") for p in patterns) / (layers * len(patterns))
        return cls(alive[-1], sum(alive), full)

    @classmethod
    def of_search(cls, layers: int, candidates: int, flips: int) -> Round:
        """Return a round of a search, whose candidates are born at half of the layers on average.

        Args:
            flips: the flips that were made before.
        """
        return cls(1 + candidates, layers * (1 + candidates / 2), 1 - flips / layers)


@dataclass(frozen=True)
class Forecast:
    """The passes, bytes, memory and hours that streaming takes.

    Attributes:
        passes: passes over the layers.
        layers: number of layers.
        processes: number of processes, which share the reading and deal the states out.
        bytes_of_pass: bytes that one pass reads.
        bytes_read: bytes that all passes read.
        operations: operations of all passes; a multiply-add is two.
        states_bytes: the most bytes of the states of one process between two layers, as they are
            taken: pinned memory for a GPU comes in powers of two.
        host_bytes: bytes of host memory of one process, states included.
        spilled_bytes: bytes of states that go to a file instead.
        device_bytes: about how many bytes of the device's memory it takes.
        read_rate: bytes a second of the disk.
        compute_rate: operations a second of the device.
        measured: which of the two rates were measured here.
        seconds: how long it takes.
    """

    passes: int
    layers: int
    processes: int
    bytes_of_pass: int
    bytes_read: int
    operations: float
    states_bytes: int
    host_bytes: int
    spilled_bytes: int
    device_bytes: int
    read_rate: float
    compute_rate: float
    measured: tuple[str, ...]
    seconds: float

    def table(self) -> str:
        """Format one line for each number."""
        return table(["forecast", "about"], [list(row) for row in self.rows().items()])

    def rows(self) -> dict[str, str]:
        """Return what every number is, and the number with its unit."""
        here = {name: ", measured here" if name in self.measured else "" for name in _RATES}
        spilled = self.spilled_bytes
        held = f"{_gb(self.host_bytes)}, {_gb(self.states_bytes - spilled)} of states"
        return {
            "passes over the layers": f"{self.passes} of {self.layers} layers",
            "read": f"{_gb(self.bytes_of_pass)} a pass, {_gb(self.bytes_read)} in all",
            "host memory": held,
            **({"states in a file": _gb(spilled)} if spilled else {}),
            "device memory": f"about {_gb(self.device_bytes)}",
            "disk": f"{self.read_rate / 1e9:.2f} GB/s{here['read']}",
            "compute": f"{self.compute_rate / 1e12:.3g} TFLOP/s{here['compute']}",
            **({"processes": str(self.processes)} if self.processes > 1 else {}),
            "time": f"{self.seconds / 3600:.2f} h",
        }

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the hours."""
        return asdict(self) | {"measured": list(self.measured), "hours": self.seconds / 3600}


_RATES = ("read", "compute")


def forecast(
    facts: dict[str, Any],
    rounds: Sequence[Round],
    batches: Sequence[Batch],
    *,
    dtype: str,
    device: str,
    host_memory: int | None = None,
    read_rate: float | None = None,
    compute_rate: float | None = None,
    processes: int = 1,
) -> Forecast:
    """Say what some passes over a checkpoint's layers take.

    Args:
        facts: what `models.loading.describe` says of it.
        rounds: the passes.
        batches: the text.
        dtype: dtype of the weights.
        device: the device that computes.
        host_memory: max bytes of states in host memory.
        read_rate: bytes a second that the disk reads; None measures it.
        compute_rate: operations a second that the device computes; None measures it.
        processes: number of processes.
    """
    weights = open_weights(facts)
    shape = Shape.of(text_section(read_config(facts["path"])))
    item = DTYPES[dtype].itemsize
    names = [weights.layer(i) for i in range(shape.layers)]
    reader = Reader(weights, names)
    stored = [plan.bytes for plan in reader.plans]
    made = [sum(_elements(weights, n) for n in group) * item for group in names]
    rest = (
        sum(_elements(weights, n) for n in {*weights.entries} - {n for g in names for n in g})
        * item
    )
    rates: dict[str, float] = {
        "read": read_rate or measured_reading(reader),
        "compute": compute_rate or SHARE * measured_product(device, DTYPES[dtype]),
    }
    pinned = torch.device(device).type == "cuda"
    hidden, ids = (
        sum(taken(b.ids.numel() * each, pinned) for b in batches)
        for each in (shape.hidden * item, 4 * shape.topk)
    )
    largest = max(b.ids.numel() for b in batches)
    seconds, operations, states = 0.0, 0.0, 0.0
    for one in rounds:
        # Every process runs the trunk, and its share of all others.
        mine = shape.layers + (one.state_layers - shape.layers) / processes
        for layer in range(shape.layers):
            each = one.share * layer_operations(shape, layer, one.full, batches)
            operations += each * one.state_layers / shape.layers
            compute = each * mine / shape.layers / rates["compute"]
            seconds += max(stored[layer] / rates["read"], compute)
        here = 1 + (one.states - 1) / processes
        states = max(states, one.share * here * (hidden + ids * (1 - one.full)))
    spilled = 0 if host_memory is None else max(int(states) - host_memory, 0)
    # Absorbed queries and the outputs of attention; rows of the experts; a chunk of the logits.
    work = 2 * shape.heads * shape.latent_width + shape.active_experts * (
        2 * shape.hidden + 3 * shape.moe_intermediate
    )
    work += 6 * shape.hidden
    return Forecast(
        passes=len(rounds),
        layers=shape.layers,
        processes=processes,
        bytes_of_pass=sum(stored),
        bytes_read=sum(stored) * len(rounds),
        operations=operations,
        states_bytes=int(states),
        host_bytes=2 * taken(max(stored), pinned) + int(states) - spilled,
        spilled_bytes=spilled,
        device_bytes=max(made) + max(stored) + rest + int(largest * item * work),
        read_rate=rates["read"],
        compute_rate=rates["compute"],
        measured=tuple(
            name
            for name, given in (("read", read_rate), ("compute", compute_rate))
            if given is None
        ),
        seconds=seconds,
    )  # fmt: skip


def layer_operations(shape: Shape, layer: int, full: float, batches: Sequence[Batch]) -> float:
    """Count the operations of one layer on all batches.

    Args:
        full: how much of an indexer runs: 1 in a full layer, 0 in a shared one.
    """
    tokens = sum(b.ids.numel() for b in batches)
    mlp = shape.dense_weights if layer < shape.dense_layers else shape.active_moe_weights
    linear = 2 * tokens * (shape.attention_weights + mlp + full * shape.indexer_weights)
    attended = scored = 0
    for b in batches:
        sequences, length = b.ids.shape
        attended += sequences * count_pairs(length, shape.topk)
        scored += sequences * count_pairs(length, length)
    pairs = attended * shape.latent_pair_operations + full * scored * shape.index_pair_operations
    return float(linear + pairs)


def measured_reading(reader: Reader) -> float:
    """Read some layers past the page cache, as far as the system allows, in bytes a second."""
    read = seconds = 0.0
    for index, plan in enumerate(reader.plans):
        for span in plan.spans:
            handle = os.open(reader.weights.folder / span.shard, os.O_RDONLY)
            os.posix_fadvise(handle, span.begin, span.end - span.begin, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        began = time.perf_counter()
        reader.take(index)
        seconds += time.perf_counter() - began
        read += plan.bytes
        if read >= SAMPLE or seconds > 10:
            break
    reader.close()
    return read / max(seconds, 1e-9)


def measured_product(device: str, dtype: torch.dtype) -> float:
    """Return the rate of a large matrix product on a device, in operations a second."""
    gpu = torch.device(device).type == "cuda"
    size = 8192 if gpu else 512
    a = torch.randn(size, size, device=device).to(dtype)
    count, began = 0, 0.0
    for turn in range(1 << 20):
        if turn == 2:
            began = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize(device)
        count = max(turn - 1, 0)
        if count and time.perf_counter() - began > 0.3:
            break
    return 2 * size**3 * count / (time.perf_counter() - began)


def _elements(weights: Weights, name: str) -> int:
    count = 1
    for size in weights.entries[name].shape:
        count *= size
    return count


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
