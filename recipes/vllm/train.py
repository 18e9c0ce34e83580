"""Train a small DSA model with the dimensions that vLLM's kernels need, in the time you name.

    python -m recipes.vllm.train --tokens train.u16.xz --held-out validation.npz
        --tokenizer tokenizer.json --out work/vllm --minutes 6

Indexer of 32 heads x 128, latent 512 + 64, k = 512, 8 dense layers. The text is uint16 ids of one
tokenizer, documents closed by id 0, and an .npz of held-out ids by domain. Half of all sequences
hold a retrieval task, so that layers differ in what their selections are worth. A dense stage takes
four fifths of the time, the warm-up of the indexers the rest; the learning rate follows the clock.

--out gets `model`, a checkpoint of transformers' GlmMoeDsa, and calibration.jsonl and
heldout.jsonl, the token ids of sequences that were not trained on. It needs one GPU.
`--device cpu --minutes 0.5 --small` goes through it on a CPU, without a useful result.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from recipes.tiny.model import Tiny
from recipes.tiny.retrieval import Retrieval
from recipes.tiny.train import Batches, loss_of, optimiser, schedule

CONFIG = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "index_topk": 512,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "index_topk": 64,
}
LENGTH = 4096
RETRIEVAL = 0.5  # share of the sequences with a retrieval task
SEQUENCES = 96  # of the calibration text, and as many held-out ones


def run(stage: str, model: Tiny, batches: Batches, o: argparse.Namespace, seconds: float) -> None:
    """Train one stage for a while: "dense" all weights, "warmup" the indexers alone."""
    dense = stage == "dense"
    count, micro = (o.batch, o.micro) if dense else (max(o.batch // 4, 1), max(o.micro // 8, 1))
    peak = 2e-3
    opt = optimiser(model, peak, indexer_only=not dense)
    trained = [p for group in opt.param_groups for p in group["params"]]
    model.train()
    step, started, log = 0, time.time(), 0.0
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batches, 0, count, o.length)
        while (spent := time.time() - started) < seconds:
            done = spent / seconds
            for group in opt.param_groups:
                group["lr"] = peak * schedule(round(done * 1000), 1000)
            ids = ahead.result().to(o.device)
            ahead = pool.submit(batches, step + 1, count, o.length)
            total = 0.0
            chunks = ids.split(micro)
            for chunk in chunks:
                with torch.autocast(ids.device.type, torch.bfloat16):
                    if dense:
                        loss, _ = loss_of(model, chunk, "dense")
                        (loss / len(chunks)).backward()
                    else:
                        loss, _ = model.warmup(chunk[:, :-1])
                total = total + loss.detach() / len(chunks)
            if not dense:
                for p in trained:
                    p.grad /= len(chunks)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            step += 1
            if time.time() - log > 10:
                log = time.time()
                row = {"stage": stage, "step": step, "s": round(log - started), "loss": 0.0}
                row["loss"] = round(float(total), 4)
                row["tokens"] = step * count * o.length
                print(json.dumps(row), flush=True)
                if not math.isfinite(row["loss"]):
                    raise SystemExit(f"{stage}: the loss is not finite at step {step}.")


def save(model: Tiny, o: argparse.Namespace) -> None:
    """Write the weights as a checkpoint that transformers and vLLM load, with its tokenizer."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    state = {name: w.detach().float().cpu() for name, w in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    config = dict(model.c) | {"tie_word_embeddings": False}
    stock = GlmMoeDsaForCausalLM(
        GlmMoeDsaConfig(**config, architectures=["GlmMoeDsaForCausalLM"], dtype="bfloat16")
    )
    report = stock.load_state_dict(state, strict=False)
    if report.unexpected_keys or report.missing_keys:
        raise SystemExit(f"transformers' model has other weights: {report}.")
    out = o.out / "model"
    stock.to(torch.bfloat16).save_pretrained(out)
    stored = json.loads((out / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types", "indexer_types"):
        stored.pop(key, None)  # Versions name their values differently.
    # vLLM reads these and does not know transformers' defaults of them.
    stored |= {
        "indexer_rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
    (out / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(o.tokenizer)), eos_token="<|endoftext|>"
    ).save_pretrained(out)


def write_texts(o: argparse.Namespace, task: Retrieval) -> None:
    """Write held-out sequences as token ids: every second one gets a retrieval task."""
    held_out = np.load(o.held_out)
    windows = []
    for name in sorted(held_out.files):
        ids = held_out[name].astype(np.int64)
        stops = np.append(np.flatnonzero(ids == 0), len(ids))
        starts = np.append(0, stops[:-1] + 1)
        for start, stop in zip(starts, stops, strict=True):
            pieces = (stop - start) // o.length
            windows += [(name, ids[start + i * o.length :][: o.length]) for i in range(pieces)]
    order = np.random.default_rng(7).permutation(len(windows))
    count = min(SEQUENCES, len(windows) // 2)
    for file, picked in (("calibration", order[:count]), ("heldout", order[count : 2 * count])):
        with open(o.out / f"{file}.jsonl", "w", encoding="utf-8") as f:
            for number, i in enumerate(picked):
                name, ids = windows[i]
                if number % 2:
                    ids = task(ids, np.random.default_rng([11, int(i)]))
                domain = "retrieval" if number % 2 else "text"
                f.write(json.dumps({"ids": ids.tolist(), "domain": domain, "id": f"{name}/{i}"}))
                f.write("\n")


@torch.no_grad()
def check(model: Tiny, o: argparse.Namespace) -> None:
    """Print the losses of dense attention and of single shared layers, by domain."""
    model.eval()
    rows = [json.loads(line) for line in (o.out / "heldout.jsonl").read_text().splitlines()]
    patterns = [None] + [
        "F" * i + "S" + "F" * (model.c["num_hidden_layers"] - i - 1)
        for i in range(1, model.c["num_hidden_layers"])
    ]
    for domain in ("text", "retrieval"):
        ids = torch.tensor([r["ids"] for r in rows if r["domain"] == domain][:4]).to(o.device)
        losses = {}
        with torch.autocast(ids.device.type, torch.bfloat16):
            losses["dense"] = float(loss_of(model, ids, "dense")[0])
            for pattern in patterns:
                each = [float(loss_of(model, one[None], "plain", pattern)[0]) for one in ids]
                losses[pattern or "sparse"] = float(np.mean(each))
        print(json.dumps({domain: {k: round(v, 4) for k, v in losses.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("tokens", "held-out", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--batch", type=int, default=16, help="Number of sequences in a step.")
    parser.add_argument("--micro", type=int, default=8, help="Number of sequences at once.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="Use a model for trying it out.")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = np.frombuffer(lzma.decompress(o.tokens.read_bytes()), np.uint16)
    task = Retrieval(Tokenizer.from_file(str(o.tokenizer)), CONFIG["vocab_size"])
    write_texts(o, task)
    model = Tiny(CONFIG | (SMALL if o.small else {})).to(o.device)
    if o.device != "cpu":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        Tiny.distil = staticmethod(torch.compile(Tiny.distil, dynamic=False))
        torch._dynamo.config.cache_size_limit = 64
    for number, (stage, share) in enumerate((("dense", 0.8), ("warmup", 0.2))):
        batches = Batches(tokens, task, RETRIEVAL, number)
        run(stage, model, batches, o, o.minutes * 60 * share)
    save(model, o)
    with torch.compiler.set_stance("force_eager"):
        check(model, o)


if __name__ == "__main__":
    main()
