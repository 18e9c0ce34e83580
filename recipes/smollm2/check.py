"""Compare the rewritten checkpoint with the LlamaForCausalLM of the same weights.

    python -m recipes.smollm2.check work/smollm2/float32 --wheel FILE
        [--data work/smollm2/data/heldout.jsonl] [--documents 20] [--length 8192]
        [--device cuda] [--sparse]

The comparison covers logits, top-1 and the held-out perplexity of both models. It switches the
selection to dense: with k >= the length every token is selected, whatever the scores are. So every
difference comes from the rewriting. Both models run in stock transformers with SDPA, and the logits
are compared chunk by chunk. In fp32 the relative difference must stay below 1e-3 and the top-1
agreement above 99.8 %, or the exit status is 1. `--sparse` adds the loss with the checkpoint's own
k and indexers, on the fast path.
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
from torch import nn

from indexcache.cli import guarded
from indexcache.data import load_documents, make_batches, shipped_text
from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.lm import hidden_states, logit_chunks, token_losses
from indexcache.models.loading import load
from indexcache.models.patch import Patches
from recipes.smollm2.rewrite import load_llama

MAX_DIFFERENCE = 1e-3  # The relative difference of the logits must be smaller.
MIN_AGREEMENT = 0.998  # The share of equal top-1 must be larger.


def every_token(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Return what an indexer selects when k is the length: int32 [B, T, T]."""
    batch, length, _width = x.shape
    return torch.arange(length, dtype=torch.int32, device=x.device).expand(batch, length, length)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run the model with k >= the length, and skip the scores, which then decide nothing."""
    with Patches() as patches:
        for indexer in indexers(model):
            patches.replace(indexer, every_token)
        yield


@torch.no_grad()
def compare(llama: nn.Module, dsa: nn.Module, ids_BT: torch.Tensor) -> dict[str, float]:
    """Sum over all tokens of `ids_BT` that have a next one.

    Returns:
        "square" and "difference": squared norms of the logits and of their difference;
        "agree": number of tokens with the same top-1;
        "llama" and "dsa": negative log-likelihoods of both models, in nats;
        "tokens": number of tokens.
    """
    hidden_llama = hidden_states(llama, ids_BT)
    hidden_dsa = hidden_states(dsa, ids_BT)
    sums = dict.fromkeys(("square", "difference", "agree", "llama", "dsa", "tokens"), 0.0)
    chunks = zip(logit_chunks(llama, hidden_llama), logit_chunks(dsa, hidden_dsa), strict=True)
    for (at, (x,)), (_, (y,)) in chunks:
        target = ids_BT[:, at.start + 1 : at.stop + 1].to(x.device).flatten()
        sums["square"] += float(x.double().square().sum())
        sums["difference"] += float((x.double() - y.double()).square().sum())
        sums["agree"] += float((x.argmax(-1) == y.argmax(-1)).sum())
        sums["llama"] += float(F.cross_entropy(x.flatten(0, 1), target, reduction="sum"))
        sums["dsa"] += float(F.cross_entropy(y.flatten(0, 1), target, reduction="sum"))
        sums["tokens"] += target.numel()
    return sums


def row(name: str, sums: dict[str, float]) -> dict[str, object]:
    """Turn the sums of `compare` into means; "sparse" is the loss of the fast path where given."""
    tokens = sums["tokens"]
    means: dict[str, object] = {
        "document": name,
        "tokens": int(tokens),
        "relative": math.sqrt(sums["difference"] / sums["square"]),
        "agreement": sums["agree"] / tokens,
        "perplexity_llama": math.exp(sums["llama"] / tokens),
        "perplexity_dsa": math.exp(sums["dsa"] / tokens),
    }
    if "sparse" in sums:
        means |= {"loss_sparse": sums["sparse"] / tokens, "loss_dense": sums["dsa"] / tokens}
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="The folder that rewrite.py wrote.")
    parser.add_argument(
        "--wheel", type=Path, required=True, help="The wheel or GGUF file that was rewritten."
    )
    parser.add_argument("--data", type=Path, help="Held-out text; without it the package's own.")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="Both models are loaded in this dtype.",
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="Compute the loss with the checkpoint's own k and indexers too.",
    )
    o = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    llama, _, _, digest = load_llama(o.wheel, o.device)
    llama.to(getattr(torch, o.dtype))
    model = load(o.checkpoint, dtype=o.dtype, device=o.device)
    text = o.data or shipped_text("heldout")
    documents = load_documents(text, model.encode, model.config.vocab_size)
    total: dict[str, float] = {}
    for batch in make_batches(documents, length=o.length, sequences=o.documents):
        started = time.time()
        with dense(model.module):
            sums = compare(llama, model.module, batch.ids)
        if o.sparse:
            with accelerate(model.module), torch.no_grad():
                hidden = hidden_states(model.module, batch.ids)
            sums["sparse"] = float(token_losses(model.module, hidden, batch.ids).double().sum())
        total = {k: total.get(k, 0.0) + v for k, v in sums.items()}
        line = row(f"{batch.domain}: {batch.units[0]}", sums)
        print(json.dumps(line | {"seconds": round(time.time() - started, 1)}), flush=True)
    result = row("all", total) | {
        "documents": o.documents,
        "length": o.length,
        "dtype": o.dtype,
        "base_digest": digest,
    }
    if o.sparse:
        result["topk"] = model.topk
    print(json.dumps(result))
    passed = result["relative"] < MAX_DIFFERENCE and result["agreement"] > MIN_AGREEMENT
    if o.dtype == "float32" and not passed:
        print(
            f"The logits differ: their relative difference must be below {MAX_DIFFERENCE} and the "
            f"agreement above {MIN_AGREEMENT}.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
