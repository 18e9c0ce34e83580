"""What sharing costs each layer, from the first step of a search; and what that says of a distillation's layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from indexcache.records import finished_journal, read_json

LEAST_SHARE = 0.1  # of the mean cost: what a layer counts that loses nothing


def sharing_costs(folder: Path, layers: int, model: str | None = None) -> list[float | None]:
    """For each layer but the first, which is None, the loss in nats a token that it adds to the full model's on the search's
    calibration text when it alone reads the selection of the layer before it: what a search's first step tries.

    Args:
        model: the fingerprint of the checkpoint whose layers are asked for; None: not compared.

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
    alone = [losses.get(full[:i] + "S" + full[i + 1 :]) for i in range(layers)]
    missing = [i for i, x in enumerate(alone) if x is None and i]
    if full not in losses or len(missing) == layers - 1:
        raise ValueError(
            f"{folder}: this is no search of {layers} layers, or one that kept them all."
        )
    if missing:
        raise ValueError(
            f"{folder}: this search has not tried to share layer {missing[0]} alone, as those with --stages above 1 do not; "
            "search with --stages 1."
        )
    return [None if x is None else x - losses[full] for x in alone]


def weights_of_costs(costs: Sequence[float | None]) -> list[float]:
    """How much each layer counts where several learn from one indexer: its cost, at least a tenth of the mean cost, so that no layer
    is left out. A layer without a cost counts as the mean."""
    known = [max(c, 0.0) for c in costs if c is not None]
    mean = sum(known) / max(len(known), 1)
    if mean == 0:
        return [1.0] * len(costs)
    return [mean if c is None else max(c, LEAST_SHARE * mean) for c in costs]


def layer_weights(spec: str, layers: int, model: str | None = None) -> list[float]:
    """What a user gives: numbers with commas, one a layer, or the folder of a search (of `model`, as in `sharing_costs`).

    Raises:
        ValueError: neither, or another number of them.
    """
    try:
        found = [float(x) for x in spec.split(",")]
    except ValueError:
        if not spec or not os.path.isdir(spec):  # a Path raises where the name is too long
            raise ValueError(
                f"--layer-weights takes numbers with commas, one a layer, or the folder of a search, not {spec!r:.80}."
            ) from None
        return weights_of_costs(sharing_costs(Path(spec), layers, model))
    if len(found) != layers:
        raise ValueError(f"--layer-weights has {len(found)} numbers, the model {layers} layers.")
    return found
