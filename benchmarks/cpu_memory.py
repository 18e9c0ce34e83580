"""Measure memory and time of one forward pass of `tiny` on a CPU, stock against the fast path.

    python -m benchmarks.cpu_memory [--out FILE]

The token losses of both paths on the same text of 1024 tokens are compared first. Each measurement
then runs in a separate process, because the peak of a process never falls. Each row also has the
memory of stock by a formula, 2 * 4 * H * T^2 bytes: the scores of one layer and their rectified
copy in fp32. 16K tokens are measured on the fast path only; for stock the formula extrapolates. The
rows go to benchmarks/results/tiny_cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from indexcache import accelerate, load
from indexcache.data import batches
from indexcache.models.lm import hidden_states, token_losses

ROOT = Path(__file__).resolve().parent.parent

INDEX_HEADS = 16  # heads of tiny's indexers
CASES = [
    (1024, "stock"),
    (1024, "fast"),
    (2048, "stock"),
    (2048, "fast"),
    (4096, "stock"),
    (4096, "fast"),
    (16384, "fast"),
]


def measure(length: int, path: str) -> None:
    """Time a second pass over `length` random ids, and print it as JSON.

    The megabytes are those that both passes add to the loaded model.
    """
    model = load("tiny").module
    ids = torch.randint(1, 4096, (1, length), generator=torch.Generator().manual_seed(0))
    if path == "fast":
        accelerate(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        began = time.time()
        assert hidden_states(model, ids).isfinite().all()
    seconds = time.time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"seconds": round(seconds, 2), "added_mb": round((after - before) / 1024)}
    print(json.dumps(row | {"peak_mb": round(after / 1024)}))


def check() -> float:
    """Return the largest difference of a mean loss between the paths, on held-out text."""
    loaded = load("tiny")
    worst = 0.0
    for batch in batches("heldout", loaded.encode, loaded.config, length=1024, sequences=3):
        stock = mean_loss(loaded.module, batch.ids)
        with accelerate(loaded.module):
            fast = mean_loss(loaded.module, batch.ids)
        worst = max(worst, abs(float(stock - fast)))
    if worst > 1e-4:
        raise SystemExit(f"the paths differ by {worst} nats: nothing is timed")
    return worst


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of the next tokens, in nats."""
    return token_losses(model, hidden_states(model, ids), ids).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "tiny_cpu.json"
    )
    parser.add_argument(
        "--one",
        nargs=2,
        metavar=("LENGTH", "PATH"),
        help="make one measurement and print it; this script calls itself so",
    )
    o = parser.parse_args()
    if o.one:
        measure(int(o.one[0]), o.one[1])
        return
    difference = check()
    rows = []
    print(f"paths differ by {difference:.1e} nats at most")
    for length, path in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu_memory", "--one", str(length), path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        row = {
            "context": length,
            "path": path,
            **json.loads(done.stdout.splitlines()[-1]),
            "stock_formula_mb": 8 * INDEX_HEADS * length**2 // 2**20,
        }
        rows.append(row)
        print(row, flush=True)
    result = {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "largest_loss_difference": difference,
        "rows": rows,
    }
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
