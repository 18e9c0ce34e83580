"""Describe a checkpoint before it is loaded, from its config and its file headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from indexcache.checkpoint import (
    config_facts,
    layers_without_indexer,
    read_config,
    resolve,
    resolve_config,
    tensor_names,
)
from indexcache.configs import model_type_of, text_section
from indexcache.models.family import family_named
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern

SIZES = (
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


def describe(model: str | Path) -> dict[str, Any]:
    """Describe a checkpoint from its config and its file headers alone.

    The facts of `describe_config` are among the result's, and no verb reads a config otherwise.

    Raises:
        ValueError: it is no folder, its config or its safetensors cannot be read, its family is
            unknown, or the config makes a layer full that has no indexer weights.
    """
    path = resolve(model)
    facts = describe_config(path)
    native = Pattern(facts["native_pattern"])
    names = tensor_names(path)
    missing = layers_without_indexer(path)
    if len(missing) == len(native):
        raise ValueError(
            f"{path}: the checkpoint has no indexer weights in any layer, so it is a dense model: "
            "there is no selection to share, and indexers cannot be trained from nothing here."
        )
    contradicted = [i for i in missing if native[i] != "S"]
    if contradicted:
        raise ValueError(
            f"{path}: the config makes layer {contradicted[0]} full, but the checkpoint has no "
            "indexer weights for it; transformers would fill them with random numbers."
        )
    return facts | {
        "tensors": len(names),
        "files": len(set(names.values())),
        "layers_without_indexer": list(missing),
    }


def describe_config(model: str | Path) -> dict[str, Any]:
    """Describe a model from its config alone: of a folder, or a config.json by itself.

    Returns:
        The facts of `describe`, as if there were no tensors. "quantization" (`Quantization` or
        None), "mtp_layers" and "nested" are those of `checkpoint.config_facts`; "native_pattern" is
        what the config asks for.

    Raises:
        ValueError: the config cannot be read, its family is unknown, a size is missing, or its
            pattern is none.
    """
    path = resolve_config(model)
    config = read_config(path)
    family = family_named(model_type_of(config), f"{path}: ")
    section = text_section(config)
    file = path if path.is_file() else path / "config.json"
    for key in SIZES:
        if type(section.get(key)) is not int or section[key] < 1:
            raise ValueError(
                f"{file}: {key} is {section.get(key)!r:.40}; a DSA model needs a whole number of "
                "at least 1 there."
            )
    try:
        native = Pattern.from_config(section)
    except ValueError as error:
        given = ", ".join(key for key in SHARING_KEYS if section.get(key) is not None)
        raise ValueError(
            f"{file}: the config has no valid pattern ({given}): {error} Correct it, or export "
            "another pattern over it."
        ) from None
    facts = config_facts(path, config)
    return {
        "path": str(path),
        "model_type": family.model_type,
        **{k: section[k] for k in SIZES},
        "tensors": 0,
        "files": 0,
        "native_pattern": str(native),
        "layers_without_indexer": [],
        "native_sharing": family.native_sharing,
        "next_token_layers": facts["mtp_layers"],
        **facts,
    }
