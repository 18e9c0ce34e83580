"""Train `tiny` in three stages: dense pre-training, indexer warm-up, sparse stage.

    python -m recipes.tiny.train --corpus work/tiny-corpus --out work/tiny-train
        --stage dense|warmup|sparse|all

Each stage writes STAGE.pt, its weights in bf16, and its losses to log.jsonl. A stage that was cut
off continues from STAGE.part.pt, which holds weights, optimiser and step; the batches depend on
random seed and step alone. A finished stage is not run again. It needs one GPU. `--steps 3
--device cpu --sequence 128 --batch 2` goes through every stage on a CPU in a minute, without a
useful result.

This trainer and model.py stay until tiny is trained again. Then transformers' own model and
`indexcache.distilling` take their place.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from indexcache.pattern import Pattern
from recipes.tiny.model import CONFIG, Tiny
from recipes.tiny.retrieval import Retrieval

# A step has batch x length tokens, in chunks of `micro` sequences. `lr` is the peak learning rate
# and `retrieval` the share of sequences with a retrieval task. The learning rate of the dense stage
# is laid out for `schedule` steps: it ends at a third of its peak, and the sparse stage lowers it
# further.
STAGES = {
    "dense": {
        "steps": 3000,
        "schedule": 4682,
        "batch": 32,
        "length": 4096,
        "lr": 4e-3,
        "retrieval": 0.20,
        "micro": 32,
    },
    "warmup": {
        "steps": 360,
        "batch": 16,
        "length": 2048,
        "lr": 3e-3,
        "retrieval": 0.20,
        "micro": 8,
    },
    "sparse": {
        "steps": 580,
        "batch": 64,
        "length": 2048,
        "lr": 1e-3,
        "retrieval": 0.20,
        "micro": 16,
    },
}
SAVE = 100  # A state is saved after so many steps.


class Batches:
    """Random windows of the tokens, some with a retrieval task.

    They depend on seed and step alone.
    """

    def __init__(self, tokens: np.ndarray, task: Retrieval, share: float, seed: int):
        self.tokens = tokens
        self.task = task
        self.share = share
        self.seed = seed

    def __call__(self, step: int, batch: int, length: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, step])
        rows = []
        for start in rng.integers(0, len(self.tokens) - length - 1, batch):
            window = self.tokens[start : start + length + 1].astype(np.int64)
            rows.append(self.task(window, rng) if rng.random() < self.share else window)
        return torch.from_numpy(np.stack(rows))


def loss_of(model: Tiny, ids: torch.Tensor, mode: str, pattern: str | None = None):
    logits, kl = model(ids[:, :-1], mode, pattern)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), kl


def optimiser(model: Tiny, lr: float, indexer_only: bool) -> torch.optim.AdamW:
    """Make the optimiser of all weights or of the indexers alone, and freeze the others."""
    decayed, undecayed = [], []
    for name, p in model.named_parameters():
        trained = "indexer" in name or not indexer_only
        p.requires_grad_(trained)
        if trained:
            (decayed if p.dim() > 1 and "embed" not in name else undecayed).append(p)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda
    )


def schedule(step: int, steps: int) -> float:
    """Compute the factor of the learning rate: linear over the first 3 %, then cosine to 0.05."""
    warm = max(steps // 33, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(
    stage: str,
    model: Tiny,
    batches: Any,
    out: Path,
    o: argparse.Namespace,
    check: Any,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train one stage, write its weights, and log the result of `check(model, stage)`.

    Args:
        batches: the token ids of a step, from (step, batch, length): int64 [batch, length + 1].
        settings: steps, batch, length, lr, micro, and schedule for a longer one; None: STAGES'.
    """
    s = dict(STAGES[stage]) if settings is None else dict(settings)
    if settings is None:
        s["length"] = o.sequence or s["length"]
        s["batch"] = o.batch or s["batch"]
        s["steps"] = o.steps or s["steps"]
    s["micro"] = min(s["micro"], s["batch"])
    opt = optimiser(model, s["lr"], stage == "warmup")
    first = 0
    saved = out / f"{stage}.part.pt"
    if saved.exists():
        state = torch.load(saved, map_location=o.device, weights_only=True)
        if state["settings"] != s:
            raise SystemExit(
                f"{saved}: this stage was begun with other settings ({state['settings']}); remove "
                "it or use another --out."
            )
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimiser"])
        first = state["step"]
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        earlier = [r for r in rows if r["stage"] != stage or r.get("step", 0) < first]
        (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in earlier))
    model.train()
    log = open(out / "log.jsonl", "a", encoding="utf-8")
    started, tokens = time.time(), 0
    for step in range(first, s["steps"]):
        if step == first + 20:
            started, tokens = time.time(), 0  # The compilation is over.
        for group in opt.param_groups:
            group["lr"] = s["lr"] * schedule(step, s.get("schedule", s["steps"]))
        ids = batches(step, s["batch"], s["length"]).to(o.device)
        loss_total, kl_total = 0.0, 0.0
        chunks = ids.split(s["micro"])
        for chunk in chunks:
            with torch.autocast(ids.device.type, torch.bfloat16):
                if stage == "warmup":
                    kl, _ = model.warmup(chunk[:, :-1])
                    kl_total = kl_total + kl / len(chunks)
                else:
                    loss, kl = loss_of(model, chunk, stage)
                    ((loss + kl) / len(chunks)).backward()
                    loss_total = loss_total + loss.detach() / len(chunks)
                    kl_total = kl_total + kl.detach() / len(chunks)
        trained = [p for group in opt.param_groups for p in group["params"]]
        if stage == "warmup" and len(chunks) > 1:
            for p in trained:
                p.grad /= len(chunks)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if stage != "warmup":
            model.balance()
        tokens += ids.shape[0] * s["length"]
        if step % 20 == 0 or step == s["steps"] - 1:
            row = {
                "stage": stage,
                "step": step,
                "steps": s["steps"],
                "loss": float(loss_total),
                "kl": float(kl_total),
                "norm": float(norm),
                "tokens": (step + 1) * s["batch"] * s["length"],
                "tokens_s": round(tokens / (time.time() - started)),
            }
            if not math.isfinite(row["loss"] + row["kl"]):
                raise SystemExit(
                    f"{stage}: the loss is not finite at step {step}; lower the learning rate."
                )
            log.write(json.dumps(row) + "\n")
            log.flush()
            if step % 200 == 0:
                print(row, flush=True)
        if (step + 1) % SAVE == 0 and step + 1 < s["steps"]:
            state = {
                "model": model.state_dict(),
                "optimiser": opt.state_dict(),
                "step": step + 1,
                "settings": s,
            }
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").rename(saved)
    torch.save({k: v.bfloat16() for k, v in model.state_dict().items()}, out / f"{stage}.pt")
    saved.unlink(missing_ok=True)
    log.write(json.dumps({"stage": stage, "done": True, "check": check(model, stage)}) + "\n")


@torch.no_grad()
def validate(model: Tiny, tokens: np.ndarray, device: str, stage: str, length: int) -> dict:
    """Compute held-out losses of the dense model and, after its stage, of the sparse one."""
    model.eval()
    n = min(len(tokens) // (length + 1), 32)
    starts = np.linspace(0, len(tokens) - length - 1, n).astype(int)
    windows = np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64)
    ids = torch.from_numpy(windows).to(device)

    def mean(mode: str, pattern: str | None = None) -> float:
        with torch.autocast(ids.device.type, torch.bfloat16):
            chunks = ids.split(8)
            return float(np.mean([float(loss_of(model, c, mode, pattern)[0]) for c in chunks]))

    result: dict = {"length": length, "dense": mean("dense")}
    if stage != "dense":
        with torch.autocast(ids.device.type, torch.bfloat16):
            kept = torch.stack([model.warmup(c[:, :-1])[1] for c in ids.split(4)]).mean(0)
        layers = model.c["num_hidden_layers"]
        result |= {"sparse": mean("plain"), "attention_kept": [round(float(x), 4) for x in kept]}
        for freq in (2, 4):
            pattern = str(Pattern.uniform(layers, freq))
            result[f"uniform_1/{freq}"] = mean("plain", pattern)
        result["one_shared"] = [
            mean("plain", "F" * i + "S" + "F" * (layers - i - 1)) for i in range(1, layers)
        ]
    print(stage, json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--steps", type=int, help="Number of steps of each stage.")
    parser.add_argument("--sequence", type=int, help="Number of tokens in a sequence.")
    parser.add_argument("--batch", type=int, help="Number of sequences in a step.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(o.seed)
    torch.set_float32_matmul_precision("high")
    tokens = np.frombuffer(lzma.decompress((o.corpus / "train.u16.xz").read_bytes()), np.uint16)
    held_out = np.fromfile(o.corpus / "validation.u16", np.uint16)
    task = Retrieval(Tokenizer.from_file(str(o.corpus / "tokenizer.json")), CONFIG["vocab_size"])
    model = Tiny().to(o.device)
    if o.device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        Tiny.distil = staticmethod(torch.compile(Tiny.distil, dynamic=False))
        torch._dynamo.config.cache_size_limit = 64
    for i, stage in enumerate(STAGES):
        if (o.out / f"{stage}.pt").exists():
            file = o.out / f"{stage}.pt"
            model.load_state_dict(torch.load(file, map_location=o.device, weights_only=True))
        elif o.stage in (stage, "all"):
            batches = Batches(tokens, task, STAGES[stage]["retrieval"], o.seed * 10 + i)

            def check(m: Tiny, stage: str = stage) -> list[dict]:
                lengths = [o.sequence] if o.sequence else [1024, 4096]
                # Each of many shapes is used a few times, which is not worth a compilation.
                with torch.compiler.set_stance("force_eager"):
                    return [validate(m, held_out, o.device, stage, length) for length in lengths]

            train(stage, model, batches, o.out, o, check)
        else:
            break


if __name__ == "__main__":
    main()
