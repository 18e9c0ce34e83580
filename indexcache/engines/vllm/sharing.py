"""Resolve the sharing keys of a config as vLLM does, and check them before it serves.

vLLM reads `index_topk_pattern`, else `index_topk_freq` with `index_skip_topk_offset`, from the
config of the decoder, and ignores every other key. A pattern that is too short leaves the layers
behind its end full, and a role other than "S" counts as full. Source: `DeepseekV32Attention` and
`DeepseekV2MLAAttention` of vLLM 0.25 to 0.33.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from indexcache.configs import text_section
from indexcache.pattern import DEFAULT_SKIP_OFFSET, Pattern

KEYS = ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
"""The keys that vLLM's classes of DSA models read."""

OTHER_KEYS = ("indexer_types", "use_index_cache")
"""Keys that other engines read and these classes ignore."""


def resolved_roles(section: Mapping[str, Any], layers: int) -> str:
    """Return the role, F or S, that vLLM gives each of the layers, whether it is sensible or not.

    Args:
        section: the config of the decoder.
        layers: the number of decoder layers, without those for multi-token prediction.
    """
    pattern = section.get("index_topk_pattern")
    if pattern is not None:
        return "".join(
            "S" if i < len(pattern) and pattern[i] == "S" else "F" for i in range(layers)
        )
    freq = section.get("index_topk_freq", 1)
    offset = section.get("index_skip_topk_offset", DEFAULT_SKIP_OFFSET)
    return "".join("S" if max(i - offset + 1, 0) % freq else "F" for i in range(layers))


def asks_for_sharing(config: Mapping[str, Any]) -> bool:
    """Say whether a config has any key that asks for shared layers, at its top or nested."""
    return any(
        section.get("index_topk_pattern") is not None
        or section.get("index_topk_freq") not in (None, 1)
        or bool(section.get("use_index_cache"))
        or not _all_full(section.get("indexer_types"))
        for section in _sections(config)
    )


def _all_full(types: Any) -> bool:
    """Say whether indexer_types asks for nothing; what is no list of words asks for something."""
    return types is None or (isinstance(types, list | tuple) and all(t == "full" for t in types))


def check_sharing(
    config: dict[str, Any],
    *,
    stages: Sequence[int] = (0,),
    without_indexer: Collection[int] = (),
    served: str | None = None,
) -> Pattern | None:
    """Check a config whose overrides are merged, and return the pattern that vLLM will run.

    Args:
        config: the config, in the form of config.json; it may be nested.
        stages: the first layer of every pipeline stage.
        without_indexer: layers that have no indexer weights in the checkpoint.
        served: the name of the checkpoint, for messages.

    Returns:
        The pattern, or None for a config that asks for no sharing.

    Raises:
        ValueError: vLLM would ignore a key, run another pattern than the config says, or read ids
            that no layer of the stage has written.
    """
    if not asks_for_sharing(config):
        return None
    where = f"{served}: " if served else ""
    section = text_section(config)
    _check_nesting(config, section, where)
    layers = section["num_hidden_layers"]
    given = section.get("index_topk_pattern")
    if given is not None:
        pattern = _pattern(given, layers, where)
    elif section.get("index_topk_freq") not in (None, 1):
        pattern = _uniform(section, layers, where)
    else:
        keys = [key for key in OTHER_KEYS if section.get(key) not in (None, False)]
        raise ValueError(
            f"{where}the config asks for sharing by {' and '.join(keys)} alone, which vLLM ignores "
            "for this model: it would run every indexer. Add index_topk_pattern."
        )
    _check_agreement(section, pattern, where)
    for start in stages:
        if pattern[start] != "F":
            place = "layer 0" if start == 0 else f"layer {start}, the first of a pipeline stage,"
            raise ValueError(
                f"{where}{place} of the pattern is shared, but no layer before it on this stage "
                f"selects tokens. The stages begin at layers {', '.join(map(str, stages))}; those "
                "must be F."
            )
    lacking = [i for i in pattern.full_layers if i in set(without_indexer)]
    if lacking:
        raise ValueError(
            f"{where}the pattern makes layer {lacking[0]} full, but the checkpoint has no indexer "
            f"weights for it ({len(lacking)} such layers). It was pruned for, or trained with, "
            "another pattern."
        )
    return pattern


def other_family(config: dict[str, Any]) -> str | None:
    """Return the family of a model that vLLM's classes of V3.2 and GLM do not run; None for others.

    A model type that is not known counts as one of those classes', by whose keys it is checked.
    """
    from indexcache.engines.rules import DSA
    from indexcache.engines.schedules import family_of

    try:
        family = family_of(config)
    except ValueError:
        return None
    return None if family in DSA else family


def check_other(config: dict[str, Any], family: str, served: str) -> None:
    """Check a config of a model that vLLM shares by other keys than these, or never.

    Raises:
        ValueError: the config asks for another pattern than vLLM runs.
    """
    from indexcache.engines.hazards import asked_by
    from indexcache.engines.schedules import resolve, rules_of

    wanted = asked_by(config, family)
    rules = rules_of(family, "vllm")
    found = [resolve(rule, config, family).roles for rule in rules]
    if wanted is None or "S" not in wanted or not rules or wanted in found:
        return
    keys = " and ".join(rules[0].keys) or "no key that shares"
    raise ValueError(
        f"{served}: the config asks for {wanted}, but vLLM reads {keys} for {family} and runs "
        f"{found[0] or 'nothing'}. Remove the keys that it ignores."
    )


def summary(pattern: Pattern) -> str:
    """Return the line that is logged once: how many layers run their indexer, and which."""
    return f"{len(pattern.full_layers)} of {len(pattern)} layers run their indexer: {pattern}"


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    nested = config.get("text_config")
    return [config, nested] if isinstance(nested, Mapping) else [config]


def _check_nesting(config: Mapping[str, Any], section: Mapping[str, Any], where: str) -> None:
    nested = config.get("text_config")
    if section is config:
        given = nested if isinstance(nested, Mapping) else {}
        inside = [k for k in (*KEYS, *OTHER_KEYS) if given.get(k) not in (None, config.get(k))]
        if inside:
            raise ValueError(
                f"{where}{inside[0]} lies in text_config, where vLLM does not look for it: the "
                "decoder of this model is described at the top of its config, so the override must "
                "lie there."
            )
        return
    outside = [k for k in (*KEYS, *OTHER_KEYS) if config.get(k) not in (None, section.get(k))]
    if outside:
        raise ValueError(
            f"{where}{outside[0]} lies beside text_config, where vLLM does not look for it: this "
            'model is nested, so the override must be {"text_config": {..}}.'
        )


def _pattern(given: Any, layers: int, where: str) -> Pattern:
    if not isinstance(given, (str, list, tuple)):
        raise ValueError(
            f"{where}index_topk_pattern is {given!r:.60}; it must be a string of F and S, one for "
            "each layer."
        )
    roles = "".join(map(str, given))
    wrong = sorted(set(roles) - set("FS"))
    if wrong:
        raise ValueError(
            f"{where}index_topk_pattern has the role {wrong[0]!r}, which vLLM would run as full; "
            "it knows F and S only."
        )
    if len(roles) != layers:
        effect = "leave the rest full" if len(roles) < layers else "ignore the rest of it"
        raise ValueError(
            f"{where}index_topk_pattern has {len(roles)} roles, but the model has {layers} layers; "
            f"vLLM would {effect}."
        )
    if roles[0] != "F":
        raise ValueError(
            f"{where}layer 0 of index_topk_pattern is shared, but no layer before it selects "
            "tokens; it must be F."
        )
    return Pattern(roles)


def _uniform(section: Mapping[str, Any], layers: int, where: str) -> Pattern:
    freq = section["index_topk_freq"]
    offset = section.get("index_skip_topk_offset", DEFAULT_SKIP_OFFSET)
    for key, value, least in (("index_topk_freq", freq, 1), ("index_skip_topk_offset", offset, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{where}{key} is {value!r:.60}; it must be a whole number of at least {least}."
            )
    return Pattern(resolved_roles(section, layers))


def _check_agreement(section: Mapping[str, Any], pattern: Pattern, where: str) -> None:
    """Check that keys that vLLM ignores say the same as the pattern that it runs."""
    types = section.get("indexer_types")
    if types is not None and not isinstance(types, list | tuple):
        raise ValueError(
            f"{where}indexer_types is {types!r:.60}; it must be a list of full and shared, one for "
            "each layer."
        )
    if types is not None and list(types) != pattern.to_types():
        count = sum(t == "full" for t in types)
        raise ValueError(
            f"{where}indexer_types has {count} full layers of {len(types)} and disagrees with the "
            f"pattern that vLLM runs, {pattern}. Override both keys with one pattern, or neither."
        )
    if section.get("use_index_cache") is False:
        raise ValueError(
            f"{where}use_index_cache is false, but vLLM ignores that key and shares by the "
            f"pattern {pattern}. Remove the pattern, or set the key to true."
        )
