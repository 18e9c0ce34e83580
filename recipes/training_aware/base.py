"""Train the base that all arms start from: a dense stage, then the warm-up of all indexers.

The model is that of recipes/tiny with another vocabulary and, unless --dense-layers says otherwise,
dense MLPs in all layers. Its trainer is used as it is, so a stage that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from indexcache.records import atomic_folder
from recipes.tiny import train
from recipes.tiny.model import CONFIG, Tiny

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
}
"""What --small changes, to try the recipe out."""


def config_of(o: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Return the config of the model."""
    config = CONFIG | (SMALL if o.small else {}) | {"vocab_size": vocabulary}
    return config | {"first_k_dense_replace": min(o.dense_layers, config["num_hidden_layers"])}


def train_base(o: argparse.Namespace, config: dict[str, Any], windows: Any, held_out: Any) -> None:
    """Write `o.out / "base"`, a checkpoint of transformers' GlmMoeDsa, unless it is there.

    Args:
        config: of `config_of`.
        windows: `text.Windows`.
        held_out: token ids, uint16, whose loss is logged after each stage.
    """
    folder = o.out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Tiny(config).to(o.device)
    compiled = torch.device(o.device).type == "cuda"
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        Tiny.distil = staticmethod(torch.compile(Tiny.distil, dynamic=False))
        torch._dynamo.config.cache_size_limit = 64
    # The rate of the dense stage ends at a third of its peak, because the arms go on from there.
    stages = {
        "dense": {"steps": o.dense_steps, "schedule": o.dense_steps * 3 // 2, "lr": 4e-3},
        "warmup": {"steps": o.warmup_steps, "lr": 3e-3},
    }
    for number, (stage, settings) in enumerate(stages.items()):
        settings |= {"batch": o.dense_batch if stage == "dense" else max(o.dense_batch // 2, 1)}
        settings |= {"length": o.length if stage == "dense" else o.length // 2}
        settings |= {"micro": settings["batch"] if stage == "dense" else 8}
        file = folder / f"{stage}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, map_location=o.device, weights_only=True))
            continue

        def check(m: Tiny, stage: str = stage) -> dict[str, Any]:
            # Each of many shapes is used a few times, which is not worth a compilation.
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                return train.validate(m, held_out, o.device, stage, o.length)

        train.train(stage, model, windows.batches(number), folder, o, check, settings)
    save(model, o.out / "base", o.tokenizer)


def save(model: Tiny, out: Path, tokenizer: Path) -> None:
    """Write the weights as a checkpoint in bf16, with the tokenizer."""
    from tokenizers import Tokenizer
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    config = GlmMoeDsaConfig(**model.c, architectures=["GlmMoeDsaForCausalLM"], dtype="bfloat16")
    stock = GlmMoeDsaForCausalLM(config)
    state = {name: w.detach().float().cpu() for name, w in model.state_dict().items()}
    report = stock.load_state_dict(state, strict=False)
    if report.unexpected_keys or set(report.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"transformers' model has other weights: {report}.")
    stock.tie_weights()
    with atomic_folder(out) as temporary:
        stock.to(torch.bfloat16).save_pretrained(temporary)
        path = temporary / "config.json"
        stored = json.loads(path.read_text())
        for key in ("layer_types", "mlp_layer_types", "indexer_types"):
            stored.pop(key, None)  # Versions name their values differently.
        path.write_text(json.dumps(stored, indent=2) + "\n")
        (temporary / "generation_config.json").unlink(missing_ok=True)
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(tokenizer)), eos_token="<|endoftext|>"
        ).save_pretrained(temporary)
