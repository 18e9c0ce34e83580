"""Read the tensors of a checkpoint layer by layer, in threads ahead of the compute.

A layer's bytes are read in large pieces by several threads into one buffer, which is pinned where a
GPU computes. Nothing is computed here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indexcache.models.weights import TORCH_DTYPES, Weights

PIECE = 16 << 20
"""Bytes of one read."""
GAP = 1 << 20
"""Bytes between two tensors that are read along, rather than begin another read."""
THREADS = 8


@dataclass(frozen=True)
class Span:
    """Bytes of one file that are read together.

    Attributes:
        shard: the file.
        begin: the first byte in the file.
        end: the byte behind the last one.
        at: where they lie in the buffer.
    """

    shard: str
    begin: int
    end: int
    at: int


@dataclass(frozen=True)
class Plan:
    """The parts of files that hold a group of tensors, and each tensor's place in a buffer."""

    spans: tuple[Span, ...]
    places: dict[str, int]
    size: int

    @property
    def bytes(self) -> int:
        """The bytes that are read."""
        return sum(span.end - span.begin for span in self.spans)


@dataclass(eq=False)
class RawGroup:
    """The bytes of a group of tensors, as they are stored.

    Attributes:
        weights: the checkpoint.
        buffer: uint8, on the host.
        places: where each tensor, and its scales, begin in the buffer.
        seconds: how long the reading took.
    """

    weights: Weights
    buffer: Tensor
    places: dict[str, int]
    seconds: float

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Return a stored tensor or scales, a view of the buffer where its bytes are aligned.

        Args:
            buffer: a copy of the buffer on a device.
        """
        entry = self.weights.entries.get(name) or self.weights.scale_entries[name]
        at = self.places[name]
        source = self.buffer if buffer is None else buffer
        raw = source[at : at + entry.end - entry.begin]
        dtype = TORCH_DTYPES[entry.dtype]
        if (source.data_ptr() + at) % dtype.itemsize or at % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)


class Reader:
    """Reads groups of tensors, one group ahead of what is taken.

    Args:
        weights: the checkpoint.
        groups: the names of the tensors of each group, without their scales, which go along.
        pinned: whether a GPU copies the buffers. There are two then, so that a group must have been
            copied before the one behind the next is begun.
        threads: number of threads that read at once.

    Attributes:
        plans: what is read for each group.
        read: bytes read by now.
        seconds: the seconds of reading them, whoever waited.
        waited: the seconds of waiting for them.
    """

    def __init__(
        self,
        weights: Weights,
        groups: Sequence[Sequence[str]],
        *,
        pinned: bool = False,
        threads: int = THREADS,
    ):
        self.weights = weights
        self.plans = [self._plan(names) for names in groups]
        self.read = 0
        self.seconds = self.waited = 0.0
        self.threads = threads
        self._pinned: list[Tensor] | None = [] if pinned else None
        self._turn = 0
        self._next: tuple[int, Future[RawGroup]] | None = None
        self._stop = threading.Event()
        self._pools: list[ThreadPoolExecutor] = []
        shards = {span.shard for plan in self.plans for span in plan.spans}
        self._states = {shard: self._state(shard) for shard in shards}

    def _plan(self, names: Sequence[str]) -> Plan:
        scales = [self.weights.scales[n] for n in names if n in self.weights.scales]
        places = sorted((*self.weights.place(n), n) for n in (*names, *scales))
        spans: list[Span] = []
        at: dict[str, int] = {}
        size = 0
        for shard, begin, end, name in places:
            last = spans[-1] if spans else None
            if last and last.shard == shard and begin - last.end <= GAP:
                spans[-1] = Span(shard, last.begin, max(end, last.end), last.at)
            else:  # Tensors are as aligned in the buffer as in the file.
                spans.append(Span(shard, begin, end, size + (begin - size) % 64))
            at[name] = spans[-1].at + begin - spans[-1].begin
            size = spans[-1].at + spans[-1].end - spans[-1].begin
        return Plan(tuple(spans), at, size)

    def take(self, index: int, then: int | None = None) -> RawGroup:
        """Return a group, and begin to read another one.

        Args:
            index: the number of the group.
            then: the group that is read ahead; None for none.

        Raises:
            ValueError: a file is gone, is cut off, or has changed since the beginning.
        """
        began = time.perf_counter()
        if self._next is None or self._next[0] != index:
            self._forget()
            self._begin(index)
        assert self._next is not None
        future, self._next = self._next[1], None
        raw = future.result()
        self.waited += time.perf_counter() - began
        self.read += self.plans[index].bytes
        self.seconds += raw.seconds
        if then is not None:
            self._begin(then)
        return raw

    def close(self) -> None:
        """End the threads, and forget the buffers."""
        self._stop.set()
        self._forget()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()
        self._pinned = None if self._pinned is None else []
        self._stop.clear()

    def _forget(self) -> None:
        if self._next is not None:
            future, self._next = self._next[1], None
            if not future.cancel():
                future.exception()

    def _begin(self, index: int) -> None:
        if not self._pools:
            self._pools = [
                ThreadPoolExecutor(1, "indexcache-ahead"),
                ThreadPoolExecutor(self.threads, "indexcache-read"),
            ]
        self._turn += 1
        self._next = index, self._pools[0].submit(self._read, index, self._turn % 2)

    def _read(self, index: int, turn: int) -> RawGroup:
        plan = self.plans[index]
        began = time.perf_counter()
        buffer = self._buffer(turn, plan.size)
        view = buffer.numpy()
        with ExitStack() as stack:
            files = {}
            for shard in sorted({span.shard for span in plan.spans}):
                files[shard] = self._open(shard)
                stack.callback(os.close, files[shard])
            reads = []
            for s in plan.spans:
                for begin in range(s.begin, s.end, PIECE):
                    end = min(begin + PIECE, s.end)
                    part = view[s.at + begin - s.begin : s.at + end - s.begin]
                    piece = self._read_piece
                    reads.append(self._pools[1].submit(piece, s.shard, files[s.shard], begin, part))
            error = next((e for r in reads if (e := r.exception()) is not None), None)
            if error is not None:
                raise error
            for shard in files:
                self._check(shard)
        return RawGroup(self.weights, buffer, plan.places, time.perf_counter() - began)

    def _buffer(self, turn: int, size: int) -> Tensor:
        if self._pinned is None:
            return torch.empty(size, dtype=torch.uint8)
        if not self._pinned:
            largest = max(plan.size for plan in self.plans)
            empty: Any = torch.empty
            self._pinned += [empty(largest, dtype=torch.uint8, pin_memory=True) for _ in "ab"]
        return self._pinned[turn][:size]

    def _read_piece(self, shard: str, file: int, begin: int, part: Any) -> None:
        done = 0
        while done < len(part):
            if self._stop.is_set():
                return
            try:
                got = os.preadv(file, [part[done:]], begin + done)
            except OSError as error:
                path = self.weights.folder / shard
                raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
            if got == 0:
                raise ValueError(
                    f"{self.weights.folder / shard}: the file is cut off: it ends at byte "
                    f"{begin + done}, within a tensor; fetch it again."
                )
            done += got

    def _state(self, shard: str) -> tuple[int, int, int]:
        path = self.weights.folder / shard
        try:
            found = path.stat()
        except OSError as error:
            raise ValueError(
                f"{path}: the weight file cannot be read ({error.strerror}); restore it, and run "
                "the same command again."
            ) from None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _check(self, shard: str) -> None:
        if self._state(shard) != self._states[shard]:
            raise ValueError(
                f"{self.weights.folder / shard}: the weight file has changed since this run began "
                "to read it; restore it and run the same command again, or choose another --out."
            )

    def _open(self, shard: str) -> int:
        self._check(shard)
        path = self.weights.folder / shard
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
