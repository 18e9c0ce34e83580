"""Write and read what a run trains: a small delta of the indexers, or a complete checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from indexcache.checkpoint import MODELOPT_NAME
from indexcache.delta import FORMAT
from indexcache.models.applied import apply_delta as apply_delta
from indexcache.models.applied import indexer_names
from indexcache.models.family import AnyModel, indexers, native_pattern
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern
from indexcache.records import atomic, writing
from indexcache.seen import Seen

COPIED = (".json", ".jinja", ".txt", ".model")
"""Suffixes of the files of a checkpoint that `save_checkpoint` copies."""


def save_delta(model: AnyModel, pattern: Pattern, path: Path, base: dict[str, str]) -> None:
    """Write the indexers of the pattern's F and R layers, atomically.

    They have their names in the checkpoint and the dtypes they have in `model`.

    Args:
        base: {"base": a name, "base_digest": `fingerprint` of the checkpoint they belong to}; both
            are kept as metadata beside "pattern" and "format".
    """
    tensors: dict[str, Tensor] = {}
    for layer, role in enumerate(pattern.roles):
        if role != "S":
            parameters = dict(indexers(model)[layer].named_parameters())
            for name, full_name in indexer_names(model, layer).items():
                tensors[full_name] = parameters[name].detach().cpu().contiguous()
    metadata = {"format": FORMAT, "pattern": str(pattern), **base}
    with atomic(path) as temporary:
        temporary.write_bytes(with_sorted_metadata(save(tensors, metadata=metadata)))


def with_sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file whose metadata is in the order of its names.

    The library writes it in another order each time, so equal contents would have different bytes.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    entries["__metadata__"] = dict(sorted(entries.get("__metadata__", {}).items()))
    # The names of tensors stay in the library's order, which depends on dtypes and names alone.
    header = json.dumps({"__metadata__": entries.pop("__metadata__"), **entries})
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + content[start:]


def save_checkpoint(
    model: Any, weights: dict[str, Tensor], folder: Path, source: Path, seen: Seen = Seen()
) -> None:
    """Write a complete checkpoint.

    Args:
        weights: the state dict, under the names that the model has.
        folder: the checkpoint to write.
        source: the checkpoint that the model was loaded from; its tokenizer and the like are
            copied.
        seen: the text that the weights were trained on, which the config carries along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        model.save_pretrained(folder, state_dict=weights)
    for path in source.iterdir():
        left_out = path.name == MODELOPT_NAME or path.name.endswith(".index.json")
        copied = path.suffix in COPIED and not left_out
        if path.is_file() and copied and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers 5.17 and 5.23 name the same layer type differently; both derive it.
    for key in ("layer_types", *SHARING_KEYS):
        config.pop(key, None)
    if "S" in (native := native_pattern(model)).roles:  # Those layers have no indexer to write.
        config |= native.to_config()
    config |= seen.to_config()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
