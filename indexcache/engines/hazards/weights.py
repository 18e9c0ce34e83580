"""Hazards of the weights: missing, surplus, trained with another pattern, outside every pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

from indexcache.configs import mtp_layers
from indexcache.engines.hazards.case import Case, Hazard, Level, difference, numbers
from indexcache.engines.rules import FREQ, PATTERN, TYPES
from indexcache.engines.schedules import Schedule

LOADER_FAILS = ((0, 29), (0, 33))
"""The versions of vLLM, first and last, whose loader fails on surplus indexer tensors."""


def weights(case: Case) -> Iterator[Hazard]:
    """Find full layers without weights, and surplus tensors where loading fails."""
    present = case.with_indexer
    if present is None or case.family in ("minimax_m3", "deepseek_v41"):
        return
    if not present:
        yield Hazard(
            "error",
            "no weights",
            None,
            "The checkpoint has no indexer in any layer, so no layer can be full: it is a dense "
            "model's, or its files are not those of this config.",
        )
        return
    for s in case.schedules:
        if s.roles is None:
            continue
        lacking = [i for i, r in enumerate(s.roles) if r == "F" and i not in present]
        if lacking:
            level = case.level(s.engine)
            keys = s.rule.keys[:2] if s.rule else (PATTERN,)
            fix = f"give a pattern in which they are S, under {' and '.join(keys)}"
            if not keys:
                level = "error" if s.engine in case.named else "warning"
                fix = f"it has no sharing for {case.family}, so choose another engine"
            yield Hazard(
                level,
                "no weights",
                s.engine,
                f"{s.engine} makes layers {numbers(lacking)} full, for "
                "which the checkpoint has no indexer weights (it was trained shared, or pruned): "
                f"{fix}.",
            )
        yield from _surplus(case, s, present)


def _surplus(case: Case, s: Schedule, present: frozenset[int]) -> Iterator[Hazard]:
    rule = s.rule
    if rule is None or rule.engine != "vllm" or rule.keys != (PATTERN, FREQ) or s.roles is None:
        return
    extra = [i for i, r in enumerate(s.roles) if r == "S" and i in present]
    version = case.version
    first, last = LOADER_FAILS
    if not extra or (version is not None and version < first[: len(version)]):
        return
    level: Level = "error"
    if plugin_installed():
        level = "note"
    elif version is not None and version[:2] > last:
        level = "warning"
    yield Hazard(
        level,
        "surplus",
        s.engine,
        f"vllm {'.'.join(map(str, first))} to {'.'.join(map(str, last))} fails to load the "
        f"indexer tensors of the {len(extra)} shared layers: install indexcache[vllm] beside it, "
        "or serve the pruned checkpoint of export --prune.",
    )


def plugin_installed() -> bool:
    """Say whether vLLM is installed here together with this package's plugin."""
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        return False
    plugins = metadata.entry_points(group="vllm.general_plugins")
    return any(plugin.value.startswith("indexcache.") for plugin in plugins)


def native(case: Case) -> Iterator[Hazard]:
    """Say that a model shares by itself, and which of its layers a pattern makes full."""
    own = replace(case, configs={"": case.config}, asked=None, given=False).wanted
    shares = own is not None and "S" in own
    if case.family in ("hy_v4", "deepseek_v41"):
        shares = True
        if own is None:
            own = next((s.roles for s in case.schedules if s.roles), None)
    if not shares or own is None:
        return
    if case.with_indexer and all(i in case.with_indexer for i, r in enumerate(own) if r == "S"):
        return  # Every layer has its indexer.
    if case.given and case.wanted is not None and case.with_indexer is None:
        risky = [
            i
            for i, (a, b) in enumerate(zip(own, case.wanted, strict=False))
            if a == "S" and b == "F"
        ]
        if risky:
            yield Hazard(
                "warning",
                "native",
                None,
                f"The config shares layers {numbers(risky)} by itself, which the pattern makes "
                "full: if the model was trained so, they have no indexer weights; check with the "
                "checkpoint's folder.",
            )
    yield Hazard(
        "note",
        "native",
        None,
        f"The config shares by itself ({own.count('F')} full): if it was trained so, its S layers "
        "have no indexer weights and can never be full, and a search is pointless.",
    )


def next_token(case: Case) -> Iterator[Hazard]:
    """Say that MTP layers are outside every pattern."""
    count = mtp_layers(case.config)
    if count:
        yield Hazard(
            "note",
            "mtp",
            None,
            f"{count} MTP (next-token) layers are outside the pattern and keep their own indexer: "
            "leave them out of its length.",
        )


def training(case: Case) -> Iterator[Hazard]:
    """Find engines that serve another pattern than a training run used."""
    for t in case.trained:
        if t.roles is None:
            yield Hazard(
                "error",
                "training",
                t.engine,
                f"{t.engine} stops: {t.failure} ({case.train_config}).",
            )
            continue
        if t.roles.replace("-", "").startswith("S"):
            yield Hazard(
                "error",
                "training",
                t.engine,
                f"{t.engine} shares the first layer, before which none selects tokens: set the "
                "offset to 1 or more.",
            )
        for s in case.schedules:
            if s.roles is None or s.roles == t.roles:
                continue
            level = case.level(s.engine)
            if s.rule is not None and not s.rule.keys and s.rule.engine not in case.named:
                level = "warning"
            if "S" not in t.roles:
                level = "warning"
            why = ", because they count the offset of a frequency differently"
            yield Hazard(
                level,
                "training",
                s.engine,
                f"{t.engine} trains with {t.full} full layers, but {s.engine} would serve {s.full} "
                f"({difference(s.roles, t.roles)}): set {PATTERN} and {TYPES} to the trained "
                f"pattern{why if t.key == FREQ else ''}.",
            )
