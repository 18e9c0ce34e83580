"""The verb `plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output
from indexcache.cli.timing import number

if TYPE_CHECKING:
    from indexcache.shapes import Rates, Shape


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is predicted."""

    gpu: Annotated[str, Parameter(metavar="GPU")]
    "H100, H200, or bench, which is the device of the --bench file."
    context: Annotated[str, Parameter(metavar="N")]
    "Number of tokens of a prompt, e.g. 60K, which is 60000."
    output_tokens: Annotated[int, Parameter(metavar="N")]
    "Number of tokens that are decoded for a request."
    price: float
    "Price of a GPU hour, in any currency."
    bench: Annotated[str | None, Parameter(metavar="FILE")] = None
    "The bench.json of a bench on that GPU."
    batch: int = 1
    "Number of requests that are decoded together."
    index_dtype: Literal["bf16", "fp8"] = "fp8"
    "Dtype of the indexers' keys and queries. With --bench it is the one that was measured."


def plan(
    model: Annotated[
        str, Parameter(help="A config.json, a checkpoint folder, tiny, or a named shape.")
    ],
    *,
    settings: Annotated[PlanSettings, FLAT],
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Predict the speed and cost of a model on a GPU with all, 1/2 and 1/4 of its layers full.

    The cost model is fitted to the rows of a bench on that GPU (--bench), and its error on lengths
    that it was not fitted to is shown. Without --bench the prediction is the floor alone, which
    nothing reaches.
    """
    s = settings
    from indexcache.bench import cost
    from indexcache.bench.cost import FLOOR_ONLY, WORTH, fit, left_out, usable, worth_from
    from indexcache.report.speed import predictions
    from indexcache.shapes import Shape, rates_named, read_shape

    name, config = read_shape(model)
    shape, context = Shape.of(config), number(s.context)
    _check(s, shape, context)
    result = None if s.bench is None else _read(s.bench)
    device = _device_of(result) if s.gpu == "bench" else rates_named(s.gpu)
    fitted, errors, notes = FLOOR_ONLY, list[dict[str, Any]](), _notes(s, shape, device, context)
    chunk, index_dtype = 16384, s.index_dtype  # as bench takes it
    if result is None:
        basis = "floor only: no --bench was given, so these are bounds that nothing reaches (no efficiency is assumed)"
    else:
        rows = usable(result["rows"])
        try:
            fitted, errors = fit(rows), left_out(rows)
        except (TypeError, KeyError, AttributeError, ZeroDivisionError):
            raise ValueError(
                f"{s.bench}: a row is not what a bench writes, so the file was changed; measure anew."
            ) from None
        chunk, index_dtype = rows[0]["chunk"], result["settings"].get("index_dtype", index_dtype)
        basis = f"fitted to {len(rows)} rows of {s.bench} ({result['device']}, {result['date']})"
        notes += _mismatch(result, rows, shape, device, context, s.batch)
    predict = partial(
        cost.plan,
        shape,
        fitted,
        device,
        output_tokens=s.output_tokens,
        price=s.price,
        batch=s.batch,
        chunk=chunk,
        index_dtype=index_dtype,
    )
    predicted = predict(context=context)
    advice = _advice(
        predicted,
        WORTH,
        worth_from(shape, WORTH, lambda n: predict(context=n)),
        shape.topk,
        context,
    )

    print(
        f"{name} on {device.name}: prompts of {context} tokens, {s.output_tokens} decoded, {s.batch} together; {basis}\n"
    )
    print(predictions(predicted))
    print(f"\n{advice}")
    print(_accuracy(errors) if s.bench else "Predictions have no error to show without --bench.")
    for note in notes:
        print(f"Note: {note}")
    output.emit(
        {
            "model": name,
            "gpu": device.name,
            "context": context,
            "output_tokens": s.output_tokens,
            "batch": s.batch,
            "price": s.price,
            "basis": "bench" if s.bench else "floor",
            "rows": predicted,
            "advice": advice,
            "left_out": errors,
            "notes": notes,
        }
    )


def _check(s: PlanSettings, shape: Shape, context: int) -> None:
    if s.output_tokens < 1 or s.batch < 1:
        raise ValueError(
            f"--output-tokens and --batch must be at least 1, not {s.output_tokens} and {s.batch}."
        )
    if not (math.isfinite(s.price) and s.price >= 0):
        raise ValueError(f"--price must be a number of at least 0, not {s.price}.")
    if context + s.output_tokens > shape.context:
        raise ValueError(
            f"{context} + {s.output_tokens} tokens are more than the model's maximum of {shape.context}."
        )


def _read(file: str) -> dict[str, Any]:
    from indexcache.bench.cost import usable
    from indexcache.records import read_json

    result = read_json(Path(file))
    needed = {"context", "pattern", "full", "layers"}
    if (
        not isinstance(result, dict)
        or not isinstance(result.get("rows"), list)
        or not {"device", "shape", "date", "settings"} <= set(result)
    ):
        raise ValueError(f"{file}: is not the bench.json of a bench.")
    if not all(
        isinstance(r, dict) and (needed | {"chunk"} <= set(r) or r.get("error"))
        for r in result["rows"]
    ):
        raise ValueError(
            f"{file}: a row lacks what a bench writes ({', '.join(sorted(needed))}, chunk)."
        )
    if not usable(result["rows"]):
        raise ValueError(
            f"{file}: has no measured row of F and S layers with floors, so there is nothing to fit to."
        )
    return result


def _device_of(result: dict[str, Any] | None) -> Rates:
    """The device that a bench ran on, with the rates it noted."""
    from indexcache.shapes import Rates

    if result is None:
        raise ValueError("--gpu bench takes the device of a bench: give its file with --bench.")
    try:
        return Rates(**(result["ceilings"] | {"name": result["device"]}))
    except (KeyError, TypeError):
        raise ValueError(
            "The bench results do not say what their device can do (ceilings); measure anew or name the GPU."
        ) from None


def _notes(s: PlanSettings, shape: Shape, device: Rates, context: int) -> list[str]:
    if not device.memory:
        return []
    weights = 2 * shape.weights
    cache = (
        s.batch
        * (context + s.output_tokens)
        * shape.cache_bytes(shape.layers, index_dtype=s.index_dtype)
    )
    if weights + cache <= device.memory:
        return []
    return [
        f"bf16 weights ({weights / 1e9:.0f} GB) and cache ({cache / 1e9:.0f} GB) are more than the {device.memory / 1e9:.0f} GB of one "
        f"{device.name}; the figures count the work as if one did it all."
    ]


def _mismatch(
    result: dict[str, Any], rows: list[Any], shape: Shape, device: Rates, context: int, batch: int
) -> list[str]:
    """Where the prediction goes beyond what was measured."""
    from dataclasses import asdict

    notes = []
    if device.name not in result["device"]:
        if not result.get("ceilings", {}).get("memory"):
            raise ValueError(
                f"The bench ran on {result['device']}, which says nothing of an {device.name}; give one of that GPU, or --gpu bench."
            )
        notes.append(
            f"measured on {result['device']}, not on an {device.name}: carried over by the floors alone."
        )
    if asdict(shape) != result["shape"]:
        notes.append(
            f"measured on another shape ({result.get('model', 'unknown')}): carried over by the floors alone."
        )
    low, high = min(r["context"] for r in rows), max(r["context"] for r in rows)
    if not low <= context <= high:
        notes.append(f"{context} tokens are outside of what was measured ({low} to {high}).")
    if batch > max(r.get("batch", 1) for r in rows):
        notes.append(f"{batch} requests together are more than was measured.")
    return notes


def _advice(
    rows: list[dict[str, Any]], worth: float, start: int | None, topk: int, context: int
) -> str:
    quarter = rows[-1]["saving"]
    if context <= topk:
        return f"Sharing changes nothing at {context} tokens: up to k = {topk} every layer selects everything."
    if quarter < worth:
        after = (
            f"from about {start} tokens on it saves more"
            if start
            else "nor does it at any length the model takes"
        )
        return (
            f"Not worth it here: 1/4 saves {quarter:.1%} of a request (below {worth:.0%}); {after}."
        )
    half = rows[1]["saving"]
    return f"Worth it here: 1/4 saves {quarter:.1%} of a request, 1/2 {half:.1%}; below about {start} tokens 1/4 saves less than {worth:.0%}."


def _accuracy(errors: list[dict[str, Any]]) -> str:
    if not errors:
        return "The results have one length only, so the error on others is unknown."
    said = []
    for what, label in (("ttft_s", "TTFT"), ("decode_tok_s", "tokens/s")):
        found = [e for e in errors if e["what"] == what]
        if found:
            worst = max(found, key=lambda e: abs(e["error"]))
            mean = sum(abs(e["error"]) for e in found) / len(found)
            said.append(
                f"{label} {mean:.1%} in the mean, at most {abs(worst['error']):.1%} (at {worst['context']} tokens)"
            )
    return "Error on lengths left out of the fit: " + "; ".join(said) + "."
