"""Selections of a trained model for timing a random one: how much neighbouring queries read in common decides what attention costs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_selections(word: str) -> Tensor:
    """int [R, K], a tensor of a safetensors file, from "FILE:NAME": row r holds ascending ids below `R + r + 1`.

    Raises:
        ValueError: no such file or tensor, or it does not hold selections.
    """
    from safetensors import SafetensorError, safe_open

    file, _, name = word.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"--selections takes FILE:NAME, a tensor of a safetensors file; {word!r} is none.")
    try:
        with safe_open(path, "pt") as held:
            if name not in held.keys():  # noqa: SIM118 - safe_open is no mapping
                raise ValueError(f"{path}: has no tensor {name!r}, it has {', '.join(sorted(held.keys()))}.")
            ids = held.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file ({error}).") from None
    whole = ids.dim() == 2 and ids.numel() and not ids.is_floating_point() and bool((ids >= 0).all())
    seen = torch.arange(len(ids), 2 * len(ids)) if whole else ids
    if not whole or not bool((ids[:, 1:] > ids[:, :-1]).all()) or not bool((ids[:, -1] <= seen).all()):
        raise ValueError(f"{path}: {name} holds no selections: whole numbers [rows, k], ascending, in row r up to rows + r.")
    return ids.int()


def stretch(ids_RK: Tensor, k: int, length: int) -> Tensor:
    """int32 [length, k] like recorded ids [R, K]: each row of k ids is k / K copies of a recorded row side by side, spread over the
    keys that are visible. Rows repeat every R; rows of at most k visible keys take all, -1 padded.

    The last R of 2 R tokens were recorded; their ids are scaled to the width of a copy, which is the same for R neighbouring rows.

    Raises:
        ValueError: k is no multiple of K.
    """
    recorded, each = ids_RK.shape
    copies = k // each
    if copies * each != k:
        raise ValueError(f"{k} ids a query cannot be made of copies of {each} recorded ones.")
    device, out = ids_RK.device, torch.empty(length, k, dtype=torch.int32, device=ids_RK.device)
    slot, copy = torch.arange(each, device=device), torch.arange(copies, device=device)
    for start in range(0, length, recorded):
        rows = torch.arange(start, min(start + recorded, length), device=device)
        width = max(start + 1, k) / copies
        e = (ids_RK[: len(rows)] * (width / (2 * recorded))).long()
        e = ((e - slot).cummax(1).values + slot).minimum(int(width) - each + slot)  # apart again where they fell together
        block = ((copy * width).long()[None, :, None] + e[:, None, :]).flatten(1)
        every = torch.arange(k, device=device).expand(len(rows), -1)
        block = torch.where((rows < k)[:, None], torch.where(every <= rows[:, None], every, -1), block)
        out[rows] = block.int()
    return out
