"""Define the tuning constants, which change the kernels' speed, and results only by rounding.

docs/kernels.md has the measurements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """The queries and keys of a kernel's tile, and how many tiles are in flight."""

    queries: int
    keys: int
    stages: int = 2

    def options(self, side: int, divisor: int) -> dict[str, int]:
        """Compute launch options for a tile `divisor` times smaller in both directions.

        `side` is the side of the tile that is divided among warps, 16 rows for each.
        """
        tile = {"BM": max(self.queries // divisor, 32), "BN": max(self.keys // divisor, 32)}
        warps = min(max(side // divisor // 16, 4), 8)
        return tile | {"num_warps": warps, "num_stages": self.stages}


@dataclass(frozen=True, kw_only=True)
class IndexTuning:
    """The indexer's scores and the selection of the best (ops/index)."""

    tile: Tile = Tile(64, 128, 3)
    "Tile of a prefill in the Triton kernel. More warps or larger tiles are slower."
    tile_wide: Tile = Tile(64, 64, 3)
    "The same for more than 128 dims."
    hopper: bool = True
    "Whether the Gluon kernel computes the scores where it fits."
    hopper_stages: int = 2
    "Tiles of 128 keys in flight in the Gluon kernel."
    grid: bool = True
    "Whether one launch of the whole device selects from up to 10 long rows."
    grouped_pools: bool = True
    """Whether neighbouring queries score the union of their pools together. A layer of a 200K
    prefill takes 66 ms, and 113 ms when each query scores its pool by itself."""
    bitmaps_from: int = 9
    """Groups of at least this many queries are united through bitmaps where their lists are short
    too; 9 is none. Not measured yet."""
    stride: int = 32
    "Keys that one key of the sample stands for."
    listed: int = 8192
    "Min capacity of a row's lists; above that it is at most 4 x the number of selected keys."
    sample: int = 32768
    "Max samples of a row; longer rows take a wider stride."
    deviations: float = 5.0
    "The threshold is set this many standard deviations to the safe side."
    chunk: int = 8192
    "Prefill queries per chunk."
    workspace: int = 1 << 29
    "Max bytes of score rows at a time, in decoding and for pools."
    rows_below: int = 32
    "Fewer queries than this use the row kernel."
    pdl: bool = False
    "Whether keys may come to the L2 cache while the kernel before the scores still runs."
    workers: int = 132
    "Programs that recompute the rows whose sample misled."


@dataclass(frozen=True, kw_only=True)
class MlaTuning:
    """Sparse attention over latents (ops/mla)."""

    rows: int = 64
    "Rows (queries x heads) of a program in prefill."
    keys: int = 64
    "Keys of a tile."
    stages: int = 2
    "Tiles in flight in prefill."
    warps: int = 8
    "Warps of a program in prefill."
    narrow_keys: int = 32
    """Keys of a tile of 16-bit latents with at most 256 value dims and 512 dims in all, in prefill.
    Two such programs of 4 warps, with one tile in flight, fit on a multiprocessor."""
    decode_warps: int = 8
    "Warps of a program whose ids are split over programs."
    decode_keys: int = 64
    "Keys of a tile of such a program: fewer make more programs."
    decode_rows: int = 64
    "Rows of such a program; 64 spill, and more programs read the same latents with fewer."
    splits: int = 64
    "Max number of programs that share the ids of a query."
    pdl: bool = False
    "Whether such programs may start while the kernel before them still runs."
    programs: int = 132
    "With fewer programs than this the ids of a query are split over programs."
    hopper: bool = True
    "Whether the Gluon kernel runs prefill where it fits."
    hopper_registers: int = 224
    "Registers of a computing thread in the Gluon kernel."
    backward_keys: int = 32
    "Keys of a tile in the backward pass."
    backward_slice: int = 128
    "Value dims of the latents' gradient that are computed at a time."
    rows_fp32: int = 32
    "Max rows of a program for fp32, which takes twice the shared memory."
    keys_fp32: int = 16
    "Max keys of a tile for fp32."


@dataclass(frozen=True, kw_only=True)
class StepTuning:
    """The products of one token in a step of decoding (ops/step)."""

    products: bool = False
    "Whether these kernels run the projections of attention. Off until the results have them."
    experts: bool = False
    "Whether they run the router and the experts."
    indexer: bool = False
    "Whether they run the indexer's projections and its quantisation, where `products` is on too."
    attention: bool = False
    "Whether the values' weights are multiplied where the splits of attention are added up."
    value_rows: int = 32
    "Rows of the values' weights of a program of that."
    pdl: bool = True
    "Whether a kernel of the step may start and load its weights while the one before runs."
    tile: int = 4096
    "Weights that a program loads at a time."
    down_tile: int = 2048
    "The same for the down projections of experts."
    columns: int = 2048
    "Max columns of a tile."
    whole: bool = False
    "Whether tiles have all columns, so that all of a program's weights load before it waits."
    programs: int = 132
    "A tile has fewer rows where there would be fewer programs than this."
    warps: int = 4
    "Warps of a program."


@dataclass(frozen=True, kw_only=True)
class KlTuning:
    """The distillation loss (ops/kl).

    `wide` tiles serve more than 192 dims of attention, or more than 128 of the indexer.
    """

    normalise: Tile = Tile(128, 128)
    teach: Tile = Tile(128, 128)
    teach_wide: Tile = Tile(128, 64)
    score: Tile = Tile(128, 128)
    queries: Tile = Tile(128, 64)
    "Tile of the gradients of the queries."
    keys: Tile = Tile(64, 128)
    "Tile of the gradients of the keys."
    keys_wide: Tile = Tile(32, 128, 3)
    "The same for more than 128 dims, where 64 queries spill 280 bytes."
    slice: int = 64
    "Dims of an attention product that are multiplied at a time."
    rows: int = 8192
    "Max queries of a chunk."
    programs: int = 264
    "Programs that fill a device. Short documents share the heads of a block of keys among several."

    def largest(self) -> int:
        """Return the largest side of a tile: matrices are padded to multiples of it."""
        return max(max(t.queries, t.keys) for t in vars(self).values() if isinstance(t, Tile))


@dataclass(frozen=True, kw_only=True)
class LinearTuning:
    """Products with FP8 weights, and gated experts (ops/linear)."""

    plain: tuple[int, int, int, int] = (128, 256, 64, 4)
    """Rows of the weights, tokens (at most) and inputs of a tile of unquantised weights, and tiles
    in flight; gated experts take half of the rows from either half."""
    converted: tuple[int, int, int, int] = (128, 256, 32, 6)
    "The same where FP8 weights become bf16. With 64 inputs ptxas waits for each wgmma (C7515)."
    quantized: tuple[int, int, int, int] = (128, 128, 128, 3)
    "The same where the inputs are quantised; a tile has 128 inputs, which have one scale."
    described: bool = False
    "Whether the copy engine brings tiles of weights that are not converted. Not measured yet."
    fused_experts: bool = False
    """Whether `accelerate` runs unquantised experts by `ops.gated_experts` too, on a GPU. Then
    nothing lies between the products but the sum of a token's experts. Not measured yet."""
    few: int = 4
    "Up to this many tokens each product reads the weights for one token, in fp32."
    few_rows: int = 8
    "Max rows of the weights of a program that serves few tokens; a power of two up to 128."
    few_inputs: int = 512
    few_warps: int = 4
    few_programs: int = 264
    "With fewer programs than this they take fewer rows each."


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """All tuning constants, and the backend of calls that leave theirs at "auto"."""

    backend: str = "auto"
    index: IndexTuning = field(default_factory=IndexTuning)
    mla: MlaTuning = field(default_factory=MlaTuning)
    kl: KlTuning = field(default_factory=KlTuning)
    step: StepTuning = field(default_factory=StepTuning)
    linear: LinearTuning = field(default_factory=LinearTuning)


_current = Tuning()


def current() -> Tuning:
    """Return the tuning in force."""
    return _current


@contextmanager
def tuned(
    *,
    backend: str | None = None,
    index: Mapping[str, Any] | None = None,
    mla: Mapping[str, Any] | None = None,
    kl: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
    linear: Mapping[str, Any] | None = None,
) -> Iterator[Tuning]:
    """Change the tuning within a block: `with ops.tuned(mla={"hopper": False}): ...`.

    The change holds in all threads, because the backward pass runs in another one.

    Args:
        backend: "auto", "torch" or "triton", for calls whose backend is "auto".
        index, mla, kl, step, linear: fields of `IndexTuning`, `MlaTuning`, `KlTuning`, `StepTuning`
            and `LinearTuning`, and their new values.

    Raises:
        TypeError: there is no such field.
    """
    global _current
    before = _current
    _current = Tuning(
        backend=before.backend if backend is None else backend,
        index=replace(before.index, **(index or {})),
        mla=replace(before.mla, **(mla or {})),
        kl=replace(before.kl, **(kl or {})),
        step=replace(before.step, **(step or {})),
        linear=replace(before.linear, **(linear or {})),
    )
    try:
        yield _current
    finally:
        _current = before


# ---- small arithmetic that every launch shares


def power(n: int, minimum: int = 1) -> int:
    """Return the next power of two, at least `minimum`."""
    return max(1 << (max(n, 1) - 1).bit_length(), minimum)


def segments(rows: int, length: int, programs: int, block: int) -> tuple[int, int]:
    """Split rows of `length` so that `programs` programs have work.

    Returns (number of segments, their length). The number is a power of two, at most 64, and no
    segment is shorter than a block.
    """
    count = 1
    while count < 64 and rows * count < programs and length // (2 * count) >= block:
        count *= 2
    return count, -(-length // (count * block)) * block


def interpreted() -> bool:
    """Return whether Triton's CPU interpreter is on: TRITON_INTERPRET=1 before triton's import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def gluon_runs(device: torch.device) -> bool:
    """Return whether the Gluon kernels run on this device.

    Gluon is experimental: its kernels are used on the chip and with the versions of triton that
    they were measured with.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return gluon_refusal() is None


def gluon_refusal() -> str | None:
    """Return why the Gluon kernels do not run with the triton that is installed; None: they do."""
    import triton

    if triton.__version__.startswith("3.6."):
        return None
    return f"they were measured with triton 3.6, and {triton.__version__} is installed"
