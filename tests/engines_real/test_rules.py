"""Compare the rules with the engines' own code: transformers, vLLM and SGLang."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
import types as module_types
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from indexcache.configs import is_nested, text_section
from indexcache.engines.overriding import loaded
from indexcache.engines.rules import RULES
from indexcache.engines.schedules import (
    family_of,
    indexed_layers,
    load_failure,
    pipeline_starts,
    resolve,
)
from indexcache.exporting.applied import applied
from indexcache.exporting.engines import FLAGS
from indexcache.pattern import Pattern
from tests.engines.shapes import DEEPSEEK, GLM, SHAPES, types

from .code import ROOT, condition, functions, statements, text, tree

needs_wheels = pytest.mark.skipif(
    not (ROOT / "sglang.txt").exists(), reason="make test-engines fetches the wheels"
)

STOPPED = (KeyError, TypeError, ValueError, IndexError, StrictDataclassError)

PATTERNS = [None, "FSSFSS", "FSS", "FSSFSSFSS", "fssfss", "SFSFSF", "FXSSFS", "", types("FSSFSS")]
PATTERNS += [list("FSSFSS"), [None] * 6]
TYPES = [None, types("FFSSFS"), types("FSS"), types("FSSFSSFS"), ["full", "x", "shared"] * 2]
TYPES += ["FSSFSS", [None] * 6]
RATES = [
    {},
    {"index_topk_freq": 1},
    {"index_topk_freq": 3},
    {"index_topk_freq": 4, "index_skip_topk_offset": 1},
    {"index_topk_freq": 2, "index_skip_topk_offset": 3},
    {"index_topk_freq": 2, "index_skip_topk_offset": 0},
    {"index_topk_freq": 0},
    {"index_topk_freq": None},
    {"index_topk_freq": 3, "index_skip_topk_offset": None},
]


def sections(base: dict[str, Any]) -> list[dict[str, Any]]:
    """Return configs with every combination of keys, good and bad."""
    return [
        base
        | rates
        | ({} if pattern is None else {"index_topk_pattern": pattern})
        | ({} if kinds is None else {"indexer_types": kinds})
        for pattern, kinds, rates in itertools.product(PATTERNS, TYPES, RATES)
    ]


def ours(engine: str, config: dict[str, Any], platform: str = "") -> str | None:
    """Return the roles that our rule gives; None where the engine stops."""
    family = family_of(config)
    (rule,) = [
        r
        for r in RULES
        if r.engine == engine and family in r.families and r.platform in ("", platform)
    ]
    return resolve(rule, loaded(engine, config), family).roles


def theirs(shared: Any, config: dict[str, Any]) -> str | None:
    """Return the roles by `shared(i)` of an engine; None where it raises."""
    indexed = indexed_layers(config, family_of(config))
    try:
        return "".join(("S" if shared(i) else "F") if has else "-" for i, has in enumerate(indexed))
    except (AssertionError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


# -- transformers ---------------------------------------------------------------------------------


def of_transformers(config: dict[str, Any]) -> str | None:
    """Return the roles by the config class of transformers and the test in its layers."""
    try:
        built = transformers.AutoConfig.for_model(**config).get_text_config()
    except STOPPED:
        return None
    if not hasattr(type(built), "indexer_types"):  # Any key of a config.json is an attribute.
        return theirs(lambda i: False, config)
    return theirs(lambda i: built.indexer_types[i] == "shared", config)


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "deepseek_v32", "hy_v4", "glm5_next_text"])
def test_transformers_runs_its_rule(model_type):
    base = {"model_type": model_type, "num_hidden_layers": 6}
    if model_type == "glm5_next_text":
        base["layer_types"] = ["indexed_attention"] * 6
    for config in sections(base):
        assert of_transformers(config) == ours("transformers", config), config


def test_the_config_class_of_transformers_stops_where_we_say():
    """vLLM and SGLang load glm_moe_dsa through it."""
    for config in sections({"model_type": "glm_moe_dsa", "num_hidden_layers": 6}):
        try:
            transformers.AutoConfig.for_model(**config)
        except STOPPED:
            assert load_failure(config) is not None, config
        else:
            assert load_failure(config) is None, config


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_runs_real_shapes_as_we_say(name):
    config = SHAPES[name][0]
    if config["model_type"] in ("some_vl", "deepseek_v41"):
        return  # It does not know these.
    assert of_transformers(config) == ours("transformers", config)


# -- vLLM -----------------------------------------------------------------------------------------


def namespace(config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**text_section(config))


@cache
def vllm_class(module: str) -> Callable[..., dict[str, Any]]:
    """Return the statements of a DSA layer's constructor that decide whether it is shared."""
    name = vllm_name(module)

    keys = ("index_topk_freq", "index_topk_pattern", "index_skip_topk_offset")

    def wanted(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return name in text(node) and "index_topk_pattern" in text(node.test)
        return isinstance(node, ast.Assign) and text(node.targets[0]).strip("_") in keys

    return statements(module, "__init__", wanted)


def vllm_name(module: str) -> str:
    return "_skip_topk" if "deepseek_v2" in module else "skip_topk"


def of_vllm_class(config: dict[str, Any], module: str) -> str | None:
    """Return the roles by the statements of a DSA layer's constructor."""
    run, name, view = vllm_class(module), vllm_name(module), namespace(config)
    return theirs(lambda i: run(config=view, layer_id=i, _skip_topk=False)[name], config)


CLASSES = ["vllm/models/deepseek_v32/attention.py", "vllm/model_executor/models/deepseek_v2.py"]


@needs_wheels
@pytest.mark.parametrize("module", CLASSES)
def test_vllm_runs_its_rule(module):
    for config in sections({"model_type": "deepseek_v32", "num_hidden_layers": 6}):
        assert of_vllm_class(config, module) == ours("vllm", config), config


@needs_wheels
@pytest.mark.parametrize("name", SHAPES)
def test_vllm_and_sglang_run_real_shapes_as_we_say(name):
    config = SHAPES[name][0]
    family = family_of(config)
    if family in ("deepseek_v32", "glm_moe_dsa"):
        for module in CLASSES:
            assert of_vllm_class(config, module) == ours("vllm", config)
    if family in ("deepseek_v32", "glm_moe_dsa", "glm5_next"):
        assert of_sglang(config) == ours("sglang", config)
    if family == "glm5_next":
        assert of_vllm_glm5_next(config) == ours("vllm", config)
    if family == "hy_v4":
        assert of_vllm_hy(config) == ours("vllm", config)
        assert of_sglang_hy(config) == ours("sglang", config)
    if family == "minimax_m3":
        assert of_vllm_minimax(config) == ours("vllm", config, "ROCm")
        assert of_minimax_elsewhere(config) == ours("vllm", config, "CUDA")
        assert of_minimax_elsewhere(config) == ours("sglang", config)
    if family == "deepseek_v41":
        assert of_vllm_sources(config) == ours("vllm", config)
        assert of_sglang_sources(config) == ours("sglang", config)


def config_class(module: str, name: str) -> Any:
    """Run a whole config module, and return its class."""
    for stub in ("sglang", "sglang.srt", "sglang.srt.configs", "sglang.srt.configs.mamba_utils"):
        sys.modules.setdefault(stub, module_types.ModuleType(stub))
    mamba = sys.modules["sglang.srt.configs.mamba_utils"]
    mamba.KimiLinearCacheParams = mamba.KimiLinearStateShape = object  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(f"engine_{abs(hash(module))}", ROOT / module)
    assert spec is not None and spec.loader is not None
    loaded_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded_module)
    return getattr(loaded_module, name)


def of_vllm_hy(config: dict[str, Any]) -> str | None:
    code = functions("vllm/models/hy_v4/nvidia/attention.py", "compute_skip_topk_layers")
    keys = {k: v for k, v in config.items() if k != "architectures"}
    try:
        built = config_class("vllm/transformers_utils/configs/hy_v4.py", "HYV4Config")(**keys)
        skipped = code.compute_skip_topk_layers(built)
    except STOPPED:
        return None
    return theirs(lambda i: i in skipped, config)


def of_sglang_hy(config: dict[str, Any]) -> str | None:
    keys = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    try:
        seen = config_class("sglang/srt/configs/hy_v4.py", "HYV4Config")(**keys)
    except ValueError:
        return None
    return theirs(lambda i: seen.indexer_types[i] == "shared", config)


@needs_wheels
def test_vllm_and_sglang_run_their_rules_of_hy_v4():
    for kinds in TYPES:
        config = {"model_type": "hy_v4", "num_hidden_layers": 6, "index_topk_pattern": "FSFSFS"}
        config |= {} if kinds is None else {"indexer_types": kinds}
        assert of_vllm_hy(config) == ours("vllm", config), config
        assert of_sglang_hy(config) == ours("sglang", config), config


def of_vllm_minimax(config: dict[str, Any]) -> str | None:
    code = functions(
        "vllm/models/minimax_m3/amd/model.py",
        "_sparse_attention_layer_ids",
        "_sparse_attention_layer_ordinals",
        "_should_skip_index_topk",
    )
    view = namespace(config)
    return theirs(lambda i: code._should_skip_index_topk(view, i), config)


@needs_wheels
def test_vllm_runs_its_rule_of_minimax():
    base = {"model_type": "minimax_m3", "num_hidden_layers": 6}
    base["sparse_attention_config"] = {"sparse_attention_freq": [0, 1, 1, 0, 1, 1]}
    for rates in RATES:
        for switch in ({}, {"use_index_cache": True}, {"use_index_cache": False}):
            config = base | rates | switch
            assert of_vllm_minimax(config) == ours("vllm", config, "ROCm"), config


def of_minimax_elsewhere(config: dict[str, Any]) -> str | None:
    """Return the roles of vLLM on CUDA and of SGLang there, which have no key for sharing."""
    assert "topk_freq" not in text(tree("vllm/models/minimax_m3/nvidia/model.py"))
    run = statements(
        "sglang/srt/layers/attention/minimax_sparse_backend.py",
        "__init__",
        lambda s: isinstance(s, ast.Assign) and text(s.targets[0]) == "self.index_topk_freq",
    )
    backend = SimpleNamespace()
    run(self=backend, is_hip=lambda: False)
    assert backend.index_topk_freq == 1
    return theirs(lambda i: False, config)


def of_vllm_glm5_next(config: dict[str, Any]) -> str | None:
    """Return the roles of vLLM's class, which gives every layer the same constant."""
    found = [
        keyword.value
        for node in ast.walk(tree("vllm/models/glm5next/common/attention.py"))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "skip_topk"
    ]
    assert found
    return theirs(lambda i: any(ast.literal_eval(value) for value in found), config)


def of_sglang_sources(config: dict[str, Any]) -> str | None:
    own = condition(
        "sglang/srt/models/deepseek_v4.py", "self.layer_id in config.index_source_layer_ids"
    )
    view = namespace(config)
    return theirs(lambda i: not own(self=SimpleNamespace(layer_id=i), config=view), config)


def of_vllm_sources(config: dict[str, Any]) -> str | None:
    def wanted(node: ast.stmt) -> bool:
        if not isinstance(node, ast.Assign):
            return False
        target = text(node.targets[0])
        return target in ("is_backbone", "self.index_source_layers", "self.is_index_source")

    run = statements("vllm/models/deepseek_v41/attention.py", "__init__", wanted)
    view = namespace(config)

    def shared(layer: int) -> bool:
        layer_self = SimpleNamespace()
        run(self=layer_self, config=view, layer_id=layer)
        return not layer_self.is_index_source

    return theirs(shared, config)


# -- SGLang ---------------------------------------------------------------------------------------


@cache
def sglang_functions() -> SimpleNamespace:
    return functions(
        "sglang/srt/configs/model_config.py",
        "_hf_arch",
        "_hf_attr",
        "is_deepseek_dsa",
        "dsa_layer_skips_topk",
    )


def of_sglang(config: dict[str, Any]) -> str | None:
    """Return the roles by SGLang's own function; glm5_next goes through its config class."""
    code = sglang_functions()
    if family_of(config) == "glm5_next":
        built = config_class("sglang/srt/configs/glm5_next.py", "Glm5NextConfig")(**config)
        view = built.text_config
    else:
        view = namespace(config)
    view.architectures = ["GlmMoeDsaForCausalLM"]
    view.index_topk = 2048
    return theirs(lambda i: code.dsa_layer_skips_topk(view, i), config)


@needs_wheels
def test_sglang_runs_its_rule():
    for config in sections({"model_type": "deepseek_v32", "num_hidden_layers": 6}):
        assert of_sglang(config) == ours("sglang", config), config


@needs_wheels
def test_sglang_reads_what_the_config_class_of_transformers_fills():
    for config in sections({"model_type": "glm_moe_dsa", "num_hidden_layers": 6}):
        try:
            built = transformers.AutoConfig.for_model(**config)
        except STOPPED:
            continue  # `load_failure` says so.
        seen = {"model_type": "glm_moe_dsa", "num_hidden_layers": 6} | _sharing(built)
        assert of_sglang(seen) == ours("sglang", config), config


@needs_wheels
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_cut_pipeline_stages_as_we_say(engine, monkeypatch):
    module = {"vllm": "vllm/distributed/utils.py", "sglang": "sglang/srt/distributed/utils.py"}
    import logging
    import os

    known = {
        "envs": SimpleNamespace(VLLM_PP_LAYER_PARTITION=None),
        "logger": logging.getLogger("engines"),
        "os": os,
    }
    cut = functions(module[engine], "get_pp_indices", **known).get_pp_indices
    for layers in (6, 61, 78):
        for stages in range(1, 7):
            starts = tuple(cut(layers, rank, stages)[0] for rank in range(stages))
            assert starts == pipeline_starts(engine, layers, stages)


# -- Exported overrides ---------------------------------------------------------------------------


def with_sglang_overrides(built: Any, overrides: dict[str, Any]) -> None:
    """Apply overrides to a config object by SGLang's own loop."""

    def wanted(node: ast.stmt) -> bool:
        return isinstance(node, ast.For) and "model_override_args" in text(node.iter)

    run = statements("sglang/srt/utils/hf_transformers/config.py", "get_config", wanted)
    run(config=built, model_override_args=overrides)


@needs_wheels
@pytest.mark.parametrize("roles", ["FSSFSS", "FFFSFS"])
def test_exported_overrides_give_the_pattern_in_every_engine(roles):
    pattern = Pattern(roles)
    glm = GLM | {"num_hidden_layers": 6, "index_topk_freq": 2}
    for config in (glm, DEEPSEEK | {"num_hidden_layers": 6}):
        seen = applied(config, pattern, ("transformers", "vllm", "sglang"))
        assert of_vllm_class(seen["vllm"], CLASSES[0]) == roles
        assert of_sglang(seen["sglang"]) == roles
        if config is glm:
            assert of_transformers(seen["transformers"]) == roles
        built = transformers.AutoConfig.for_model(**config)
        with_sglang_overrides(built, FLAGS["sglang"][1](config, pattern))
        assert of_sglang(built.to_dict() | config | _sharing(built)) == roles


def _sharing(built: Any) -> dict[str, Any]:
    names = ("index_topk_pattern", "indexer_types", "index_topk_freq", "index_skip_topk_offset")
    return {name: getattr(built, name) for name in names if getattr(built, name, None) is not None}


@needs_wheels
def test_exported_overrides_reach_the_text_config_of_a_nested_model():
    text_config = {"num_hidden_layers": 8, "num_attention_heads": 64, "index_topk": 2048}
    config = {"model_type": "glm5_next", "text_config": text_config}
    assert is_nested(config)
    overrides = FLAGS["sglang"][1](config, Pattern("FFFFFFFS"))
    built = config_class("sglang/srt/configs/glm5_next.py", "Glm5NextConfig")(**config)
    with_sglang_overrides(built, overrides)
    assert built.text_config.index_topk_pattern == "FFFFFFFS"
    assert built.text_config.indexer_types[7] == "shared"
    flat = config_class("sglang/srt/configs/glm5_next.py", "Glm5NextConfig")(**config)
    with_sglang_overrides(flat, {"index_topk_pattern": "FFFFFFFS"})
    assert flat.text_config.index_topk_pattern is None
