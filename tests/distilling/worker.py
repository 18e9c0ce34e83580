"""Train small runs: in the tests, under torchrun, or in a process that is killed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indexcache.data import Batch, Document
from indexcache.distilling import DistillResult, DistillSettings, Row, distill, pack_rows
from indexcache.distilling import run as run_module
from indexcache.distilling.settings import RunSettings
from indexcache.models.family import decoder_layers, indexers
from indexcache.models.seam import use_pattern
from indexcache.pattern import Pattern
from indexcache.records import Run
from tests.support import make_model

PATTERN = "FSFRSS@2"
MODES = {
    "warmup": {"stage": "warmup"},
    "frozen": {"stage": "sparse", "freeze_backbone": True},
    "full": {"stage": "sparse", "backbone_lr": 1e-3},
    "lora": {"stage": "sparse", "backbone_lr": 1e-2, "lora": 2},
    "zeros": {"stage": "warmup", "keep_zeros": True, "weight_decay": 0.1, "answer_weight": 0.5},
}


def row_of(length, seed=0):
    return Row.one_document(np.random.default_rng(seed).integers(0, 128, length))


def dense(model):
    """Copy the stock model so that it selects everything."""
    model = copy.deepcopy(model)
    for layer in decoder_layers(model):
        layer.self_attn.indexer.index_topk = 4096
    return model


def steps(folder: Path):
    """Read the lines of the steps and those of the evaluations from a run's journal."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [e for e in lines if "loss" in e], [e for e in lines if "held_out" in e]


def documents():
    rng = np.random.default_rng(0)
    return [
        Document(rng.integers(0, 128, n), "text", str(n), str(n))
        for n in (100, 70, 200, 300, 51, 90)
    ]


def held_out():
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 128, (3, 96)))
    text = Batch(ids, "text", ("a", "b", "c"), ("a", "b", "c"))
    return [text, *retrieval()]


def retrieval():
    """Make questions of which the untrained model finds some: its own most likely tokens."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 128, (3, 96)))
    model = make_model("glm_moe_dsa")
    with torch.no_grad(), use_pattern(model, PATTERN):
        found = model(ids).logits.argmax(-1)
    ids[:2, 50], ids[0, 80] = found[:2, 49], found[0, 79]
    answers = (((50, 51), (80, 81)), ((50, 51),), ((60, 62),))
    return [
        Batch(ids[:2], "retrieval:passkey", ("p", "q"), ("p", "q"), answers=answers[:2]),
        Batch(ids[2:], "retrieval:needles", ("r",), ("r",), answers=answers[2:]),
    ]


def train(
    out: Path, mode: str, family: str = "glm_moe_dsa", pattern: str = PATTERN, **changes: Any
) -> tuple[Any, DistillResult]:
    """Train a small model in `out`; return it and the result."""
    model = make_model(family)
    if mode == "zeros":
        with torch.no_grad():
            for indexer in indexers(model):
                indexer.wq_b.weight[1::3] = 0
                indexer.wk.weight[2:5] = 0
    fields: dict[str, Any] = (
        {"steps": 7, "rows": 2, "eval_every": 3, "save_every": 3} | MODES[mode] | changes
    )
    settings = DistillSettings(**fields)
    rows = pack_rows(documents(), 96)
    if settings.answer_weight:
        rows = [dataclasses.replace(row, answers=((40, 44), (90, 91))) for row in rows]
    result = distill(model, pattern, rows, out, settings, held_out=held_out())
    return model, result


def train_checkpoint(checkpoint: Path, out: Path) -> None:
    """Train all weights of a checkpoint from the command line's function, in both processes."""
    if int(os.environ.get("RANK", "0")):
        run_module.load = None  # Another process than the first must not read all weights.
    text = checkpoint / "ids.jsonl"
    settings = DistillSettings(**MODES["full"] | {"steps": 3, "eval_every": 1})
    files = RunSettings(data=str(text), length=64, batch_tokens=128, eval_sequences=2)
    pattern = Pattern.of("FSSFSS")
    run_module.distill_checkpoint(str(checkpoint), pattern, out, settings, files)


def die_after(step: int) -> None:
    """Kill this process, as kill -9 does, once the journal has the line of this step."""
    append = Run.append

    def watched(self: Run, entry: dict) -> None:
        append(self, entry)
        if entry["step"] == step and "loss" in entry:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.append = watched


if __name__ == "__main__":
    torch.set_num_threads(1)
    action = sys.argv[1]
    folder = Path(sys.argv[2])
    if action == "kill":
        die_after(5)
        train(folder, sys.argv[3])
    else:
        torch.distributed.init_process_group("gloo")  # All runs share it.
        for name in sys.argv[3:]:
            if name in MODES:
                train(folder / name, name)
            else:
                train_checkpoint(Path(name), folder / "checkpoint")
        torch.distributed.destroy_process_group()
