"""Refuse configs that contradict the family they name, or themselves.

A checkpoint whose config was relabelled loads without an error and computes something else. Keys
that a family does not read are harmless unless they ask for another computation than the family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from indexcache.models.family import Family

FIXED = {
    "rope_interleave": (True, "its attention rotates neighbouring dims together"),
    "scoring_func": ("sigmoid", "its router scores experts by the sigmoid"),
    "topk_method": ("noaux_tc", "its router chooses experts by group with a bias"),
    "moe_layer_freq": (1, "every layer behind the dense ones has experts"),
}
"""Keys whose value is part of the computation in both families: the value, and its meaning."""

FOREIGN = (
    "compress_ratios",
    "index_block_size",
    "index_kpool",
    "index_local_blocks",
    "index_source_layer_ids",
    "index_topk_blocks",
)
"""Keys of other families' indexers, which these do not obey."""


def check_config(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse a config that says something which its family does not do.

    Args:
        config: the section of a config.json that describes the decoder.
        family: the family that its model_type names.
        where: what begins the error message, e.g. the folder.

    Raises:
        ValueError: a key contradicts the family or another key; the message names both.
    """
    kind = family.model_type
    for key, value, expected, meaning in _contradictions(config, family):
        raise ValueError(
            f"{where}: the config has {key} = {value!r:.60}, which contradicts its model type "
            f"{kind} ({meaning}): expected {expected}. The model would load and compute something "
            "else; restore the checkpoint's own config.json."
        )
    _check_router(config, where)
    _check_rope(config, where)


def _contradictions(config: Mapping[str, Any], family: Family) -> list[tuple[str, Any, str, str]]:
    found: list[tuple[str, Any, str, str]] = []
    interleaved = config.get("indexer_rope_interleave")
    if interleaved is not None and bool(interleaved) != family.interleaved:
        meaning = "neighbouring dims" if family.interleaved else "dims of the two halves"
        expected = str(family.interleaved).lower()
        text = f"its indexer rotates {meaning} together"
        found.append(("indexer_rope_interleave", interleaved, expected, text))
    for key, (value, meaning) in FIXED.items():
        if config.get(key) not in (None, value):
            found.append((key, config[key], repr(value), meaning))
    found += [
        (key, config[key], "no such key", "its indexer does not know it")
        for key in FOREIGN
        if config.get(key) is not None
    ]
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    head, sizes = config.get("qk_head_dim"), [config.get(k, 0) for k in parts]
    if isinstance(head, int) and all(sizes) and head != sum(sizes):
        found.append(("qk_head_dim", head, str(sum(sizes)), " + ".join(parts)))
    other = _other_class(config, family)
    if other is not None:
        text = "its class belongs to another model type"
        found.append(("architectures", other, _class_of(family.model_type) or "none", text))
    return found


def _check_router(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers of experts and groups from which no router can choose."""
    keys = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    for key in keys:
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{where}: the config has {key} = {value!r:.40}; it must be a whole number of at "
                "least 1."
            )
    experts, chosen, groups, kept = (config.get(key) for key in keys)
    if experts and groups and experts % groups:
        raise ValueError(
            f"{where}: the config has n_group = {groups}, which does not divide n_routed_experts = "
            f"{experts}."
        )
    for (name, part), (of, whole) in (
        (("num_experts_per_tok", chosen), ("n_routed_experts", experts)),
        (("topk_group", kept), ("n_group", groups)),
    ):
        if part and whole and part > whole:
            raise ValueError(f"{where}: the config has {name} = {part}, more than {of} = {whole}.")


def _class_of(model_type: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def _other_class(config: Mapping[str, Any], family: Family) -> str | None:
    """Return a class name of `architectures` that transformers has for another model type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    named = config.get("architectures")
    own = {_class_of(family.model_type), MODEL_MAPPING_NAMES.get(family.model_type)}
    for name in named if isinstance(named, (list, tuple)) else ():
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
            others = {v for k, v in mapping.items() if k != family.model_type}
            if isinstance(name, str) and name in others and name not in own:
                return str(name)
    return None


def _check_rope(config: Mapping[str, Any], where: str) -> None:
    """Refuse a RoPE that transformers does not know, and two that differ."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parts = {
        key: value
        for key in ("rope_parameters", "rope_scaling")
        if isinstance(value := config.get(key), Mapping) and value
    }
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for key, value in parts.items():
        kind = value.get("rope_type", value.get("type", "default"))
        if kind not in known:
            raise ValueError(
                f"{where}: the config's {key} has the type {kind!r:.40}, which is none of "
                f"{', '.join(known)}; for RoPE without scaling remove {key}."
            )
    # rope_scaling replaces rope_parameters, and a theta inside either replaces that at the top.
    thetas = {
        f"{key}.rope_theta": value["rope_theta"]
        for key, value in parts.items()
        if value.get("rope_theta") is not None
    }
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = config["rope_theta"]
    if len(set(thetas.values())) > 1:
        said = ", ".join(f"{k} = {v}" for k, v in thetas.items())
        raise ValueError(
            f"{where}: the config contradicts itself about RoPE ({said}); keep the one that the "
            "model was trained with."
        )
    both = [dict(p) for p in parts.values()]
    if len(both) == 2 and _plain(both[0]) != _plain(both[1]):
        raise ValueError(
            f"{where}: the config has both rope_parameters and rope_scaling, and they differ; "
            "transformers obeys rope_scaling alone. Keep one."
        )


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")} | {
        "type": kind
    }
