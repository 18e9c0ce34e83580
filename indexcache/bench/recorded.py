"""Selections of a trained model for timing a random one: how much neighbouring queries read in common decides what attention costs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from indexcache.models.family import module_of
from indexcache.models.fast.selector import FastSelector, IndexInputs
from indexcache.models.patch import state_of
from indexcache.models.seam import IndexerCall
from indexcache.ops import Selection


def read_selections(word: str) -> list[Tensor]:
    """int [R, K], tensors of a safetensors file, from "FILE:NAME" or "FILE:NAME,POOL": row r holds ascending ids below `R + r + 1`.

    Raises:
        ValueError: no such file or tensor, or it does not hold selections.
    """
    file, _, names = word.rpartition(":")
    if not file or names.count(",") > 1:
        raise ValueError(
            f"--selections takes FILE:NAME[,POOL], one or two tensors of a safetensors file, not {word!r}."
        )
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file} (--selections FILE:NAME).")
    return [_read(Path(file), name) for name in names.split(",")]


def _read(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as held:
            if name not in held.keys():  # noqa: SIM118 - safe_open is no mapping
                raise ValueError(
                    f"{path}: has no tensor {name!r}, it has {', '.join(sorted(held.keys()))}."
                )
            ids = held.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file ({error}).") from None
    whole = (
        ids.dim() == 2 and ids.numel() and not ids.is_floating_point() and bool((ids >= 0).all())
    )
    seen = torch.arange(len(ids), 2 * len(ids)) if whole else ids
    if (
        not whole
        or not bool((ids[:, 1:] > ids[:, :-1]).all())
        or not bool((ids[:, -1] <= seen).all())
    ):
        raise ValueError(
            f"{path}: {name} holds no selections: whole numbers [rows, k], ascending, in row r up to rows + r."
        )
    return ids.int()


class Stretched:
    """Recorded ids [R, K] over a context, made row by row when asked for: each row of k ids is k / K copies of a recorded row side by
    side, spread over the keys that are visible. Rows repeat every R; rows of at most k visible keys take all, -1 padded.

    The last R of 2 R tokens were recorded; their ids are scaled to the width of a copy, which is the same for R neighbouring rows.

    Args:
        ids_RK: recorded ids, on the device where rows are wanted; `k` ids a row, of `length` rows.

    Raises:
        ValueError: k is no multiple of K.
    """

    def __init__(self, ids_RK: Tensor, k: int, length: int):
        recorded, each = ids_RK.shape
        self.k, self.recorded, self.copies = k, recorded, k // each
        if self.copies * each != k:
            raise ValueError(f"{k} ids a query cannot be made of copies of {each} recorded ones.")
        device = ids_RK.device
        slot, copy = torch.arange(each, device=device), torch.arange(self.copies, device=device)
        self.ids = torch.empty(length, each, dtype=torch.int32, device=device)  # of the first copy
        self.shift = torch.empty(
            -(-length // recorded), self.copies, dtype=torch.int32, device=device
        )  # of the others
        for i, start in enumerate(range(0, length, recorded)):
            end = min(start + recorded, length)
            width = max(start + 1, k) / self.copies
            e = (ids_RK[: end - start] * (width / (2 * recorded))).long()
            # apart again where they fell together
            self.ids[start:end] = ((e - slot).cummax(1).values + slot).minimum(
                int(width) - each + slot
            )
            self.shift[i] = (copy * width).long()

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.shift.nbytes

    def rows(self, start: int, end: int) -> Tensor:
        """int32 [end - start, k], ascending."""
        row = torch.arange(start, end, device=self.ids.device)
        out = (
            self.shift[row // self.recorded][:, :, None] + self.ids[start:end][:, None, :]
        ).flatten(1)
        few = min(max(self.k - start, 0), end - start)  # rows that take all
        if few:
            every = torch.arange(self.k, dtype=torch.int32, device=out.device)
            out[:few] = torch.where(every <= row[:few, None], every, -1)
        return out


def stretch(ids_RK: Tensor, k: int, length: int) -> Tensor:
    """All rows of `Stretched`: int32 [length, k]."""
    return Stretched(ids_RK, k, length).rows(0, length)


class RecordedSelector(FastSelector):
    """The fast path's selector; prefills read recorded selections where there are some.

    The indexers run and are timed as always; what they select goes before the recorded ids come.

    Attributes:
        ids: int32 [T, k], what a prefill reads in the place of every selection, or None.
        pools: makes the ids that F layers publish to R layers, or None.
    """

    def __init__(self, model: nn.Module, selector: FastSelector):
        super().__init__(
            module_of(model), selector.index_dtype, selector.project, selector.project_one
        )
        self.ids: Tensor | None = None
        self.pools: Stretched | None = None

    def topk(
        self, call: IndexerCall, inputs: IndexInputs, pool: int, within: Selection | None = None
    ) -> Selection:
        selection = super().topk(call, inputs, pool, within)
        if inputs.positions is not None:
            return selection  # Decoding reads what it selects.
        batch, queries = call.x.shape[:2]
        end = inputs.k.shape[1]
        ids = selection.ids
        candidates = selection.pool
        del selection
        if self.ids is not None:
            ids = self.ids[None, end - queries : end].expand(batch, -1, -1)
        if self.pools is not None and pool:
            candidates = None
            candidates = self.pools.rows(end - queries, end)[None].expand(batch, -1, -1)
        return Selection(ids, candidates)


def record_selections(model: nn.Module) -> None:
    """Make the selector of an accelerated model a `RecordedSelector`, until `undo`."""
    selector = state_of(model).selector
    assert isinstance(selector, FastSelector)
    state_of(model).selector = RecordedSelector(model, selector)
