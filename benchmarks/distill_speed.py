"""Measure tokens a second of the indexers' warm-up stage on a GPU, in complete training steps.

    python -m benchmarks.distill_speed [--lengths 8192,65536] [--pattern 1/4] [--steps 5] [--plain]

The fused loss is checked first, and a row is written only when its check passed in this run. The
model has the shape that recipes/smollm2 gives SmolLM2 (30 layers, 9 heads, 9 index heads of 256),
random weights in bf16, and random tokens, each row one document. Times do not depend on the
values. --plain also times the loss in plain torch, at the first length. The rows go to
benchmarks/results/distill_speed.json, or to --out FILE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indexcache import ops
from indexcache.distilling import DistillSettings, distill
from indexcache.distilling.flops import flops_per_token
from indexcache.distilling.loss import distill_loss
from indexcache.distilling.rows import Row
from indexcache.models.random import random_model
from indexcache.ops import AttentionTarget
from indexcache.shapes import Shape, reachable_of
from indexcache.spec import parse_pattern

ROOT = Path(__file__).resolve().parent.parent

SHAPE: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 9,
    "q_lora_rank": 576,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 192,
    "v_head_dim": 64,
    "first_k_dense_replace": 30,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 256,
    "index_n_heads": 9,
    "index_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}


def check(length: int = 2048) -> float:
    """Return the largest relative error of loss and gradients, fused against plain torch.

    The inputs are bf16, of two layers of this shape.
    """
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device="cuda") * by).bfloat16()

    targets = [
        AttentionTarget(draw(length, 9, 256), draw(length, 448), draw(9, 64, 256, by=0.06), 0.0625)
        for _ in range(2)
    ]
    results: list[Any] = []
    for backend in ("torch", "triton"):
        leaves = (
            [draw(length, 9, 256), draw(length, 256, by=0.1), draw(length, 9, by=0.1).float()]
            if not results
            else results[0][2]
        )
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        with ops.tuned(backend=backend):
            loss = distill_loss(*leaves, targets)
        results.append((loss.detach(), torch.autograd.grad(loss, leaves), leaves))
    (plain_loss, plain_grads, _), (loss, grads, _) = results
    pairs = zip((loss, *grads), (plain_loss, *plain_grads), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def measure(length: int, pattern: str, steps: int) -> dict[str, Any]:
    """Train the indexers for a few steps, and return a row of the result."""
    model = random_model(SHAPE, device="cuda")
    roles = parse_pattern(pattern, SHAPE["num_hidden_layers"]).pattern
    rng = np.random.default_rng(0)
    rows = [Row.one_document(rng.integers(0, SHAPE["vocab_size"], length)) for _ in range(steps)]
    settings = DistillSettings(
        stage="warmup", freeze_backbone=True, steps=steps, rows=1, eval_every=0, save_every=steps
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as out:
        distill(model, roles, rows, out, settings)
        journal = (Path(out) / "journal.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in journal]
    rate = statistics.median(e["tokens_s"] for e in lines[2:])
    flop = flops_per_token(Shape.of(SHAPE), roles, settings, length)
    rates = reachable_of(torch.cuda.get_device_name())
    if rates is None:
        raise SystemExit("The rates of this GPU are unknown, so there is no floor to compare with.")
    return {
        "length": length,
        "pattern": str(roles),
        "tokens_s": rate,
        "tflops": round(rate * flop / 1e12, 1),
        "floor_tokens_s": round(rates.bf16 / flop, 1),
        "share_of_floor": round(rate * flop / rates.bf16, 4),
        "mfu": lines[-1]["mfu"],
        "added_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,65536")
    parser.add_argument("--pattern", default="uniform:1/4", help="as the command line takes it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--plain", action="store_true", help="the loss in plain torch too, at the first length"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "distill_speed.json"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a GPU is needed", file=sys.stderr)
        return 2
    error = check()
    print(
        f"fused against plain torch, bf16, 2048 tokens: largest relative error {error:.1e}",
        flush=True,
    )
    if error > 2e-2:
        return 1
    rows = []
    lengths = [int(n) for n in arguments.lengths.split(",")]
    runs = [(length, "fused") for length in lengths]
    if arguments.plain:
        runs.append((lengths[0], "plain torch"))
    for length, loss in runs:
        with ops.tuned(backend="triton" if loss == "fused" else "torch"):
            rows.append({"loss": loss, **measure(length, arguments.pattern, arguments.steps)})
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "error": error,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
