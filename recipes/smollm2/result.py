"""Collect the evaluations of an experiment into one result."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch

from indexcache.distilling.layer_weights import sharing_costs
from indexcache.records import read_journal, write_json
from indexcache.report.plots import draw_overlap
from recipes.smollm2.compare import closed_of, groups_of, pairs_of, rows_of, tasks_of


def write_result(out: Path, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Write result.json and overlap.png of the experiment in `out`, and return the result.

    Args:
        settings: what all evaluations share.
        device: where they ran.

    Raises:
        ValueError: the evaluations that all others are compared with are missing.
    """
    lines = read_lines(out, "seed*/evaluated")
    references = read_lines(out, "reference")
    full = [line for line in lines if line["method"] == "full"]
    methods = {(line["method"], line["kept"]) for line in references}
    if not full or not {("dense", 1), ("oracle", 1)} <= methods:
        raise ValueError(
            f"{out} lacks evaluations of all indexers, the dense model or the oracle: run the "
            "stages reference and evaluate first."
        )
    first = full[0]["seed"]
    mass = {
        f"{line['method']} 1/{line['kept']}": line["mass_kept"]
        for line in lines
        if line["seed"] == first and "mass_kept" in line
    }
    searched = {
        f"searched 1/{line['kept']}, seed {line['seed']}": line["pattern"]
        for line in lines
        if line["method"] == "searched"
    }
    costs = {
        str(line["seed"]): sharing_costs(search_of(out, line["seed"]), len(line["pattern"]))
        for line in full
    }
    groups = groups_of(read_lines(out, "seed*/groups"), lines)
    lines = references + lines
    result = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        "rows": rows_of(lines),
        "pairs": pairs_of(lines),
        "closed": closed_of(lines),
        "patterns": searched,
        "groups": groups,
        "mass_kept": {"seed": first, "of": mass},
        "tasks": tasks_of(lines),
        "overlap": full[0]["overlap"],
        "sharing_costs": costs,
    }
    write_json(out / "result.json", result)
    try:
        title = f"SmolLM2-DSA, k = {full[0]['overlap']['topk']}: shared part of the selections"
        draw_overlap(full[0]["overlap"], out / "overlap.png", title=title)
    except ValueError as error:
        print(error, file=sys.stderr)
    return result


def read_lines(out: Path, runs: str) -> list[dict[str, Any]]:
    """Read the journals of these run folders, the seeds in their order."""
    folders = [path.parent for path in out.glob(f"{runs}/journal.jsonl")]
    if "seed" in runs:
        folders.sort(key=lambda folder: int(folder.parent.name.removeprefix("seed")))
    return [line for folder in folders for line in read_journal(folder)]


def search_of(out: Path, seed: int) -> Path:
    """Return the folder of a seed's search.

    Raises:
        ValueError: the search has no result.
    """
    folder = out / f"seed{seed}" / "search"
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} has no result: run the stage search first.")
    return folder


def summary(result: dict[str, Any]) -> str:
    """Format the loss and the tasks of every method, all domains together."""
    lines = []
    for r in result["rows"]:
        if r["domain"] == "all":
            interval = f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
            tasks = f"tasks {r['retrieval']:.3f}, their answers' loss {r['retrieval_loss']:.3f}"
            lines.append(
                f"{r['method']:17s} 1/{r['kept']}: {r['delta_loss']:+.4f} {interval}, {tasks}"
            )
    return "\n".join(lines)
