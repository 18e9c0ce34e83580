"""Check what the plugin lets vLLM serve: patterns that it runs as they are written."""

import pytest

from indexcache.engines.vllm.sharing import check_sharing, resolved_roles, summary
from indexcache.pattern import Pattern

TYPES = {"F": "full", "S": "shared"}


def config(layers=6, **keys):
    return {"num_hidden_layers": layers, "model_type": "glm_moe_dsa", **keys}


def types(roles):
    return [TYPES[r] for r in roles]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"index_topk_freq": 1},
        {"index_topk_freq": None, "index_skip_topk_offset": 2},
        {"indexer_types": ["full"] * 6},
        {"use_index_cache": False},
    ],
)
def test_a_config_without_sharing_is_none_of_the_plugins_business(keys):
    assert check_sharing(config(**keys)) is None


@pytest.mark.parametrize(
    ("keys", "roles"),
    [
        ({"index_topk_pattern": "FSSFSS"}, "FSSFSS"),
        ({"index_topk_pattern": list("FSFSFS")}, "FSFSFS"),
        ({"index_topk_pattern": "FFFFFF", "use_index_cache": True}, "FFFFFF"),
        ({"index_topk_freq": 2}, "FFSFSF"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, "FSSFSS"),
        ({"index_topk_freq": 4, "index_topk_pattern": "FSFSFS"}, "FSFSFS"),
        ({"index_topk_pattern": "FSSFSS", "indexer_types": types("FSSFSS")}, "FSSFSS"),
    ],
)
def test_a_sound_config_gives_the_pattern_that_vllm_runs(keys, roles):
    pattern = check_sharing(config(**keys))
    assert pattern == Pattern(roles)
    assert resolved_roles(config(**keys), 6) == roles


def test_the_summary_counts_the_full_layers():
    assert summary(Pattern("FSSFSS")) == "2 of 6 layers run their indexer: FSSFSS"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"index_topk_pattern": "FSS"}, "has 3 roles, but the model has 6 layers"),
        ({"index_topk_pattern": "FSSFSSFSS"}, "has 9 roles, but the model has 6"),
        ({"index_topk_pattern": "fssfss"}, "role 'f', which vLLM would run as full"),
        ({"index_topk_pattern": "FRRFRR"}, "role 'R'"),
        ({"index_topk_pattern": "SFSFSF"}, "layer 0 of index_topk_pattern is shared"),
        ({"index_topk_pattern": 7}, "must be a string of F and S"),
        ({"index_topk_pattern": types("FSSFSS")}, "role"),
        ({"indexer_types": types("FSSFSS")}, "by indexer_types alone, which vLLM ignores"),
        ({"use_index_cache": True}, "by use_index_cache alone, which vLLM ignores"),
        ({"index_topk_freq": 0}, "at least 1"),
        ({"index_topk_freq": "4"}, "whole number"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 0}, "index_skip_topk_offset is 0"),
        ({"index_topk_pattern": "FSSFSS", "indexer_types": types("FFFFFF")}, "disagrees"),
        ({"index_topk_freq": 2, "indexer_types": types("FSFSFS")}, "disagrees"),
        ({"index_topk_pattern": "FSSFSS", "use_index_cache": False}, "use_index_cache is false"),
        ({"indexer_types": "FSSFSS"}, "by indexer_types alone"),
        ({"indexer_types": True}, "by indexer_types alone"),
        ({"indexer_types": ["SHARED"] * 6, "use_index_cache": False}, "by indexer_types alone"),
        ({"indexer_types": 7, "index_topk_freq": 2}, "indexer_types is 7; it must be a list"),
        ({"text_config": {"index_topk_pattern": "FSSFSS"}}, "lies in text_config, where vLLM"),
        ({"text_config": {"index_topk_freq": 3}, "index_topk_freq": 2}, "lies in text_config"),
    ],
)
def test_what_vllm_would_run_differently_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        check_sharing(config(**keys))


def test_every_stage_begins_with_a_full_layer():
    keys = config(index_topk_pattern="FSSFSS")
    assert check_sharing(keys, stages=(0, 3)) == Pattern("FSSFSS")
    with pytest.raises(ValueError, match="layer 2, the first of a pipeline stage, .* 0, 2, 4"):
        check_sharing(keys, stages=(0, 2, 4))


def test_a_full_layer_needs_weights():
    keys = config(index_topk_pattern="FSSFSS")
    assert check_sharing(keys, without_indexer=(1, 2, 4)) is not None
    with pytest.raises(
        ValueError, match="here: .* layer 3 full, but the checkpoint has no indexer"
    ):
        check_sharing(keys, without_indexer=(3, 4), served="here")


def test_nested_keys_count_where_the_decoder_is_described():
    text = config(index_topk_pattern="FSSFSS")
    assert check_sharing({"model_type": "glm5v", "text_config": text}) == Pattern("FSSFSS")
    flat = {"model_type": "glm5v", "text_config": config(), "index_topk_pattern": "FSSFSS"}
    with pytest.raises(ValueError, match="beside text_config"):
        check_sharing(flat)
    both = {"text_config": text, "index_topk_pattern": "FSSFSS"}
    assert check_sharing(both) == Pattern("FSSFSS")
