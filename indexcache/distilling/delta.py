"""What a run leaves: the trained indexers as a small delta, or the whole checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from indexcache.distilling.indexers import indexer_names
from indexcache.models.family import indexers
from indexcache.models.loading import fingerprint
from indexcache.pattern import Pattern
from indexcache.records import atomic, writing

FORMAT = "indexcache-delta-1"


def save_delta(model: nn.Module, pattern: Pattern, path: Path, base: dict[str, str]) -> None:
    """The indexers of the pattern's F and R layers, under their names in the checkpoint and in the dtypes they have in `model`.

    Args:
        base: {"base": a name, "base_digest": `fingerprint` of the checkpoint they belong to}; strings, both kept as metadata
            beside {"pattern", "format"}.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, role in enumerate(pattern.roles):
        if role != "S":
            parts = dict(indexers(model)[layer].named_parameters())
            tensors |= {
                full: parts[name].detach().cpu().contiguous()
                for name, full in indexer_names(model, layer).items()
            }
    with atomic(path) as temporary:
        temporary.write_bytes(
            save(tensors, metadata={"format": FORMAT, "pattern": str(pattern), **base})
        )


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | Path, *, base: str | Path | None = None) -> Pattern:
    """Put the indexers of a delta into a loaded model, in the dtype its own have; the pattern they were trained for.

    Args:
        base: the folder the model was loaded from; when given, it must be the checkpoint that the delta belongs to.

    Raises:
        ValueError: no such delta, another base, tensors that are not the indexers of the pattern's F and R layers in this model, or
            values that are not finite. Nothing is changed then.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: the delta cannot be read ({' '.join(str(error).split())})."
        ) from None
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    if (
        base is not None
        and (digest := metadata.get("base_digest"))
        and digest != fingerprint(Path(base))
    ):
        raise ValueError(
            f"{path}: the delta belongs to another checkpoint ({metadata.get('base')}) than {base}."
        )
    pattern = Pattern(metadata["pattern"])
    if len(pattern) != len(indexers(model)):
        raise ValueError(
            f"{path}: the delta is for {len(pattern)} layers, the model has {len(indexers(model))}."
        )
    targets: dict[str, Any] = {}
    for layer, indexer in enumerate(indexers(model)):
        if indexer is not None:
            parts = dict(indexer.named_parameters())
            targets |= {full: parts[name] for name, full in indexer_names(model, layer).items()}
    for name, value in tensors.items():
        if name not in targets or targets[name].shape != value.shape:
            raise ValueError(
                f"{path}: the tensor {name:.120} has no place in this model's indexers (shape {tuple(value.shape)})."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: the tensor {name:.120} has values that are not finite.")
    kept = {i for i, role in enumerate(pattern.roles) if role != "S"}
    found = {
        i
        for i in kept
        if indexers(model)[i] is not None and set(indexer_names(model, i).values()) <= set(tensors)
    }
    if found != kept:
        raise ValueError(
            f"{path}: the delta is for {pattern}, but has no whole indexer of this model's layer {min(kept - found)}."
        )
    for name, value in tensors.items():
        targets[name].copy_(value)
    return pattern


def save_whole(model: Any, weights: dict[str, Any], folder: Path, source: Path) -> None:
    """A complete checkpoint: `weights` under the names of the checkpoint it came from, tokenizer and the like from `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        model.save_pretrained(folder, state_dict=weights)
    for path in source.iterdir():
        kind = path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(
            ".index.json"
        )
        if path.is_file() and kind and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop(
        "layer_types", None
    )  # 5.17 and 5.23 of transformers name the same type differently; both derive it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
