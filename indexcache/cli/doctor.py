"""The verb `doctor`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output, Spec
from indexcache.cli.results import deliver

DoctorEngine = Literal["transformers", "vllm", "sglang", "tensorrt-llm", "atom", "llama.cpp"]
GATE_FAILED = 1


def doctor(
    model: Annotated[
        str, Parameter(help="Checkpoint folder, tiny, or a config.json without its weights.")
    ],
    *,
    pattern: Annotated[
        Spec | None,
        Parameter(
            help="Examine the exported overrides of this pattern. Overrides of your own, as JSON "
            "or in a file, are taken as they are, and so is a string of roles that is no pattern. "
            "The default is what the config itself asks for."
        ),
    ] = None,
    engine: Annotated[
        tuple[DoctorEngine, ...] | None,
        Parameter(metavar="ENGINE", help="Engines to examine. The default is all."),
    ] = None,
    engine_version: Annotated[
        str | None, Parameter(metavar="V", help="Version of the one engine. The default is any.")
    ] = None,
    tensor_parallel_size: Annotated[
        int, Parameter(help="Number of GPUs that share each layer.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, Parameter(help="Number of pipeline stages, which each engine cuts in its own way.")
    ] = 1,
    train_config: Annotated[
        Path | None,
        Parameter(
            metavar="FILE",
            help="Settings of a training run (Megatron-LM or prime-rl), to compare with serving.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        Parameter(
            metavar="FILE",
            help="The certificate.json of `evaluate --certificate`: fail unless it holds for this "
            "checkpoint, its config, and the pattern that is asked for.",
        ),
    ] = None,
    output: Annotated[Output, FLAT] = Output(),
) -> int:
    """Say what each engine would really run, and fail where that is not what is asked for.

    It prints the schedule of every engine and the key that decides, and then every hazard: ignored
    keys, patterns that are short or were made for another model, pipeline stages that begin with a
    shared layer, missing or surplus weights. The exit code is 1 if one of them is an error.
    """
    from indexcache.checkpoint import read_config, resolve_config
    from indexcache.engines.doctor import Hazard, examine
    from indexcache.engines.rules import ENGINES
    from indexcache.engines.schedules import family_of
    from indexcache.evals.certificate import check_certificate

    path = resolve_config(model)
    config = read_config(path)
    family_of(config)
    names = engine or ENGINES
    configs, asked = None, None
    if pattern is not None:
        configs, asked = _given(pattern, config, names)
    result = examine(
        path,
        config,
        configs=configs,
        asked=asked,
        engines=engine,
        version=engine_version,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        train_config=train_config,
    )
    if certificate is not None:
        found = check_certificate(certificate, path, config, roles=result.asked, overridden=configs)
        result = result.with_hazards(
            Hazard("error" if f.error else "note", "certificate", None, f.text) for f in found
        )
    deliver(result.table(), result.to_json(), output)
    return GATE_FAILED if result.failed else 0


def _given(
    spec: str, config: dict[str, Any], names: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the config as each engine sees it with --pattern, and the roles that it asks for.

    Raises:
        ValueError: the specification is neither a pattern nor overrides.
    """
    from indexcache.configs import text_section
    from indexcache.engines.hazards import asked_by
    from indexcache.engines.overriding import overridden, without_sharing
    from indexcache.engines.schedules import family_of
    from indexcache.exporting.applied import applied
    from indexcache.pattern import Pattern
    from indexcache.spec import parse_pattern

    layers = text_section(config)["num_hidden_layers"]
    own = _overrides(spec)
    if own is None and re.fullmatch("[A-Za-z]{2,}", spec) and not Path(spec).exists():
        try:
            Pattern(spec).check(layers=layers, reindex=False)
        except ValueError:
            if spec not in ("full", "all"):
                own = _literal(spec, config)
    if own is not None:
        asked = asked_by(overridden("", without_sharing(config), own), family_of(config))
        return {name: overridden(name, config, own) for name in names}, asked
    named = parse_pattern(spec, layers)
    return applied(config, named.pattern, names), named.pattern.roles


def _literal(roles: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides that somebody would write for a string of roles, right or wrong."""
    from indexcache.configs import is_nested

    keys = {"use_index_cache": True, "index_topk_pattern": roles, "indexer_types": None}
    return {"text_config": keys} if is_nested(config) else keys


def _overrides(spec: str) -> dict[str, Any] | None:
    """Return the overrides that a specification or its file holds; None for a pattern."""
    from indexcache.overrides import SHARING_KEYS, flag_values, levels_of, unwrapped
    from indexcache.pattern import MAX_FILE
    from indexcache.reading import parse_json, read_text

    text = spec
    if not spec.startswith("{"):
        path = Path(spec)
        if not path.is_file() or path.suffix in (".safetensors", ".toml"):
            return None
        text = read_text(path, most=MAX_FILE).strip()
    try:
        value = parse_json(text)
    except ValueError:
        flags = flag_values(text)
        value = flags[0] if len(flags) == 1 else None
    if not isinstance(value, dict):
        return None
    value = dict(unwrapped(value))
    levels = levels_of(value)
    if "pattern" in value or any("num_hidden_layers" in level for level in levels):
        return None
    return value if any(key in level for level in levels for key in SHARING_KEYS) else None
