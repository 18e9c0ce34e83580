"""Train `tiny` in the DeepSeek order: dense pre-training, indexer warm-up, sparse stage.

    python recipes/tiny/train.py --corpus work/tiny-corpus --out work/tiny-train --stage dense|warmup|sparse|all

Each stage writes `STAGE.pt` (weights in bf16) and its losses to `log.jsonl`; a stage that was cut off goes on from
`STAGE.part.pt` (weights, optimiser, step; the batches are a function of seed and step), a finished one is not run again. Needs one GPU;
`--steps 3 --device cpu --sequence 128 --batch 2` goes through every stage on a CPU in a minute, to no useful result.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from recipes.tiny.model import CONFIG, Tiny
from recipes.tiny.retrieval import Retrieval

# tokens a step = batch x length; peak learning rate; share of sequences with a retrieval task. The learning rate of
# the dense stage is laid out for `schedule` steps: it ends at a third of its peak, and the sparse stage takes it down.
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
SAVE = 100  # steps between two states to go on from


class Batches:
    """Random windows of the token stream, some with a retrieval task; a function of (seed, step) alone."""

    def __init__(self, tokens: np.ndarray, task: Retrieval, share: float, seed: int):
        self.tokens, self.task, self.share, self.seed = tokens, task, share, seed

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
    named = [(n, p) for n, p in model.named_parameters() if ("indexer" in n or not indexer_only)]
    for n, p in model.named_parameters():
        p.requires_grad_("indexer" in n or not indexer_only)
    decay = [p for n, p in named if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in named if not (p.dim() > 1 and "embed" not in n)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda
    )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 3 %, then cosine to a twentieth."""
    warm = max(steps // 33, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(
    stage: str, model: Tiny, batches: Batches, out: Path, o: argparse.Namespace, check
) -> None:
    s = dict(STAGES[stage])
    s |= {
        "length": o.sequence or s["length"],
        "batch": o.batch or s["batch"],
        "steps": o.steps or s["steps"],
    }
    s["micro"] = min(s["micro"], s["batch"])
    opt = optimiser(model, s["lr"], stage == "warmup")
    first, part = 0, out / f"{stage}.part.pt"
    if part.exists():
        state = torch.load(part, map_location=o.device, weights_only=True)
        if state["settings"] != s:
            raise SystemExit(
                f"{part}: this stage was begun with other settings ({state['settings']}); remove it or use another --out"
            )
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimiser"])
        first = state["step"]
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        kept = [r for r in rows if r["stage"] != stage or r.get("step", 0) < first]
        (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    model.train()
    log = open(out / "log.jsonl", "a", encoding="utf-8")
    began, seen = time.time(), 0
    for step in range(first, s["steps"]):
        if step == first + 20:
            began, seen = time.time(), 0  # compilation is over
        for group in opt.param_groups:
            group["lr"] = s["lr"] * schedule(step, s.get("schedule", s["steps"]))
        ids = batches(step, s["batch"], s["length"]).to(o.device)
        total, kl_total = 0.0, 0.0
        pieces = ids.split(s["micro"])
        for piece in pieces:
            with torch.autocast(ids.device.type, torch.bfloat16):
                if stage == "warmup":
                    kl, _ = model.warmup(piece[:, :-1])
                    kl_total = kl_total + kl / len(pieces)
                else:
                    loss, kl = loss_of(model, piece, stage)
                    ((loss + kl) / len(pieces)).backward()
                    total, kl_total = (
                        total + loss.detach() / len(pieces),
                        kl_total + kl.detach() / len(pieces),
                    )
        if stage == "warmup" and len(pieces) > 1:
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad /= len(pieces)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for g in opt.param_groups for p in g["params"]], 1.0
        )
        opt.step()
        opt.zero_grad(set_to_none=True)
        if stage != "warmup":
            model.balance()
        seen += ids.shape[0] * s["length"]
        if step % 20 == 0 or step == s["steps"] - 1:
            row = {
                "stage": stage,
                "step": step,
                "steps": s["steps"],
                "loss": float(total),
                "kl": float(kl_total),
                "norm": float(norm),
                "tokens": (step + 1) * s["batch"] * s["length"],
                "tokens_s": round(seen / (time.time() - began)),
            }
            if not math.isfinite(row["loss"] + row["kl"]):
                raise SystemExit(
                    f"{stage}: the loss is not finite at step {step}; lower the learning rate"
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
            torch.save(state, part.with_suffix(".tmp"))
            part.with_suffix(".tmp").rename(part)
    torch.save({k: v.bfloat16() for k, v in model.state_dict().items()}, out / f"{stage}.pt")
    part.unlink(missing_ok=True)
    log.write(json.dumps({"stage": stage, "done": True, "check": check(model, stage)}) + "\n")


@torch.no_grad()
def validate(model: Tiny, tokens: np.ndarray, device: str, stage: str, length: int) -> dict:
    """Held-out loss of the dense model and, once there are indexers, of the sparse one; what sharing costs."""
    model.eval()
    n = min(len(tokens) // (length + 1), 32)
    starts = np.linspace(0, len(tokens) - length - 1, n).astype(int)
    ids = torch.from_numpy(
        np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64)
    ).to(device)

    def mean(mode: str, pattern: str | None = None) -> float:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return float(
                np.mean([float(loss_of(model, part, mode, pattern)[0]) for part in ids.split(8)])
            )

    result: dict = {"length": length, "dense": mean("dense")}
    if stage != "dense":
        with torch.autocast(ids.device.type, torch.bfloat16):
            kept = torch.stack([model.warmup(part[:, :-1])[1] for part in ids.split(4)]).mean(0)
        layers = model.c["num_hidden_layers"]
        result |= {"sparse": mean("plain"), "attention_kept": [round(float(x), 4) for x in kept]}
        for freq in (2, 4):
            result[f"uniform_1/{freq}"] = mean(
                "plain", "".join("S" if i % freq else "F" for i in range(layers))
            )
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
    parser.add_argument("--steps", type=int, help="steps of each stage (default: the table above)")
    parser.add_argument(
        "--sequence", type=int, help="tokens of a sequence (default: the table above)"
    )
    parser.add_argument("--batch", type=int, help="sequences of a step (default: the table above)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    from tokenizers import Tokenizer

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
            model.load_state_dict(
                torch.load(o.out / f"{stage}.pt", map_location=o.device, weights_only=True)
            )
        elif o.stage in (stage, "all"):
            batches = Batches(tokens, task, STAGES[stage]["retrieval"], o.seed * 10 + i)

            def check(m: Tiny, stage: str = stage) -> list[dict]:
                lengths = [o.sequence] if o.sequence else [1024, 4096]
                with torch.compiler.set_stance("force_eager"):  # many shapes, each used a few times
                    return [validate(m, held_out, o.device, stage, length) for length in lengths]

            train(stage, model, batches, o.out, o, check)
        else:
            break


if __name__ == "__main__":
    main()
