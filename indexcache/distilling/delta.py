"""Write and read what a run trains: a small delta of the indexers, or a complete checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from indexcache.checkpoint import MODELOPT_NAME
from indexcache.distilling.indexers import indexer_names
from indexcache.models.family import AnyModel, indexers, native_pattern
from indexcache.models.loading import fingerprint
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern
from indexcache.records import atomic, writing
from indexcache.seen import Seen

FORMAT = "indexcache-delta-1"
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


@torch.no_grad()
def apply_delta(model: AnyModel, path: str | Path, *, base: str | Path | None = None) -> Pattern:
    """Put the indexers of a delta into a loaded model, in the dtype its own indexers have.

    Args:
        base: the folder the model was loaded from; if given, it must be the checkpoint that the
            delta belongs to.

    Returns:
        The pattern that the indexers were trained for, with the text they were trained on.

    Raises:
        ValueError: there is no such delta, it has another base, its tensors are not the indexers
            of the pattern's F and R layers in this model, or values are not finite. Nothing is
            changed then.
    """
    path = Path(path)
    tensors, metadata = _read_delta(path)
    digest = metadata.get("base_digest")
    if base is not None and digest and digest != fingerprint(Path(base)):
        raise ValueError(
            f"{path}: the delta belongs to another checkpoint ({metadata.get('base')}) than {base}."
        )
    pattern = Pattern(metadata["pattern"])
    layers = indexers(model)
    if len(pattern) != len(layers):
        raise ValueError(
            f"{path}: the delta is for {len(pattern)} layers, the model has {len(layers)}."
        )
    targets: dict[str, Tensor] = {}
    complete: set[int] = set()
    for layer, indexer in enumerate(layers):
        if indexer is not None:
            parameters = dict(indexer.named_parameters())
            names = indexer_names(model, layer)
            targets |= {full_name: parameters[name] for name, full_name in names.items()}
            if set(names.values()) <= set(tensors):
                complete.add(layer)
    for name, value in tensors.items():
        if name not in targets or targets[name].shape != value.shape:
            raise ValueError(
                f"{path}: the tensor {name:.120} has no place in this model's indexers (shape "
                f"{tuple(value.shape)})."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: the tensor {name:.120} has values that are not finite.")
    incomplete = {i for i, role in enumerate(pattern.roles) if role != "S"} - complete
    if incomplete:
        raise ValueError(
            f"{path}: the delta is for {pattern}, but has no whole indexer of this model's layer "
            f"{min(incomplete)}."
        )
    for name, value in tensors.items():
        targets[name].copy_(value)
    return pattern.chosen_on(Seen.from_metadata(metadata))


def _read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a delta and its metadata."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: the delta cannot be read ({reason}).") from None
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    return tensors, metadata


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
