"""Resolve the written flags by every engine's rule, restated here without Pattern."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from indexcache.checkpoint import read_config
from indexcache.exporting import export
from indexcache.pattern import Pattern
from tests.exporting.support import LAYERS, PATTERN, UNIFORM, edit_config, load, logits

pytestmark = pytest.mark.usefixtures("one_thread")


Config = dict[str, Any]


def _by_freq(config: Config, offset: int, shift: int = 1) -> str:
    freq = config.get("index_topk_freq") or 1
    offset = config.get("index_skip_topk_offset", offset)
    return "".join("S" if max(i - offset + shift, 0) % freq != 0 else "F" for i in range(LAYERS))


def _by_string(config: Config) -> str | None:
    pattern = config.get("index_topk_pattern")
    if pattern is None:
        return None
    return "".join("S" if i < len(pattern) and pattern[i] == "S" else "F" for i in range(LAYERS))


def _by_types(config: Config) -> str | None:
    types = config.get("indexer_types")
    return None if types is None else "".join({"full": "F", "shared": "S"}[t] for t in types)


def vllm_rule(config: Config) -> str:
    return _by_string(config) or _by_freq(config, 2)


def sglang_new_rule(config: Config) -> str:
    return _by_types(config) or _by_string(config) or _by_freq(config, 2)


def sglang_first_rule(config: Config) -> str:
    if (pattern := config.get("index_topk_pattern")) is not None:
        return "".join("S" if pattern[i] == "S" else "F" for i in range(LAYERS))
    freq = config.get("index_topk_freq", 1)
    return "".join("S" if max(i - 1, 0) % freq != 0 else "F" for i in range(LAYERS))


def tensorrt_rule(config: Config) -> str:
    return "F" + vllm_rule(config)[1:]


def transformers_rule(config: Config) -> str:
    return transformers_types(config) or _by_freq(config, 2)


def transformers_types(config: Config) -> str | None:
    if (types := _by_types(config)) is not None:
        return types
    pattern = config.get("index_topk_pattern")
    return None if pattern is None else "".join({"F": "F", "S": "S"}[c] for c in pattern)


def atom_rule(config: Config) -> str:
    return _by_types(config) or _by_string(config) or _by_freq(config, 1, shift=0)


def types_only_rule(config: Config) -> str:
    return _by_types(config) or "F" * LAYERS


def prime_rule(config: Config) -> str:
    if not config.get("use_index_cache"):
        return "F" * LAYERS
    freq = config.get("index_topk_freq", 1)
    by_freq = "".join("S" if i % freq else "F" for i in range(LAYERS))
    return _by_string(config) or _by_types(config) or by_freq


def megatron_rule(config: Config) -> str:
    freq = config.get("index_topk_freq", 1)
    offset = max(config.get("index_skip_topk_offset", 0), 1)
    return "".join("S" if max(n - offset, 0) % freq != 0 else "F" for n in range(1, LAYERS + 1))


RULES = [
    vllm_rule,
    sglang_new_rule,
    sglang_first_rule,
    tensorrt_rule,
    transformers_rule,
    atom_rule,
    types_only_rule,
    prime_rule,
]

BASES: dict[str, Config] = {
    "plain": {},
    "freq": {"index_topk_freq": 4, "index_skip_topk_offset": 3},
    "freq without offset": {"index_topk_freq": 3},
    "null": {"index_topk_freq": None, "index_skip_topk_offset": None, "index_topk_pattern": None},
    "all": {
        "index_topk_freq": 2,
        "index_skip_topk_offset": 1,
        "index_topk_pattern": "FFSFFS",
        "indexer_types": ["full"] * LAYERS,
    },
}


def flag_value(path: Path, flag: str) -> Config:
    text = path.read_text()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    words = shlex.split(text)
    assert words[0] == flag
    assert len(words) == 2
    return json.loads(words[1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pattern", [PATTERN, *UNIFORM])
def test_every_engine_resolves_the_flags_to_the_same_pattern(base, pattern, broken, tmp_path):
    config = {**read_config(edit_config(broken, indexer_types=None)), **BASES[base]}
    (broken / "config.json").write_text(json.dumps(config))
    export(broken, pattern, tmp_path / "out")
    saved = read_config(tmp_path / "out" / "transformers")
    for name, flag in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
        value = flag_value(tmp_path / "out" / f"{name}.txt", flag)
        assert value == json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for seen in (config | value, saved, saved | value):
            for rule in RULES:
                assert rule(seen) == pattern, rule.__name__
            if pattern in UNIFORM:
                assert megatron_rule(seen) == pattern
            else:  # A reader of the frequency alone runs every indexer, never another pattern.
                assert megatron_rule(seen) == "F" * LAYERS
    assert (
        transformers.GlmMoeDsaConfig(**{**config, **value}).indexer_types
        == Pattern(pattern).to_types()
    )


def test_all_full_flags_are_allowed_for_every_engine_of_deepseek(deepseek, tmp_path):
    result = export(deepseek, "F" * LAYERS, tmp_path / "out")
    assert set(result.files) == {"transformers", "vllm", "sglang"}
    model, info = load(tmp_path / "out" / "transformers")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(load(deepseek)[0]))


def test_deepseek_gets_flags_and_no_checkpoint(deepseek, tmp_path):
    result = export(deepseek, PATTERN, tmp_path / "out", engines=("sglang", "vllm"))
    assert set(result.files) == {"sglang", "vllm"}
    assert all(Path(path).is_file() for paths in result.files.values() for path in paths)
    assert not (tmp_path / "out" / "transformers").exists()
