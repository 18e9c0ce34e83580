"""Predict time to first token, tokens/s and cost of requests, and say whether sharing pays.

The prediction is a `CostModel` fitted to the rows of a bench, or the floors alone without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from indexcache.bench import CHUNK
from indexcache.bench.cost import FLOOR_ONLY, CostModel, Row, errors_left_out, fit, point, usable
from indexcache.bench.results import BenchResult
from indexcache.bench.storage import BF16, Storage
from indexcache.checkpoint import config_facts
from indexcache.configs import MODEL_TYPES, model_type_of, text_section
from indexcache.pattern import Pattern
from indexcache.report.speed import prediction_table
from indexcache.shapes import Rates, Shape, rates_named, read_shape

PATTERNS = (("all", 1), ("1/2", 2), ("1/4", 4))
"""The name of a pattern, and the number of layers of which one is full."""
WORTH = 0.05
"""Sharing that saves less than this share of a request's GPU time is called not worth it."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The sizes of requests, and the price of a GPU.

    Attributes:
        context: tokens of a prompt.
        output_tokens: tokens decoded for a request.
        price: price of an hour of one GPU, in any currency.
        batch: number of requests that are decoded together.
    """

    context: int
    output_tokens: int
    price: float
    batch: int = 1

    def check(self, shape: Shape) -> None:
        """Raise ValueError for traffic that a model of this shape cannot take."""
        if self.output_tokens < 1 or self.batch < 1:
            raise ValueError(
                f"--output-tokens and --batch must be at least 1, not {self.output_tokens} and "
                f"{self.batch}."
            )
        if not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"--price must be a number of at least 0, not {self.price}.")
        if self.context + self.output_tokens > shape.context:
            raise ValueError(
                f"{self.context} + {self.output_tokens} tokens are more than the model's maximum "
                f"of {shape.context}."
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted times and costs of requests under all, 1/2 and 1/4 full layers.

    Attributes:
        model: name of the model.
        gpu: name of the device.
        traffic: the requests.
        basis: "bench" or "floor", on which the prediction rests.
        source: the same in words.
        rows: see `predict`.
        advice: whether sharing pays, in a sentence.
        left_out: see `cost.errors_left_out`.
        notes: sentences about where the prediction exceeds the measurements.
        weights: {"bytes" of all weights, "quantization" of the config or None, "assumed": what was
            taken for granted about dtypes, in a sentence}.
    """

    model: str
    gpu: str
    traffic: Traffic
    basis: str
    source: str
    rows: list[dict[str, Any]]
    advice: str
    left_out: list[dict[str, Any]]
    notes: list[str]
    weights: dict[str, Any]

    def table(self) -> str:
        """Render the predictions, one line per pattern."""
        return prediction_table(self.rows)

    def report(self) -> str:
        """Render a title, the table, the advice, the accuracy and the notes."""
        t = self.traffic
        accuracy = "Predictions have no error to show without --bench."
        if self.basis == "bench":
            accuracy = describe_errors(self.left_out)
        lines = [
            f"{self.model} on {self.gpu}: prompts of {t.context} tokens, {t.output_tokens} "
            f"decoded, {t.batch} together; {self.source}",
            "",
            self.table(),
            "",
            self.advice,
            accuracy,
            f"Weights take {self.weights['bytes'] / 1e9:.0f} GB. Assumed: "
            f"{self.weights['assumed']}.",
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `plan --json` prints."""
        return {
            "model": self.model,
            "gpu": self.gpu,
            "context": self.traffic.context,
            "output_tokens": self.traffic.output_tokens,
            "batch": self.traffic.batch,
            "price": self.traffic.price,
            "basis": self.basis,
            "rows": self.rows,
            "advice": self.advice,
            "left_out": self.left_out,
            "notes": self.notes,
            "weights": self.weights,
        }


def make_plan(
    model: str | Path,
    gpu: str,
    traffic: Traffic,
    *,
    bench: str | Path | None = None,
    index_dtype: str = "fp8",
) -> Plan:
    """Predict the times and costs of requests on a GPU.

    Args:
        model: a config.json, a checkpoint folder, `tiny` or a named shape.
        gpu: "H100", "H200", or "bench" for the device that the bench ran on.
        traffic: the requests.
        bench: the bench.json of a bench on that GPU; without it the floors alone are shown.
        index_dtype: dtype of the indexer's keys and queries, "fp8" or "bf16"; that of a bench takes
            precedence.

    Raises:
        ValueError: the model, the GPU or the traffic makes no sense, or the file is no bench.json.
    """
    name, config = read_shape(model)
    shape = Shape.of(config)
    if (kind := model_type_of(config)) not in (None, *MODEL_TYPES):
        raise ValueError(
            f"{model}: the model_type {kind!r:.60} is not known to have a DSA indexer, so its "
            f"times would be those of another model; known are {', '.join(MODEL_TYPES)}."
        )
    facts = config_facts(model, config)
    try:
        storage = Storage.of(shape, facts["quantization"])
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    traffic.check(shape)
    result = None if bench is None else BenchResult.read(bench)
    rates = _rates_of_bench(result) if gpu == "bench" else rates_named(gpu)
    notes = _memory_notes(shape, storage, rates, traffic, index_dtype)
    cost = FLOOR_ONLY
    errors: list[dict[str, Any]] = []
    chunk = CHUNK
    source = (
        "floor only: no --bench was given, so these are bounds that nothing reaches "
        "(no efficiency is assumed)"
    )
    if result is not None:
        rows = usable(result.rows)
        if not rows:
            raise ValueError(
                f"{bench}: has no measured row of F and S layers with floors, so there is nothing "
                "to fit to."
            )
        try:
            cost = fit(rows)
            errors = errors_left_out(rows)
        except (TypeError, KeyError, AttributeError, ZeroDivisionError):
            raise ValueError(
                f"{bench}: a row is not what a bench writes, so the file was changed; measure anew."
            ) from None
        chunk = rows[0]["chunk"]
        index_dtype = result.settings.get("index_dtype", index_dtype)
        source = f"fitted to {len(rows)} rows of {bench} ({result.device}, {result.date})"
        notes += _extrapolation_notes(result, rows, shape, rates, traffic)
        if storage.quantization is not None:
            notes.append(
                f"measured with {result.settings.get('dtype', 'bf16')} weights: carried over to "
                f"{storage.name} by the floors alone."
            )
    patterns = {name: Pattern.uniform(shape.layers, freq) for name, freq in PATTERNS}

    def predict_at(
        context: int, patterns: Mapping[str, Pattern] = patterns
    ) -> list[dict[str, Any]]:
        return predict(
            shape,
            cost,
            rates,
            replace(traffic, context=context),
            chunk=chunk,
            index_dtype=index_dtype,
            storage=storage,
            patterns=patterns,
        )

    predictions = predict_at(traffic.context)
    advice = _advice(predictions, worth_from(shape, WORTH, predict_at), shape.topk, traffic.context)
    native, native_notes = _native(model, config)
    notes += native_notes
    if native is not None and "S" in native.roles:
        predictions = predict_at(traffic.context, patterns | {"config": native})
    if facts["mtp_layers"]:
        notes.append(
            f"the {facts['mtp_layers']} multi-token-prediction (MTP) layers of the config are not "
            "counted."
        )
    return Plan(
        model=name,
        gpu=rates.name,
        traffic=traffic,
        basis="floor" if bench is None else "bench",
        source=source,
        rows=predictions,
        advice=advice,
        left_out=errors,
        notes=notes,
        weights={
            "bytes": round(storage.weight_bytes(shape)),
            "quantization": None
            if storage.quantization is None
            else storage.quantization.to_json(),
            "assumed": storage.assumed(index_dtype),
        },
    )


def _native(model: str | Path, config: dict[str, Any]) -> tuple[Pattern | None, list[str]]:
    """Return the pattern that the config asks for, and a note where it shares or is none."""
    try:
        native = Pattern.from_config(text_section(config))
    except ValueError as error:
        return None, [f"{model}: the config has no valid pattern ({error})"]
    if "S" not in native.roles:
        return native, []
    return native, [
        f"the config shares already: {native}, the row 'config'; layers without indexer weights "
        "can never be full."
    ]


def predict(
    shape: Shape,
    cost: CostModel,
    rates: Rates,
    traffic: Traffic,
    *,
    chunk: int = CHUNK,
    index_dtype: str = "fp8",
    storage: Storage = BF16,
    patterns: Mapping[str, Pattern] | None = None,
) -> list[dict[str, Any]]:
    """Predict the time and cost of a request under patterns, by default all, 1/2 and 1/4 full.

    A request takes its TTFT and 1 / batch of `output_tokens` steps, which `batch` requests share. A
    step is predicted at the length where half of the output is decoded.

    Returns:
        Per pattern {"name", "pattern", "full", "layers", "ttft_s", "decode_tok_s" (of one request),
        "gpu_s" (of one request), "cost_per_million" (prompt and output tokens, in the currency of
        the price), "saving" (of gpu_s, against all; None for all)}.

    Raises:
        ValueError: the cost model lacks prefills or decoding.
    """
    rows: list[dict[str, Any]] = []
    t = traffic
    if patterns is None:
        patterns = {name: Pattern.uniform(shape.layers, freq) for name, freq in PATTERNS}
    for name, pattern in patterns.items():

        def row_at(context: int, batch: int, pattern: Pattern = pattern) -> Row:
            return point(
                shape,
                context,
                pattern,
                rates,
                chunk=chunk,
                batch=batch,
                index_dtype=index_dtype,
                storage=storage,
            )

        ttft = cost.ttft_s(row_at(t.context, 1))
        step = cost.step_ms(row_at(t.context + t.output_tokens // 2, t.batch))
        if ttft is None or not step:
            raise ValueError(
                "These bench results have no prefill or no decoding, so a request cannot be "
                "predicted from them."
            )
        seconds = ttft + t.output_tokens * step / t.batch / 1e3
        tokens = t.context + t.output_tokens
        rows.append(
            {
                "name": name,
                "pattern": str(pattern),
                "full": len(pattern.full_layers),
                "layers": len(pattern),
                "ttft_s": ttft,
                "decode_tok_s": 1e3 / step,
                "gpu_s": seconds,
                "cost_per_million": t.price / 3600 * seconds / tokens * 1e6,
                "saving": 1 - seconds / rows[0]["gpu_s"] if rows else None,
            }
        )
    return rows


def worth_from(
    shape: Shape, saving: float, predict_at: Callable[[int], Sequence[Mapping[str, Any]]]
) -> int | None:
    """Find the shortest context, within 5 %, at which the last pattern saves at least `saving`.

    Args:
        predict_at: returns the rows of `predict` at a context.

    Returns:
        A number of tokens; None where no context up to the model's maximum saves so much.
    """
    low = shape.topk
    high = shape.context
    if predict_at(high)[-1]["saving"] < saving:
        return None
    while high > low * 1.05 + 1:
        middle = int((low * high) ** 0.5)
        if predict_at(middle)[-1]["saving"] >= saving:
            high = middle
        else:
            low = middle
    return high


def describe_errors(errors: Sequence[Mapping[str, Any]]) -> str:
    """Say in a sentence how far the predictions of `cost.errors_left_out` are off."""
    if not errors:
        return "The results have one length only, so the error on others is unknown."
    phrases = []
    for quantity, label in (("ttft_s", "TTFT"), ("decode_tok_s", "tokens/s")):
        matching = [e for e in errors if e["what"] == quantity]
        if matching:
            worst = max(matching, key=lambda e: abs(e["error"]))
            mean = sum(abs(e["error"]) for e in matching) / len(matching)
            phrases.append(
                f"{label} {mean:.1%} in the mean, at most {abs(worst['error']):.1%} "
                f"(at {worst['context']} tokens)"
            )
    return "Error on lengths left out of the fit: " + "; ".join(phrases) + "."


def _advice(
    rows: Sequence[Mapping[str, Any]], worth_at: int | None, topk: int, context: int
) -> str:
    if context <= topk:
        return (
            f"Sharing changes nothing at {context} tokens: up to k = {topk} every layer selects "
            "everything."
        )
    half, quarter = (row["saving"] for row in rows[1:])
    if quarter < WORTH:
        longer = "nor does it at any length the model takes"
        if worth_at:
            longer = f"from about {worth_at} tokens on it saves more"
        return (
            f"Not worth it here: 1/4 saves {quarter:.1%} of a request (below {WORTH:.0%}); "
            f"{longer}."
        )
    return (
        f"Worth it here: 1/4 saves {quarter:.1%} of a request, 1/2 {half:.1%}; below about "
        f"{worth_at} tokens 1/4 saves less than {WORTH:.0%}."
    )


def _rates_of_bench(result: BenchResult | None) -> Rates:
    """Return the rates that a bench recorded for its device."""
    if result is None:
        raise ValueError("--gpu bench takes the device of a bench: give its file with --bench.")
    try:
        return Rates(**(result.ceilings | {"name": result.device}))
    except TypeError:
        raise ValueError(
            "The bench results do not say what their device can do (ceilings); measure anew or "
            "name the GPU."
        ) from None


def _memory_notes(
    shape: Shape, storage: Storage, rates: Rates, traffic: Traffic, index_dtype: str
) -> list[str]:
    if not rates.memory:
        return []
    weights = storage.weight_bytes(shape)
    tokens = traffic.batch * (traffic.context + traffic.output_tokens)
    cache = tokens * shape.cache_bytes(shape.layers, index_dtype=index_dtype)
    if weights + cache <= rates.memory:
        return []
    return [
        f"{storage.name} weights ({weights / 1e9:.0f} GB) and cache ({cache / 1e9:.0f} GB) are "
        f"more than the {rates.memory / 1e9:.0f} GB of one {rates.name}; the figures count the "
        "work as if one did it all."
    ]


def _extrapolation_notes(
    result: BenchResult, rows: Sequence[Row], shape: Shape, rates: Rates, traffic: Traffic
) -> list[str]:
    """Say where the prediction exceeds the measurements.

    Raises:
        ValueError: the bench ran on a device whose rates say nothing of this one.
    """
    notes = []
    if rates.name not in result.device:
        if not result.ceilings.get("memory"):
            raise ValueError(
                f"The bench ran on {result.device}, which says nothing of an {rates.name}; give "
                "one of that GPU, or --gpu bench."
            )
        notes.append(
            f"measured on {result.device}, not on an {rates.name}: carried over by the floors "
            "alone."
        )
    if asdict(shape) != result.shape:
        notes.append(
            f"measured on another shape ({result.model}): carried over by the floors alone."
        )
    shortest = min(r["context"] for r in rows)
    longest = max(r["context"] for r in rows)
    if not shortest <= traffic.context <= longest:
        notes.append(
            f"{traffic.context} tokens are outside of what was measured ({shortest} to {longest})."
        )
    if traffic.batch > max(r.get("batch", 1) for r in rows):
        notes.append(f"{traffic.batch} requests together are more than was measured.")
    return notes
