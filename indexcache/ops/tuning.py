"""What the selection's speed depends on and its result does not. Figures: docs/kernels.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass
class Settings:
    """Of ops/launch_scores.py, ops/launch_select.py and ops/launch_index.py."""

    queries: int = 64  # of a prefill tile; more warps or larger tiles lost
    keys: int = 128
    stages: int = 3
    hopper: bool = True  # the Gluon kernel of the scores where it fits
    hopper_stages: int = 2  # tiles of 128 keys on their way
    grid: bool = True  # up to 10 long rows are selected by one launch of the whole device
    grouped_pools: bool = True  # neighbours score the union of their pools together: 66 ms a layer of a 200K prefill, each by itself 113
    stride: int = 32  # a sample stands for this many keys
    listed: int = (
        8192  # least capacity of the lists of a row, at most 4 x the wanted count above that
    )
    sample: int = 32768  # most samples of a row; longer rows take a wider stride
    deviations: float = 5.0  # the threshold is set this many standard deviations to the safe side
    chunk: int = 8192  # prefill queries at a time
    workspace: int = 1 << 29  # bytes of rows of scores at a time, for decode and pools
    rows_below: int = 32  # fewer queries than this use the row kernel
    workers: int = 132  # programs that redo rows whose sample misled


SETTINGS = Settings()


def power(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(1 << (max(n, 1) - 1).bit_length(), least)


def segments(rows: int, length: int, programs: int, block: int) -> tuple[int, int]:
    """(segments, a power of two; their length): enough programs to fill the device, none shorter than a block."""
    count = 1
    while count < 64 and rows * count < programs and length // (2 * count) >= block:
        count *= 2
    return count, -(-length // (count * block)) * block


def gluon_runs(device: torch.device) -> bool:
    """Gluon is experimental: its kernels are used on the chip and with the versions of triton that they were measured with."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and triton.__version__.startswith("3.6.")
    )
