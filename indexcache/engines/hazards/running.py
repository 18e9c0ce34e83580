"""Hazards of what an engine runs: failures, ignored keys, pipeline stages, versions."""

from __future__ import annotations

from collections.abc import Iterator

from indexcache.configs import text_section
from indexcache.engines.hazards.case import Case, Hazard, Level, difference, listed, meant, numbers
from indexcache.engines.rules import CLI_FACTOR, FREQ, PATTERN, SOURCES, TYPES, Rule
from indexcache.engines.schedules import Schedule, load_failure, pipeline_starts

SENDS_IDS = (0, 5, 23)
"""The first version of SGLang that was seen to send selections from one stage to the next."""


def failures(case: Case) -> Iterator[Hazard]:
    """Find engines that stop, or read garbage."""
    for s in case.schedules:
        if s.failure:
            yield Hazard(
                case.level(s.engine),
                "fails",
                s.engine,
                f"{s.engine} stops: {s.failure}; give it a string of F and S, one for each layer, "
                "that begins with F.",
            )
        elif s.roles and s.roles.replace("-", "").startswith("S"):
            yield Hazard(
                case.level(s.engine),
                "first",
                s.engine,
                f"{s.engine} shares the first layer with sparse attention without a check, and it "
                f"would read ids that no layer has written: {s.key or 'the pattern'} must make "
                "it full.",
            )
    yield from _config_class(case)


def _config_class(case: Case) -> Iterator[Hazard]:
    """Find a config.json that vLLM and SGLang cannot load, because transformers' class cannot."""
    engines = [s.engine for s in case.schedules if s.engine in ("vllm", "sglang")]
    failure = load_failure(case.config)
    if engines and failure is not None:
        yield Hazard(
            "error",
            "fails",
            None,
            f"{listed(engines)} load this config.json through the class of transformers, which "
            f"stops before an override counts: {failure}; correct the config.json, or serve the "
            "checkpoint of export. The roles above hold only where the key is an override.",
        )


def ignored(case: Case) -> Iterator[Hazard]:
    """Find engines that run another pattern than is asked for, and say which key they miss."""
    wanted = case.wanted
    for s in case.schedules:
        if s.rule is None or s.roles is None:
            if s.rule is None and wanted is not None and "S" in wanted and s.engine in case.named:
                yield Hazard(
                    "error", "unknown", s.engine, f"{s.engine} is not known to serve {case.family}."
                )
            continue
        if wanted is None and s.key == CLI_FACTOR:
            yield Hazard(
                case.level(s.engine),
                "rule",
                s.engine,
                f"{s.engine} reads {CLI_FACTOR}, which the other engines ignore, and runs {s.full} "
                f"of {s.indexed} indexers: {_fix(s.rule)}, which wins there.",
            )
        if wanted is None or s.roles == wanted:
            if s.roles != wanted or not case.given:
                yield from _ignored_keys(case, s)
            continue
        if not s.rule.keys:
            if "S" in wanted:
                level: Level = "error" if s.rule.engine in case.named else "warning"
                yield Hazard(
                    level,
                    "no sharing",
                    s.engine,
                    f"{s.engine} has no index sharing for {case.family}: it ignores every key and "
                    f"runs all {s.full} indexers, so choose another engine.",
                )
            continue
        keys = [
            k
            for k, roles in meant(case.configs[s.rule.engine], case.family).items()
            if roles != s.roles
        ]
        missed = [k for k in keys if k != s.key]
        why = f"ignores {listed(missed)}" if missed else f"reads {s.key or 'no key'} in its own way"
        yield Hazard(
            case.level(s.engine),
            "ignored" if missed else "rule",
            s.engine,
            f"{s.engine} {why} and runs {s.full} of {s.indexed} indexers instead of "
            f"{wanted.count('F')} ({difference(s.roles, wanted)}): {_fix(s.rule)}.",
        )


def _ignored_keys(case: Case, s: Schedule) -> Iterator[Hazard]:
    """Find keys that say something else than what an engine runs, where it runs what is asked."""
    assert s.rule is not None
    for key, roles in meant(case.configs[s.rule.engine], case.family).items():
        if roles is not None and roles != s.roles and key not in s.rule.keys:
            yield Hazard(
                case.level(s.engine),
                "ignored",
                s.engine,
                f"{s.engine} ignores {key}, which asks for {roles.count('F')} full layers, and "
                f"runs {s.full}: {_fix(s.rule)}.",
            )


def _fix(rule: Rule) -> str:
    if PATTERN in rule.keys and TYPES in rule.keys:
        return f"set {TYPES} and {PATTERN} to the same pattern"
    if TYPES in rule.keys:
        return f"set {TYPES}, which it reads"
    if PATTERN in rule.keys:
        return f"set {PATTERN}, which it reads"
    if SOURCES in rule.keys:
        return f"only {SOURCES} counts there, and the weights were trained for it"
    return f"only {FREQ} counts there, with use_index_cache in the decoder's section"


def nowhere(case: Case) -> Iterator[Hazard]:
    """Find a pattern that no engine runs."""
    wanted = case.wanted
    if wanted is None or "S" not in wanted or not case.given:
        return
    if not any(s.roles == wanted and not s.failure for s in case.schedules):
        yield Hazard(
            "error",
            "nowhere",
            None,
            "None of these engines runs the pattern that was given: choose another --engine, or "
            "another pattern.",
        )


def stages(case: Case) -> Iterator[Hazard]:
    """Find pipeline stages that begin with a shared layer, by each engine's own cut."""
    if case.stages == 1:
        return
    for s in case.schedules:
        if s.rule is None or s.roles is None:
            continue
        name = s.rule.engine
        starts = pipeline_starts(name, case.layers, case.stages)
        bad = [i for i in starts[1:] if _first_sparse(s.roles, i, starts) == "S"]
        if not bad or name == "transformers":
            continue
        level: Level = case.level(s.engine)
        extra = ""
        if name == "sglang" and (case.version or ()) >= SENDS_IDS:
            level, extra = "note", " (this version sends the ids from stage to stage)"
        variable = {"vllm": "VLLM_PP_LAYER_PARTITION", "sglang": "SGLANG_PP_LAYER_PARTITION"}.get(
            name
        )
        cut = f"cut the stages elsewhere with {variable}, or " if variable else ""
        yield Hazard(
            level,
            "stage",
            s.engine,
            f"{s.engine} begins pipeline stages at layers {numbers(starts)}, and {numbers(bad)} "
            f"would read a selection of another stage{extra}: {cut}make those layers full.",
        )


def _first_sparse(roles: str, start: int, starts: tuple[int, ...]) -> str:
    """Return the role of the first layer with sparse attention in the stage that starts there."""
    end = next((b for b in starts if b > start), len(roles))
    return roles[start:end].replace("-", "")[:1]


def tensor_parallel(case: Case) -> Iterator[Hazard]:
    """Find a number of ranks that does not divide the attention heads."""
    heads = text_section(case.config).get("num_attention_heads")
    if isinstance(heads, int) and heads % case.tensor:
        yield Hazard(
            "error",
            "tensor parallel",
            None,
            f"num_attention_heads is {heads}, which --tensor-parallel-size {case.tensor} does not "
            "divide: choose a divisor.",
        )


def overlap(case: Case) -> Iterator[Hazard]:
    """Say that two-batch overlap excludes sharing in SGLang."""
    for s in case.schedules:
        if (
            s.engine == "sglang"
            and "S" in (s.roles or "")
            and TYPES in (s.rule.keys if s.rule else ())
        ):
            yield Hazard(
                "note",
                "overlap",
                s.engine,
                "sglang refuses shared layers together with --enable-two-batch-overlap: leave that "
                "flag out.",
            )


def versions(case: Case) -> Iterator[Hazard]:
    """Find a version that was not read."""
    if case.version is None:
        return
    for name in case.named:
        rules = [s.rule for s in case.schedules if s.rule is not None and s.rule.engine == name]
        asked = ".".join(map(str, case.version))
        for rule in rules:
            if rule.last is not None and case.version[: len(rule.last)] > rule.last:
                yield Hazard(
                    "warning",
                    "version",
                    name,
                    f"{name} {asked} is newer than what was read ({rule.versions}): its rule may "
                    "have changed, so compare the schedule that it logs.",
                )
        if not rules:
            yield Hazard(
                "error", "version", name, f"{name} {asked} is not known to serve {case.family}."
            )
