"""Make long-range tasks in real text, 2K to 8K tokens, and score a model on them.

There are two tasks:

  passkey  One line with a five-digit key is somewhere in the text, 0 to 90 % of the length before
           the end, and the end asks for it.
  recall   16 lines "The code of NAME is 1234." are spread over the first part. The end asks for 8
           of them, one after the other. The first two are examples and are not scored.

A row is {"task", "length", "seed", "ids" [length], "answers" [[start, stop], ..]}: the model has
to continue ids[:start] with ids[start:stop]. One pass scores all answers of a row. Greedy decoding
gives an answer exactly when each of its tokens is the most likely one after the right ones, so
nothing is generated, and every pattern can be tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indexcache.cli import guarded
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import hidden_states
from indexcache.models.loading import describe, load
from indexcache.models.seam import use_pattern
from indexcache.spec import parse_pattern
from recipes.tiny.retrieval import Retrieval

LENGTHS = (2048, 4096, 8192)
ROWS = 40  # Each task and length has so many rows.
DEPTHS = 10  # The passkey has so many places, which are evenly spread.
PAIRS = 16  # A row has so many names with a code.
ASKED = 8  # The end asks for so many codes.
SHOWN = 2  # So many of the answers are examples.
NAMES = [
    "Adams",
    "Baker",
    "Clark",
    "Davis",
    "Evans",
    "Foster",
    "Green",
    "Harris",
    "Irving",
    "Jones",
    "King",
    "Lewis",
    "Moore",
    "Nelson",
    "Owens",
    "Parker",
    "Quinn",
    "Roberts",
    "Smith",
    "Taylor",
    "Underwood",
    "Vance",
    "Walker",
    "Young",
]


class Tasks(Retrieval):
    """Tasks in words, written into windows of real text at places that the parent class finds."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, tokenizer.get_vocab_size())
        self.tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def passkey(
        self, x: np.ndarray, rng: np.random.Generator, depth: float
    ) -> tuple[np.ndarray, list[list[int]]]:
        """Write the task into a copy of the window; depth 0 puts the key first.

        Returns:
            The window, and the start and end of its answer.
        """
        key = "".join(map(str, rng.integers(0, 10, 5)))
        note = self.encode(f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n")
        question = self.encode("\n\nWhat is the pass key? The pass key is")
        answer = self.encode(f" {key}")
        x = x.copy()
        end = len(x) - len(question) - len(answer)
        at = int(depth * 0.95 * (end - len(note)))
        x[at : at + len(note)] = note
        x[end:] = np.concatenate([question, answer])
        return x, [[len(x) - 5, len(x)]]  # Each digit is a token.

    def pairs(self, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[list[int]]]:
        """Write the task `recall` into a copy of the window.

        Returns:
            The window, and the start and end of each answer that is scored.
        """
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[:PAIRS]]
        codes = ["".join(map(str, rng.integers(0, 10, 4))) for _ in names]
        notes = [
            self.encode(f"\n\nThe code of {n} is {c}.\n\n")
            for n, c in zip(names, codes, strict=True)
        ]
        tail, answers = [], []
        for i in rng.permutation(PAIRS)[:ASKED]:
            tail.append(self.encode(f"\nThe code of {names[i]} is"))
            tail.append(self.encode(f" {codes[i]}"))
            answers.append([sum(map(len, tail)) - 4, sum(map(len, tail))])
            tail.append(self.encode("."))
        questions = np.concatenate(tail)
        x = x.copy()
        at = len(x) - len(questions)
        self.write(x, notes, 0, at, rng)
        x[at:] = questions
        return x, [[start + at, stop + at] for start, stop in answers[SHOWN:]]


def make_tasks(
    tokenizer: Any, texts: Iterable[str], rows: int = ROWS, lengths: Iterable[int] = LENGTHS
) -> list[dict[str, Any]]:
    """Make `rows` rows of each task and length. Row i is written into text i of those long enough.

    Raises:
        ValueError: no text has that many tokens.
    """
    backend = tokenizer.backend_tokenizer
    task = Tasks(backend)
    filler = [
        np.array(e.ids, np.int64)
        for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)
    ]
    tasks = []
    for length in lengths:
        windows = [f[:length] for f in filler if len(f) >= length]
        if not windows:
            raise ValueError(f"No text has {length} tokens for the tasks to be written into.")
        for i in range(rows):
            window = windows[i % len(windows)]
            rng = np.random.default_rng([length, i])
            written = {
                "passkey": task.passkey(window, rng, i % DEPTHS / DEPTHS),
                "recall": task.pairs(window, rng),
            }
            for name, (ids, answers) in written.items():
                row = {"task": name, "length": length, "seed": i}
                tasks.append(row | {"ids": ids.tolist(), "answers": answers})
    return tasks


@dataclass
class Score:
    """Sums over the answers of one task and length."""

    right: float = 0.0
    answers: int = 0
    loss: float = 0.0
    tokens: int = 0


def score(
    rows: Iterable[dict[str, Any]], logits: Callable[[Tensor, list[int]], Tensor]
) -> list[dict[str, Any]]:
    """Compute the share of right answers and their mean loss, for each task and length.

    Args:
        logits: computes the model's logits [positions, V] for ids int64 [1, T] and positions; see
            `logits_of`.

    Returns:
        "accuracy": the share of answers that greedy decoding gives; "loss": nats per token.
    """
    scores: dict[tuple[str, int], Score] = {}
    for r in rows:
        ids = torch.tensor([r["ids"]])
        positions = [p for start, stop in r["answers"] for p in range(start - 1, stop - 1)]
        predicted = logits(ids, positions).float().cpu()
        target = ids[0, [p + 1 for p in positions]]
        right = predicted.argmax(-1) == target
        total = scores.setdefault((r["task"], r["length"]), Score())
        at = 0
        for start, stop in r["answers"]:
            total.right += float(right[at : at + stop - start].all())
            total.answers += 1
            at += stop - start
        total.loss += float(F.cross_entropy(predicted, target, reduction="none").sum())
        total.tokens += len(positions)
    return [
        {
            "task": task,
            "length": length,
            "accuracy": total.right / total.answers,
            "loss": total.loss / total.tokens,
            "answers": total.answers,
        }
        for (task, length), total in sorted(scores.items(), key=lambda item: item[0])
    ]


def logits_of(
    model: Any, states: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor, list[int]], Tensor]:
    """Return the `logits` of `score` for a transformers model, under the pattern in force.

    Args:
        states: computes the final hidden states [1, T, E] for ids [1, T]; None takes the model's.
    """

    def logits(ids: Tensor, positions: list[int]) -> Tensor:
        hidden = states(ids) if states else hidden_states(model, ids)
        head = model.get_output_embeddings()
        return head(hidden[0, positions].to(head.weight.device)).detach()

    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--tasks", type=Path, required=True, help="The tasks.jsonl that data.py wrote."
    )
    parser.add_argument(
        "--pattern",
        nargs="*",
        default=[],
        help="Test these patterns beside the model itself, as in `indexcache evaluate`.",
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="Number of rows of each task and length."
    )
    parser.add_argument("--length", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    o = parser.parse_args()
    layers = describe(o.checkpoint)["num_hidden_layers"]
    patterns = [parse_pattern(spec, layers).pattern for spec in ("full", *o.pattern)]
    with open(o.tasks, encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if r["seed"] < o.rows and r["length"] in o.length]
    model = load(o.checkpoint, dtype=o.dtype, device=o.device).module
    with accelerate(model):
        for pattern in patterns:
            with use_pattern(model, pattern):
                for r in score(rows, logits_of(model)):
                    print(json.dumps({"pattern": str(pattern)} | r), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
