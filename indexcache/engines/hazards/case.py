"""Define the subject of the checks and their findings, and read single sharing keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from indexcache.configs import is_nested, text_section
from indexcache.engines.schedules import FREQ, OFFSET, PATTERN, TYPES, Rule, Schedule, resolve
from indexcache.overrides import SHARING_KEYS

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

CHECKED = ("transformers", "vllm", "sglang")
"""Engines whose own code the tests run; a hazard of another one is an error only if it is named."""


@dataclass(frozen=True)
class Hazard:
    """One thing that goes wrong, or may.

    Attributes:
        level: "error" (another model than asked, garbage, or no model at all), "warning" or "note".
        kind: a short name, for programs.
        engine: the engine that it concerns; None for all.
        text: a sentence with the key and the fix.
    """

    level: Level
    kind: str
    engine: str | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that the checks look at; see `doctor.examine`."""

    config: dict[str, Any]
    family: str
    configs: Mapping[str, dict[str, Any]]
    given: bool
    asked: str | None
    schedules: tuple[Schedule, ...]
    trained: tuple[Schedule, ...]
    named: frozenset[str]
    version: tuple[int, ...] | None
    tensor: int
    stages: int
    train_config: str | None
    with_indexer: frozenset[int] | None
    twice: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(text_section(self.config)["num_hidden_layers"])

    def level(self, engine: str, level: Level = "error") -> Level:
        """Return the level of a hazard of an engine: at most a warning where it is not checked."""
        name = engine.split(" ")[0]
        weak = name not in CHECKED and name not in self.named
        return "warning" if weak and level == "error" else level

    @cached_property
    def wanted(self) -> str | None:
        """The roles that the pattern, else the config's first valid key, asks for; None for none.

        Layers without sparse attention are "-".
        """
        if self.asked is not None:
            return self._masked(self.asked)
        return asked_by(self.config, self.family)

    def _masked(self, roles: str) -> str:
        known = next((s.roles for s in self.schedules if s.roles), "")
        return "".join("-" if known[i : i + 1] == "-" else r for i, r in enumerate(roles))


def asked_by(config: dict[str, Any], family: str) -> str | None:
    """Return the roles that the first valid sharing key of a config asks for; None for none."""
    return next((roles for roles in meant(config, family).values() if roles is not None), None)


def meant(config: dict[str, Any], family: str) -> dict[str, str | None]:
    """Return what each sharing key of a config asks for by itself; None where it is malformed.

    A frequency of 1 is left out, because exports neutralise a frequency with it.
    """
    section = text_section(config)
    found: dict[str, str | None] = {}
    for key in (TYPES, PATTERN, FREQ):
        value = section.get(key)
        if value is None or (key == FREQ and value == 1):
            continue
        rule = replace(_PLAIN, keys=(key,))
        if family == "minimax_m3":
            rule = replace(rule, after=True, offset=0, by_ordinal=True)
        found[key] = resolve(rule, _only(config, key), family).roles
    return found


_PLAIN = Rule(
    engine="",
    families=(),
    keys=(),
    null="full",
    least="full",
    short="fails",
    long="fails",
    letters="fails",
    words="fails",
    listed="types",
    source="the meaning of the keys on which the engines agree",
)


def _only(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a config in which `key` is the only sharing key of the decoder."""
    keep = (FREQ, OFFSET) if key == FREQ else (key,)
    section = {k: v for k, v in text_section(config).items() if k not in SHARING_KEYS or k in keep}
    return {**config, "text_config": section} if is_nested(config) else section


def difference(roles: str, wanted: str) -> str:
    """Name the first layer in which what runs differs from what is wanted."""
    for i, role in enumerate(roles):
        if wanted[i : i + 1] != role:
            return f"layer {i} is {role}, not {wanted[i : i + 1] or 'there'}"
    return "the first layers are the same"


def listed(names: list[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def numbers(layers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
