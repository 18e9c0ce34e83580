"""Make small checkpoints on disk, copies that a test may damage, and readers of both."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

LAYERS = 6
PATTERN = "FSSFSF"  # No frequency gives it.
UNIFORM = ("FSFSFS", "FFSFSF", "FFSSSF", "FSSSSS", "FFFFFF")
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "max_position_embeddings": 128,
    "first_k_dense_replace": 1,
}


def _save(folder: Path, family: str, **save: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    # The stock initialisation leaves logits so small that layers hardly differ.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    model.save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free\n")
    (folder / "pytorch_model.bin").write_text("stale")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    (folder / ".cache").write_text("hidden")
    return folder


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("glm") / "base", "GlmMoeDsa")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("sharded") / "base", "GlmMoeDsa", max_shard_size="30KB")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("deepseek") / "base", "DeepseekV32")


@pytest.fixture
def broken(glm_folder, tmp_path) -> Path:
    """Copy the checkpoint, so that a test may damage it."""
    return Path(shutil.copytree(glm_folder, tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    return folder


def packed(header: Any, data: bytes = b"") -> bytes:
    """Make the bytes of a safetensors file with this header."""
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        call()
    message = str(caught.value)
    assert message.endswith("."), message
    for word in words:
        assert word in message, message


def load(folder: Path, **config: Any):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **config
    )
    return model.eval(), info


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(0, TINY["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(1))
    return model(ids).logits
