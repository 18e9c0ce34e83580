"""The settings that the verbs which time a model have in common, and how their words become values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from indexcache.cli.common import Dtype, IndexDtype

if TYPE_CHECKING:
    from indexcache.bench.measure import Subject
    from indexcache.bench.run import Grid
    from indexcache.pattern import Pattern

NAMED = "glm-4.7-flash-dsa, glm-5, deepseek-v3.2, tiny-random"
Timed = Annotated[
    str, Parameter(help=f"Checkpoint folder, tiny, or a named shape with random weights ({NAMED}).")
]


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """What is timed, and how its model is made."""

    layers: int | None = None
    "Take only the first layers of a named shape."
    decode_tokens: int = 64
    "Number of tokens that are decoded after each prefill."
    chunk: int = 16384
    """Number of tokens of a prefill that go through the model at once. Patterns with R layers take
    half as many."""
    data: str | None = None
    "Text to prefill with, repeated to the length. The default is random tokens."
    dtype: Dtype = "bfloat16"
    "Dtype of the weights."
    index_dtype: IndexDtype = "fp8"
    "Dtype of the indexers' keys and queries; auto takes that of the weights."
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


def open_model(
    model: str, lengths: tuple[str, ...], wanted: tuple[str, ...], batch: str, s: TimingSettings
) -> tuple[Subject, Grid, list[int] | None]:
    """The accelerated model, what to measure on it under the patterns `wanted`, and the ids of --data where it is given. What
    cannot be measured is refused before the model is made."""
    import torch

    from indexcache.bench.measure import open_subject
    from indexcache.bench.recorded import read_selections
    from indexcache.bench.run import Grid
    from indexcache.cli.common import keep_freed_memory
    from indexcache.data import load_documents
    from indexcache.shapes import SHAPES, shape_of

    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(model, s.layers)
    grid = Grid(
        contexts=contexts(lengths),
        patterns=patterns(wanted, shape.layers),
        batches=batches(batch),
        decode_tokens=s.decode_tokens,
        chunk=s.chunk,
        seed=s.seed,
    )
    grid.check(shape, device.startswith("cuda"))
    if s.data is not None and model in SHAPES:
        raise ValueError(
            "A named shape has no tokenizer, so it is timed with random tokens; leave --data out."
        )
    recorded = None if s.selections is None else read_selections(s.selections)
    widths = [(recorded[0], 1)] if recorded else []
    widths += (
        [(recorded[1], p.pool_factor) for _, p in grid.patterns if p.pool_factor]
        if recorded and recorded[1:]
        else []
    )
    for ids, factor in widths:
        if shape.topk * factor % ids.shape[1]:
            raise ValueError(
                f"{s.selections}: {shape.topk * factor} ids a query cannot be made of copies of {ids.shape[1]} recorded ones."
            )
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
        selections=recorded,
    )
    if s.data is None:
        return subject, grid, None
    assert subject.encode is not None
    documents = load_documents(s.data, subject.encode, shape.vocab)
    return subject, grid, [i for d in documents for i in d.ids.tolist()]


def contexts(words: tuple[str, ...]) -> tuple[int, ...]:
    """("10K,60K", "5000") -> (10000, 60000, 5000); K is a thousand, M a million."""
    return tuple(dict.fromkeys(number(word) for word in split(words)))


def number(word: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KkM]?)", word)
    value = (
        float(match[1]) * {"": 1, "K": 1_000, "M": 1_000_000}[match[2].upper()] if match else 0.0
    )
    if value < 1 or value != int(value):
        raise ValueError(
            f"{word!r} is no number of tokens; write e.g. 8192, 60K or 1M (K is a thousand)."
        )
    return int(value)


def patterns(words: tuple[str, ...], layers: int) -> tuple[tuple[str, Pattern], ...]:
    """(name, pattern) for each word; see PATTERNS."""
    from indexcache.spec import parse_patterns

    return tuple((p.name, p.pattern) for p in parse_patterns(split(words), layers))


def batches(word: str) -> tuple[int | str, ...]:
    """ "1,4,fill" -> (1, 4, "fill")."""
    found: list[int | str] = []
    for one in split((word,)):
        if one != "fill" and not (one.isascii() and one.isdigit() and int(one) > 0):
            raise ValueError(f"--batch takes numbers of requests and the word fill, not {one!r}.")
        found.append(one if one == "fill" else int(one))
    return tuple(dict.fromkeys(found))


def split(words: tuple[str, ...]) -> list[str]:
    return [part.strip() for word in words for part in word.split(",") if part.strip()]
