"""Which layers run their indexer in each engine: the rules of `rules`, applied to a config.

Roles are one character a layer: F runs its indexer, S reuses a selection, and - has no sparse
attention, so that it has no indexer to share.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from indexcache.configs import model_type_of, text_section
from indexcache.engines.rules import (
    CLI_FACTOR,
    FAMILIES,
    FILLING,
    FREQ,
    OFFSET,
    PATTERN,
    RULES,
    SOURCES,
    TYPES,
    Rule,
)
from indexcache.pattern import stage_starts


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A rule by which an engine reads a config.

    Attributes:
        rule: the engine's rule; None where it does not know the model.
        roles: F, S or - for each layer; None where it fails before it has them.
        key: the key that decided, or None where no key did.
        failure: why the engine stops, as a clause, or None.
    """

    engine: str
    rule: Rule | None
    roles: str | None
    key: str | None = None
    failure: str | None = None

    @property
    def full(self) -> int:
        """Number of layers that run their indexer."""
        return (self.roles or "").count("F")

    @property
    def indexed(self) -> int:
        """Number of layers with sparse attention."""
        return sum(r != "-" for r in self.roles or "")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {
            "engine": self.engine,
            "known": self.rule is not None,
            "schedule": self.roles,
            "full": self.full if self.roles else None,
            "layers": self.indexed if self.roles else None,
            "key": self.key,
            "failure": self.failure,
            "versions": self.rule.versions if self.rule else None,
            "source": self.rule.source if self.rule else None,
        }


class Stops(Exception):
    """The engine would stop; the message is a clause that says where."""


def family_of(config: dict[str, Any]) -> str:
    """Return the family of a config's decoder.

    Raises:
        ValueError: it is not known to have an indexer.
    """
    types = (model_type_of(config), config.get("model_type"))
    for family, names in FAMILIES.items():
        if any(t in names for t in types if isinstance(t, str)):
            return family
    raise ValueError(
        f"The model_type {types[0]!r:.60} is not known to have an indexer; known are "
        f"{', '.join(name for names in FAMILIES.values() for name in names)}."
    )


def rules_of(family: str, engine: str, version: tuple[int, ...] | None = None) -> tuple[Rule, ...]:
    """Return the rules that an engine has for a family, one for each platform; it may have none.

    A version outside the range that was read gets the nearest rule.
    """
    rules = [rule for rule in RULES if rule.engine == engine and family in rule.families]
    if version is not None:
        older = [r for r in rules if r.first is not None and version < r.first[: len(version)]]
        rules = [r for r in rules if r not in older]
    return tuple(rules)


def indexed_layers(config: dict[str, Any], family: str) -> list[bool]:
    """Return which decoder layers have sparse attention."""
    section = text_section(config)
    layers = section["num_hidden_layers"]
    every = [True] * layers
    if family == "glm5_next":
        types = section.get("layer_types")
        if isinstance(types, list) and len(types) == layers:
            return [t != "linear_attention" for t in types]
        linear = section.get("linear_attn_config")
        if isinstance(linear, Mapping) and isinstance(linear.get("kda_layers"), list):
            return [i not in linear["kda_layers"] for i in range(layers)]
        return [i % 4 == 3 for i in range(layers)]
    if family == "minimax_m3":
        sparse = section.get("sparse_attention_config")
        flags = sparse.get("sparse_attention_freq") if isinstance(sparse, Mapping) else None
        if isinstance(flags, list) and len(flags) == layers:
            return [flag != 0 for flag in flags]
        types = section.get("layer_types")
        if isinstance(types, list) and len(types) == layers:
            return [t == "minimax_m3_sparse" for t in types]
        return [False] * layers
    if family == "deepseek_v41":
        ratios = section.get("compress_ratios")
        if isinstance(ratios, list):
            return [i < len(ratios) and ratios[i] != 0 for i in range(layers)]
    return every


def resolve(rule: Rule, config: dict[str, Any], family: str) -> Schedule:
    """Return what an engine with this rule makes of a config, sensible or not."""
    section = text_section(config)
    indexed = indexed_layers(config, family)
    try:
        shared, key = _shared(rule, section, indexed)
    except Stops as stop:
        return Schedule(engine=rule.name, rule=rule, roles=None, failure=str(stop))
    if shared and shared[0] and rule.first_shared == "full":
        shared[0] = False
    roles = "".join(
        "-" if not has else "S" if s else "F" for has, s in zip(indexed, shared, strict=True)
    )
    return Schedule(
        engine=rule.name, rule=rule, roles=roles, key=key, failure=_forward_failure(rule, roles)
    )


def load_failure(config: dict[str, Any]) -> str | None:
    """Say why vLLM and SGLang stop while they load a config.json; None where they do not.

    They load glm_moe_dsa through the config class of transformers, which computes indexer_types
    from the other keys, before an override counts. What it takes may still fit no model.
    """
    if family_of(config) != "glm_moe_dsa":
        return None
    return resolve(FILLING, config, "glm_moe_dsa").failure


def filled_types(config: dict[str, Any]) -> list[str] | None:
    """Return what the config class of transformers fills indexer_types with; None if it stops.

    What is too short, or neither full nor shared, counts as full.
    """
    roles = resolve(FILLING, config, "glm_moe_dsa").roles
    return None if roles is None else ["shared" if r == "S" else "full" for r in roles]


def _forward_failure(rule: Rule, roles: str) -> str | None:
    """Say why the first forward pass of a schedule fails; None where it does not."""
    sparse = roles.replace("-", "")
    if rule.first_shared == "fails" and sparse.startswith("S"):
        return "its first layer with sparse attention is shared, which raises an error"
    if rule.next_only:
        for i, role in enumerate(roles):
            if role == "S" and roles[i - 1] != "F":
                return (
                    f"layer {i} is shared, but layer {i - 1} passes it no selection, which raises "
                    "an error in the first forward pass"
                )
    return None


def _shared(
    rule: Rule, section: Mapping[str, Any], indexed: list[bool]
) -> tuple[list[bool], str | None]:
    """Return which layers are shared, and the key that decided."""
    layers = len(indexed)
    if rule.needs and not section.get(rule.needs):
        return [False] * layers, None
    if rule.filled and TYPES not in section:
        with contextlib.suppress(Stops):  # Then the keys count only as overrides.
            return _shared(FILLING, section, indexed)
    for key in rule.keys:
        value = section.get(key)
        if key == SOURCES:
            return _of_sources(value, indexed), SOURCES
        if key == CLI_FACTOR:
            if value is not None and _number(value, key, rule) > 1:
                return [i % value != 0 for i in range(layers)], key
        elif key == FREQ:
            break
        elif value is not None:
            return _of_roles(rule, key, value, layers), key
    if rule.default_types:
        return [i != 0 and (i - 1) % 4 != 0 for i in range(layers)], "the default of its family"
    if FREQ not in rule.keys:
        return [False] * layers, None
    return _of_frequency(rule, section, indexed)


def _of_sources(value: Any, indexed: list[bool]) -> list[bool]:
    sources = value if isinstance(value, (list, tuple)) else ()
    if any(indexed) and not sources:
        raise Stops(f"{SOURCES} is missing, which raises an error")
    return [has and i not in sources for i, has in enumerate(indexed)]


def _of_roles(rule: Rule, key: str, value: Any, layers: int) -> list[bool]:
    if not isinstance(value, (str, list, tuple)):
        raise Stops(f"{key} is {value!r:.40}, which is neither a string nor a list")
    words = key == TYPES
    items = list(value)
    if key == PATTERN and not isinstance(value, str):
        if rule.listed == "full":
            return [False] * layers
        words = rule.listed == "types"
    shared_name, names = ("shared", ("full", "shared")) if words else ("S", ("F", "S"))
    strict = rule.words if words else rule.letters
    if (
        words
        and rule.typed
        and not (isinstance(value, list) and all(isinstance(item, str) for item in items))
    ):
        raise Stops(f"{key} is {value!r:.40}, which is no list of strings")
    odd = [item for item in items if item not in names]
    if odd and strict == "fails":
        raise Stops(f"{key} has the role {odd[0]!r:.40}, which raises an error")
    if len(items) < layers and rule.short == "fails":
        raise Stops(f"{key} has {len(items)} of {layers} roles, which raises an error")
    if len(items) > layers and rule.long == "fails":
        raise Stops(f"{key} has {len(items)} roles for {layers} layers, which raises an error")
    if rule.engine == "tensorrt-llm":
        items = [str(item).upper() for item in items]
    return [i < len(items) and items[i] == shared_name for i in range(layers)]


def _of_frequency(
    rule: Rule, section: Mapping[str, Any], indexed: list[bool]
) -> tuple[list[bool], str | None]:
    freq = _number(section.get(FREQ, 1), FREQ, rule)
    given = rule.offset if rule.ignores_offset else section.get(OFFSET, rule.offset)
    offset = _number(given, OFFSET, rule)
    if freq == 0:
        raise Stops(f"{FREQ} is 0, which raises an error")
    step = 0 if rule.after else 1
    ordinals = _ordinals(indexed) if rule.by_ordinal else list(range(len(indexed)))
    shared = [n is not None and max(n - offset + step, 0) % freq != 0 for n in ordinals]
    return shared, FREQ if FREQ in section and freq != 1 else None


def _ordinals(indexed: list[bool]) -> list[int | None]:
    count = 0
    found: list[int | None] = []
    for has in indexed:
        found.append(count if has else None)
        count += has
    return found


def _number(value: Any, key: str, rule: Rule) -> int:
    """Return a frequency or an offset, as the engine takes it."""
    if value is None:
        if rule.null == "fails":
            raise Stops(f"{key} is null, which raises an error")
        return rule.offset if key == OFFSET else 1
    if not isinstance(value, (int, float)):
        raise Stops(f"{key} is {value!r:.40}, which is no number")
    below = rule.least_offset if key == OFFSET else rule.least
    if value < 1 and below is not None:
        if below == "fails":
            raise Stops(f"{key} is {value}, which raises an error")
        return 1
    return value  # type: ignore[return-value]


def pipeline_starts(engine: str, layers: int, stages: int) -> tuple[int, ...]:
    """Return the first layer of every pipeline stage, as an engine cuts them by itself.

    vLLM gives the remainder to the stages before the last, SGLang to the last ones, others to the
    first ones. VLLM_PP_LAYER_PARTITION and SGLANG_PP_LAYER_PARTITION count where they are set.

    Raises:
        ValueError: stages is not in 1..layers, or such a variable does not fit.
    """
    starts = stage_starts(layers, stages)
    variable = {"vllm": "VLLM_PP_LAYER_PARTITION", "sglang": "SGLANG_PP_LAYER_PARTITION"}.get(
        engine
    )
    given = os.environ.get(variable) if variable and stages > 1 else None
    size, extra = divmod(layers, stages)
    sizes = [size] * stages
    if given is not None:
        parts = given.split(",")
        if not all(p.strip().isdigit() for p in parts):
            raise ValueError(f"{variable} is {given!r:.60}; it must be whole numbers and commas.")
        sizes = [int(p) for p in parts]
        if len(sizes) != stages or sum(sizes) != layers:
            raise ValueError(
                f"{variable} is {given!r:.60}, which does not cut {layers} layers into {stages}."
            )
    elif engine == "vllm":
        for i in range(2, extra + 2):
            sizes[-i] += 1
    elif engine == "sglang":
        for i in range(1, extra + 1):
            sizes[-i] += 1
    else:
        return starts
    return tuple(sum(sizes[:p]) for p in range(stages))


def parse_version(text: str) -> tuple[int, ...]:
    """Read a version such as 0.33.0, 0.33rc1 or v0.5.23.post1.

    Raises:
        ValueError: it does not begin with numbers.
    """
    numbers: list[int] = []
    for part in text.strip().removeprefix("v").split("."):
        digits = re.match("[0-9]*", part)[0]  # type: ignore[index]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    if not numbers or len(text) > 40:
        raise ValueError(f"{text!r:.60} is no version; give one such as 0.33.0.")
    return tuple(numbers)
