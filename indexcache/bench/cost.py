"""A cost model fitted to `bench` rows: how long a prefill and a decoding step take at lengths that were not measured.

A part of a prefill takes a * calls + b * floor (`indexcache.bench.floors`), calls = layers that run it, times chunks (of a
plan, parts of a chunk count). A decoding step, which is one CUDA graph and not timed in parts, takes a + b * (floor of all but
the indexers) + c * (layers that index) + d * (floor of the indexers). Every coefficient is at least 0; relative errors are
squared. R layers are not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from indexcache.bench.floors import INDEX_PARTS, PARTS, decode_floor, prefill_floor
from indexcache.pattern import Pattern
from indexcache.shapes import Rates, Shape

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CostModel:
    """Coefficients in milliseconds. `prefill`: part -> (a, b); `decode`: (a, b, c, d), None where nothing was fitted."""

    prefill: dict[str, tuple[float, float]] | None
    decode: tuple[float, float, float, float] | None

    def ttft_s(self, row: Row) -> float | None:
        """Predicted seconds to the first token of a row (`point`, or one of `bench`; what it measured is not looked at)."""
        if self.prefill is None:
            return None
        return (
            sum(
                a * n + b * floor
                for (a, b), (n, floor) in zip(
                    self.prefill.values(), _parts(row, self.prefill), strict=True
                )
            )
            / 1e3
        )

    def step_ms(self, row: Row) -> float | None:
        """Predicted milliseconds of one decoding step of all sequences of a row."""
        return None if self.decode is None else float(np.dot(self.decode, _step(row)))


FLOOR_ONLY = CostModel(dict.fromkeys(PARTS, (0.0, 1.0)), (0.0, 1.0, 0.0, 1.0))


def point(
    shape: Shape,
    context: int,
    pattern: Pattern,
    rates: Rates,
    *,
    chunk: int,
    batch: int = 1,
    index_dtype: str = "fp8",
) -> Row:
    """A row of `bench` without measurements: what a prediction needs."""
    return {
        "context": context,
        "pattern": str(pattern),
        "full": len(pattern.full_layers),
        "layers": len(pattern),
        "chunk": chunk,
        "batch": batch,
        "floor_ms": prefill_floor(
            shape, context, pattern, rates, batch=batch, index_dtype=index_dtype
        ),
        "decode_floor_ms": decode_floor(
            shape, context, pattern, rates, batch=batch, index_dtype=index_dtype
        ),
    }


def usable(rows: Sequence[Row]) -> list[Row]:
    """The rows that a model is fitted to: measured, with floors, and without R layers."""
    return [
        r
        for r in rows
        if not r.get("error")
        and r.get("floor_ms")
        and r.get("decode_floor_ms")
        and "R" not in r["pattern"]
    ]


def fit(rows: Sequence[Row]) -> CostModel:
    """The model of these rows. Prefill is fitted where a row has a TTFT and the time of its parts, decoding where it has a rate.

    Raises:
        ValueError: nothing to fit to.
    """
    rows = usable(rows)
    timed = [r for r in rows if r.get("ttft_s") and r.get("parts_ms")]
    stepped = [r for r in rows if r.get("decode_tok_s")]
    if not timed and not stepped:
        raise ValueError(
            "There is no measured row of F and S layers with floors in these bench results, so nothing to fit to."
        )
    prefill = None
    if timed:
        parts = [shares(r) for r in timed]
        weight = np.array([1e-3 / r["ttft_s"] for r in timed])
        names = [p for p in PARTS if any(p in x for x in parts)]
        features = [_parts(r, names) for r in timed]
        prefill = {}
        for i, name in enumerate(names):
            a, b = non_negative(
                np.array([f[i] for f in features]) * weight[:, None],
                np.array([x.get(name, 0.0) for x in parts]) * weight,
            )
            prefill[name] = (a, b)
    decode = None
    if stepped:
        took = np.array([1e3 / r["decode_tok_s"] for r in stepped])
        a, b, c, d = non_negative(
            np.array([_step(r) for r in stepped]) / took[:, None], np.ones(len(stepped))
        )
        decode = (a, b, c, d)
    return CostModel(prefill, decode)


def left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Predictions for each context by a model fitted to the other contexts only: {"context", "pattern", "batch", "what" (ttft_s or
    decode_tok_s), "measured", "predicted", "error" (relative)}. Empty where there is one context."""
    rows, found = usable(rows), []
    for context in sorted({r["context"] for r in rows}):
        others = [r for r in rows if r["context"] != context]
        if not others:
            continue
        try:
            model = fit(others)
        except ValueError:
            continue
        for row in (r for r in rows if r["context"] == context):
            step = model.step_ms(row)
            for what, predicted in (
                ("ttft_s", model.ttft_s(row)),
                ("decode_tok_s", 1e3 / step if step else None),
            ):
                if row.get(what) and predicted is not None:
                    found.append(
                        {
                            "context": context,
                            "pattern": row["pattern"],
                            "batch": row.get("batch", 1),
                            "what": what,
                            "measured": row[what],
                            "predicted": predicted,
                            "error": predicted / row[what] - 1,
                        }
                    )
    return found


def shares(row: Row) -> dict[str, float]:
    """Milliseconds of each part of a row's prefill, adding up to its TTFT: the parts are timed in a pass of their own, and what
    they leave of the TTFT is rest."""
    parts = {p: ms for p, ms in row["parts_ms"].items() if p not in ("rest", "total")}
    total, known = 1e3 * row["ttft_s"], sum(parts.values())
    if known > total:
        parts = {p: ms * total / known for p, ms in parts.items()}
    return parts | {"rest": max(total - known, 0.0)}


def non_negative(features: np.ndarray, target: np.ndarray) -> list[float]:
    """Coefficients >= 0 that minimise |features @ x - target|^2, exactly: the best of the least-squares fits on every subset of
    the columns that are non-negative there (few columns, so all subsets are tried)."""
    columns = features.shape[1]
    best, least = np.zeros(columns), float(target @ target)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            part = features[:, chosen]
            if not part.any(axis=0).all():
                continue
            x = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.square(part @ x - target).sum())
            if (x >= 0).all() and error < least * (1 - 1e-12):
                best, least = np.zeros(columns), error
                best[list(chosen)] = x
    return [float(v) for v in best]


def _parts(row: Row, names: Any) -> list[tuple[float, float]]:
    """(calls, floor in ms) of each part of a prefill. A plan has no floor and takes its time by the token: parts of a chunk count."""
    chunks, whole = (
        -(-row["context"] // row["chunk"]) * row.get("batch", 1),
        row["context"] / row["chunk"] * row.get("batch", 1),
    )
    calls = {
        "head": 1,
        **dict.fromkeys(INDEX_PARTS, row["full"] * chunks),
        "plan": row["full"] * whole,
    }
    return [(calls.get(p, row["layers"] * chunks), row["floor_ms"].get(p, 0.0)) for p in names]


def _step(row: Row) -> tuple[float, float, float, float]:
    """(1, floor of all but the indexers, layers that index, floor of the indexers) of a decoding step."""
    floor = row["decode_floor_ms"]
    index = sum(floor.get(p, 0.0) for p in INDEX_PARTS)
    return 1.0, sum(floor.values()) - index, row["full"], index


PLANNED = (("all", 1), ("1/2", 2), ("1/4", 4))
WORTH = 0.05  # of a request's GPU time: sharing that saves less is called not worth it


def plan(
    shape: Shape,
    model: CostModel,
    rates: Rates,
    *,
    context: int,
    output_tokens: int,
    price: float,
    batch: int = 1,
    chunk: int = 8192,
    index_dtype: str = "fp8",
) -> list[dict[str, Any]]:
    """What requests of `context` prompt tokens and `output_tokens` cost under all, 1/2 and 1/4 full layers (uniform).

    A request takes its TTFT and output_tokens steps shared by `batch` requests, each at the length half of the output has been
    decoded.

    Args:
        price: of an hour of one GPU, in any currency.

    Returns:
        Per pattern {"name", "pattern", "full", "layers", "ttft_s", "decode_tok_s" (of one request), "gpu_s" (of one request),
        "cost_per_million" (prompt and output tokens, in the currency of the price), "saving" (of gpu_s, against all; None for all)}.
    """
    found: list[dict[str, Any]] = []
    for name, freq in PLANNED:
        pattern = Pattern.uniform(shape.layers, freq)
        first = model.ttft_s(
            point(shape, context, pattern, rates, chunk=chunk, index_dtype=index_dtype)
        )
        held = context + output_tokens // 2
        step = model.step_ms(
            point(shape, held, pattern, rates, chunk=chunk, batch=batch, index_dtype=index_dtype)
        )
        if first is None or not step:
            raise ValueError(
                "These bench results have no prefill or no decoding, so a request cannot be predicted from them."
            )
        seconds = first + output_tokens * step / batch / 1e3
        found.append(
            {
                "name": name,
                "pattern": str(pattern),
                "full": len(pattern.full_layers),
                "layers": len(pattern),
                "ttft_s": first,
                "decode_tok_s": 1e3 / step,
                "gpu_s": seconds,
                "cost_per_million": price / 3600 * seconds / (context + output_tokens) * 1e6,
                "saving": None if name == PLANNED[0][0] else 1 - seconds / found[0]["gpu_s"],
            }
        )
    return found


def worth_from(shape: Shape, saving: float, predict: Any) -> int | None:
    """The shortest context, to a twentieth, at which predict(context) -> rows of `plan` saves at least `saving` with its last
    pattern; None when none up to the model's maximum does."""
    low, high = shape.topk, shape.context
    if predict(high)[-1]["saving"] < saving:
        return None
    while high > low * 1.05 + 1:
        middle = int((low * high) ** 0.5)
        low, high = (low, middle) if predict(middle)[-1]["saving"] >= saving else (middle, high)
    return high
