"""Hold the roles of all layers, and the sizes of pools, as one immutable value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from indexcache.pattern.counts import full_by_rule, positive
from indexcache.pattern.pools import DEFAULT_POOL_FACTOR, Pool, split_pool
from indexcache.seen import Seen

ROLES = "FRS"
TYPES = {"F": "full", "S": "shared"}


@dataclass(frozen=True, init=False)
class Pattern:
    """Roles of all layers, e.g. `Pattern("FSSFSS")`, or `Pattern("FRRFRR@8")` with pools of 8 k.

    `Pattern("FRRFRR@1/8")` has pools of an eighth of the tokens that a query sees, and of at least
    k.

    Args:
        roles: one character per layer, F, R or S, layer 0 first; or a sequence of "full"/"shared".
            A string that has R may end in `@c`, the pool factor, or `@1/8`, the pool's share.
        pool_factor: c, an int >= 1; the pool of an F layer holds c * index_topk ids. It is only for
            patterns with R, where the default is 8; else it is None. A `Fraction` below 1 is the
            pool's share of what a query sees: the attribute `pool_share` holds it then, and
            `pool_factor` is None. Several, written `@1/8,1/16`, are those of the F layers that
            publish a pool, in their order: `pool_shares` holds them, and `pool_share` the largest.
        seen: the text that a search chose it on, which travels with it into files; two patterns
            that differ in nothing else are equal.

    Raises:
        ValueError: anything but F, R and S (lower case included), an empty pattern, a first layer
            that is not F, a pool factor that is not a positive integer, or a share that is not
            between 0 and 1.
    """

    roles: str
    pool_factor: int | None
    pool_share: Fraction | None
    pool_shares: tuple[Fraction, ...] | None
    seen: Seen = field(compare=False, repr=False)

    def __init__(
        self, roles: str | Sequence[str], pool_factor: Pool | None = None, seen: Seen = Seen()
    ):
        if not isinstance(roles, str):
            roles = _roles_of_types(roles)
        roles, pool_factor = split_pool(roles, pool_factor)
        if not roles:
            raise ValueError(
                "The pattern is empty: give one of F, R or S for every layer, e.g. FSSFSS."
            )
        for i, role in enumerate(roles):
            if role not in ROLES:
                hint = f" Write '{role.upper()}'." if role.upper() in ROLES else ""
                raise ValueError(
                    f"Layer {i} of the pattern has the role {role!r}; only F, R and S are known."
                    f"{hint}"
                )
        if roles[0] != "F":
            raise ValueError(
                f"Layer 0 of the pattern is {roles[0]}, but it must be F: no layer before it has a "
                "selection."
            )
        if "R" in roles:
            pool_factor = DEFAULT_POOL_FACTOR if pool_factor is None else pool_factor
        elif pool_factor is not None:
            raise ValueError(
                "A pool factor was given, but the pattern has no R layer that would use it."
            )
        object.__setattr__(self, "roles", roles)
        several = pool_factor if isinstance(pool_factor, tuple) else None
        if several and len(several) != len(self.publishers()):
            raise ValueError(
                f"R layers read the pools of {len(self.publishers())} full layers, so the pattern "
                f"takes that many pools, or one for all, not {len(several)}."
            )
        if several:
            pool_factor = max(several)
            several = several if len(set(several)) > 1 else None
        share = isinstance(pool_factor, Fraction)
        object.__setattr__(self, "pool_factor", None if share else pool_factor)
        object.__setattr__(self, "pool_share", pool_factor if share else None)
        object.__setattr__(self, "pool_shares", several)
        object.__setattr__(self, "seen", seen)

    # -- reading: what reads configs and files lies in reading.py, which imports this file -------

    @classmethod
    def of(cls, value: Pattern | str | Sequence[str]) -> Pattern:
        """Return a `Pattern` unchanged, and make one of a string or a sequence of roles."""
        return value if isinstance(value, Pattern) else cls(value)

    @classmethod
    def full(cls, layers: int) -> Pattern:
        """Return the pattern in which every layer is full."""
        return cls("F" * positive("layers", layers))

    @classmethod
    def uniform(
        cls,
        layers: int,
        freq: int,
        offset: int = 1,
        *,
        rest: str = "S",
        pool_factor: Pool | None = None,
    ) -> Pattern:
        """Return the pattern with one full layer in `freq` and `rest` (S or R) between them.

        Layer i is full where max(i - offset + 1, 0) % freq == 0. With offset 1 that is i % freq
        (FSSSFSSS); the engines' own default is 2 (FFSSSFSS).

        Raises:
            ValueError: freq < 1, offset outside 1..layers, or rest not S or R.
        """
        positive("layers", layers)
        positive("freq", freq)
        if positive("offset", offset) > layers:
            raise ValueError(f"offset must be at most the {layers} layers, not {offset}.")
        return filled(full_by_rule(layers, freq, offset), rest, pool_factor)

    @classmethod
    def from_config(cls, config: Any) -> Pattern:
        """Read the pattern of a model config (a dict or a transformers config).

        The precedence is that of transformers: `indexer_types`, then `index_topk_pattern`, then
        `index_topk_freq` with `index_skip_topk_offset` (default 2). A config with none of them is
        all full. `text_config` is read where the top level has no layers.

        Raises:
            ValueError: no `num_hidden_layers`, or a key that is not what transformers accepts.
        """
        from indexcache.pattern import reading

        return reading.of_config(config)

    @classmethod
    def from_overrides(cls, values: Mapping[str, Any], layers: int | None = None) -> Pattern:
        """Read the pattern of engine overrides or of a config, whose keys must agree.

        Each engine reads another key, so two that differ mean two patterns. The keys may lie under
        `text_config`, and the overrides under the name of an engine's flag.

        Args:
            layers: number of layers of the model, for overrides that give a frequency alone.

        Raises:
            ValueError: there is no pattern, or the keys are malformed or contradict each other.
        """
        from indexcache.pattern import reading

        return reading.of_overrides(values, layers)

    @classmethod
    def from_file(cls, path: str | Path, layers: int | None = None) -> Pattern:
        """Read a pattern from a file.

        The file holds the string itself, JSON `{"pattern": ..}`, a JSON list of types, the
        overrides of vLLM or SGLang as JSON or in a script that starts them, or it is a config.json.

        What text a search chose it on comes from the file too, or from a pattern.json beside it,
        as an export writes it beside the flags of engines.

        Args:
            path: the file.
            layers: number of layers of the model, for overrides that give a frequency alone.

        Raises:
            ValueError: the file cannot be read, holds no pattern, or holds several.
        """
        from indexcache.pattern import reading

        return reading.of_file(path, layers)

    # -- writing ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        if self.pool_shares:
            return f"{self.roles}@{','.join(map(str, self.pool_shares))}"
        return self.roles if self.pool is None else f"{self.roles}@{self.pool}"

    def __repr__(self) -> str:
        return f"Pattern({str(self)!r})"

    def to_types(self) -> list[str]:
        """Return transformers' `indexer_types`: "full" or "shared" per layer.

        Raises:
            ValueError: the pattern has R layers.
        """
        self.check(reindex=False)
        return [TYPES[r] for r in self.roles]

    def to_config(self) -> dict[str, Any]:
        """Return the config keys on which all engines agree.

        They are `use_index_cache`, `index_topk_pattern` and `indexer_types`, and for a uniform
        pattern `index_topk_freq` with an explicit `index_skip_topk_offset`.

        Raises:
            ValueError: the pattern has R layers.
        """
        keys: dict[str, Any] = {
            "use_index_cache": True,
            "index_topk_pattern": self.roles,
            "indexer_types": self.to_types(),
        }
        if (rule := self.frequency()) is not None:
            keys |= {"index_topk_freq": rule[0], "index_skip_topk_offset": rule[1]}
        return keys

    def to_file(self, path: str | Path) -> None:
        """Write `facts()`, and the text that a search chose the pattern on, as JSON."""
        value = self.facts() | self.seen.to_pattern_file()
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        """Return what a file holds: "pattern", "layers", "full" (their number), "indexer_types".

        Patterns with R layers have no "indexer_types".
        """
        value: dict[str, Any] = {
            "pattern": str(self),
            "layers": len(self),
            "full": len(self.full_layers),
        }
        if "R" not in self.roles:
            value["indexer_types"] = self.to_types()
        return value

    # -- asking ----------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool | None:
        """The size of the pools: the factor of k, or the share or shares of what a query sees."""
        return self.pool_shares or self.pool_share or self.pool_factor

    def pools(self) -> dict[int, int | Fraction]:
        """Return the size of the pool of every full layer that publishes one."""
        layers = sorted(self.publishers())
        sizes = self.pool_shares or [self.pool_share or self.pool_factor] * len(layers)
        return {i: size for i, size in zip(layers, sizes, strict=True) if size is not None}

    def __len__(self) -> int:
        return len(self.roles)

    def __getitem__(self, layer: int) -> str:
        return self.roles[layer]

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The full layers, in ascending order."""
        return tuple(i for i, r in enumerate(self.roles) if r == "F")

    @property
    def keep(self) -> float:
        """Fraction of the layers that stay full."""
        return len(self.full_layers) / len(self)

    def source(self, layer: int) -> int:
        """Return the layer whose result `layer` reads.

        F reads its own, R the pool of the nearest F before it, S the selection of the nearest F or
        R before it.
        """
        layer = range(len(self))[layer]
        if self.roles[layer] == "F":
            return layer
        sources = "F" if self.roles[layer] == "R" else "FR"
        return next(i for i in range(layer - 1, -1, -1) if self.roles[i] in sources)

    def groups(self) -> list[tuple[int, ...]]:
        """Cut the layers before every F: each group is a full layer and those that read from it."""
        starts = [*self.full_layers, len(self)]
        return [tuple(range(a, b)) for a, b in pairwise(starts)]

    def publishers(self) -> frozenset[int]:
        """Return the full layers whose pool an R layer reads."""
        return frozenset(self.source(i) for i, r in enumerate(self.roles) if r == "R")

    def signature(self) -> tuple[tuple[str, int | Fraction | None], ...]:
        """Return what decides each layer's result: its role, and the size of its pool."""
        pools = self.pools()
        return tuple((r, pools.get(i)) for i, r in enumerate(self.roles))

    def frequency(self) -> tuple[int, int] | None:
        """Return (freq, offset) if the rule of `uniform` gives this pattern, else None.

        Of several rules it takes the one with offset 1, then 2: on those most engines agree.
        """
        if "R" in self.roles:
            return None
        full = self.full_layers
        gaps = sorted({b - a for a, b in pairwise(full)} - {1})
        if len(gaps) > 1:
            return None
        for freq in [*gaps, len(self) - full[-1]]:
            for offset in range(1, len(self) + 1):
                if Pattern.uniform(len(self), max(freq, 1), offset) == self:
                    return max(freq, 1), offset
        return None

    def replace(self, layer: int, role: str) -> Pattern:
        """Return the same pattern with one layer in another role.

        Raises:
            ValueError: the role is not one of F, R and S, or layer 0 would not be F.
            IndexError: there is no such layer.
        """
        layer = range(len(self))[layer]
        if len(role) != 1:
            raise ValueError(f"A layer has one role, F, R or S, not {role!r:.60}.")
        roles = self.roles[:layer] + role + self.roles[layer + 1 :]
        pool = self.pool if "R" in roles else None
        if self.pool_shares and pool:
            pool = self._pools_for(Pattern(roles, self.pool_share))
        return Pattern(roles, pool, self.seen)

    def _pools_for(self, other: Pattern) -> tuple[Fraction, ...]:
        """Return pools for a pattern with other roles: those that its R layers have here.

        A layer that is R there alone has the largest.
        """
        before, found = self.pools(), []
        for layer in sorted(other.publishers()):
            readers = [
                i for i, r in enumerate(other.roles) if r == "R" and other.source(i) == layer
            ]
            sizes = [before.get(layer)]
            sizes += [before[self.source(i)] for i in readers if self.roles[i] == "R"]
            size = next((x for x in sizes if x is not None), self.pool_share)
            assert isinstance(size, Fraction)
            found.append(size)
        return tuple(found)

    def chosen_on(self, seen: Seen) -> Pattern:
        """Return the same pattern, which a search chose on this text, perhaps beside another."""
        return Pattern(self.roles, self.pool, self.seen | seen) if seen else self

    def with_rest(self, role: str, pool_factor: Pool | None = None) -> Pattern:
        """Return the pattern with the same full layers and every other layer in `role` (S or R).

        Raises:
            ValueError: another role, or a pool factor that no layer uses.
        """
        pattern = filled([r == "F" for r in self.roles], role, pool_factor)
        return pattern.chosen_on(self.seen)

    def check(
        self,
        *,
        layers: int | None = None,
        stages: Iterable[int] | None = None,
        reindex: bool = True,
        share: bool = True,
        without_indexer: Iterable[int] = (),
    ) -> Pattern:
        """Return the pattern itself if it can be used under these conditions.

        Args:
            layers: the number of decoder layers it must have.
            stages: first layer of every pipeline stage; each must be F, since ids do not cross
                stages.
            reindex: False refuses R, which no engine knows.
            share: False refuses pools that are a share of the context.
            without_indexer: layers that have no indexer weights and so can be neither F nor R.

        Raises:
            ValueError: the pattern breaks one of the conditions.
        """
        if layers is not None and len(self) != layers:
            raise ValueError(f"The pattern has {len(self)} layers, but the model has {layers}.")
        for start in stages or ():
            if self.roles[start] != "F":
                raise ValueError(
                    f"A pipeline stage begins at layer {start}, which is {self.roles[start]}: it "
                    "must be F, because selections do not cross pipeline stages."
                )
        if not reindex and "R" in self.roles:
            raise ValueError(
                f"Layer {self.roles.index('R')} is R (re-index), but the engine knows only F and S."
            )
        if not share and self.pool_share is not None:
            raise ValueError(
                f"The pool of {self!s:.80} is a share of the context, which only search, evaluate, "
                "overlap and generation with transformers run; take a factor of k, such as @8."
            )
        for layer in without_indexer:
            if layer < len(self) and self.roles[layer] != "S":
                raise ValueError(
                    f"Layer {layer} is {self.roles[layer]}, but the checkpoint has no indexer "
                    "weights for it, so it can only be S (trained with sharing, or pruned by an "
                    "export)."
                )
        return self


def filled(is_full: Sequence[bool], rest: str, pool_factor: Pool | None) -> Pattern:
    """Return the pattern with F where `is_full` says so and `rest` elsewhere."""
    if rest not in ("S", "R"):
        raise ValueError(f"The layers between the full ones can be S or R, not {rest!r:.60}.")
    roles = "".join("F" if full else rest for full in is_full)
    # A pool factor beside S reaches Pattern, which refuses it.
    return Pattern(roles, pool_factor if "R" in roles or rest == "S" else None)


def _roles_of_types(types: Any) -> str:
    if not isinstance(types, Sequence):
        raise ValueError(
            "A pattern is a string of F, R and S or a list of full/shared, not "
            f"{type(types).__name__}."
        )
    names = {"full": "F", "shared": "S", "F": "F", "S": "S", "R": "R"}
    for i, item in enumerate(types):
        if not isinstance(item, str) or item not in names:
            raise ValueError(
                f"Layer {i} of the list is {item!r:.60}; only full and shared are known."
            )
    return "".join(names[t] for t in types)
