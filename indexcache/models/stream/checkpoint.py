"""Save the states of a pass over the layers at intervals, so that a kill costs few layers."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from indexcache.models.stream.run import State, Variant
from indexcache.models.stream.store import Slot, Store
from indexcache.records import atomic

SHARE = 0.02
"""Share of the time that checkpoints may take where no interval is given."""
RATE = 1e9
"""Bytes a second that a disk is thought to write before it has written anything."""

log = logging.getLogger("indexcache")


class Checkpoint:
    """The newest states of a pass in a file, of this process alone.

    A file is one JSON line, which says what the states are, and their tensors one after another.

    Args:
        path: the file.
        every: the interval in layers; 0 saves none. None saves as often as takes little time.
        identity: what must be equal for the states to be of use.
    """

    def __init__(self, path: Path, every: int | None, identity: dict[str, Any]):
        self.path = path
        self.every = every
        self.identity = json.loads(json.dumps(identity))
        self._began = time.perf_counter()
        self._rate = RATE
        self._warned = False

    def load(self, store: Store, variants: Sequence[Variant]) -> tuple[int, list[State]] | None:
        """Return the next layer and the states before it; None where there are none of this pass.

        A file that cannot be read is as good as none.
        """
        try:
            with open(self.path, "rb") as file:
                facts = json.loads(file.readline())
                if facts["of"] != self._of(variants):
                    return None
                slots = [
                    store.read(file, shape, getattr(torch, dtype))
                    for shape, dtype in facts["slots"]
                ]
                if file.read(1):
                    return None
                states = [
                    State(
                        list(one["variants"]),
                        *([None if i is None else slots[i] for i in one[key]] for key in PARTS),
                    )
                    for one in facts["states"]
                ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
        return int(facts["layer"]), states

    def save(
        self, store: Store, variants: Sequence[Variant], layer: int, states: Sequence[State]
    ) -> None:
        """Save the states before a layer where it is time to, and where the disk has room."""
        numbers: dict[Slot, int] = {}
        parts = [
            {"variants": state.variants}
            | {
                key: [
                    None if slot is None else numbers.setdefault(slot, len(numbers))
                    for slot in getattr(state, key)
                ]
                for key in PARTS
            }
            for state in states
        ]
        size = sum(slot.size for slot in numbers)
        if not self._due(layer, size):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        facts = {
            "of": self._of(variants),
            "layer": layer,
            "states": parts,
            "slots": [[list(s.shape), str(s.dtype).removeprefix("torch.")] for s in numbers],
        }
        try:
            if shutil.disk_usage(self.path.parent).free < size:
                raise OSError
            with atomic(self.path) as temporary, open(temporary, "wb") as file:
                file.write(json.dumps(facts).encode() + b"\n")
                for slot in numbers:
                    store.write(slot, file)
        except OSError:
            if not self._warned:
                log.warning(
                    "%s: there is no room for a checkpoint of %.1f GB, so a kill costs the round "
                    "that is under way.",
                    self.path.parent,
                    size / 1e9,
                )
            self._warned = True
            return
        self._began = time.perf_counter()
        self._rate = max(size, 1) / max(self._began - began, 1e-9)

    def clear(self) -> None:
        """Remove the file, whose pass has ended."""
        with suppress(OSError):
            self.path.unlink()
        self._began = time.perf_counter()

    def _of(self, variants: Sequence[Variant]) -> Any:
        return [self.identity, [[str(v.pattern), v.trained] for v in variants]]

    def _due(self, layer: int, size: int) -> bool:
        if self.every is not None:
            return self.every > 0 and layer % self.every == 0
        return (time.perf_counter() - self._began) * SHARE > size / self._rate


PARTS = ("hidden", "ids", "pool")
