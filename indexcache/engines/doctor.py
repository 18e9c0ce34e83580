"""Say what each engine would really run of a config, and what is dangerous about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from indexcache.checkpoint import has_weights, indexer_part, listed_names
from indexcache.configs import text_section
from indexcache.engines.hazards import CHECKS, LEVELS, Case, Hazard
from indexcache.engines.overriding import loaded
from indexcache.engines.rules import ENGINES
from indexcache.engines.schedules import Schedule, family_of, parse_version, resolve, rules_of
from indexcache.engines.training import train_schedules
from indexcache.overrides import SHARING_KEYS
from indexcache.reading import read_text
from indexcache.report.tables import table

__all__ = ["Diagnosis", "Hazard", "examine"]

MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of an examination: the schedules of the engines, and all hazards.

    Attributes:
        model: what was examined.
        family: the family of the model, see `schedules.FAMILIES`.
        layers: number of decoder layers.
        asked: the roles that the pattern or the config asks for; None where it asks for none.
        schedules: what each engine runs.
        trained: what a training run shares, where its settings were given.
        hazards: errors first.
    """

    model: str
    family: str
    layers: int
    asked: str | None
    schedules: tuple[Schedule, ...]
    trained: tuple[Schedule, ...]
    hazards: tuple[Hazard, ...]

    @property
    def failed(self) -> bool:
        """Whether one of the hazards is an error."""
        return any(h.level == "error" for h in self.hazards)

    def with_hazards(self, found: Iterable[Hazard]) -> Diagnosis:
        """Return a diagnosis with further hazards, errors first."""
        order = {level: i for i, level in enumerate(LEVELS)}
        every = sorted([*self.hazards, *found], key=lambda h: order[h.level])
        return replace(self, hazards=tuple(dict.fromkeys(every)))

    def table(self) -> str:
        """Return the schedules as a table, and the hazards below it, one a line."""
        rows = [
            [
                s.engine,
                s.rule.versions if s.rule else "",
                f"{s.full}/{s.indexed}" if s.roles else "-",
                s.key or ("no key" if s.rule else ""),
                s.roles or s.failure or "does not know this model",
            ]
            for s in (*self.schedules, *self.trained)
        ]
        shown = table(["engine", "versions", "full", "decided by", "layers"], rows)
        found = "\n".join(f"{h.level}: {h.text}" for h in self.hazards)
        return f"{shown}\n\n{found or 'No hazard was found.'}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {
            "model": self.model,
            "family": self.family,
            "layers": self.layers,
            "asked": self.asked,
            "schedules": [s.to_json() for s in self.schedules],
            "trained": [s.to_json() for s in self.trained],
            "hazards": [h.to_json() for h in self.hazards],
            "failed": self.failed,
        }


def examine(
    model: str | Path,
    config: dict[str, Any],
    *,
    configs: Mapping[str, dict[str, Any]] | None = None,
    asked: str | None = None,
    engines: Sequence[str] | None = None,
    version: str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    train_config: str | Path | None = None,
) -> Diagnosis:
    """Examine a model's config, and its weights where `model` is a folder that has them.

    Args:
        model: the folder of a checkpoint, or a config.json.
        config: its config.
        configs: by engine, the config as the engine sees it with a pattern's overrides; None where
            there is no pattern.
        asked: the roles of that pattern, F, S or whatever it holds.
        engines: those to examine; None is all of `ENGINES`.
        version: the version of the one engine in `engines`.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: pipeline stages.
        train_config: settings of a training run of Megatron-LM or prime-rl.

    Raises:
        ValueError: the model has no known indexer, an engine is unknown, a number is out of range,
            or a file cannot be read.
    """
    family = family_of(config)
    names = tuple(dict.fromkeys(engines)) if engines else ENGINES
    for name in names:
        if name not in ENGINES:
            raise ValueError(
                f"The engine {name!r:.60} is not known; known are {', '.join(ENGINES)}."
            )
    if version is not None and len(engines or ()) != 1:
        raise ValueError("A version is that of one engine: name it with --engine.")
    layers = text_section(config)["num_hidden_layers"]
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}; no model has more than {MOST_LAYERS}.")
    for flag, size in (
        ("--tensor-parallel-size", tensor_parallel_size),
        ("--pipeline-parallel-size", pipeline_parallel_size),
    ):
        if size < 1:
            raise ValueError(f"{flag} must be at least 1, not {size}.")
    number = None if version is None else parse_version(version)
    seen = {name: (configs or {}).get(name) or loaded(name, config) for name in names}
    schedules: list[Schedule] = []
    for name in names:
        rules = rules_of(family, name, number)
        schedules += [resolve(rule, seen[name], family) for rule in rules] or [
            Schedule(engine=name, rule=None, roles=None)
        ]
    trained = () if train_config is None else train_schedules(train_config, config, family)
    case = Case(
        config=config,
        family=family,
        configs=seen,
        given=configs is not None,
        asked=asked,
        schedules=tuple(schedules),
        trained=trained,
        named=frozenset(engines or ()),
        version=number,
        tensor=tensor_parallel_size,
        stages=pipeline_parallel_size,
        train_config=None if train_config is None else str(train_config),
        with_indexer=_layers_with_indexer(Path(model)),
        twice=_keys_twice(Path(model)),
    )
    found = [h for check in CHECKS for h in check(case)]
    return Diagnosis(
        model=str(model),
        family=family,
        layers=layers,
        asked=case.wanted,
        schedules=tuple(schedules),
        trained=trained,
        hazards=(),
    ).with_hazards(found)


def _layers_with_indexer(model: Path) -> frozenset[int] | None:
    """Return the layers that have indexer tensors; None where there are no weights, or none here.

    Tensors of families whose names are others are not recognised.
    """
    if not (model.is_dir() and has_weights(model)):
        return None
    return frozenset(
        part[0] for name in listed_names(model) if (part := indexer_part(name)) is not None
    )


def _keys_twice(model: Path) -> tuple[str, ...]:
    """Return the sharing keys that stand twice in one object of a config.json, with two values."""
    path = model / "config.json" if model.is_dir() else model
    found: dict[str, None] = {}

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        found.update({k: None for k, v in items if k in SHARING_KEYS and v != value[k]})
        return value

    if path.is_file():
        json.loads(read_text(path), object_pairs_hook=pairs)
    return tuple(found)
