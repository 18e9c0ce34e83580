"""Train low-rank adapters (LoRA, by the library peft) instead of all weights.

The adapters lie on the matrices of attention. MLPs get none, because peft maps their names to
experts in one tensor in these families, nor do routers, norms, embeddings and indexers. Afterwards
they are merged into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import DsaModule

TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""The matrices that get adapters, by the ends of their names."""
SCALE = 2
"""The product of an adapter's matrices counts so often: lora_alpha is SCALE times the rank."""
FOLDER = "adapter"
BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def check_peft() -> None:
    """Refuse where the library is missing.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--lora needs the library peft ({error}): pip install 'indexcache[lora]'."
        ) from None


def add_adapters(model: DsaModule, rank: int, seed: int) -> None:
    """Put adapters that change nothing yet into the model, in fp32, and freeze everything else."""
    from peft import inject_adapter_in_model

    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(rank), model)
    for name, p in model.named_parameters():
        p.requires_grad_(A in name or B in name)


def _config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules=list(TARGETS)
    )


def remove_adapters(model: DsaModule) -> None:
    """Put the layers that had adapters back, as they were."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "base_layer" in child._modules:
                setattr(module, name, child.base_layer)
    vars(model).pop("peft_config", None)


def merged(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge adapters into a state dict.

    Returns:
        All weights under their names in the checkpoint, and the adapters' own under peft's names.
    """
    plain: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    for name, value in weights.items():
        if A in name or B in name:
            adapters[f"base_model.model.{name.replace('.default.', '.')}"] = value
            continue
        plain_name = name.replace(BASE, ".")
        if name != plain_name and name.endswith(f"{BASE}weight"):
            stem = name.removesuffix(f"{BASE}weight")
            up, down = (weights[f"{stem}{part}weight"].double() for part in (B, A))
            value = (value.double() + SCALE * up @ down).to(value.dtype)
        plain[plain_name] = value
    return plain, adapters


def save_adapters(adapters: dict[str, Tensor], rank: int, folder: Path) -> None:
    """Write the adapters that `merged` returns into a folder that peft loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = _config(rank)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.save_pretrained(folder)
    contiguous = {name: value.contiguous() for name, value in adapters.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
