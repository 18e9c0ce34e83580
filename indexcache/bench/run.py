"""Run a bench: measure every context under every pattern, and save each row at once."""

from __future__ import annotations

import datetime
import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from indexcache.bench import CHUNK
from indexcache.bench.measure import SPARE, compile_pass, filling_batch, measure
from indexcache.bench.results import (
    FILL,
    BenchResult,
    cell_key,
    check_row,
    derive_rows,
    published_figures,
    published_source,
)
from indexcache.bench.subject import Subject
from indexcache.memory import out_of_memory
from indexcache.models.identity import library_versions
from indexcache.progress import progress as bar
from indexcache.records import open_run, usable
from indexcache.shapes import SHAPES, Shape
from indexcache.spec import NamedPattern

RESULT = "bench.json"
RANDOM_NOTE = (
    "Weights are random: what is selected means nothing (neighbouring queries have less in common "
    "than in a trained model); only times and memory count."
)
RECORDED_NOTE = (
    "In prefills attention read recorded selections of a trained model, stretched over the "
    "context, and not those of the indexers, whose making was timed all the same."
)
RECORDED_POOLS_NOTE = "R layers read recorded pools in the same way."

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells that a bench measures: each context under each pattern, with each batch.

    Attributes:
        contexts: lengths of the prompt in tokens.
        patterns: named patterns.
        batches: requests that are decoded together: numbers, or "fill" for as many as fit. Only
            decoding is timed for more than one.
        decode_tokens: tokens that are decoded after each prefill.
        chunk: tokens of a prefill that go through the model at once. Patterns with R layers take
            half of it, because pools are wide, and their rows say so.
        seed: random seed of the prompts.
    """

    contexts: tuple[int, ...]
    patterns: tuple[NamedPattern, ...]
    batches: tuple[int | str, ...] = (1,)
    decode_tokens: int = 64
    chunk: int = CHUNK
    seed: int = 0

    def check(self, shape: Shape, on_gpu: bool) -> None:
        """Raise ValueError for a grid that cannot be measured on a model of this shape."""
        for name, values in (
            ("context", self.contexts),
            ("pattern", self.patterns),
            ("batch", self.batches),
        ):
            if not values:
                raise ValueError(f"There is no {name} to measure.")
        if min(self.decode_tokens, self.chunk) < 1:
            raise ValueError(
                "At least one token is decoded and a chunk has at least one, not "
                f"{self.decode_tokens} and {self.chunk}."
            )
        longest = shape.context - self.decode_tokens - SPARE
        for context in self.contexts:
            if not 1 <= context <= longest:
                raise ValueError(
                    f"A context of {context} tokens does not fit: the model's maximum is "
                    f"{shape.context}, and {self.decode_tokens} + {SPARE} are decoded after it; "
                    f"give 1 to {longest}."
                )
        for named in self.patterns:
            named.pattern.check(share=False, layers=shape.layers)
        if FILL in self.batches and not on_gpu:
            raise ValueError(
                "How many requests fill the memory is known for a GPU only; give --batch a number."
            )


@dataclass(frozen=True)
class Cell:
    """One row to measure; `batch` is a number or "fill"."""

    context: int
    named: NamedPattern
    batch: int | str

    def row(self) -> dict[str, Any]:
        """Return the part of its row that is known before the measurement."""
        pattern = self.named.pattern
        return {
            "context": self.context,
            "name": self.named.name,
            "pattern": str(pattern),
            "full": len(pattern.full_layers),
            "layers": len(pattern),
            "asked": self.batch,
        }


def run_bench(
    subject: Subject,
    grid: Grid,
    out: Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = False,
) -> BenchResult:
    """Measure the grid.

    Args:
        subject: the model.
        grid: the cells to measure.
        out: a folder, created if needed, where bench.json is written after every row. Its rows are
            kept, so a run that was killed continues.
        fresh: whether to delete the rows in `out` first.
        progress: whether to show a progress bar of tokens on stderr.

    Raises:
        ValueError: as `Grid.check`, or `out` holds a run with other settings or is no folder.
    """
    grid.check(subject.shape, subject.on_gpu)
    pools = any(named.pattern.pool_factor for named in grid.patterns)
    recorded = subject.selections[: 2 if pools else 1]
    text = subject.text_digest
    if subject.text and text is None:
        text = _digest(str(list(subject.text)).encode())
    settings = {
        "model": subject.name,
        "identity": subject.identity,
        "device": subject.device_name,
        "dtype": subject.dtype,
        "index_dtype": subject.index_dtype,
        "decode_tokens": grid.decode_tokens,
        "chunk": grid.chunk,
        "seed": grid.seed,
        "compile": subject.compiled,
        "selections": (
            _digest(b"".join(t.numpy().tobytes() for t in recorded)) if recorded else None
        ),
        "text": text,
        **({} if subject.fp8 == "dequantize" else {"fp8": subject.fp8}),
        **library_versions(),
    }

    def result_of(rows: Sequence[Mapping[str, Any]]) -> BenchResult:
        return _result(subject, settings, rows, len(recorded))

    if out is None:
        rows: list[dict[str, Any]] = []
        _measure_all(subject, grid, rows, lambda row: None, progress)
        return result_of(rows)
    if fresh:
        with usable(out):
            for name in ("settings.json", "journal.jsonl", RESULT):
                (out / name).unlink(missing_ok=True)
    with open_run(out, settings, check_row) as run:
        rows = list(run.journal)

        def keep(row: dict[str, Any]) -> None:
            run.append(row)
            run.save(RESULT, result_of(rows).to_json())

        _measure_all(subject, grid, rows, keep, progress)
        result = result_of(rows)
        run.save(RESULT, result.to_json())
    return result


def _measure_all(
    subject: Subject,
    grid: Grid,
    rows: list[dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
    progress: bool,
) -> None:
    """Append the missing rows of the grid to `rows`, and call keep(row) for each."""
    done = {cell_key(row) for row in rows if not row.get("error")}
    cells = [Cell(c, p, b) for b in grid.batches for c in grid.contexts for p in grid.patterns]
    missing = [cell for cell in cells if cell_key(cell.row()) not in done]
    if len(missing) < len(cells):
        log.info(
            "%d rows are there already and are kept (--fresh measures them anew)",
            len(cells) - len(missing),
        )
    longest = max((cell.context for cell in missing), default=0)
    compiled: set[bool] = set()  # True: with pools; False: without.
    with bar(sum(cell.context for cell in missing), "tok") if progress else nullcontext() as shown:
        for cell in missing:
            if shown is not None:
                batch = "" if cell.batch == 1 else f" batch {cell.batch}"
                shown.set_description(
                    f"{cell.context} {cell.named.name}{batch}", refresh=sys.stderr.isatty()
                )
            row = _measure_cell(subject, grid, cell, longest, compiled)
            if row.get("error"):
                log.warning("%s", row["error"])
            rows.append(row)
            keep(row)
            if shown is not None:
                shown.update(cell.context)


def _measure_cell(
    subject: Subject, grid: Grid, cell: Cell, longest: int, compiled: set[bool]
) -> dict[str, Any]:
    """Measure one row, or set its "error" if there is too little memory for it.

    Args:
        longest: the largest context of the run, which bounds the pass that compiles.
        compiled: the kinds of patterns that are compiled, with pools (True) or without (False);
            this adds the cell's kind after a pass that compiles.
    """
    pattern = cell.named.pattern
    pools = "R" in pattern.roles
    chunk = max(grid.chunk // 2, 1) if pools else grid.chunk
    row = cell.row()
    try:
        if pools not in compiled:
            length = min(longest, 2 * chunk + chunk // 2 + 1)
            compile_pass(subject, pattern, length, chunk)
            compiled.add(pools)
        capacity = cell.context + grid.decode_tokens + SPARE
        batch = filling_batch(subject, capacity, pattern) if cell.batch == FILL else int(cell.batch)
        return row | measure(
            subject,
            cell.context,
            pattern,
            batch=batch,
            decode_tokens=grid.decode_tokens,
            chunk=chunk,
            seed=grid.seed,
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return row | {
            "error": f"Out of memory at {cell.context} tokens, pattern {cell.named.name}, batch "
            f"{cell.batch}; fewer tokens, requests or --chunk may fit."
        }
    except ValueError as error:
        if cell.batch != FILL:
            raise
        return row | {"error": str(error)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _result(
    subject: Subject,
    settings: Mapping[str, Any],
    journal: Sequence[Mapping[str, Any]],
    recorded: int = 0,
) -> BenchResult:
    """Make the result of a journal; `recorded` is the number of recorded tensors that were read."""
    published = None
    if subject.name in SHAPES:
        uncut = subject.shape.layers == SHAPES[subject.name]["num_hidden_layers"]
        published = published_figures(subject.name) if uncut else None
    notes = [RANDOM_NOTE] if subject.random else []
    notes += [RECORDED_NOTE, RECORDED_POOLS_NOTE][:recorded]
    return BenchResult(
        device=subject.device_name,
        date=str(datetime.date.today()),
        model=subject.name,
        random=subject.random,
        note=" ".join(notes),
        shape=asdict(subject.shape),
        ceilings=asdict(subject.rates),
        settings=dict(settings),
        published={"source": published_source(), **published} if published else None,
        rows=derive_rows(journal, published),
    )
