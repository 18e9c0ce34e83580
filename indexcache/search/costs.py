"""What sharing costs each layer, from the first step of a search; and what that says of a distillation's layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from indexcache.records import finished_journal

LEAST = 0.1  # of the mean cost: what a layer counts that loses nothing


def sharing_costs(folder: Path, layers: int) -> list[float | None]:
    """For each layer the loss, nats a token, that its sharing alone adds to the full model's on the search's calibration text (a
    search's first step tries just that); None where that step keeps the layer full, as it does the first of each pipeline stage.

    Raises:
        ValueError: `folder` holds no finished search of `layers` layers.
    """
    losses = {e["pattern"]: float(e["loss"]) for e in finished_journal(folder) if {"pattern", "loss"} <= e.keys()}
    full = "F" * layers
    alone = [losses.get(full[:i] + "S" + full[i + 1 :]) for i in range(layers)]
    if full not in losses or all(x is None for x in alone):
        raise ValueError(f"{folder}: this is no search of {layers} layers, so it does not say what sharing each of them costs.")
    return [None if x is None else x - losses[full] for x in alone]


def weights_of_costs(costs: Sequence[float | None]) -> list[float]:
    """How much each layer counts where several learn from one indexer: its cost, at least a tenth of the mean cost, so that no layer
    is left out. A layer without a cost counts as the mean."""
    known = [max(c, 0.0) for c in costs if c is not None]
    mean = sum(known) / max(len(known), 1)
    if mean == 0:
        return [1.0] * len(costs)
    return [mean if c is None else max(c, LEAST * mean) for c in costs]


def layer_weights(spec: str, layers: int) -> list[float]:
    """What a user gives: numbers with commas, one a layer, or the folder of a search.

    Raises:
        ValueError: neither, or another number of them.
    """
    if Path(spec).is_dir():
        return weights_of_costs(sharing_costs(Path(spec), layers))
    try:
        found = [float(x) for x in spec.split(",")]
    except ValueError:
        raise ValueError(f"--layer-weights takes numbers with commas, one a layer, or the folder of a search, not {spec!r:.80}.") from None
    if len(found) != layers:
        raise ValueError(f"--layer-weights has {len(found)} numbers, the model {layers} layers.")
    return found
