"""Long-range test material: passkey and key-value recall in real text, 2K to 8K tokens, and how a model is scored on it.

A row is {"task", "length", "seed", "ids" [length], "answers" [[start, stop], ..]}: the model has to continue ids[:start] with
ids[start:stop]. All answers of a row are scored in one pass: greedy decoding gives an answer exactly when each of its tokens
is the most likely one after the right ones, so no generation is needed and any pattern can be tested.

    passkey   one line with a five-digit key somewhere in the text, asked for at the end, 0 to 90 % of the length away
    recall    16 lines "the code of NAME is 1234" spread over the first part, 8 of them asked for one after the other at the end
              (the first two as an example: they are not scored)
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.cli import guarded

sys.path.append(str(Path(__file__).resolve().parent.parent / "tiny"))
from retrieval import Retrieval

LENGTHS = (2048, 4096, 8192)
ROWS = 40  # of each task and length
DEPTHS = 10  # places of the passkey, evenly spread
PAIRS, ASKED, SHOWN = 16, 8, 2
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
    """Writes tasks in words into windows of real text; placing them is the parent's."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, tokenizer.get_vocab_size())
        self.encode = lambda text: np.array(
            tokenizer.encode(text, add_special_tokens=False).ids, np.int64
        )

    def passkey(
        self, x: np.ndarray, rng: np.random.Generator, depth: float
    ) -> tuple[np.ndarray, list[list[int]]]:
        """The window with the task in it, and where the answer stands; depth 0 puts the key first."""
        key = "".join(map(str, rng.integers(0, 10, 5)))
        note = self.encode(f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n")
        ask, answer = (
            self.encode("\n\nWhat is the pass key? The pass key is"),
            self.encode(f" {key}"),
        )
        x = x.copy()
        end = len(x) - len(ask) - len(answer)
        at = int(depth * 0.95 * (end - len(note)))
        x[at : at + len(note)] = note
        x[end:] = np.concatenate([ask, answer])
        return x, [[len(x) - 5, len(x)]]  # the digits, a token each

    def pairs(self, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[list[int]]]:
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
        end = np.concatenate(tail)
        x = x.copy()
        self.write(x, notes, 0, len(x) - len(end), rng)
        x[len(x) - len(end) :] = end
        return x, [[a + len(x) - len(end), b + len(x) - len(end)] for a, b in answers[SHOWN:]]


def make_tasks(
    tokenizer: Any, texts: Iterable[str], rows: int = ROWS, lengths: Iterable[int] = LENGTHS
) -> list[dict[str, Any]]:
    """`rows` rows of each task and length; row i is written into text i, or one after it that is long enough.

    Raises:
        ValueError: no text has that many tokens.
    """
    backend = tokenizer.backend_tokenizer
    task = Tasks(backend)
    filler = [
        np.array(e.ids, np.int64)
        for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)
    ]
    made = []
    for length in lengths:
        windows = [f[:length] for f in filler if len(f) >= length]
        if not windows:
            raise ValueError(f"No text has {length} tokens for the tasks to be written into.")
        for i in range(rows):
            window = windows[i % len(windows)]
            rng = np.random.default_rng([length, i])
            for name, (ids, answers) in (
                ("passkey", task.passkey(window, rng, i % DEPTHS / DEPTHS)),
                ("recall", task.pairs(window, rng)),
            ):
                made.append(
                    {
                        "task": name,
                        "length": length,
                        "seed": i,
                        "ids": ids.tolist(),
                        "answers": answers,
                    }
                )
    return made


def score(
    rows: Iterable[dict[str, Any]], logits: Callable[[Any, list[int]], Any]
) -> list[dict[str, Any]]:
    """Share of answers that greedy decoding gives, and their mean loss per token, for each task and length.

    Args:
        logits: (ids int64 [1, T], positions) -> logits [positions, V] of the model at these positions; see `logits_of`.
    """
    import torch
    import torch.nn.functional as F

    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for r in rows:
        ids = torch.tensor([r["ids"]])
        positions = [p for a, b in r["answers"] for p in range(a - 1, b - 1)]
        found = logits(ids, positions).float().cpu()
        target = ids[0, [p + 1 for p in positions]]
        right, loss = found.argmax(-1) == target, F.cross_entropy(found, target, reduction="none")
        at, s = 0, sums[r["task"], r["length"]]
        for a, b in r["answers"]:
            s[0] += float(right[at : at + b - a].all())
            s[1] += 1
            at += b - a
        s[2] += float(loss.sum())
        s[3] += len(positions)
    return [
        {
            "task": task,
            "length": length,
            "accuracy": s[0] / s[1],
            "loss": s[2] / s[3],
            "answers": int(s[1]),
        }
        for (task, length), s in sorted(sums.items())
    ]


def logits_of(
    model: Any, states: Callable[[Any], Any] | None = None
) -> Callable[[Any, list[int]], Any]:
    """How `score` asks a loaded transformers model, in whatever pattern it is. `states`: ids [1, T] -> final hidden states [1, T, E]."""
    from indexcache.models.lm import hidden_states

    def logits(ids: Any, positions: list[int]) -> Any:
        head, hidden = (
            model.get_output_embeddings(),
            states(ids) if states else hidden_states(model, ids),
        )
        return head(hidden[0, positions].to(head.weight.device)).detach()

    return logits


def main() -> None:
    import argparse
    import json

    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.loading import load
    from indexcache.models.seam import use_pattern
    from indexcache.pattern import Pattern

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tasks", type=Path, required=True, help="tasks.jsonl of data.py")
    parser.add_argument(
        "--pattern",
        nargs="*",
        default=[],
        help="patterns of F, R and S to test beside the model itself",
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="of each task and length")
    parser.add_argument("--length", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    o = parser.parse_args()
    with open(o.tasks, encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if r["seed"] < o.rows and r["length"] in o.length]
    model = load(o.checkpoint, dtype=o.dtype, device=o.device).module
    layers = model.config.num_hidden_layers
    with accelerate(model):
        for pattern in ["F" * layers, *o.pattern]:
            with use_pattern(model, Pattern(pattern)):
                for r in score(rows, logits_of(model)):
                    print(json.dumps({"pattern": pattern} | r), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
