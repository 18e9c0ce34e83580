"""Measure peak memory and time of the distillation loss with its gradients, 1K to 16K tokens.

    python -m benchmarks.distill_memory [--device cpu|cuda] [--out FILE]

Gradients at 512 tokens are checked first, against autograd over full [L, L] matrices. Each
measurement then runs in a separate process and counts the memory beyond the inputs.
`warmup` and `sparse` are one indexer that serves four layers, over all keys and over k = 32.
`pass` is a complete training pass of `tiny` over one row under FSSSFSSSFSSS. `held` is the loss of
`warmup` by autograd over full matrices. The rows go to benchmarks/results/distill_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from indexcache import Pattern, load
from indexcache.distilling.forward import DistillForward, attention_replaced, run_decoder
from indexcache.distilling.indexers import trainable_indexers
from indexcache.distilling.loss import distill_loss
from indexcache.distilling.rows import Row
from indexcache.ops import AttentionTarget

ROOT = Path(__file__).resolve().parent.parent

LENGTHS = (1024, 2048, 4096, 8192, 16384)
# These are the sizes of tiny.
HEADS = 6
WIDTH = 80
INDEX_HEADS = 16
INDEX_DIM = 32
K = 32
LAYERS = 4
MAX_MATRIX_LENGTH = 2048  # tokens; full matrices of longer documents take too much memory


def inputs(length: int, device: str):
    """Draw the arguments of the loss: (q, k, w) that require gradients, targets, selected ids."""
    g = torch.Generator().manual_seed(0)
    q, k, w = (
        torch.randn(s, generator=g)
        for s in ((length, INDEX_HEADS, INDEX_DIM), (length, INDEX_DIM), (length, INDEX_HEADS))
    )
    targets = [
        AttentionTarget(
            torch.randn(length, HEADS, WIDTH, generator=g).to(device),
            torch.randn(length, WIDTH, generator=g).to(device),
            None,
            0.1,
        )
        for _ in range(LAYERS)
    ]
    positions = torch.arange(length)[:, None]
    ids = torch.where(
        positions < K,
        torch.arange(K),
        (torch.rand(length, K, generator=g) * (positions // K)).long() * K + torch.arange(K),
    )
    ids = torch.where(ids <= positions, ids, -1).int().to(device)
    return [x.to(device).requires_grad_() for x in (q, k, w * 0.05)], targets, ids


def matrix_loss(q, k, w, targets):
    """Compute the loss from its definition over full matrices, for autograd."""
    hidden = torch.ones(len(k), len(k), dtype=torch.bool, device=k.device).triu(1)
    scores = torch.einsum("sjt,sj->st", torch.einsum("sjd,td->sjt", q, k).relu(), w)
    log_q = scores.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0)
    total = 0
    for t in targets:
        p = (
            (torch.einsum("shd,td->hst", t.q_SHn, t.latent_TE) * t.scale)
            .masked_fill(hidden, -torch.inf)
            .softmax(-1)
            .mean(0)
        )
        total = total + (torch.xlogy(p, p) - p * log_q).sum() / len(targets)
    return total


def start(device: str) -> float:
    """Return the megabytes in use, and start counting the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # On Linux this resets the peak of the resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> float:
    """Return the peak in megabytes since `start`."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else status("VmHWM")


def status(key: str) -> float:
    """Read megabytes from this process's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


def measure(kind: str, length: int, device: str) -> None:
    """Measure one kind of pass, and print the result as JSON."""
    if kind == "pass":
        model = load("tiny", device=device).module.requires_grad_(False)
        model.config.max_position_embeddings = max(length, 4096)
        indexers = trainable_indexers(model, Pattern("FSSSFSSSFSSS"), torch.float32)
        forward = DistillForward(model, Pattern("FSSSFSSSFSSS"), indexers, sparse=False)
        row = Row.one_document(
            torch.randint(1, 4096, (length,), generator=torch.Generator().manual_seed(0)).numpy()
        )
    else:
        arguments, targets, ids = inputs(length, device)
    before, began = start(device), time.perf_counter()
    if kind == "pass":
        with attention_replaced(model, forward), torch.no_grad(), forward.row(row, collect=True):
            run_decoder(model, row, device)
    elif kind == "held":
        matrix_loss(*arguments, targets).backward()
    else:
        distill_loss(*arguments, targets, ids_SK=ids if kind == "sparse" else None).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - began, 2)
    print(json.dumps({"seconds": seconds, "added_mb": round(peak(device) - before, 1)}))


def check(device: str) -> float:
    """Return the largest relative difference of a gradient from autograd over full matrices."""
    arguments, targets, _ = inputs(512, device)
    pairs = (
        torch.autograd.grad(loss, arguments)
        for loss in (distill_loss(*arguments, targets), matrix_loss(*arguments, targets))
    )
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*pairs, strict=True))
    if worst > 1e-4:
        raise SystemExit(f"the gradients differ by {worst}: nothing is measured")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "distill_memory.json"
    )
    parser.add_argument(
        "--one",
        nargs=2,
        metavar=("WHAT", "LENGTH"),
        help="make one measurement and print it; this script calls itself so",
    )
    o = parser.parse_args()
    if o.one:
        measure(o.one[0], int(o.one[1]), o.device)
        return
    difference = check(o.device)
    rows = []
    print(f"gradients differ by {difference:.1e} at most, relative")
    for kind in ("warmup", "sparse", "pass", "held"):
        for length in LENGTHS:
            if kind == "held" and length > MAX_MATRIX_LENGTH:
                continue
            command = [sys.executable, "-m", "benchmarks.distill_memory", "--device", o.device]
            command += ["--one", kind, str(length)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            rows.append({"what": kind, "tokens": length, **measured})
            print(rows[-1], flush=True)
    name = (
        torch.cuda.get_device_name()
        if o.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    result = {
        "device": name,
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "gradient_difference": difference,
        "rows": rows,
    }
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
