"""From the recipe's weights to the packaged checkpoint: transformers' GlmMoeDsa format, tokenizer, model card.

    python recipes/tiny/pack.py --corpus work/tiny-corpus --train work/tiny-train --out indexcache/assets/tiny

Also checks, in fp32 on held-out text, that stock transformers computes what the recipe trained, and copies the
calibration and held-out text beside the checkpoint (../text).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from recipes.tiny.model import CONFIG, Tiny
from recipes.tiny.train import STAGES

LIMIT = 12_000_000  # bytes of safetensors


def save(train: Path, corpus: Path, out: Path) -> float:
    """Write the checkpoint; returns the relative difference of stock logits to the recipe's."""
    from tokenizers import Tokenizer
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    state = torch.load(train / "sparse.pt", map_location="cpu", weights_only=True)
    state = {
        k: (v if "weights_proj" in k or "correction" in k else v.bfloat16())
        for k, v in state.items()
    }
    config = GlmMoeDsaConfig(**CONFIG, architectures=["GlmMoeDsaForCausalLM"], dtype="bfloat16")
    stock = GlmMoeDsaForCausalLM(config)
    report = stock.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if report.unexpected_keys or set(report.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"transformers' model has other weights: {report}")
    stock.tie_weights()
    tiny = Tiny()
    tiny.load_state_dict({k: v.float() for k, v in state.items()})
    tokens = np.fromfile(corpus / "validation.u16", np.uint16)[:1024].astype(np.int64)
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        a, b = stock.eval()(ids).logits, tiny.eval()(ids, "plain")[0]
    stock.to(torch.bfloat16)
    for name, p in stock.named_parameters():
        if "weights_proj" in name:
            p.data = state[name].float()
    stock.save_pretrained(out)
    path = out / "config.json"
    kept = json.loads(path.read_text())
    for key in (
        "layer_types",
        "indexer_types",
    ):  # their values have other names in other versions; the defaults are the same
        kept.pop(key, None)
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
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
    if size > LIMIT:
        raise SystemExit(f"the safetensors have {size} bytes, more than {LIMIT}")
    return float((a - b).norm() / a.norm())


def curves(log: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, key) in zip(
        figure.subplots(1, 3),
        (("dense", "loss"), ("warmup", "kl"), ("sparse", "loss")),
        strict=True,
    ):
        rows = [r for r in log if r.get("stage") == stage and "step" in r]
        axes.plot([r["tokens"] / 1e6 for r in rows], [r[key] for r in rows], lw=0.8)
        axes.set_title(
            f"{stage}: {'KL of 12 indexers' if key == 'kl' else 'training loss'}", fontsize=9
        )
        axes.set_xlabel("million tokens")
        if key == "kl":
            axes.set_yscale("log")
    figure.savefig(path, metadata={"Software": None})


CARD = """---
license: apache-2.0
library_name: transformers
---
# tiny: a really trained DSA model of 5.7 M parameters

Made by `recipes/tiny/` for tests, examples and measurements of indexcache; it is no assistant. 12 layers (4 with a dense MLP, 8 MoE
with 8 experts, 4 of them a token), hidden 192, 6 heads, latent 64 + 16, lightning indexer with 16 heads of 32, index_topk 32, context
4096, byte-level BPE of 4096 ids. Stock transformers and the recipe's own code agree within {difference:.1e} (relative, logits, fp32,
1024 held-out tokens).

## Training

| stage | what | steps | tokens | training loss at the end | KL at the end (sum of 12 indexers) |
|---|---|---|---|---|---|
{stages}

The dense stage ends with its learning rate at a third of the peak; the sparse stage takes it down. Weights go from stage to stage in
bf16. All settings are the table `STAGES` in `recipes/tiny/train.py`; on one H100 the stages took about 5, 2.5 and 5.5 minutes,
compilation included.

![loss curves](curves.png)

## Held-out loss (nats per token, 32 sequences each of the recipe's validation documents)

| context | after stage | dense attention | sparse, all full | sparse, uniform 1/2 | sparse, uniform 1/4 |
|---|---|---|---|---|---|
{losses}

Sharing one layer alone, context 4096, loss minus all full: {one_shared}.

Share of the dense attention's mass that each layer's selection of 32 ids keeps, after the sparse stage:

| context | {layers} |
|---|{rule}
{kept}

Layer 0 attends broadly, so that 32 ids keep little of its mass; the sparse stage has trained the model to live with that.

## Corpus

One training sequence in five carries a synthetic retrieval task (copying, key-value recall, two-hop recall; `retrieval.py`).

| source | domain | licence | documents | MB |
|---|---|---|---|---|
{corpus}

Documents of the calibration and held-out text (`../text`) were never trained on: they are split off by a hash of their content.
"""
WHAT = {
    "dense": "dense pre-training",
    "warmup": "indexer warm-up: KL to the dense attention, all else frozen",
    "sparse": "sparse stage: all weights; KL over the selection for the indexers",
}


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def card(log: list[dict], corpus: Path, out: Path, difference: float) -> None:
    checks = {r["stage"]: r["check"] for r in log if r.get("done")}
    last = {r["stage"]: r for r in log if "step" in r}
    stages = []
    for stage, r in last.items():
        s = STAGES[stage]
        values = (f"{r[key]:.4f}" if r[key] else "" for key in ("loss", "kl"))
        stages.append(
            row(
                stage,
                WHAT[stage],
                s["steps"],
                f"{s['steps'] * s['batch'] * s['length'] / 1e6:.0f} M",
                *values,
            )
        )
    losses = []
    for stage, results in checks.items():
        for r in results:
            values = (
                f"{r[key]:.4f}" if key in r else ""
                for key in ("dense", "sparse", "uniform_1/2", "uniform_1/4")
            )
            losses.append(row(r["length"], stage, *values))
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    with open(corpus / "documents.jsonl", encoding="utf-8") as f:
        for d in map(json.loads, f):
            if d["split"] == "train":
                sizes[d["domain"], d["source"], d["licence"]][0] += 1
                sizes[d["domain"], d["source"], d["licence"]][1] += d["bytes"]
    final = checks["sparse"]
    layers = range(CONFIG["num_hidden_layers"])
    alone = zip(layers[1:], final[-1]["one_shared"], strict=True)
    text = CARD.format(
        difference=difference,
        stages="\n".join(stages),
        losses="\n".join(losses),
        one_shared=", ".join(f"layer {i} {x - final[-1]['sparse']:+.3f}" for i, x in alone),
        layers=" | ".join(f"layer {i}" for i in layers),
        rule="---|" * len(layers),
        kept="\n".join(row(r["length"], *(f"{x:.3f}" for x in r["attention_kept"])) for r in final),
        corpus="\n".join(
            row(s, d, lic, n, f"{b / 1e6:.1f}") for (d, s, lic), (n, b) in sorted(sizes.items())
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
    print(
        f"stock against recipe: {difference:.2e}; {sum(p.stat().st_size for p in o.out.iterdir()) / 1e6:.1f} MB in {o.out}"
    )


if __name__ == "__main__":
    main()
