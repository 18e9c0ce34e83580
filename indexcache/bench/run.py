"""The benchmark: every context under every pattern, each written down as soon as it is measured."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from indexcache.bench.floors import INDEX_PARTS
from indexcache.bench.measure import SPARE, Subject, filling_batch, measure, out_of_memory, warm_up
from indexcache.models.loading import library_versions
from indexcache.pattern import Pattern
from indexcache.progress import progress
from indexcache.records import open_run
from indexcache.shapes import SHAPES, Shape

RESULT = "bench.json"
FILL = "fill"
ALL = "all"
RANDOM_NOTE = (
    "Weights are random: what is selected means nothing (neighbouring queries have less in common than in a trained model); "
    "only times and memory count."
)
RECORDED_NOTE = (
    "In prefills attention read recorded selections of a trained model, stretched over the context, and not those of the "
    "indexers, whose making was timed all the same."
)
RECORDED_POOLS = "R layers read recorded pools in the same way."


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured: each context (tokens) under each (name, pattern), at each batch (a number, or "fill": as many requests
    as fit; only decoding is timed beyond 1). Patterns with R take half the chunk (their rows say so), because pools are wide."""

    contexts: tuple[int, ...]
    patterns: tuple[tuple[str, Pattern], ...]
    batches: tuple[int | str, ...] = (1,)
    decode_tokens: int = 64
    chunk: int = 8192
    seed: int = 0

    def check(self, shape: Shape, on_gpu: bool) -> None:
        """Raises ValueError for what cannot be measured on a model of this shape."""
        for what, values in (
            ("context", self.contexts),
            ("pattern", self.patterns),
            ("batch", self.batches),
        ):
            if not values:
                raise ValueError(f"There is no {what} to measure.")
        if min(self.decode_tokens, self.chunk) < 1:
            raise ValueError(
                f"At least one token is decoded and a chunk has at least one, not {self.decode_tokens} and {self.chunk}."
            )
        for context in self.contexts:
            most = shape.context - self.decode_tokens - SPARE
            if not 1 <= context <= most:
                raise ValueError(
                    f"A context of {context} tokens does not fit: the model's maximum is {shape.context}, and "
                    f"{self.decode_tokens} + {SPARE} are decoded after it; give 1 to {most}."
                )
        for name, pattern in self.patterns:
            pattern.check(layers=shape.layers)
            if len([n for n, _ in self.patterns if n == name]) > 1:
                raise ValueError(
                    f"Two patterns have the name {name!r}; give each its own with NAME=..."
                )
        if FILL in self.batches and not on_gpu:
            raise ValueError(
                "How many requests fill the memory is known for a GPU only; give --batch a number."
            )


def run_bench(
    subject: Subject,
    grid: Grid,
    out: Path | None = None,
    *,
    fresh: bool = False,
    text: list[int] | None = None,
) -> dict[str, Any]:
    """Measure the grid; with `out`, rows already there are kept and `bench.json` is written after every row.

    Returns:
        {"device", "date", "model", "random", "shape", "settings", "note", "rows"}; a row is what `measure` returns with its "name",
        its "speedup" against all full and the "published" figures where there are any, or an "error" in their place.

    Raises:
        ValueError: what `Grid.check` refuses; `out` holds a run with other settings.
    """
    grid.check(subject.shape, subject.cuda)
    lent = (subject.selections or [])[
        : 2 if any(p.pool_factor for _, p in grid.patterns) else 1
    ]  # pools are for R
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
        "selections": None if not lent else _digest(b"".join(t.numpy().tobytes() for t in lent)),
        "text": None if text is None else _digest(str(text).encode()),
        **library_versions(),
    }
    if out is None:
        rows: list[dict[str, Any]] = []
        _measure_all(subject, grid, rows, text, lambda row: None)
        return _result(subject, settings, rows, len(lent))
    if fresh:
        for name in ("settings.json", "journal.jsonl", RESULT):
            (out / name).unlink(missing_ok=True)
    with open_run(out, settings) as run:
        rows = list(run.journal)
        if any(
            not {"context", "pattern", "full", "layers", "name", "asked"} <= set(r) for r in rows
        ):
            raise ValueError(
                f"{out}: a line of journal.jsonl is not what a bench writes, so it was changed by hand; use --fresh."
            )

        def keep(row: dict[str, Any]) -> None:
            run.append(row)
            run.save(RESULT, _result(subject, settings, rows, len(lent)))

        _measure_all(subject, grid, rows, text, keep)
        result = _result(subject, settings, rows, len(lent))
        run.save(RESULT, result)
    return result


def _measure_all(
    subject: Subject, grid: Grid, rows: list[dict[str, Any]], text: list[int] | None, keep: Any
) -> None:
    """Append the missing rows of the grid to `rows`, calling keep(row) for each."""
    done = {_key(r) for r in rows if not r.get("error")}
    cells = [(c, n, p, b) for b in grid.batches for c in grid.contexts for n, p in grid.patterns]
    missing = [cell for cell in cells if (cell[0], str(cell[2]), cell[3]) not in done]
    if len(missing) < len(cells):
        print(
            f"{len(cells) - len(missing)} rows are there already and are kept (--fresh measures them anew)",
            file=sys.stderr,
        )
    warm: set[bool] = set()
    with progress(sum(c for c, *_ in missing), "tok") as bar:
        for context, name, pattern, batch in missing:
            bar.set_description(
                f"{context} {name}" + (f" batch {batch}" if batch != 1 else ""),
                refresh=sys.stderr.isatty(),
            )
            row = {
                "context": context,
                "name": name,
                "pattern": str(pattern),
                "full": len(pattern.full_layers),
                "layers": len(pattern),
                "asked": batch,
            }
            try:
                pools = "R" in pattern.roles
                chunk = max(grid.chunk // 2, 1) if pools else grid.chunk
                if pools not in warm:
                    warm_up(
                        subject,
                        pattern,
                        min(max(c for c, *_ in missing), 2 * chunk + chunk // 2 + 1),
                        chunk,
                    )
                    warm.add(pools)
                count = (
                    filling_batch(subject, context + grid.decode_tokens + SPARE, pattern)
                    if batch == FILL
                    else int(batch)
                )
                row |= measure(
                    subject,
                    context,
                    pattern,
                    batch=count,
                    decode_tokens=grid.decode_tokens,
                    chunk=chunk,
                    text=text,
                    seed=grid.seed,
                )
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                row["error"] = (
                    f"Out of memory at {context} tokens, pattern {name}, batch {batch}; fewer tokens, requests or --chunk may fit."
                )
            except ValueError as error:
                if batch != FILL:
                    raise
                row["error"] = str(error)
            if row.get("error"):
                print(f"indexcache: note: {row['error']}", file=sys.stderr)
            rows.append(row)
            keep(row)
            bar.update(context)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["context"], row["pattern"], row.get("asked", row.get("batch", 1))


def _result(
    subject: Subject,
    settings: Mapping[str, Any],
    journal: Sequence[Mapping[str, Any]],
    lent: int = 0,
) -> dict[str, Any]:
    """The journal as a result: the last measurement of each cell, with what follows from the others beside it. lent: recorded
    tensors that were read."""
    latest = {_key(r): dict(r) for r in journal}
    rows = sorted(
        latest.values(), key=lambda r: (str(r["asked"]), r["context"], -r["full"], r["name"])
    )
    whole = (
        subject.name in SHAPES and subject.shape.layers == SHAPES[subject.name]["num_hidden_layers"]
    )
    table = published(subject.name) if whole else None
    for row in rows:
        if row.get("error"):
            continue
        full = next(
            (
                r
                for r in rows
                if (r["context"], r["asked"]) == (row["context"], row["asked"])
                and set(r["pattern"]) == {"F"}
            ),
            None,
        )
        if full and not full.get("error"):
            row["speedup"] = {
                "ttft": round(full["ttft_s"] / row["ttft_s"], 6)
                if row["ttft_s"] and full["ttft_s"]
                else None,
                "decode": round(row["decode_total_tok_s"] / full["decode_total_tok_s"], 6),
            }
        row["indexer_share"] = index_share(row)
        if found := _published_row(table, row):
            row["published"] = found
    return {
        "device": subject.device_name,
        "date": str(datetime.date.today()),
        "model": subject.name,
        "random": subject.random,
        "note": " ".join(
            [RANDOM_NOTE] * subject.random
            + [RECORDED_NOTE] * (lent > 0)
            + [RECORDED_POOLS] * (lent > 1)
        ),
        "shape": asdict(subject.shape),
        "ceilings": asdict(subject.device),
        "settings": dict(settings),
        "published": {"source": published_source(), **table} if table else None,
        "rows": rows,
    }


def index_share(row: Mapping[str, Any]) -> float | None:
    """The indexers' share of a prefill's time, from the pass that was timed in parts."""
    parts = row.get("parts_ms") or {}
    total = sum(parts.values())
    return sum(parts.get(p, 0.0) for p in INDEX_PARTS) / total if total else None


def published(model: str) -> dict[str, Any] | None:
    """The published figures of a named shape: "contexts" and, for each quantity, a list of values per pattern."""
    return _assets().get(model)


def published_source() -> str:
    return str(_assets()["source"])


def _assets() -> dict[str, Any]:
    return json.loads(
        (resources.files("indexcache") / "assets" / "published.json").read_text(encoding="utf-8")
    )


def _published_row(table: Mapping[str, Any] | None, row: Mapping[str, Any]) -> dict[str, float]:
    """The published figures for a row: of its context and its kept fraction, sharing only."""
    if table is None or row["context"] not in table["contexts"] or "R" in row["pattern"]:
        return {}
    kept = next(
        (
            name
            for name, share in ((ALL, 1.0), ("1/2", 0.5), ("1/4", 0.25))
            if abs(row["full"] / row["layers"] - share) < 0.03
        ),
        None,
    )
    at = table["contexts"].index(row["context"])
    wanted = ("ttft_s", "decode_tok_s") if row["batch"] == 1 else ("decode_total_tok_s",)
    if row["asked"] not in (1, FILL):
        return {}
    return {what: table[what][kept][at] for what in wanted if kept in table[what]}
