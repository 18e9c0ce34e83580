"""The search as a run: journalled, resumable, with progress; the algorithm itself is in `greedy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from indexcache.data import Batch, check_context, digest_of
from indexcache.models.family import family_of, indexers
from indexcache.models.loading import library_versions, weights_digest
from indexcache.models.seam import selector_of
from indexcache.pattern import Pattern, full_count, stage_starts
from indexcache.progress import progress
from indexcache.records import open_run
from indexcache.searching.greedy import evaluations, greedy_stages
from indexcache.searching.objective import Objective


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search does. `keep`: fraction of layers that stay full at the end (the count is rounded, at least one per
    stage); `stages`: pipeline stages of the engine; `uniform`: also evaluate uniform patterns, S and R, to compare."""

    keep: float = 0.25
    stages: int = 1
    uniform: bool = True
    pool_factor: int = 8


def search(
    model: nn.Module,
    batches: Sequence[Batch],
    out: str | Path,
    settings: SearchSettings = SearchSettings(),
    *,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Greedy search (paper, Algorithm 1) for every budget down to `settings.keep`, resumable in `out`.

    Args:
        model: a loaded transformers model of a known family whose layers all have an indexer.
        batches: calibration batches (`indexcache.data.make_batches`).
        out: run folder; an interrupted run with the same settings continues, to the same result.
        settings: see `SearchSettings`.
        identity: further facts a resumed run must share (e.g. the checkpoint's fingerprint).

    Returns:
        The content of `out/result.json`: {"frontier": [{"full", "pattern", "loss", "flipped"}, ..] from all full
        down, "uniform": [{"full", "pattern", "loss"}, ..], "calibration": {..}}.

    Raises:
        ValueError: a model trained with sharing, sequences that are too short, a folder of another run, a loss that
            is not finite.
    """
    layers = len(indexers(model))
    family_of(model)
    refuse_trained_sharing(model)
    beyond = min(check_context(b.ids.shape[1], model.config.index_topk) for b in batches)  # type: ignore[union-attr, arg-type]
    starts = stage_starts(layers, settings.stages)
    full = full_count(layers, settings.keep)
    if full < settings.stages:
        raise ValueError(
            f"{settings.stages} pipeline stages need {settings.stages} full layers at least, but keep = {settings.keep} of "
            f"{layers} layers leaves {full}."
        )
    comparisons = _uniform(layers, full, settings) if settings.uniform else []
    with open_run(
        Path(out), {**asdict(settings), **_environment(model, batches), **(identity or {})}
    ) as run:
        known = {e["pattern"]: e["loss"] for e in run.journal}
        total = evaluations(layers, full, starts) + len({str(p) for p in comparisons})
        with progress(total, "eval", len(known)) as bar:

            def record(pattern: Pattern, loss: float) -> None:
                run.append({"pattern": str(pattern), "loss": loss})
                bar.update()

            objective = Objective(model, batches, known, record)
            frontier: list[dict[str, Any]] = []
            for step in greedy_stages(objective, layers, full, starts):
                frontier.append(
                    {
                        "full": step.full,
                        "pattern": str(step.pattern),
                        "loss": step.loss,
                        "flipped": step.flipped,
                    }
                )
                bar.set_postfix_str(f"{step.full} full, best loss {step.loss:.4f}")
                objective.rebase(step.pattern)
            uniform = [
                {"full": len(p.full_layers), "pattern": str(p), "loss": objective(p)}
                for p in comparisons
            ]
        tokens = sum(b.ids.numel() for b in batches)
        calibration = {
            "sequences": sum(len(b.units) for b in batches),
            "tokens": tokens,
            "queries_beyond_k": beyond,
            "domains": sorted({b.domain for b in batches}),
            "digests": sorted({d for b in batches for d in b.digests}),
        }
        result = {"frontier": frontier, "uniform": uniform, "calibration": calibration}
        run.save("result.json", result)
        run.save(
            "pattern.json",
            Pattern(frontier[-1]["pattern"]).facts()
            | {"calibration_digests": calibration["digests"]},
        )
    return result


def refuse_trained_sharing(model: nn.Module) -> None:
    """Raises ValueError on a model some of whose layers have no indexer: trained with sharing, or pruned by an export."""
    shared = [i for i, indexer in enumerate(indexers(model)) if indexer is None]
    if shared:
        some = ", ".join(map(str, shared[:8])) + (", .." if len(shared) > 8 else "")
        raise ValueError(
            f"Layers {some} of this model have no indexer of their own and can never be full. A search is pointless on a "
            "model that was trained with sharing: its layers have learnt the pattern it ships "
            "with. If this is a pruned export, search the checkpoint it came from."
        )


def _uniform(layers: int, full: int, settings: SearchSettings) -> list[Pattern]:
    """Uniform 1/2, 1/4, .. down to the budget, with S and with R, where the stages allow them."""
    patterns = []
    freq = 2
    while full_count(layers, 1 / freq) >= full and freq < layers:
        for rest in "SR":
            p = Pattern.uniform(
                layers, freq, rest=rest, pool_factor=settings.pool_factor if rest == "R" else None
            )
            if all(p[s] == "F" for s in stage_starts(layers, settings.stages)):
                patterns.append(p)
        freq *= 2
    return patterns


def _environment(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """What decides the last bit of a loss."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    device = (
        torch.cuda.get_device_name(weight.device)
        if weight.is_cuda
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "data": digest_of(batches),
        "weights": weights_digest(model),
        "path": selector_of(model).path,
        "dtype": str(weight.dtype),
        "device": device,
        **library_versions(),
    }
