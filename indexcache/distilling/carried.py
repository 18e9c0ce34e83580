"""Carry over what a checkpoint has beside the model that was trained: next-token layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from indexcache.checkpoint import INDEX_NAME, read_headers, read_index
from indexcache.configs import MTP_KEY, plain_name
from indexcache.models.loading import open_weights
from indexcache.records import write_json, writing

MTP_FILE = "model-mtp.safetensors"


def carry_over(facts: dict[str, Any], folder: Path) -> list[str]:
    """Add the multi-token-prediction (MTP) layers of a source to a checkpoint written from it.

    transformers neither loads nor saves them. They are copied with their bytes; those of a
    quantised source are dequantised to bf16, as the other weights are. Where the source lacks
    them, the config says that there are none.

    Args:
        facts: what `describe` says of the source.
        folder: the checkpoint that was written, which is changed.

    Returns:
        Sentences that say what was done.
    """
    weights = open_weights(facts)
    said = []
    if facts["quantization"] is not None:
        said.append(
            f"the source is stored in {facts['quantization'].method}; the checkpoint is "
            "dequantised, and its config has no quantization_config."
        )
    if facts["nested"]:
        said.append("the checkpoint is the language model alone, without the parts around it.")
    try:
        dtype = torch.bfloat16 if facts["quantization"] is not None else None
        tensors = {
            plain_name(name): weights.read(
                name, dtype=dtype if weights.is_quantised(name) else None
            ).contiguous()
            for name in weights.mtp
        }
    finally:
        weights.close()
    count = facts["mtp_layers"] if tensors else 0
    _set_count(folder / "config.json", count, keep=facts["mtp_layers"] == count)
    if not tensors:
        if facts["mtp_layers"]:
            said.append(
                f"the source has no multi-token-prediction layer, though its config says "
                f"{facts['mtp_layers']}; {MTP_KEY} is 0 in the checkpoint."
            )
        return said
    _add_file(folder, tensors)
    said.append(
        f"{len(tensors)} tensors of multi-token-prediction layers were carried over from the "
        "source; they were not trained."
    )
    return said


def _set_count(path: Path, count: int, *, keep: bool) -> None:
    """Write the number of MTP layers into a config, where it differs from what is there."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if keep and (config.get(MTP_KEY) or 0) == count:
        return
    config[MTP_KEY] = count
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _add_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors into a file of their own, and name them in the index."""
    headers = read_headers(folder)
    index = read_index(folder) or {"metadata": {}}
    with writing(folder):
        save_file(tensors, folder / MTP_FILE, metadata={"format": "pt"})
    stored = {name: shard for shard, header in headers.items() for name in header.tensors}
    size = sum(t.end - t.begin for header in headers.values() for t in header.tensors.values())
    size += sum(t.numel() * t.element_size() for t in tensors.values())
    metadata = dict(index.get("metadata") or {}) | {"total_size": size}
    metadata.pop("total_parameters", None)
    stored |= dict.fromkeys(tensors, MTP_FILE)
    write_json(
        folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(stored.items()))}
    )
