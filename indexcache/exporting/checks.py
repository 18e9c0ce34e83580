"""Check a pattern against a checkpoint before anything is written.

An engine that is given a wrong pattern usually runs another one without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from indexcache.checkpoint import INDEXER_PARTS, indexer_part, read_config, tensor_names
from indexcache.configs import text_section
from indexcache.pattern import Pattern, stage_starts

ENGINES = ("transformers", "vllm", "sglang")
MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
NATIVE_SHARING = ("glm_moe_dsa",)  # those on which stock transformers shares indexers


def check_export(
    checkpoint: str | Path,
    pattern: Pattern | str,
    engines: Sequence[str] = ENGINES,
    stages: int = 1,
) -> list[str]:
    """Check that `engines` can serve `pattern` from `checkpoint` in `stages` pipeline stages.

    Returns:
        Warnings, one sentence each: true things to know that do not make the export wrong.

    Raises:
        ValueError: an unknown engine or model type; a folder that is not a complete safetensors
            checkpoint; a pattern with R, of another length, or with a stage that does
            not begin with F; an F layer whose indexer is not in the checkpoint; or an engine that
            cannot share on this model.
    """
    engines = check_engines(engines)
    pattern = Pattern.of(pattern)
    config = read_config(checkpoint)
    section = text_section(config)
    model_type = section.get("model_type") or config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{checkpoint}: the model_type {model_type!r:.60} is not known to have a DSA indexer "
            f"that can be shared; known are {', '.join(MODEL_TYPES)}."
        )
    starts = stage_starts(section["num_hidden_layers"], stages)
    pattern.check(layers=section["num_hidden_layers"], stages=starts, reindex=False)
    if "transformers" in engines and model_type not in NATIVE_SHARING and "S" in pattern.roles:
        raise ValueError(
            f"The transformers library has no index sharing for {model_type}: its config keys "
            "would be ignored and every layer stay full; run the pattern with indexcache's "
            "use_pattern, or export it for vllm or sglang."
        )
    without_indexer = _check_indexers(Path(checkpoint), pattern)
    return [
        *_pattern_warnings(section, pattern, without_indexer),
        *_engine_warnings(config, pattern, engines),
        *_stage_warnings(len(pattern), starts),
        *_code_warnings(Path(checkpoint), engines),
    ]


def check_engines(engines: Sequence[str]) -> tuple[str, ...]:
    """Return the engines without repetition; a single name may be given as a string.

    Raises:
        ValueError: no engine, or an unknown one.
    """
    names = tuple(dict.fromkeys([engines] if isinstance(engines, str) else engines))
    for name in names:
        if name not in ENGINES:
            raise ValueError(
                f"The engine {name!r:.60} is not known; known are {', '.join(ENGINES)}."
            )
    if not names:
        raise ValueError(f"No engine was given; known are {', '.join(ENGINES)}.")
    return names


def _check_indexers(checkpoint: Path, pattern: Pattern) -> tuple[int, ...]:
    """Check that every F layer has a complete indexer, and return the layers without any."""
    present: dict[int, set[str]] = {}
    for name in tensor_names(checkpoint):
        if (match := indexer_part(name)) is not None:
            layer, tensor = match
            present.setdefault(layer, set()).add(tensor)
    absent = [layer for layer in pattern.full_layers if layer not in present]
    if absent:
        raise ValueError(
            f"{checkpoint}: the pattern wants full indexers at layers {_numbers(absent)}, but the "
            "checkpoint has no indexer weights there (it was trained shared, or pruned by an "
            "export): these can only be S."
        )
    for layer in pattern.full_layers:
        if missing := [name for name in INDEXER_PARTS if name not in present[layer]]:
            raise ValueError(
                f"{checkpoint}: the indexer of layer {layer}, which is F, lacks "
                f"{', '.join(missing)}; fetch the checkpoint again."
            )
    return tuple(layer for layer in range(len(pattern)) if layer not in present)


def _pattern_warnings(
    section: dict[str, Any], pattern: Pattern, without_indexer: tuple[int, ...]
) -> list[str]:
    warnings = []
    if without_indexer:
        warnings.append(
            f"The checkpoint has no indexer at layers {_numbers(without_indexer)}: it was trained "
            "shared, or pruned by an export. These layers can only be S, and a search is pointless "
            "for a model that was trained shared."
        )
    replaced = _pattern_of(section)
    if replaced is not None and "S" in replaced.roles:
        sharing = f"{replaced}, which the export replaces"
        if replaced == pattern:
            sharing = "this same pattern"
        warnings.append(f"The checkpoint's config already shares: it gives {sharing}.")
    mtp_layers = section.get("num_nextn_predict_layers")
    if isinstance(mtp_layers, int) and mtp_layers > 0:
        warnings.append(
            f"The checkpoint's {mtp_layers} multi-token-prediction (MTP) layers are outside the "
            "pattern and keep their own indexer."
        )
    k = section.get("index_topk")
    context = section.get("max_position_embeddings")
    if "S" not in pattern.roles or not isinstance(k, int):
        return warnings
    if isinstance(context, int) and context <= k:
        warnings.append(
            f"Sharing is a no-op here: the context of at most {context} tokens never exceeds "
            f"index_topk = {k}."
        )
    else:
        warnings.append(
            f"Sharing is a no-op in contexts of up to index_topk = {k} tokens: check quality on "
            "much longer ones."
        )
    return warnings


def _engine_warnings(
    config: dict[str, Any], pattern: Pattern, engines: tuple[str, ...]
) -> list[str]:
    if "S" not in pattern.roles:
        return []
    warnings = []
    if "vllm" in engines:
        warnings.append(
            "Some versions of vLLM fail to load a checkpoint that still has the indexers of S "
            "layers: give vLLM the pruned checkpoint where there is one."
        )
    if "sglang" in engines:
        warnings.append(
            "Older versions of SGLang refuse sharing together with two-batch overlap: leave it off "
            "there."
        )
        if text_section(config) is not config:
            warnings.append(
                "Older versions of SGLang apply overrides only to the top of a multimodal config, "
                "where the pattern is not read: check its log, or serve a checkpoint whose "
                "config.json carries the pattern."
            )
    return warnings


def _stage_warnings(layers: int, starts: tuple[int, ...]) -> list[str]:
    """Warn where engines cut the layers into stages in another way than `stage_starts`.

    vLLM puts the remainder into the middle stages, SGLang into the last ones. A pattern that begins
    every stage with F here would not do so there, unless they are given the same cut.
    """
    if layers % len(starts) == 0:
        return []
    cut = ",".join(str(b - a) for a, b in zip(starts, [*starts[1:], layers], strict=True))
    warning = (
        f"{layers} layers do not divide into {len(starts)} pipeline stages, and engines cut them "
        f"in different ways: set VLLM_PP_LAYER_PARTITION or SGLANG_PP_LAYER_PARTITION to {cut}, "
        "which is what was checked."
    )
    return [warning]


def _code_warnings(checkpoint: Path, engines: tuple[str, ...]) -> list[str]:
    if "transformers" not in engines or not any(checkpoint.glob("*.py")):
        return []
    warning = (
        "The checkpoint brings Python files, which are not copied: a tokenizer or model that needs "
        "them must be loaded from the original."
    )
    return [warning]


def _pattern_of(section: dict[str, Any]) -> Pattern | None:
    """Return the config's pattern, or None where it has no valid one: it is replaced anyway."""
    try:
        return Pattern.from_config(section)
    except ValueError:
        return None


def _numbers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
