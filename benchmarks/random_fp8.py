"""Write a checkpoint of random weights in block-scaled FP8, layer by layer, of any size."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from indexcache.models.fp8 import scale_shape
from indexcache.models.weights import expert_parts

BLOCK = (128, 128)
KEPT = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "weights_proj", "bias")
STD = 0.02
POOL = 1 << 26  # random numbers of which all tensors are cut
NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_checkpoint(folder: Path, config: dict[str, Any], device: str = "cpu") -> int:
    """Write config.json and one file a layer; matrices have a standard deviation of 0.02.

    Args:
        folder: an empty folder.
        config: the content of a config.json.
        device: where the random numbers are made.

    Returns:
        The bytes written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quantised = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantised}), encoding="utf-8"
    )
    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        parts = expert_parts(name, tuple(tensor.shape)) or {name: tuple(tensor.shape)}
        place = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        groups.setdefault(place, {}).update(parts)
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(POOL, device=device, generator=generator)
    pools = {
        torch.float8_e4m3fn: normal.to(torch.float8_e4m3fn),
        torch.bfloat16: (normal * STD).bfloat16(),
        torch.float32: normal * STD,
    }
    raw = {kind: pool.view(torch.uint8).cpu().numpy() for kind, pool in pools.items()}
    weight_map: dict[str, str] = {}
    total = 0
    for place, names in groups.items():
        file = f"model-{place}.safetensors"
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, shape in names.items():
            fp8 = len(shape) == 2 and not any(part in name for part in KEPT)
            tensors[name] = (torch.float8_e4m3fn if fp8 else torch.bfloat16, shape)
            if fp8:
                tensors[f"{name}_scale_inv"] = torch.float32, scale_shape(shape, BLOCK)
        weight_map |= dict.fromkeys(tensors, file)
        total += _write(folder / file, tensors, raw)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write(path: Path, tensors: dict[str, Any], raw: dict[torch.dtype, Any]) -> int:
    """Write one safetensors file, and wait until it is on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        at = 0
        for name, (dtype, shape) in tensors.items():
            if name.endswith("_scale_inv"):
                file.write(torch.full(shape, STD).numpy().tobytes())
                continue
            if name.endswith("norm.weight"):
                ones = torch.ones(shape, dtype=dtype).view(torch.uint8)
                file.write(ones.numpy().tobytes())
                continue
            left = math.prod(shape) * dtype.itemsize
            pool = raw[dtype]
            at = (at + 64 * 1009) % (len(pool) // 2) // 64 * 64
            while left:
                part = pool[at : at + left]
                file.write(part.data)
                left -= len(part)
                at = 0
        file.flush()
        os.fsync(file.fileno())
    return end
