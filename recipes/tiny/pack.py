"""Pack the trained weights as the packaged checkpoint, with tokenizer and model card.

    python -m recipes.tiny.pack --corpus work/tiny-corpus --train work/tiny-train
        --out indexcache/assets/tiny

The checkpoint has the format of transformers' GlmMoeDsa. The script also compares stock
transformers with the recipe's model, in fp32 on held-out text, and copies the calibration and
held-out text to ../text beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from recipes.tiny.model import CONFIG, Tiny
from recipes.tiny.train import STAGES

MAX_SIZE = 12_000_000  # bytes of the safetensors


def save(train: Path, corpus: Path, out: Path) -> float:
    """Write the checkpoint, and return the relative difference of stock logits to the recipe's."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    state = torch.load(train / "sparse.pt", map_location="cpu", weights_only=True)
    state = {
        name: w if "weights_proj" in name or "correction" in name else w.bfloat16()
        for name, w in state.items()
    }
    config = GlmMoeDsaConfig(**CONFIG, architectures=["GlmMoeDsaForCausalLM"], dtype="bfloat16")
    stock = GlmMoeDsaForCausalLM(config)
    report = stock.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if report.unexpected_keys or set(report.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"transformers' model has other weights: {report}.")
    stock.tie_weights()
    tiny = Tiny()
    tiny.load_state_dict({k: v.float() for k, v in state.items()})
    tokens = np.fromfile(corpus / "validation.u16", np.uint16)[:1024].astype(np.int64)
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        stock_logits = stock.eval()(ids).logits
        logits = tiny.eval()(ids, "plain")[0]
    stock.to(torch.bfloat16)
    for name, p in stock.named_parameters():
        if "weights_proj" in name:
            p.data = state[name].float()
    stock.save_pretrained(out)
    path = out / "config.json"
    stored = json.loads(path.read_text())
    # Other versions name the values of these two differently, and their defaults are the same.
    for key in ("layer_types", "indexer_types"):
        stored.pop(key, None)
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "generation_config.json").unlink(missing_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(corpus / "tokenizer.json")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONFIG["max_position_embeddings"],
    )
    fast.save_pretrained(out)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    if size > MAX_SIZE:
        raise SystemExit(f"The safetensors have {size} bytes, more than {MAX_SIZE}.")
    return float((stock_logits - logits).norm() / stock_logits.norm())


def curves(log: list[dict], path: Path) -> None:
    """Draw the training curves of the three stages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    stages = {"dense": "loss", "warmup": "kl", "sparse": "loss"}
    for axes, (stage, key) in zip(figure.subplots(1, 3), stages.items(), strict=True):
        rows = [r for r in log if r.get("stage") == stage and "step" in r]
        axes.plot([r["tokens"] / 1e6 for r in rows], [r[key] for r in rows], lw=0.8)
        curve = "KL of 12 indexers" if key == "kl" else "training loss"
        axes.set_title(f"{stage}: {curve}", fontsize=9)
        axes.set_xlabel("million tokens")
        if key == "kl":
            axes.set_yscale("log")
    figure.savefig(path, metadata={"Software": None})


CARD = """---
license: apache-2.0
library_name: transformers
---
# tiny: a really trained DSA model of 5.7 M parameters

`recipes/tiny/` made this model for tests, examples and measurements of indexcache; it
is no assistant. It has 12 layers (4 with a dense MLP, 8 MoE layers with 8 experts, 4 of
them for a token), hidden size 192, 6 heads, a latent of 64 + 16, a lightning indexer
with 16 heads of 32, index_topk 32, context 4096 and a byte-level BPE of 4096 ids. Stock
transformers and the recipe's own code agree within {difference:.1e} (relative, logits, fp32,
1024 held-out tokens).

## Training

| stage | what it trains | steps | tokens | last training loss | last KL (sum of 12 indexers) |
|---|---|---|---|---|---|
{stages}

The dense stage ends with its learning rate at a third of the peak, and the sparse stage
lowers it further. Weights go from stage to stage in bf16. The table `STAGES` in
`recipes/tiny/train.py` has all settings. On one H100 the stages took about 5, 2.5 and
5.5 minutes with compilation.

![loss curves](curves.png)

## Held-out loss

The losses are in nats per token, on 32 sequences of the recipe's validation documents.
The last three columns have sparse attention.

| context | after stage | dense attention | all full | uniform 1/2 | uniform 1/4 |
|---|---|---|---|---|---|
{losses}

Loss above all full where one layer alone shares, at context 4096:

{one_shared}

Share of the dense attention that each layer's selection of 32 ids keeps, after the
sparse stage:

| context | {layers} |
|---|{rule}
{kept}

Layer 0 attends broadly, so 32 ids keep little of its attention. The sparse stage has
trained the model to work with that.

What R (re-index) layers lose depends on the share of the context that their pool is.
With 3 of 12 layers full (`FFSSSSSSSFSS`), on 36 sequences of 1,024 tokens of the
shipped held-out text when it had 24 documents a domain, loss above all full:

| S | R, pool 1/16 of the context | R, pool 1/8 | R, pool 1/4 | R, pool 1/2 |
|---|---|---|---|---|
| +0.289 | +0.191 | +0.118 | +0.058 | +0.013 |

Figures at a quarter or half flatter R: at 200K tokens a pool of 8 k, k = 2,048, is 8 %.

## Corpus

One training sequence in five has a synthetic retrieval task: copying, key-value recall
or two-hop recall (`retrieval.py`).

| source | domain | licence | documents | MB |
|---|---|---|---|---|
{corpus}

Documents of the calibration and held-out text (`../text`) are no training text: a hash
of their content splits them off.
"""
TRAINS = {
    "dense": "all weights, with dense attention",
    "warmup": "the indexers, on the KL to the dense attention",
    "sparse": "all weights; the indexers on the KL over their selection",
}


def row(*cells: object) -> str:
    """Format a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def card(log: list[dict], corpus: Path, out: Path, difference: float) -> None:
    """Write the model card.

    Args:
        log: the lines of the trainer's log.
        difference: the relative difference of stock logits to the recipe's.
    """
    checks = {r["stage"]: r["check"] for r in log if r.get("done")}
    last = {r["stage"]: r for r in log if "step" in r}
    stages = []
    for stage, r in last.items():
        s = STAGES[stage]
        tokens = s["steps"] * s["batch"] * s["length"]
        values = (f"{r[key]:.4f}" if r[key] else "" for key in ("loss", "kl"))
        stages.append(row(stage, TRAINS[stage], s["steps"], f"{tokens / 1e6:.0f} M", *values))
    keys = ("dense", "sparse", "uniform_1/2", "uniform_1/4")
    losses = [
        row(r["length"], stage, *(f"{r[key]:.4f}" if key in r else "" for key in keys))
        for stage, results in checks.items()
        for r in results
    ]
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    with open(corpus / "documents.jsonl", encoding="utf-8") as f:
        for d in map(json.loads, f):
            if d["split"] == "train":
                size = sizes[d["domain"], d["source"], d["licence"]]
                size[0] += 1
                size[1] += d["bytes"]
    final = checks["sparse"]
    layers = range(CONFIG["num_hidden_layers"])
    costs = [loss - final[-1]["sparse"] for loss in final[-1]["one_shared"]]
    one_shared = [
        row("layer", *layers[1:]),
        "---".join("|" * (len(layers) + 1)),
        row("loss", *(f"{cost:+.3f}" for cost in costs)),
    ]
    text = CARD.format(
        difference=difference,
        stages="\n".join(stages),
        losses="\n".join(losses),
        one_shared="\n".join(one_shared),
        layers=" | ".join(f"layer {i}" for i in layers),
        rule="---|" * len(layers),
        kept="\n".join(row(r["length"], *(f"{x:.3f}" for x in r["attention_kept"])) for r in final),
        corpus="\n".join(
            row(source, domain, licence, number, f"{size / 1e6:.1f}")
            for (domain, source, licence), (number, size) in sorted(sizes.items())
        ),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("corpus", "train", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    o = parser.parse_args()
    if o.out.exists():
        shutil.rmtree(o.out)
    o.out.mkdir(parents=True)
    difference = save(o.train, o.corpus, o.out)
    log = [json.loads(line) for line in open(o.train / "log.jsonl", encoding="utf-8")]
    curves(log, o.out / "curves.png")
    card(log, o.corpus, o.out, difference)
    text = o.out.parent / "text"
    text.mkdir(exist_ok=True)
    for split in ("calibration", "heldout"):
        shutil.copy(o.corpus / f"{split}.jsonl", text / f"{split}.jsonl")
    size = sum(p.stat().st_size for p in o.out.iterdir())
    print(f"{o.out}: {size / 1e6:.1f} MB; stock and recipe differ by {difference:.2e}")


if __name__ == "__main__":
    main()
