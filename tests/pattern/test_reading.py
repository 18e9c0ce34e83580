"""Test what reads and writes patterns: round trips, the precedence of transformers, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from indexcache.pattern import Pattern
from tests.pattern.support import QUICK, patterns, shared_patterns
from tests.support import refused


@QUICK
@given(patterns)
def test_round_trip_of_string_and_file(tmp_path, p):
    assert Pattern(str(p)) == p
    assert eval(repr(p)) == p
    p.to_file(tmp_path / "pattern.json")
    assert Pattern.from_file(tmp_path / "pattern.json") == p
    (tmp_path / "text").write_text(f"  {p}\n", encoding="utf-8")
    assert Pattern.from_file(tmp_path / "text") == p
    (tmp_path / "quoted").write_text(json.dumps(str(p)), encoding="utf-8")
    assert Pattern.from_file(tmp_path / "quoted") == p


@QUICK
@given(shared_patterns)
def test_round_trip_of_types_and_config(tmp_path, p):
    types = p.to_types()
    assert types == ["full" if r == "F" else "shared" for r in p.roles]
    assert Pattern(types) == Pattern(tuple(types)) == Pattern(list(p.roles)) == p
    config = {"num_hidden_layers": len(p), **p.to_config()}
    assert Pattern.from_config(config) == p
    assert Pattern.from_config({"text_config": config}) == p
    for key in ("indexer_types", "index_topk_pattern"):  # Each key suffices alone.
        assert Pattern.from_config({"num_hidden_layers": len(p), key: config[key]}) == p
    if "index_topk_freq" in config:
        only = {
            k: config[k] for k in ("num_hidden_layers", "index_topk_freq", "index_skip_topk_offset")
        }
        assert Pattern.from_config(only) == p
    for value in (types, config):
        (tmp_path / "file.json").write_text(json.dumps(value), encoding="utf-8")
        assert Pattern.from_file(tmp_path / "file.json") == p


def test_config_has_the_keys_of_all_engines():
    assert Pattern("FFSF").to_config() == {
        "use_index_cache": True,
        "index_topk_pattern": "FFSF",
        "indexer_types": ["full", "full", "shared", "full"],
        "index_topk_freq": 2,
        "index_skip_topk_offset": 2,
    }
    assert set(Pattern("FSSFSF").to_config()) == {
        "use_index_cache",
        "index_topk_pattern",
        "indexer_types",
    }


def test_file_holds_the_pattern_and_its_counts(tmp_path):
    Pattern("FSSF").to_file(tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    assert value == {
        "pattern": "FSSF",
        "layers": 4,
        "full": 2,
        "indexer_types": ["full", "shared", "shared", "full"],
    }
    Pattern("FRRF", 4).to_file(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "pattern": "FRRF@4",
        "layers": 4,
        "full": 2,
    }


# -- the precedence of transformers ----------------------------------------------------------------


def restated(layers: int, config: dict[str, Any]) -> list[str]:
    """Restate the docs of transformers' GlmMoeDsaConfig: types, else pattern, else schedule."""
    if config.get("indexer_types") is not None:
        return list(config["indexer_types"])
    if (text := config.get("index_topk_pattern")) is not None:
        return (
            [{"F": "full", "S": "shared"}[c] for c in text] if isinstance(text, str) else list(text)
        )
    freq = config.get("index_topk_freq", 1)
    offset = config.get("index_skip_topk_offset", 2)
    types = []
    for i in range(layers):
        beyond = i - (offset - 1)  # number of layers after the leading full block
        types.append("full" if beyond <= 0 or freq <= 1 or beyond % freq == 0 else "shared")
    return types


def agree(layers: int, keys: dict[str, Any]) -> None:
    from transformers import GlmMoeDsaConfig

    config = {"num_hidden_layers": layers, **keys}
    theirs = GlmMoeDsaConfig(num_hidden_layers=layers, **keys)
    expected = theirs.indexer_types
    assert restated(layers, keys) == expected
    if len(expected) == layers and expected[0] == "full":
        for source in (
            config,
            theirs,
            theirs.to_dict(),
            {"text_config": config, "model_type": "x"},
        ):
            assert Pattern.from_config(source).to_types() == expected
        again = GlmMoeDsaConfig(num_hidden_layers=layers, **Pattern.from_config(config).to_config())
        assert again.indexer_types == expected
    else:  # transformers refuses it too, at the latest in the forward pass.
        for source in (config, theirs):
            refused(lambda source=source: Pattern.from_config(source))


@pytest.mark.parametrize("layers", [1, 2, 7, 12])
def test_schedule_as_in_transformers(layers):
    agree(layers, {})
    for freq in (-1, 0, 1, 2, 3, 4, 5, 20):
        agree(layers, {"index_topk_freq": freq})
        for offset in (-3, 0, 1, 2, 3, 7, 20):
            agree(layers, {"index_topk_freq": freq, "index_skip_topk_offset": offset})


def test_precedence_as_in_transformers():
    types = {
        None: None,
        "t": ["full", "shared", "shared", "full", "shared"],
        "short": ["full"],
        "s": ["shared"] * 5,
    }
    texts = {
        None: None,
        "p": "FFSFS",
        "list": ["full", "full", "full", "shared", "shared"],
        "long": "FSSSSS",
        "s": "SFFFF",
    }
    for t in types.values():
        for p in texts.values():
            for freq in (0, 3):
                keys = {
                    "indexer_types": t,
                    "index_topk_pattern": p,
                    "index_topk_freq": freq,
                    "index_skip_topk_offset": 1,
                }
                agree(5, {k: v for k, v in keys.items() if v is not None})
                agree(5, keys)


def test_a_null_frequency_is_an_absent_one():
    """transformers fails on a null; most JSON readers take it for an absent key, and so do we."""
    assert Pattern.from_config({"num_hidden_layers": 3, "index_topk_freq": None}) == Pattern("FFF")
    config = {"num_hidden_layers": 7, "index_topk_freq": 4, "index_skip_topk_offset": None}
    assert Pattern.from_config(config) == Pattern("FFSSSFS")


def test_text_config_only_where_the_top_has_no_layers():
    inner = {"num_hidden_layers": 2, "index_topk_pattern": "FS"}
    assert Pattern.from_config({"text_config": inner}) == Pattern("FS")
    assert Pattern.from_config({"num_hidden_layers": 3, "text_config": inner}) == Pattern("FFF")
    refused(lambda: Pattern.from_config({"text_config": {"a": 1}}), "num_hidden_layers")
    refused(lambda: Pattern.from_config({"text_config": None}), "num_hidden_layers")


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"index_topk_freq": "4"}, "index_topk_freq"),
        ({"index_topk_freq": 2.5}, "index_topk_freq"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": [1]}, "index_skip_topk_offset"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, "Layer 0"),
        ({"index_topk_pattern": "FSS"}, "3 layers"),
        ({"index_topk_pattern": "FSSSS"}, "5 layers"),
        ({"index_topk_pattern": "fsss"}, "'f'"),
        ({"index_topk_pattern": ""}, "empty"),
        ({"index_topk_pattern": 7}, "index_topk_pattern"),
        ({"index_topk_pattern": {"F": 1}}, "index_topk_pattern"),
        ({"index_topk_pattern": "FRRR"}, "Layer 1 is R"),
        ({"index_topk_pattern": "FRRR@4"}, "Layer 1 is R"),
        ({"index_topk_pattern": ["F", "S", "S", "S"]}, "index_topk_pattern"),
        ({"indexer_types": "FSSS"}, "indexer_types"),
        ({"indexer_types": []}, "empty"),
        ({"indexer_types": ["full", "S", "shared", "shared"]}, "indexer_types"),
        ({"indexer_types": ["full", None, "shared", "shared"]}, "indexer_types"),
        ({"indexer_types": ["full", ["shared"], "shared", "shared"]}, "indexer_types"),
        ({"indexer_types": ["shared", "full", "full", "full"]}, "Layer 0"),
        ({"indexer_types": ["full"] * 5}, "5 layers"),
    ],
)
def test_configs_that_are_refused(keys, part):
    refused(lambda: Pattern.from_config({"num_hidden_layers": 4, **keys}), part)


def test_values_that_are_no_config_are_refused():
    for value in (None, 3, "FSS", ["full"], object()):
        refused(lambda value=value: Pattern.from_config(value), "mapping")
    refused(lambda: Pattern.from_config({}), "num_hidden_layers")


# -- files that hold no pattern --------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"   \n",
        b"\xff\xfe",
        b"{",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b"true",
        b"NaN",
        b'""',
        b'"fss"',
        b'["full", 3]',
        b"fss",
        b"F S",
        b'{"pattern": 3}',
        b'{"pattern": "fs"}',
        b'{"pattern": "SS"}',
        b'{"num_hidden_layers": 3, "index_topk_pattern": "FS"}',
        b"\xef\xbb\xbf",
        b"1" * 5000,
    ],
)
def test_files_that_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    refused(lambda: Pattern.from_file(tmp_path / "file"), str(tmp_path / "file"))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    refused(lambda: Pattern.from_file(tmp_path / "missing"), "missing")
    refused(lambda: Pattern.from_file(tmp_path), str(tmp_path))
    refused(lambda: Pattern.from_file("F" * 5000), "cannot be read")
    refused(lambda: Pattern.from_file("a\0b"), "cannot be read")
