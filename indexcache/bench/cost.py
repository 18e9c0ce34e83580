"""Fit a cost model to `bench` rows, and predict prefills and decoding steps at other lengths.

A part of a prefill takes a * calls + b * floor, where `calls` is the number of layers that run the
part, times the number of chunks, and the floor is that of `indexcache.bench.floors`. A decoding
step is one CUDA graph and is not timed in parts; it takes

    a + b * (floor of all but the indexers) + c * (layers that index) + d * (floor of the indexers)

Every coefficient is at least 0, and the fit minimises squared relative errors. R layers are not
modelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from indexcache.bench.floors import INDEX_PARTS, PARTS, decode_floor, prefill_floor
from indexcache.bench.storage import BF16, Storage
from indexcache.pattern import Pattern
from indexcache.shapes import Rates, Shape

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CostModel:
    """The coefficients of a fit, in milliseconds.

    Attributes:
        prefill: part -> (a, b); None where no prefill was fitted.
        decode: (a, b, c, d); None where no decoding was fitted.
    """

    prefill: dict[str, tuple[float, float]] | None
    decode: tuple[float, float, float, float] | None

    def ttft_s(self, row: Row) -> float | None:
        """Predict the seconds to the first token from a row's settings and floors alone."""
        if self.prefill is None:
            return None
        features = _prefill_features(row, self.prefill)
        coefficients = self.prefill.values()
        return (
            sum(
                a * calls + b * floor
                for (a, b), (calls, floor) in zip(coefficients, features, strict=True)
            )
            / 1e3
        )

    def step_ms(self, row: Row) -> float | None:
        """Predict the milliseconds of one decoding step of all sequences of a row."""
        return None if self.decode is None else float(np.dot(self.decode, _step_features(row)))


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
    storage: Storage = BF16,
) -> Row:
    """Make a row of `bench` that has all that a prediction needs, and no measurements."""
    settings: dict[str, Any] = {"batch": batch, "index_dtype": index_dtype, "storage": storage}
    return {
        "context": context,
        "pattern": str(pattern),
        "full": len(pattern.full_layers),
        "layers": len(pattern),
        "chunk": chunk,
        "batch": batch,
        "floor_ms": prefill_floor(shape, context, pattern, rates, **settings),
        "decode_floor_ms": decode_floor(shape, context, pattern, rates, **settings),
    }


def usable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows to fit a model to: measured, with floors, and without R layers."""
    return [
        r
        for r in rows
        if not r.get("error")
        and r.get("floor_ms")
        and r.get("decode_floor_ms")
        and "R" not in r["pattern"]
    ]


def fit(rows: Sequence[Row]) -> CostModel:
    """Fit the model to the usable rows.

    Prefill is fitted to the rows that have a TTFT and times of parts, decoding to those with a
    rate.

    Raises:
        ValueError: no row can be fitted to.
    """
    rows = usable(rows)
    prefills = [r for r in rows if r.get("ttft_s") and r.get("parts_ms")]
    steps = [r for r in rows if r.get("decode_tok_s")]
    if not prefills and not steps:
        raise ValueError(
            "There is no measured row of F and S layers with floors in these bench results, so "
            "nothing to fit to."
        )
    return CostModel(
        _fit_prefill(prefills) if prefills else None, _fit_decode(steps) if steps else None
    )


def _fit_prefill(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    measured = [parts_of_ttft(r) for r in rows]
    weight = np.array([1e-3 / r["ttft_s"] for r in rows])
    names = [name for name in PARTS if any(name in parts for parts in measured)]
    features = [_prefill_features(r, names) for r in rows]
    coefficients = {}
    for i, name in enumerate(names):
        a, b = non_negative(
            np.array([f[i] for f in features]) * weight[:, None],
            np.array([parts.get(name, 0.0) for parts in measured]) * weight,
        )
        coefficients[name] = (a, b)
    return coefficients


def _fit_decode(rows: Sequence[Row]) -> tuple[float, float, float, float]:
    milliseconds = np.array([1e3 / r["decode_tok_s"] for r in rows])
    features = np.array([_step_features(r) for r in rows])
    a, b, c, d = non_negative(features / milliseconds[:, None], np.ones(len(rows)))
    return a, b, c, d


def errors_left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Predict each context by a model that is fitted to the other contexts only.

    Returns:
        One {"context", "pattern", "batch", "what" (ttft_s or decode_tok_s), "measured",
        "predicted", "error" (relative)} per prediction; none where there is only one context.
    """
    rows = usable(rows)
    errors = []
    for context in sorted({r["context"] for r in rows}):
        try:
            model = fit([r for r in rows if r["context"] != context])
        except ValueError:
            continue
        for row in (r for r in rows if r["context"] == context):
            step = model.step_ms(row)
            predictions = {
                "ttft_s": model.ttft_s(row),
                "decode_tok_s": 1e3 / step if step else None,
            }
            for quantity, predicted in predictions.items():
                if row.get(quantity) and predicted is not None:
                    errors.append(
                        {
                            "context": context,
                            "pattern": row["pattern"],
                            "batch": row.get("batch", 1),
                            "what": quantity,
                            "measured": row[quantity],
                            "predicted": predicted,
                            "error": predicted / row[quantity] - 1,
                        }
                    )
    return errors


def parts_of_ttft(row: Row) -> dict[str, float]:
    """Scale the parts of a row's prefill so that they add up to its TTFT, in milliseconds.

    The parts are timed in a separate pass. "rest" is the time between their sum and the TTFT.
    """
    parts = {p: ms for p, ms in row["parts_ms"].items() if p not in ("rest", "total")}
    total = 1e3 * row["ttft_s"]
    timed = sum(parts.values())
    if timed > total:
        parts = {p: ms * total / timed for p, ms in parts.items()}
    return parts | {"rest": max(total - timed, 0.0)}


def non_negative(features: np.ndarray, target: np.ndarray) -> list[float]:
    """Return the coefficients x >= 0 that minimise |features @ x - target|^2."""
    from scipy.optimize import nnls

    return [float(x) for x in nnls(features, target)[0]]


def _prefill_features(row: Row, names: Iterable[str]) -> list[tuple[float, float]]:
    """Return (calls, floor in ms) of each named part of a prefill.

    "plan" has no floor and takes its time by the token, so a fraction of a chunk counts as such.
    """
    chunks = -(-row["context"] // row["chunk"]) * row.get("batch", 1)
    exact_chunks = row["context"] / row["chunk"] * row.get("batch", 1)
    calls = {
        "head": 1,
        **dict.fromkeys(INDEX_PARTS, row["full"] * chunks),
        "plan": row["full"] * exact_chunks,
    }
    return [
        (calls.get(name, row["layers"] * chunks), row["floor_ms"].get(name, 0.0)) for name in names
    ]


def _step_features(row: Row) -> tuple[float, float, float, float]:
    """Return the factors of the coefficients of a decoding step; see the top of the module."""
    floor = row["decode_floor_ms"]
    index = sum(floor.get(name, 0.0) for name in INDEX_PARTS)
    return 1.0, sum(floor.values()) - index, row["full"], index
