"""Text, retrieval and evaluations that the benchmarks of searches share.

Every piece is a folder or a file that stays, so an interrupted benchmark goes on; processes that do
different seeds may work in one folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import indexcache as ic
from indexcache.checkpoint import resolve
from indexcache.data import Batch
from indexcache.data.retrieval import DOMAIN
from indexcache.records import read_json, write_json

TASKS = ("passkey", "needles", "key-value")
EVALUATED_AT_ONCE = 6  # patterns of one call of `evaluate`, which is kept when it is done


def common_arguments(description: str, result: Path) -> argparse.ArgumentParser:
    """Return a parser with the arguments that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="Folder of all run folders.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--topk", type=int, help="Run the model with this k.")
    parser.add_argument("--data", help="Calibration and held-out text; the default is tiny's.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="Kinds of retrieval.")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=24, help="Sequences to search on.")
    parser.add_argument("--task-sequences", type=int, default=12, help="The same, of each task.")
    parser.add_argument("--documents", type=int, default=54, help="Held-out sequences.")
    parser.add_argument("--task-documents", type=int, default=36, help="The same, of each task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--result", type=Path, default=result)
    return parser


def open_model(o: argparse.Namespace) -> ic.Model:
    """Load the model on the fast path, with another k where one is asked for."""
    path = o.model if o.topk is None else _with_topk(o.model, o.topk, o.out)
    model = ic.load(path, dtype=o.dtype, device=o.device)
    ic.accelerate(model.module)
    return model


def _with_topk(model: str, topk: int, out: Path) -> Path:
    """Make a checkpoint with another k beside the runs; its other files are links."""
    source = resolve(model)
    folder = out / f"{source.name}-k{topk}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            os.symlink(file.resolve(), folder / file.name)
    write_json(folder / "config.json", read_json(source / "config.json") | {"index_topk": topk})
    return folder


@dataclass(frozen=True)
class Text:
    """Hold what a seed searches on, and what its patterns are measured on.

    Attributes:
        text: calibration sequences.
        asked: calibration sequences of retrieval.
        held_out: held-out sequences of both.
    """

    text: list[Batch]
    asked: list[Batch]
    held_out: list[Batch]

    @classmethod
    def of(cls, model: ic.Model, o: argparse.Namespace, seed: int) -> Text:
        """Read the text of a seed."""
        parts = {}
        for split, text, tasks in (
            ("calibration", o.sequences, o.task_sequences),
            ("heldout", o.documents, o.task_documents),
        ):
            source = split if o.data is None else o.data
            how: dict[str, Any] = {"split": None if o.data is None else split}
            how |= {"length": o.length, "seed": seed}
            parts[split] = model.batches(source, sequences=text, **how)
            asked = model.retrieval(o.tasks, source=source, sequences=tasks, **how)
            parts[f"{split} tasks"] = asked
        held_out = parts["heldout"] + parts["heldout tasks"]
        return cls(parts["calibration"], parts["calibration tasks"], held_out)


def measured(
    model: ic.Model, patterns: Iterable[ic.Pattern], held_out: Sequence[Batch], kept: Path
) -> dict[str, dict[str, Any]]:
    """Measure loss and recall of patterns beside all full, a few at once, and keep them in a file.

    Returns:
        By pattern: delta_loss, ci_low, ci_high, loss, recall and recall_full as fractions of 1, and
        recall_by_task.
    """
    found: dict[str, dict[str, Any]] = read_json(kept) if kept.exists() else {}
    new = [p for p in {str(p): p for p in patterns}.values() if str(p) not in found]
    for at in range(0, len(new), EVALUATED_AT_ONCE):
        some = {str(p): p for p in new[at : at + EVALUATED_AT_ONCE]}
        evidence = ic.evaluate(model, some, held_out, progress=True)
        for name in some:
            rows = {row.where: row for row in evidence.rows if row.name == name}
            tasks = {
                str(w).removeprefix(DOMAIN): r.recall
                for w, r in rows.items()
                if r.recall is not None and w != f"{DOMAIN}all"
            }
            own, asked = rows["all"], sum(r.answers for r in tasks.values())
            found[name] = {
                "delta_loss": own.delta_loss,
                "ci_low": own.ci_low,
                "ci_high": own.ci_high,
                "loss": own.loss,
                "recall": sum(r.found for r in tasks.values()) / asked,
                "recall_full": sum(r.found_baseline for r in tasks.values()) / asked,
                "recall_by_task": {t: r.found / r.answers for t, r in tasks.items()},
            }
        write_json(kept, found)
    return found


def collect(folder: Path, result: Path, name: str) -> list[dict[str, Any]]:
    """Write the rows of all seeds of a model into the result file; rows of other models stay."""
    rows = [row for file in sorted(folder.glob("*/rows.json")) for row in read_json(file)]
    kept = read_json(result)["rows"] if result.exists() else []
    kept = [r for r in kept if r["model"] != name]
    write_json(result, {"rows": sorted(kept + rows, key=lambda r: (r["model"], r["seed"]))})
    return rows
