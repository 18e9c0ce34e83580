"""The verb `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output
from indexcache.cli.numbers import number
from indexcache.cli.results import deliver


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a prediction."""

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
    from indexcache.bench.plan import Traffic, make_plan

    traffic = Traffic(
        context=number(settings.context),
        output_tokens=settings.output_tokens,
        price=settings.price,
        batch=settings.batch,
    )
    result = make_plan(
        model, settings.gpu, traffic, bench=settings.bench, index_dtype=settings.index_dtype
    )
    deliver(result.report(), result.to_json(), output)
