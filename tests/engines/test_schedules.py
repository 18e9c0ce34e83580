"""Test the engines' rules against schedules that were written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from indexcache.configs import text_section
from indexcache.engines.overriding import loaded, overridden
from indexcache.engines.rules import ENGINES, FAMILIES, RULES, TRAINERS
from indexcache.engines.schedules import (
    Schedule,
    family_of,
    parse_version,
    pipeline_starts,
    resolve,
    rules_of,
)
from indexcache.engines.vllm.sharing import resolved_roles

from .shapes import DEEPSEEK, GLM, SHAPES, STOPS, types


def schedules(config) -> dict[str, Schedule]:
    """Return what each engine runs, by the name of its rule."""
    family = family_of(config)
    return {
        rule.name: resolve(rule, loaded(engine, config), family)
        for engine in ENGINES
        for rule in rules_of(family, engine)
    }


def run(engine, config, **keys):
    """Return what one engine runs of a config of GLM-5 with few layers."""
    return schedules(config | keys)[engine]


SMALL = GLM | {"num_hidden_layers": 6}


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_run_as_written_by_hand(name):
    config, expected = SHAPES[name]
    found = schedules(config)
    for engine, roles in expected.items():
        if roles == STOPS:
            assert found[engine].roles is None, engine
            assert found[engine].failure, engine
        else:
            assert found[engine].roles == roles, engine
            assert len(roles) == text_section(config)["num_hidden_layers"]


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang"])
def test_the_rules_of_engines_whose_code_installs_are_all_compared_with_it(engine):
    assert all(rule.tested for rule in RULES if rule.engine == engine)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"index_topk_pattern": "FSS"},
            {"transformers": None, "vllm": "FSSFFF", "sglang": "FSSFFF", "atom": "FSSFFF"},
        ),
        (
            {"index_topk_pattern": "FSSFSSFSS"},
            {"transformers": "FSSFSS", "vllm": "FSSFSS", "sglang": "FSSFSS"},
        ),
        (
            {"index_topk_pattern": "fssfss"},
            {"transformers": None, "vllm": "FFFFFF", "sglang": "FFFFFF", "tensorrt-llm": "FSSFSS"},
        ),
        (
            {"index_topk_pattern": types("FSSFSS")},
            {
                "transformers": "FSSFSS",
                "vllm": "FFFFFF",
                "sglang": "FSSFSS",
                "tensorrt-llm": "FFFFFF",
            },
        ),
        (
            {"index_topk_pattern": list("FSSFSS")},
            {"vllm": "FSSFSS", "sglang": "FFFFFF", "tensorrt-llm": "FFFFFF"},
        ),
        (
            {"index_topk_pattern": "SSSFSS"},
            {"vllm": "SSSFSS", "sglang": "SSSFSS", "tensorrt-llm": "FSSFSS"},
        ),
        (
            {"indexer_types": types("FSS")},
            {"transformers": None, "vllm": "FFFFFF", "sglang": "FSSFFF"},
        ),
        ({"index_topk_freq": None}, {"transformers": None, "vllm": None, "sglang": "FFFFFF"}),
        ({"index_topk_freq": 0}, {"transformers": "FFFFFF", "vllm": None, "sglang": "FFFFFF"}),
        (
            {"index_topk_freq": 3, "index_skip_topk_offset": None},
            {"transformers": None, "vllm": None, "sglang": "FFSSFS"},
        ),
        (
            {"index_topk_freq": 3, "index_skip_topk_offset": 0},
            {"transformers": "SSFSSF", "vllm": "SSFSSF", "sglang": "SSFSSF"},
        ),
        (
            {"index_topk_freq": 3, "index_skip_topk_offset": 1},
            {"transformers": "FSSFSS", "vllm": "FSSFSS", "atom": "FFSSFS"},
        ),
        *[
            ({"indexer_types": bad}, {"transformers": None, "vllm": "FFFFFF"})
            for bad in ("FSSFSS", [None] * 6, ["full", 1, 1] * 2, {"0": "full"})
        ],
        ({"index_topk_pattern": [None] * 6}, {"transformers": None}),
        ({"cli_factor": 2}, {"vllm": "FFFFFF", "sglang": "FFFFFF"}),
        (
            {"cli_factor": 2, "model_type": "deepseek_v32"},
            {"transformers": "FFFFFF", "vllm": "FFFFFF", "sglang": "FSFSFS"},
        ),
        ({"index_topk_pattern": 7}, {"transformers": None, "vllm": None, "sglang": None}),
    ],
)
def test_bad_and_rare_values_do_what_they_do_in_each_engine(keys, expected):
    found = schedules(SMALL | keys)
    assert {name: found[name].roles for name in expected} == expected


def test_the_rule_of_vllm_is_that_of_its_plugin():
    for keys in (
        {"index_topk_pattern": "FSS"},
        {"index_topk_pattern": "fSSFxS"},
        {"index_topk_freq": 3},
        {"index_topk_freq": 2, "index_skip_topk_offset": 3},
        {"indexer_types": types("FSSFSS")},
    ):
        assert run("vllm", SMALL, **keys).roles == resolved_roles(SMALL | keys, 6)


def test_the_deciding_key_is_named():
    both = {"index_topk_pattern": "FSFSFS", "indexer_types": types("FSSFSS")}
    assert run("vllm", SMALL, **both).key == "index_topk_pattern"
    assert run("sglang", SMALL, **both).key == "indexer_types"
    assert run("vllm", SMALL, index_topk_freq=1).key is None


def test_a_shared_layer_behind_a_linear_one_stops_transformers():
    config = {"model_type": "glm5_next_text", "num_hidden_layers": 8}
    config["index_topk_pattern"] = "FFFFFFFS"
    found = schedules(config)["transformers"]
    assert found.roles == "---F---S"
    assert "passes it no selection" in found.failure


def test_sglang_ignores_an_override_beside_types_that_transformers_filled():
    """Its config class of glm_moe_dsa is that of transformers, which fills indexer_types."""
    seen = overridden("sglang", SMALL, {"index_topk_pattern": "FSFSFS"})
    assert run("sglang", seen).roles == "FFFFFF"
    both = {"index_topk_pattern": "FSFSFS", "indexer_types": types("FSFSFS")}
    assert run("sglang", overridden("sglang", SMALL, both)).roles == "FSFSFS"
    deepseek = DEEPSEEK | {"num_hidden_layers": 6}
    seen = overridden("sglang", deepseek, {"index_topk_pattern": "FSFSFS"})
    assert run("sglang", seen).roles == "FSFSFS"


def test_an_override_of_a_section_is_merged_into_it():
    config = {"model_type": "vl", "text_config": SMALL | {"index_topk_freq": 2}}
    seen = overridden("vllm", config, {"text_config": {"index_topk_pattern": "FFFSSS"}})
    assert run("vllm", seen).roles == "FFFSSS"
    assert "index_topk_pattern" not in config["text_config"]
    flat = overridden("vllm", config, {"index_topk_pattern": "FFFSSS"})
    assert run("vllm", flat).roles == "FFSFSF"


@pytest.mark.parametrize(
    ("engine", "layers", "stages", "starts"),
    [
        ("vllm", 61, 4, (0, 15, 30, 46)),  # 15, 15, 16, 15
        ("vllm", 78, 4, (0, 19, 39, 59)),  # 19, 20, 20, 19
        ("vllm", 61, 2, (0, 31)),
        ("sglang", 61, 4, (0, 15, 30, 45)),  # 15, 15, 15, 16
        ("sglang", 78, 4, (0, 19, 38, 58)),  # 19, 19, 20, 20
        ("tensorrt-llm", 61, 4, (0, 16, 31, 46)),
        ("vllm", 8, 1, (0,)),
    ],
)
def test_engines_cut_pipeline_stages_in_their_own_way(engine, layers, stages, starts):
    assert pipeline_starts(engine, layers, stages) == starts


def test_a_partition_of_the_environment_counts(monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,4")
    assert pipeline_starts("vllm", 6, 2) == (0, 2)
    assert pipeline_starts("sglang", 6, 2) == (0, 3)
    with pytest.raises(ValueError, match="does not cut 7 layers into 2"):
        pipeline_starts("vllm", 7, 2)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,x")
    with pytest.raises(ValueError, match="whole numbers and commas"):
        pipeline_starts("vllm", 6, 2)


@pytest.mark.parametrize(
    ("keys", "megatron", "prime"),
    [
        ({"index_topk_freq": 3}, "FSSFSS", "FSSFSS"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 0}, "FSSFSS", "FSSFSS"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 2}, "FFSSFS", "FSSFSS"),
        ({"index_topk_pattern": "FFFSSS"}, "FFFFFF", "FFFSSS"),
    ],
)
def test_trainers_count_offsets_in_their_own_way(keys, megatron, prime):
    config = SMALL | {"use_index_cache": True} | keys
    found = [resolve(rule, config, "glm_moe_dsa").roles for rule in TRAINERS]
    assert found == [megatron, prime]
    off = config | {"use_index_cache": False}
    assert resolve(TRAINERS[1], off, "glm_moe_dsa").roles == "FFFFFF"


def test_versions_are_read():
    assert parse_version("v0.33.0") == (0, 33, 0)
    assert parse_version("0.5.23.post1") == (0, 5, 23)
    for bad in ("", "new", "x.1"):
        with pytest.raises(ValueError, match="is no version"):
            parse_version(bad)


def test_every_rule_is_complete():
    for rule in RULES:
        assert set(rule.families) <= set(FAMILIES), rule
        assert rule.source
        assert replace(rule, last=(9,)).versions
    names = [name for names in FAMILIES.values() for name in names]
    assert len(set(names)) == len(names)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="'llama' is not known to have an indexer"):
        family_of({"model_type": "llama", "num_hidden_layers": 2})
