"""Check a pattern against a checkpoint before anything is written.

An engine that is given a wrong pattern usually runs another one without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from indexcache.checkpoint import (
    INDEX_NAME,
    INDEXER_PARTS,
    config_facts,
    has_weights,
    indexer_part,
    listed_names,
    read_config,
    resolve_config,
)
from indexcache.configs import MODEL_TYPES as MODEL_TYPES
from indexcache.configs import model_type_of, text_section
from indexcache.engines.schedules import load_failure
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern, stage_starts

ENGINES = ("transformers", "vllm", "sglang", "tensorrt-llm")
CHECKPOINT_ENGINES = ("transformers", "tensorrt-llm")
"""Engines that read the pattern from the config.json of a checkpoint, and take no flag."""
NATIVE_SHARING = ("glm_moe_dsa",)  # those on which stock transformers shares indexers


def check_export(
    checkpoint: str | Path,
    pattern: Pattern | str,
    engines: Sequence[str] | None = ENGINES,
    stages: int = 1,
) -> list[str]:
    """Check that `engines` can serve `pattern` from `checkpoint` in `stages` pipeline stages.

    Where only config.json is there, the pattern is checked against it alone, and a warning says so.

    Returns:
        Warnings, one sentence each: true things to know that do not make the export wrong.

    Raises:
        ValueError: an unknown engine or model type; a folder that is not a complete safetensors
            checkpoint; a pattern with R, of another length, or with a stage that does
            not begin with F; an F layer whose indexer is not in the checkpoint; or an engine that
            cannot share on this model.
    """
    pattern = Pattern.of(pattern)
    path = resolve_config(checkpoint)
    config = read_config(path)
    section = text_section(config)
    model_type = check_model_type(config, path)
    starts = stage_starts(section["num_hidden_layers"], stages)
    pattern.check(layers=section["num_hidden_layers"], stages=starts, reindex=False)
    engines = check_engines(engines, config, pattern, path)
    if "transformers" in engines and not transformers_shares(model_type, pattern):
        raise ValueError(
            f"The transformers library has no index sharing for {model_type}: its config keys "
            "would be ignored and every layer stay full; run the pattern with indexcache's "
            "use_pattern, or export it for vllm or sglang (--engine vllm sglang)."
        )
    facts = config_facts(path, config)
    native = native_in(section)
    if has_weights(path) or set(engines) & set(CHECKPOINT_ENGINES):
        without_indexer = _check_indexers(_folder_with_weights(path), pattern)
        warnings = _weight_warnings(path, without_indexer)
    else:
        warnings = [_unchecked(path, native, pattern)]
    return [
        *warnings,
        *_pattern_warnings(section, pattern, native),
        *_mtp_warnings(facts["mtp_layers"]),
        *_noop_warnings(section, pattern),
        *_engine_warnings(config, pattern, engines),
        *_stage_warnings(len(pattern), starts),
        *_code_warnings(path, engines),
    ]


def check_model_type(config: dict[str, Any], where: str | Path) -> str:
    """Return the model type of a config.

    Raises:
        ValueError: it is not known to have an indexer that can be shared.
    """
    model_type = model_type_of(config)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{where}: the model_type {model_type!r:.60} is not known to have a DSA indexer "
            f"that can be shared; known are {', '.join(MODEL_TYPES)}."
        )
    return str(model_type)


def transformers_shares(model_type: str, pattern: Pattern) -> bool:
    """Say whether stock transformers obeys the pattern on a model of this type."""
    return model_type in NATIVE_SHARING or "S" not in pattern.roles


def check_engines(
    engines: Sequence[str] | None, config: dict[str, Any], pattern: Pattern, path: Path
) -> tuple[str, ...]:
    """Return the engines without repetition; a single name may be given as a string.

    None stands for all that can serve the pattern from what lies at `path`.

    Raises:
        ValueError: no engine, or an unknown one.
    """
    if engines is None:
        shares = transformers_shares(model_type_of(config), pattern)
        unable = set() if has_weights(path) else set(CHECKPOINT_ENGINES)
        unable |= set() if shares else {"transformers"}
        return tuple(name for name in ENGINES if name not in unable)
    names = tuple(dict.fromkeys([engines] if isinstance(engines, str) else engines))
    for name in names:
        if name not in ENGINES:
            raise ValueError(
                f"The engine {name!r:.60} is not known; known are {', '.join(ENGINES)}."
            )
    if not names:
        raise ValueError(f"No engine was given; known are {', '.join(ENGINES)}.")
    return names


def _folder_with_weights(path: Path) -> Path:
    """Return the folder of a checkpoint that is to be written anew.

    Raises:
        ValueError: it is a config.json, or holds nothing else.
    """
    if path.is_file() or not (has_weights(path) or any(path.glob("*.bin"))):
        raise ValueError(
            f"{path}: there are no weights, so no checkpoint can be written; --engine vllm sglang "
            "without --prune writes flags, which need none."
        )
    return path


def _unchecked(path: Path, native: Pattern | None, pattern: Pattern) -> str:
    """Say that no weights were there to check, and what the config alone says about them."""
    said = (
        f"{path}: there are no weights, so the pattern was checked against the config alone; "
        "whether every full layer has an indexer is unchecked."
    )
    risky = [i for i in pattern.full_layers if native is not None and native[i] == "S"]
    if not risky:
        return said
    return said[:-1] + (
        f", and the config shares layers {_numbers(risky)}, which have none if it was trained so."
    )


def _check_indexers(checkpoint: Path, pattern: Pattern) -> tuple[int, ...]:
    """Check that every F layer has a complete indexer, and return the layers without any."""
    present: dict[int, set[str]] = {}
    for name in listed_names(checkpoint):
        if (match := indexer_part(name)) is not None:
            layer, tensor = match
            present.setdefault(layer, set()).add(tensor)
    if not present:
        raise ValueError(
            f"{checkpoint}: there is no indexer in any layer, so this is a dense checkpoint: there "
            "is no selection to share."
        )
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


def has_surplus(path: Path, pattern: Pattern) -> bool:
    """Say whether S layers have indexer tensors; they count as there where no weights can tell."""
    if not has_weights(path):
        return "S" in pattern.roles
    parts = (indexer_part(name) for name in listed_names(path))
    layers = {part[0] for part in parts if part is not None and part[0] < len(pattern)}
    return any(pattern[layer] == "S" for layer in layers)


def _weight_warnings(path: Path, without_indexer: tuple[int, ...]) -> list[str]:
    warnings = []
    if without_indexer:
        warnings.append(
            f"The checkpoint has no indexer at layers {_numbers(without_indexer)}: it was trained "
            "shared, or pruned by an export. These layers can only be S, and a search is pointless "
            "for a model that was trained shared."
        )
    if not any(path.glob("*.safetensors")):
        warnings.append(
            f"{path}: the indexers were checked by the names in {INDEX_NAME}; the weight files are "
            "not there."
        )
    return warnings


def _pattern_warnings(
    section: dict[str, Any], pattern: Pattern, native: Pattern | None
) -> list[str]:
    if native is None:
        keys = [key for key in SHARING_KEYS if section.get(key) is not None]
        return [
            f"The checkpoint's config.json has a pattern that cannot be ({', '.join(keys)}), which "
            "the export replaces."
        ]
    if "S" not in native.roles:
        return []
    sharing = "this same pattern" if native == pattern else f"{native}, which the export replaces"
    return [f"The checkpoint's config already shares: it gives {sharing}."]


def _mtp_warnings(mtp_layers: int) -> list[str]:
    if not mtp_layers:
        return []
    return [
        f"The checkpoint's {mtp_layers} multi-token-prediction (MTP) layers are outside the "
        "pattern and keep their own indexer."
    ]


def _noop_warnings(section: dict[str, Any], pattern: Pattern) -> list[str]:
    k = section.get("index_topk")
    context = section.get("max_position_embeddings")
    if "S" not in pattern.roles or not isinstance(k, int):
        return []
    if isinstance(context, int) and context <= k:
        warning = (
            f"Sharing is a no-op here: the context of at most {context} tokens never exceeds "
            f"index_topk = {k}."
        )
    else:
        warning = (
            f"Sharing is a no-op in contexts of up to index_topk = {k} tokens: check quality on "
            "much longer ones."
        )
    return [warning]


def _engine_warnings(
    config: dict[str, Any], pattern: Pattern, engines: tuple[str, ...]
) -> list[str]:
    if "S" not in pattern.roles:
        return []
    warnings = []
    if "vllm" in engines:
        warnings.append(
            "Some versions of vLLM (0.29 to 0.33) fail to load a checkpoint that still has the "
            "indexers of S layers: give vLLM a pruned one, which --prune writes."
        )
    stops = load_failure(config)
    if stops is not None and set(engines) & {"vllm", "sglang"}:
        warnings.append(
            f"vLLM and SGLang stop at the original config.json before a flag counts ({stops}): "
            "correct it, or serve the exported checkpoint, whose config.json is right."
        )
    if "sglang" in engines:
        warnings.append(
            "Older versions of SGLang refuse sharing together with two-batch overlap: leave it off "
            "there."
        )
        if text_section(config) is not config:
            warnings.append(
                "SGLang merges overrides of a multimodal config's text_config since 0.5.23 at the "
                "latest; older versions may replace all of it, and then fail: serve a checkpoint "
                "whose config.json carries the pattern there."
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
    if not set(engines) & set(CHECKPOINT_ENGINES) or not any(checkpoint.glob("*.py")):
        return []
    warning = (
        "The checkpoint brings Python files, which are not copied: a tokenizer or model that needs "
        "them must be loaded from the original."
    )
    return [warning]


def native_in(section: dict[str, Any]) -> Pattern | None:
    """Return the config's pattern, or None where it has no valid one: it is replaced anyway."""
    try:
        return Pattern.from_config(section)
    except ValueError:
        return None


def _numbers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
