"""Checkpoints to models, refusing everything that would give a wrong number later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from indexcache.checkpoint import layers_without_indexer, read_config, resolve, tensor_names
from indexcache.models.family import families
from indexcache.pattern import Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE_FILES = (
    1 << 30
)  # checkpoints up to this size enter the fingerprint whole, larger ones by samples


@dataclass(frozen=True)
class Loaded:
    """A model ready for evaluation, its tokenizer, the folder it came from, and the pattern its config asks for. The model
    itself is full in every layer that has indexer weights, whatever the config asks for."""

    model: nn.Module
    tokenizer: Any
    path: Path
    native: Pattern

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def topk(self) -> int:
        return self.model.config.index_topk  # type: ignore[union-attr, return-value]


def describe(model: str | Path) -> dict[str, Any]:
    """What a checkpoint is, from its config and file headers alone.

    Raises:
        ValueError: not a folder, no readable config, unknown family, no or broken safetensors.
    """
    path = resolve(model)
    config = read_config(path)
    model_type = config.get("model_type")
    if model_type not in families():
        raise ValueError(
            f"{path}: the model type {model_type!r} is not a DSA family that is known here "
            f"({', '.join(sorted(families()))})."
        )
    native = Pattern.from_config(config)
    names = tensor_names(path)
    missing = layers_without_indexer(path)
    wrong = [i for i in missing if native[i] != "S"]
    if wrong:
        raise ValueError(
            f"{path}: the config makes layer {wrong[0]} full, but the checkpoint has no indexer weights for it; "
            "transformers would fill them with random numbers."
        )
    keys = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_lora_rank",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "max_position_embeddings",
        "vocab_size",
    )
    return {
        "path": str(path),
        **{k: config.get(k) for k in keys},
        "tensors": len(names),
        "files": len(set(names.values())),
        "native_pattern": str(native),
        "layers_without_indexer": list(missing),
        "native_sharing": families()[model_type].native_sharing,
        "next_token_layers": config.get("num_nextn_predict_layers") or 0,
    }


def load_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a DSA checkpoint with stock transformers, from safetensors only, in eval mode.

    Args:
        model: checkpoint folder, or `tiny`.
        dtype: float32, bfloat16 or float16.
        device: a torch device, e.g. "cpu" or "cuda:0".
        trust_remote_code: run Python code that lies in the checkpoint (off by default).

    Raises:
        ValueError: what `describe` refuses; an unknown dtype or device; weights that the model needs and the
            checkpoint lacks; no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    facts = describe(model)
    path = Path(facts["path"])
    if dtype not in DTYPES:
        raise ValueError(f"The dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    check_device(device)
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if families()[facts["model_type"]].native_sharing:
            # a config that shares on a checkpoint that has all indexers is an override, not how the model was trained
            bare = set(facts["layers_without_indexer"])
            config.indexer_types = [
                "shared" if i in bare else "full" for i in range(facts["num_hidden_layers"])
            ]
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: transformers cannot load this checkpoint ({str(error).splitlines()[0]:.200})."
        ) from None
    loaded, report = found
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} weights are missing, among them {missing[0]}; transformers would fill them "
            "with random numbers."
        )
    loaded.to(device).eval()
    return Loaded(loaded, load_tokenizer(path), path, Pattern(facts["native_pattern"]))


def check_device(device: str) -> None:
    """Raises ValueError for a device that is none or cannot be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from None


def load_tokenizer(path: Path) -> Any:
    """Raises ValueError where the checkpoint has no tokenizer that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no tokenizer can be read there ({str(error).splitlines()[0]:.200})."
        ) from None


def fingerprint(path: Path) -> str:
    """A digest that changes with the config or the weights: config.json whole, and the weight files whole when they are
    1 GiB together at most, else the header and 64 blocks of 64 KiB of each (reading a large checkpoint takes longer than
    a search step)."""
    h = hashlib.sha256(json.dumps(read_config(path), sort_keys=True).encode())
    files = sorted(path.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in files) <= WHOLE_FILES
    for file in files:
        size = file.stat().st_size
        h.update(f"{file.name}|{size}|".encode())
        with open(file, "rb") as f:
            if whole:
                while block := f.read(1 << 24):
                    h.update(block)
            else:
                for i in range(64):
                    f.seek(i * max(size - (1 << 16), 0) // 63)
                    h.update(f.read(1 << 16))
    return h.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest of a loaded model: names, shapes and dtypes of all weights, 64 elements spread over each, and k."""
    h = hashlib.sha256(str(getattr(model.config, "index_topk", None)).encode())
    for name, p in model.state_dict().items():
        flat = p.detach().reshape(-1)
        picks = torch.linspace(
            0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64
        ).long()
        sample = flat[picks.to(flat.device)].float().cpu().numpy()
        h.update(f"{name}|{tuple(p.shape)}|{p.dtype}".encode() + sample.tobytes())
    return h.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the last bit of a result."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
