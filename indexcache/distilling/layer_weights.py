"""Weigh the layers of a distillation by what sharing cost each of them in a search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from indexcache.records import finished_journal, read_json

MIN_SHARE = 0.1
"""A layer counts at least this share of the mean cost."""


def sharing_costs(folder: Path, layers: int, model: str | None = None) -> list[float | None]:
    """Return what it costs each layer to read the selection of the layer before it.

    The first step of a search tries this for every layer alone.

    Args:
        folder: a finished search.
        layers: number of layers of the model.
        model: the fingerprint of the checkpoint; None: not compared.

    Returns:
        For each layer the loss that is added to the full model's, in nats a token on the search's
        calibration text; None for the first layer, which has no layer before it.

    Raises:
        ValueError: `folder` holds no finished search of this model that has tried every layer.
    """
    journal = finished_journal(folder)
    settings = read_json(folder / "settings.json")
    searched = settings.get("model") if isinstance(settings, dict) else None
    if model is not None and searched is not None and searched != model:
        raise ValueError(f"{folder}: this is a search of another model.")
    try:
        losses = {
            str(e["pattern"]): float(e["loss"]) for e in journal if {"pattern", "loss"} <= e.keys()
        }
    except (TypeError, ValueError):
        raise ValueError(
            f"{folder}: a line of its journal has no loss of a pattern, so it was changed by hand."
        ) from None
    full = "F" * layers
    shared_alone = [losses.get(full[:i] + "S" + full[i + 1 :]) for i in range(layers)]
    missing = [i for i, loss in enumerate(shared_alone) if loss is None and i > 0]
    if full not in losses or len(missing) == layers - 1:
        raise ValueError(
            f"{folder}: this is no search of {layers} layers, or one that kept them all."
        )
    if missing:
        raise ValueError(
            f"{folder}: this search never shared layer {missing[0]} alone, because it ran with "
            "--stages above 1; search with --stages 1."
        )
    return [None if loss is None else loss - losses[full] for loss in shared_alone]


def weights_of_costs(costs: Sequence[float | None]) -> list[float]:
    """Return layer weights that are the layers' costs, each at least a tenth of the mean cost.

    The lower bound leaves no layer out. A layer without a cost counts as the mean.
    """
    positive = [max(cost, 0.0) for cost in costs if cost is not None]
    mean = sum(positive) / max(len(positive), 1)
    if mean == 0:
        return [1.0] * len(costs)
    return [mean if cost is None else max(cost, MIN_SHARE * mean) for cost in costs]


def layer_weights(spec: str, layers: int, model: str | None = None) -> list[float]:
    """Parse layer weights: comma-separated numbers, one a layer, or the folder of a search.

    Args:
        spec: what a user gives with --layer-weights.
        layers: number of layers of the model.
        model: see `sharing_costs`.

    Raises:
        ValueError: `spec` is neither, or has another number of weights.
    """
    try:
        weights = [float(x) for x in spec.split(",")]
    except ValueError:
        if not spec or not os.path.isdir(spec):  # A Path raises where the name is too long.
            raise ValueError(
                "--layer-weights takes numbers with commas, one a layer, or the folder of a "
                f"search, not {spec!r:.80}."
            ) from None
        return weights_of_costs(sharing_costs(Path(spec), layers, model))
    if len(weights) != layers:
        raise ValueError(f"--layer-weights has {len(weights)} numbers, the model {layers} layers.")
    return weights
