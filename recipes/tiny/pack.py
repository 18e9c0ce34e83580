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
from model import CONFIG, Tiny

LIMIT = 12_000_000  # bytes of safetensors


def save(train: Path, corpus: Path, out: Path) -> float:
    """Write the checkpoint; returns the relative difference of stock logits to the recipe's."""
    from tokenizers import Tokenizer
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    state = torch.load(train / "sparse.pt", map_location="cpu", weights_only=True)
    state = {k: (v if "weights_proj" in k or "correction" in k else v.bfloat16()) for k, v in state.items()}
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
    for key in ("layer_types", "indexer_types"):  # their values have other names in other versions; the defaults are the same
        kept.pop(key, None)
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    (out / "generation_config.json").unlink(missing_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(corpus / "tokenizer.json")), bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        model_max_length=CONFIG["max_position_embeddings"],
    )  # fmt: skip
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
    for axes, (stage, key) in zip(figure.subplots(1, 3), (("dense", "loss"), ("warmup", "kl"), ("sparse", "loss")), strict=True):
        rows = [r for r in log if r.get("stage") == stage and "step" in r]
        axes.plot([r["tokens"] / 1e6 for r in rows], [r[key] for r in rows], lw=0.8)
        axes.set_title(f"{stage}: {'KL of 12 indexers' if key == 'kl' else 'training loss'}", fontsize=9)
        axes.set_xlabel("million tokens")
        if key == "kl":
            axes.set_yscale("log")
    figure.savefig(path, metadata={"Software": None})


def card(log: list[dict], corpus: Path, out: Path, difference: float) -> None:
    checks = {r["stage"]: r["check"] for r in log if r.get("done")}
    last = {}
    for r in log:
        if "step" in r:
            last[r["stage"]] = r
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for line in open(corpus / "documents.jsonl", encoding="utf-8"):
        d = json.loads(line)
        if d["split"] == "train":
            sizes[d["source"], d["domain"], d["licence"]][0] += 1
            sizes[d["source"], d["domain"], d["licence"]][1] += d["bytes"]
    final = checks["sparse"]
    lines = [
        "---", "license: apache-2.0", "library_name: transformers", "---", "# tiny: a really trained DSA model of 5.7 M parameters", "",
        "Made by `recipes/tiny/` for tests, examples and measurements of indexcache; it is no assistant. 12 layers (4 dense MLP, 8 MoE with",
        "8 experts), hidden 192, 6 heads, latent 64 + 16, lightning indexer with 16 heads of 32, index_topk 32, context 4096, BPE of 4096 ids.", "",
        f"Stock transformers and the recipe's own code agree within {difference:.1e} (relative, logits, fp32, 1024 held-out tokens).", "",
        "## Training", "", "| stage | what | steps | tokens | last training loss | last KL (sum of 12 indexers) |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    what = {"dense": "dense pre-training", "warmup": "indexer warm-up: KL to the dense attention, all else frozen",
            "sparse": "sparse stage: all weights; KL over the selection for the indexers"}  # fmt: skip
    for stage, r in last.items():
        lines.append(f"| {stage} | {what[stage]} | {r['steps']} | {r['tokens'] / 1e6:.0f} M | "
                     f"{r['loss']:.4f} | {r['kl']:.4f} |")  # fmt: skip
    lines += ["", "![loss curves](curves.png)", "", "## Held-out text (32 sequences each, the recipe's validation documents)", "",
              "| context | after | dense loss | sparse loss | uniform 1/2 | uniform 1/4 |", "|---|---|---|---|---|---|"]  # fmt: skip
    for stage, results in checks.items():
        for r in results:
            cells = [f"{r[k]:.4f}" if k in r else "" for k in ("dense", "sparse", "uniform_1/2", "uniform_1/4")]
            lines.append(f"| {r['length']} | {stage} | " + " | ".join(cells) + " |")
    lines += ["", "Share of the dense attention's mass that each layer's selection (32 ids) keeps, after the sparse stage:", "",
              "| context | " + " | ".join(f"layer {i}" for i in range(12)) + " |", "|---" * 13 + "|"]  # fmt: skip
    lines += [f"| {r['length']} | " + " | ".join(f"{x:.3f}" for x in r["attention_kept"]) + " |" for r in final]
    lines += ["", "Loss when one layer alone is shared (context 4096 minus all full): "
              + ", ".join(f"{i + 1}: {x - final[-1]['sparse']:+.4f}" for i, x in enumerate(final[-1]["one_shared"])) + ".",
              "", "## Corpus", "", "20 % of the training sequences carry a synthetic retrieval task (copying, key-value recall, two-hop recall; `retrieval.py`).", "",
              "| source | domain | licence | documents | MB |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {s} | {d} | {lic} | {n} | {b / 1e6:.1f} |" for (s, d, lic), (n, b) in sorted(sizes.items(), key=lambda x: x[0][1])]
    lines += ["", "Documents of the calibration and held-out text (`../text`) were never trained on (split by a hash of the content).", ""]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


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
    print(f"stock against recipe: {difference:.2e}; {sum(p.stat().st_size for p in o.out.iterdir()) / 1e6:.1f} MB in {o.out}")


if __name__ == "__main__":
    main()
