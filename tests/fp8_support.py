"""Write small checkpoints in block-scaled FP8, as the official ones are, and read them otherwise.

The reader is numpy alone: bytes from a table of the 256 values of e4m3, block by block.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support import make_model

BLOCK = 128
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
# The latent has 512 + 64 rows in kv_a_proj_with_mqa, and kv_b_proj 3 heads of 32 + 32: 192 rows.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 136,
    "index_head_dim": 64,
    "moe_intermediate_size": 160,
}
KEPT = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "weights_proj", "bias", "eh_proj")
LABEL = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}


def is_quantised(name: str) -> bool:
    return not any(part in name for part in KEPT)


def write_fp8(
    folder: Path, family: str, *, files: int = 3, block: int = BLOCK, **changes: Any
) -> Path:
    """Write a random model in FP8 with a next-token layer, in several files, and a tokenizer."""
    make_model(family, **(SIZES | changes)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    layers = (SIZES | changes)["num_hidden_layers"]
    last = f"layers.{layers - 1}."
    weights |= {
        n.replace(last, f"layers.{layers}."): w.clone() for n, w in weights.items() if last in n
    }
    width = (SIZES | changes)["hidden_size"]
    weights[f"model.layers.{layers}.eh_proj.weight"] = torch.randn(width, 2 * width)
    weights[f"model.layers.{layers}.enorm.weight"] = torch.ones(width)
    stored: dict[str, torch.Tensor] = {}
    for name, w in weights.items():
        if is_quantised(name) and w.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"] = quantise(w, block)
        else:
            stored[name] = w.bfloat16()
    save_sharded(folder, stored, files)
    edit_config(
        folder,
        quantization_config=FP8 | {"weight_block_size": [block, block]},
        num_nextn_predict_layers=1,
    )
    write_tokenizer(folder)
    return folder


def quantise(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix in blocks, each in a loop of its own."""
    rows, columns = w.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            span = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = w[span].abs().max() / 448
            out[span] = (w[span] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    """Spread tensors over files so that weights and their scales lie in different ones."""
    where = {}
    for i in range(files):
        part = sorted(tensors)[i::files]
        shard = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each ASCII character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(LABEL))


def read_raw(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Read every tensor of a folder as (dtype, shape, bytes), without the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + x for x in entry["data_offsets"])
            found[name] = (entry["dtype"], entry["shape"], content[begin:end])
    return found


def e4m3_table() -> np.ndarray:
    """Return the value of every byte in e4m3: 4 bits of exponent, 3 of mantissa, no infinities."""
    values = []
    for byte in range(256):
        sign = -1.0 if byte & 0x80 else 1.0
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        if exponent == 15 and mantissa == 7:
            values.append(np.nan)
        elif exponent == 0:
            values.append(sign * mantissa / 8 * 2.0**-6)
        else:
            values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values, dtype=np.float32)


def read_otherwise(folder: Path, block: int = BLOCK) -> dict[str, np.ndarray]:
    """Read a checkpoint into fp32 arrays; FP8 weights times the scale of each block."""
    raw, table, out = read_raw(folder), e4m3_table(), {}
    for name, (dtype, shape, content) in raw.items():
        if name.endswith("_scale_inv"):
            continue
        if dtype == "BF16":
            bits = np.frombuffer(content, "<u2").astype(np.uint32) << 16
            out[name] = bits.view(np.float32).reshape(shape)
            continue
        assert dtype == "F8_E4M3"
        value = table[np.frombuffer(content, np.uint8)].reshape(shape)
        scale_dtype, scale_shape, scale_bytes = raw[f"{name}_scale_inv"]
        if scale_dtype == "F8_E8M0":
            scale = 2.0 ** (np.frombuffer(scale_bytes, np.uint8).astype(np.float32) - 127)
        else:
            scale = np.frombuffer(scale_bytes, "<f4")
        scale = scale.reshape(scale_shape)
        for row in range(shape[0]):
            for j in range(scale.shape[1]):
                value[row, j * block : (j + 1) * block] *= scale[row // block, j]
        out[name] = value
    return out
