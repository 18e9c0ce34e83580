"""The settings that `bench` and `profile` have in common, and how their words become values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from indexcache.bench import CHUNK
from indexcache.cli.common import DeltaFile, Dtype, Fp8, IndexDtype
from indexcache.cli.numbers import number

if TYPE_CHECKING:
    from indexcache.bench.run import Grid
    from indexcache.bench.subject import Subject

NAMED = "glm-4.7-flash-dsa, glm-5, deepseek-v3.2, tiny-random"
Timed = Annotated[
    str, Parameter(help=f"Checkpoint folder, tiny, or a named shape with random weights ({NAMED}).")
]


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """The settings of a timing: the model, and the measurements to make."""

    layers: int | None = None
    "Take only the first layers of a named shape."
    decode_tokens: int = 64
    "Number of tokens that are decoded after each prefill."
    chunk: int = CHUNK
    """Number of tokens of a prefill that go through the model at once. Patterns with R layers take
    half as many."""
    data: str | None = None
    "Text to prefill with, repeated to the length. The default is random tokens."
    dtype: Dtype = "bfloat16"
    "Dtype of the weights."
    index_dtype: IndexDtype = "fp8"
    "Dtype of the indexers' keys and queries; auto takes that of the weights."
    fp8: Fp8 = "dequantize"
    """How weights in FP8 are read: dequantize them, keep them, or keep them and quantise the
    inputs of products of many tokens too (both). A named shape gets such weights with the last
    two."""
    compile: bool = True
    "Fuse what lies between the matrix products with torch.compile, on a GPU."
    selections: Annotated[str | None, Parameter(metavar="FILE:NAME[,POOL]")] = None
    "Recorded selections, and pools, that layers read in a prefill instead of their own."
    device: str | None = None
    "Where the model runs. The default is cuda where there is one, else cpu."
    seed: int = 0
    "Random seed for random weights and tokens."
    trust_remote_code: bool = False
    "Run Python code that lies in the checkpoint."
    delta: DeltaFile = None


def open_model(
    model: str, lengths: tuple[str, ...], specs: tuple[str, ...], batch: str, s: TimingSettings
) -> tuple[Subject, Grid]:
    """Return the accelerated model, and what to measure on it under the patterns `specs`.

    What cannot be measured is refused before the model is made.
    """
    import torch

    from indexcache.bench.run import Grid
    from indexcache.bench.subject import open_subject
    from indexcache.cli.common import keep_freed_memory
    from indexcache.models.loading import describe
    from indexcache.shapes import SHAPES, shape_of
    from indexcache.spec import parse_patterns

    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(model, s.layers)
    patterns = parse_patterns(split(specs), shape.layers)
    if model not in SHAPES:
        missing = describe(model)["layers_without_indexer"]
        for named in patterns:
            named.pattern.check(layers=shape.layers, without_indexer=missing)
    grid = Grid(
        contexts=contexts(lengths),
        patterns=patterns,
        batches=batches(batch),
        decode_tokens=s.decode_tokens,
        chunk=s.chunk,
        seed=s.seed,
    )
    grid.check(shape, device.startswith("cuda"))
    if device == "cpu":
        keep_freed_memory()
    subject = open_subject(
        model,
        layers=s.layers,
        dtype=s.dtype,
        device=device,
        index_dtype=s.index_dtype,
        seed=s.seed,
        trust_remote_code=s.trust_remote_code,
        compile=s.compile,
        selections=s.selections,
        patterns=tuple(named.pattern for named in grid.patterns),
        data=s.data,
        tokens=max(grid.contexts),
        delta=s.delta,
        fp8=s.fp8,
    )
    return subject, grid


def contexts(words: tuple[str, ...]) -> tuple[int, ...]:
    """Read lengths: ("10K,60K", "5000") gives (10000, 60000, 5000)."""
    return tuple(dict.fromkeys(number(word) for word in split(words)))


def batches(word: str) -> tuple[int | str, ...]:
    """Read numbers of requests: "1,4,fill" gives (1, 4, "fill").

    Raises:
        ValueError: a part of the word is neither a number nor "fill".
    """
    values: list[int | str] = []
    for item in split((word,)):
        if item != "fill" and not (item.isascii() and item.isdigit() and int(item) > 0):
            raise ValueError(f"--batch takes numbers of requests and the word fill, not {item!r}.")
        values.append(item if item == "fill" else int(item))
    return tuple(dict.fromkeys(values))


def split(words: tuple[str, ...]) -> list[str]:
    """Split words at commas, and drop what is empty; JSON and existing files stay whole."""
    items: list[str] = []
    for word in words:
        whole = word.startswith(("{", "[")) or os.path.exists(word)
        items += [word] if whole else word.split(",")
    return [item.strip() for item in items if item.strip()]
