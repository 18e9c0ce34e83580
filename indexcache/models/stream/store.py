"""Keep tensors in host memory, and in a file once there are too many, while others are computed."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 6
"""Max number of tensors that wait for their way off the device."""


def taken(size: int, pinned: bool) -> int:
    """Return the memory that so many bytes take: torch rounds pinned memory to powers of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size


class Slot:
    """A tensor that a store keeps. Its place is free again once nobody holds the slot.

    Attributes:
        shape, dtype: those of the tensor.
        size: its bytes.
    """

    def __init__(self, store: Store, tensor: Tensor):
        self.store = store
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.size = tensor.numel() * tensor.itemsize
        self.held: Tensor | None = None  # uint8, where it lies in memory
        self.place: int | None = None  # its first byte, where it lies in the file
        self.ready: Future[Any] | None = None

    def __del__(self) -> None:
        self.store._release(self)


class Store:
    """Tensors outside of the device.

    On the CPU a tensor in memory is kept as it is. On a GPU copies run in threads, beside the
    compute, to and from pinned memory.

    Args:
        device: the device that makes and takes the tensors.
        limit: max bytes in host memory; what is more goes to a file. None: no limit.
        folder: where that file lies. It has no name there, so that a killed process leaves none.

    Attributes:
        peak: the most bytes that were in host memory.
        spilled: the most bytes that were in the file.
    """

    def __init__(
        self, device: torch.device, limit: int | None = None, folder: str | Path | None = None
    ):
        self.device = device
        self.limit = limit
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.peak = self.spilled = 0
        self._used = self._end = 0
        self._file: int | None = None
        self._free: dict[tuple[str, int], list[Any]] = {}  # by kind and size
        self._lock = threading.RLock()
        self._pending: deque[Future[Any]] = deque()
        self._gpu = device.type == "cuda"
        self._saver = ThreadPoolExecutor(1, "indexcache-save")
        self._loader = ThreadPoolExecutor(1, "indexcache-load")
        self._streams = [torch.cuda.Stream(device) for _ in "ab"] if self._gpu else []
        empty = getattr(torch.accelerator, "empty_host_cache", None)
        if self._gpu and limit is not None and empty is not None:
            empty()  # Pinned memory of other sizes, from the pass before, would come on top.

    def put(self, tensor: Tensor) -> Slot:
        """Keep a tensor of the device, which nobody changes any more.

        Raises:
            OSError: the disk is full; a GPU's copies say so later.
        """
        slot = Slot(self, tensor)
        if not self._gpu:
            self._keep(slot, tensor)
            return slot
        while len(self._pending) >= IN_FLIGHT:
            self._pending.popleft().result()
        made = torch.cuda.current_stream(self.device).record_event()
        slot.ready = self._saver.submit(self._save, slot, tensor, made)
        self._pending.append(slot.ready)
        return slot

    def ahead(self, slots: Sequence[Slot | None]) -> Callable[[], list[Tensor | None]]:
        """Begin to bring tensors back to the device; the result waits for them."""
        if not self._gpu:
            return lambda: [None if s is None else self.host(s) for s in slots]
        future = self._loader.submit(self._load, list(slots))

        def arrive() -> list[Tensor | None]:
            found = future.result()
            for tensor in found:
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            return found

        return arrive

    def host(self, slot: Slot) -> Tensor:
        """Return a tensor on the CPU."""
        if slot.ready is not None:
            slot.ready.result()
        raw = slot.held
        if raw is None:
            assert slot.place is not None
            raw = self._read(slot.place, torch.empty(slot.size, dtype=torch.uint8))
        return raw[: slot.size].view(slot.dtype).view(slot.shape)

    def write(self, slot: Slot, file: BufferedIOBase) -> None:
        """Append the bytes of a tensor to a file."""
        file.write(_view(_bytes(self.host(slot))))

    def read(self, file: BufferedIOBase, shape: Sequence[int], dtype: torch.dtype) -> Slot:
        """Keep a tensor that `write` has written.

        Raises:
            ValueError: the file is too short.
        """
        tensor = torch.empty(tuple(shape), dtype=dtype)
        view = _view(_bytes(tensor))
        if file.readinto(view) != len(view):
            raise ValueError("it is cut off")
        slot = Slot(self, tensor)
        self._keep(slot, tensor)
        return slot

    def settle(self) -> None:
        """Wait for all copies off the device.

        Raises:
            OSError: one of them failed, because the disk is full.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the threads, and give the memory and the file back."""
        self._saver.shutdown(wait=True, cancel_futures=True)
        self._loader.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._free.clear()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _keep(self, slot: Slot, tensor: Tensor) -> None:
        """Keep a tensor of the CPU in memory or in the file."""
        raw = _bytes(tensor)
        with self._lock:
            room = self._free.get(("pinned", slot.size))
            fits = bool(room) or self._fits(slot.size)
            if fits and not self._gpu:
                self._count(slot.size)
        if fits and self._gpu:
            slot.held = self._pinned(slot.size)
            slot.held[: slot.size].copy_(raw)
        elif fits:
            slot.held = raw
        else:
            self._write(slot, raw)

    def _save(self, slot: Slot, tensor: Tensor, made: Any) -> None:
        with self._lock:
            room = self._free.get(("pinned", slot.size))
            fits = bool(room) or self._fits(slot.size)
        raw = self._pinned(slot.size, counted=fits)
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams[0]):
            self._streams[0].wait_event(made)
            raw.copy_(_bytes(tensor), non_blocking=True)
            self._streams[0].record_event().synchronize()
        if fits:
            slot.held = raw
        else:
            self._write(slot, raw)
            with self._lock:
                self._free.setdefault(("staging", slot.size), []).append(raw)

    def _load(self, slots: list[Slot | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams[1]):
            held = [None if slot is None else self.host(slot) for slot in slots]
            for tensor in held:
                found.append(None if tensor is None else tensor.to(self.device, non_blocking=True))
            self._streams[1].record_event().synchronize()  # Then the host's memory may be reused.
        return found

    def _pinned(self, size: int, *, counted: bool = True) -> Tensor:
        """Return pinned memory. What is not counted is a stage on the way to the file."""
        kind = "pinned" if counted else "staging"
        with self._lock:
            free = self._free.get((kind, size))
            if free:
                return free.pop()
            if counted and kind == "pinned":
                self._count(size)
        return self._allocated(size)

    def _allocated(self, size: int) -> Tensor:
        empty: Any = torch.empty
        return empty(size, dtype=torch.uint8, pin_memory=True)

    def _fits(self, size: int) -> bool:
        return self.limit is None or self._used + taken(size, self._gpu) <= self.limit

    def _count(self, size: int) -> None:
        self._used += taken(size, self._gpu)
        self.peak = max(self.peak, self._used)

    def _release(self, slot: Slot) -> None:
        with self._lock:
            if slot.held is not None and self._gpu:
                self._free.setdefault(("pinned", slot.size), []).append(slot.held)
            elif slot.held is not None:
                self._used -= slot.size
            if slot.place is not None:
                self._free.setdefault(("file", slot.size), []).append(slot.place)

    def _write(self, slot: Slot, raw: Tensor) -> None:
        path = self.folder / ".spilled"
        with self._lock:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=".spilled-", dir=self.folder)
                os.unlink(name)
                self._file = handle
            free = self._free.get(("file", slot.size))
            if free:
                place = free.pop()
            else:
                place, self._end = self._end, self._end + slot.size
                self.spilled = self._end
        view, done = _view(raw), 0
        try:
            while done < slot.size:
                done += os.pwrite(self._file, view[done : slot.size], place + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path.parent)) from None
        slot.place = place

    def _read(self, place: int, out: Tensor) -> Tensor:
        assert self._file is not None
        view, done = _view(out), 0
        while done < len(view):
            try:
                got = os.preadv(self._file, [view[done:]], place + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.folder)) from None
            assert got > 0, "nobody else knows this file"
            done += got
        return out


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _view(raw: Tensor) -> memoryview:
    array: Any = raw.numpy()
    return memoryview(array)
