"""Time a model with random weights on recorded selections of a trained model.

The cost of attention depends on how many ids neighbouring queries share. With random weights they
share too few.
"""

from __future__ import annotations

import lzma
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from indexcache.models.family import module_of
from indexcache.models.fast.selector import FastSelector, IndexInputs
from indexcache.models.patch import state_of
from indexcache.models.selector import IndexerCall
from indexcache.ops import Selection


def read_selections(word: str) -> tuple[Tensor, ...]:
    """Read recorded ids, and pools if they are named, from a safetensors file.

    Args:
        word: "FILE:NAME" or "FILE:NAME,POOL", the names of the file's tensors. Where only FILE.xz
            is there, it is unpacked in memory.

    Returns:
        int32 [R, K] tensors whose row r holds ascending ids of at most R + r.

    Raises:
        ValueError: there is no such file or tensor, or it does not hold selections.
    """
    file, _, names = word.rpartition(":")
    if not file or names.count(",") > 1:
        raise ValueError(
            "--selections takes FILE:NAME[,POOL], one or two tensors of a safetensors file, not "
            f"{word!r}."
        )
    if not Path(file).is_file() and not _packed(Path(file)).is_file():
        raise ValueError(f"There is no file {file} (--selections FILE:NAME).")
    tensors = read_tensors(Path(file))
    return tuple(_selection(Path(file), tensors, name) for name in names.split(","))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, or of the same file packed by xz.

    Raises:
        ValueError: it is not one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    packed = _packed(path)
    try:
        if path.is_file():
            return load(path.read_bytes())
        return load(lzma.decompress(packed.read_bytes()))
    except (SafetensorError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: is no safetensors file ({error}).") from None


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def _selection(path: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{path}: has no tensor {name!r}, it has {', '.join(sorted(tensors))}.")
    ids = tensors[name]
    if not _are_selections(ids):
        raise ValueError(
            f"{path}: {name} holds no selections: whole numbers [rows, k], ascending, in row r up "
            "to rows + r."
        )
    return ids.int()


def _are_selections(ids: Tensor) -> bool:
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or bool((ids < 0).any()):
        return False
    ascending = (ids[:, 1:] > ids[:, :-1]).all()
    last_key = torch.arange(len(ids), 2 * len(ids))
    return bool(ascending) and bool((ids[:, -1] <= last_key).all())


class Stretched:
    """Recorded ids [R, K] stretched over a longer context; rows are computed on demand.

    A row of k ids is k / K copies of a recorded row side by side, spread over the keys that are
    visible. Rows repeat every R. A row with at most k visible keys takes all of them and is padded
    with -1. The recorded ids are those of the last R of 2 R tokens. They are scaled to the width
    of a copy, which is the same for R neighbouring rows.

    Attributes:
        ids: int32 [length, K], the ids of the first copy.
        shift: int32 [length / R, k / K], how far each copy lies behind the first.
    """

    def __init__(self, ids_RK: Tensor, k: int, length: int):
        """Lay the recorded ids out for a context.

        Args:
            ids_RK: recorded ids, on the device that shall hold the rows.
            k: ids of one row.
            length: number of rows.

        Raises:
            ValueError: k is no multiple of K.
        """
        recorded, width_K = ids_RK.shape
        self.k = k
        self.recorded = recorded
        copies = k // width_K
        if copies * width_K != k:
            raise ValueError(
                f"{k} ids a query cannot be made of copies of {width_K} recorded ones."
            )
        device = ids_RK.device
        slot = torch.arange(width_K, device=device)
        copy = torch.arange(copies, device=device)
        blocks = -(-length // recorded)
        self.ids = torch.empty(length, width_K, dtype=torch.int32, device=device)
        self.shift = torch.empty(blocks, copies, dtype=torch.int32, device=device)
        for i, start in enumerate(range(0, length, recorded)):
            end = min(start + recorded, length)
            width = max(start + 1, k) / copies
            scaled = (ids_RK[: end - start] * (width / (2 * recorded))).long()
            # Ids that fell together when they were scaled are moved apart again.
            apart = (scaled - slot).cummax(1).values + slot
            self.ids[start:end] = apart.minimum(int(width) - width_K + slot)
            self.shift[i] = (copy * width).long()

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.shift.nbytes

    def rows(self, start: int, end: int) -> Tensor:
        """Return the rows from `start` to `end`: int32 [end - start, k], ascending."""
        row = torch.arange(start, end, device=self.ids.device)
        shift = self.shift[row // self.recorded][:, :, None]
        out = (shift + self.ids[start:end][:, None, :]).flatten(1)
        # `short` rows have at most k visible keys.
        short = min(max(self.k - start, 0), end - start)
        if short:
            keys = torch.arange(self.k, dtype=torch.int32, device=out.device)
            out[:short] = torch.where(keys <= row[:short, None], keys, -1)
        return out


def stretch(ids_RK: Tensor, k: int, length: int) -> Tensor:
    """Return all rows of `Stretched`: int32 [length, k]."""
    return Stretched(ids_RK, k, length).rows(0, length)


class RecordedSelector(FastSelector):
    """The fast path's selector; prefills read recorded selections where there are some.

    The indexers run and are timed as always. Their selections are freed before the recorded ids are
    computed.

    Attributes:
        ids: int32 [T, k], which a prefill reads in place of every selection, or None.
        pools: the pools that F layers publish to R layers, or None.
    """

    def __init__(self, model: nn.Module, selector: FastSelector):
        super().__init__(
            module_of(model), selector.index_dtype, selector.project, selector.project_one
        )
        self.ids: Tensor | None = None
        self.pools: Stretched | None = None

    def topk(
        self,
        call: IndexerCall,
        inputs: IndexInputs,
        pool: int | Fraction,
        within: Selection | None = None,
    ) -> Selection:
        selection = super().topk(call, inputs, pool, within)
        if inputs.positions is not None:
            return selection  # Decoding reads its own selections.
        batch, queries = call.x.shape[:2]
        end = inputs.k.shape[1]
        ids = selection.ids
        candidates = selection.pool
        del selection
        if self.ids is not None:
            ids = self.ids[None, end - queries : end].expand(batch, -1, -1)
        if self.pools is not None and pool:
            candidates = None  # This frees the memory before the next pool is computed.
            candidates = self.pools.rows(end - queries, end)[None].expand(batch, -1, -1)
        return Selection(ids, candidates)


def record_selections(model: nn.Module) -> None:
    """Make the selector of an accelerated model a `RecordedSelector`, until `undo`."""
    selector = state_of(model).selector
    assert isinstance(selector, FastSelector)
    state_of(model).selector = RecordedSelector(model, selector)
