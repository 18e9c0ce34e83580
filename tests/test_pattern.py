"""Test Pattern: round trips, the precedence of transformers, published patterns, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexcache.pattern import Pattern, stage_starts
from tests.support import refused

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# arXiv 2603.12201, appendix B, and the config.json that GLM-5.2 ships
PUBLISHED = {
    "30B_1/2": ("FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF", 47, 24),
    "30B_1/4": ("FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS", 47, 12),
    "30B_1/8": ("FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS", 47, 7),
    "GLM5_1/2": (
        "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
        78,
        40,
    ),
    "GLM5_1/4": (
        "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS",
        78,
        22,
    ),
}
GLM52 = "FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS"

patterns = st.builds(
    lambda rest, factor: Pattern("F" + rest, factor if "R" in rest else None),
    st.text("FRS", max_size=40),
    st.one_of(st.none(), st.integers(1, 999_999)),
)
shared_patterns = st.builds(lambda rest: Pattern("F" + rest), st.text("FS", max_size=40))


# -- reading and writing ---------------------------------------------------------------------------


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


# -- uniform patterns and what was published -------------------------------------------------------


def test_uniform_patterns_follow_their_rule():
    assert str(Pattern.uniform(10, 4)) == "FSSSFSSSFS"
    assert str(Pattern.uniform(10, 4, 2)) == "FFSSSFSSSF"  # Engines read freq 4 so.
    assert Pattern.from_config({"num_hidden_layers": 10, "index_topk_freq": 4}) == Pattern.uniform(
        10, 4, 2
    )
    assert str(Pattern.uniform(5, 1)) == "FFFFF"
    assert str(Pattern.uniform(5, 9)) == "FSSSS"
    assert str(Pattern.uniform(5, 2, 5)) == "FFFFF"
    assert str(Pattern.uniform(6, 3, rest="R")) == "FRRFRR@8"
    assert str(Pattern.uniform(6, 3, rest="R", pool_factor=2)) == "FRRFRR@2"
    assert Pattern.uniform(4, 1, rest="R") == Pattern.full(4)
    for n in range(1, 14):
        for freq in range(1, 7):
            assert Pattern.uniform(n, freq).roles == "".join(
                "S" if i % freq else "F" for i in range(n)
            )
            for offset in range(1, n + 1):
                lead = "F" * (offset - 1)
                tail = ("F" + "S" * (freq - 1)) * n
                assert Pattern.uniform(n, freq, offset).roles == (lead + tail)[:n]


def test_uniform_arguments_that_are_refused():
    for bad in (0, -1, 1.0, "2", None):
        refused(lambda bad=bad: Pattern.uniform(6, bad), "freq")
        refused(lambda bad=bad: Pattern.uniform(6, 2, bad), "offset")
        refused(lambda bad=bad: Pattern.uniform(bad, 2), "layers")
        refused(lambda bad=bad: Pattern.full(bad), "layers")
    refused(lambda: Pattern.uniform(6, 2, 7), "offset", "6", "7")
    for rest in ("F", "s", "SS", "", "X", None):
        refused(lambda rest=rest: Pattern.uniform(6, 2, rest=rest), "S or R")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_searched_patterns(name):
    text, layers, full = PUBLISHED[name]
    p = Pattern(text)
    assert (len(p), len(p.full_layers), p.keep) == (layers, full, full / layers)
    assert p.frequency() is None
    assert "index_topk_freq" not in p.to_config()


def test_published_shipped_pattern():
    p = Pattern(GLM52)
    assert p == Pattern.uniform(78, 4, 3)
    assert p.frequency() == (4, 3)
    assert p.full_layers == (0, 1, *range(2, 75, 4))
    assert (
        Pattern.from_config(
            {"num_hidden_layers": 78, "index_topk_freq": 4, "index_skip_topk_offset": 3}
        )
        == p
    )


def test_frequency_regenerates_the_pattern():
    for n in range(1, 14):
        for freq in range(1, n + 3):
            for offset in range(1, n + 1):
                p = Pattern.uniform(n, freq, offset)
                rule = p.frequency()
                assert rule is not None
                assert Pattern.uniform(n, *rule) == p
                assert rule[1] <= offset
                assert (
                    Pattern.from_config(
                        {
                            "num_hidden_layers": n,
                            "index_topk_freq": rule[0],
                            "index_skip_topk_offset": rule[1],
                        }
                    )
                    == p
                )
    assert Pattern.full(5).frequency() == (1, 1)
    assert Pattern("F").frequency() == (1, 1)
    assert Pattern("FSSS").frequency() == (4, 1)


@QUICK
@given(st.builds(lambda rest: Pattern("F" + rest), st.text("FS", max_size=9)))
def test_frequency_is_none_only_where_no_rule_exists(p):
    rules = [
        (f, o)
        for f in range(1, 12)
        for o in range(1, len(p) + 1)
        if Pattern.uniform(len(p), f, o) == p
    ]
    assert (p.frequency() is None) == (not rules)
    assert p.frequency() is None or p.frequency() in rules


def test_frequency_of_reindex_and_of_long_patterns():
    assert Pattern("FRFR").frequency() is None
    assert Pattern("F" + "".join("S" * i + "F" for i in range(80))).frequency() is None


# -- asking ----------------------------------------------------------------------------------------


@QUICK
@given(patterns)
def test_sources_groups_and_publishers(p):
    full = -1  # nearest F
    selecting = -1  # nearest F or R
    pools = set()
    groups = []
    for i, role in enumerate(p.roles):
        if role == "F":
            full = i
            groups.append([i])
        else:
            groups[-1].append(i)
        if role == "R":
            pools.add(full)
        expected = {"F": i, "R": full, "S": selecting}[role]
        assert p.source(i) == expected == p.source(i - len(p))
        if role != "S":
            selecting = i
    assert p.publishers() == pools
    assert p.groups() == [tuple(g) for g in groups]
    assert [i for g in p.groups() for i in g] == list(range(len(p)))
    assert p.keep == p.roles.count("F") / len(p)
    assert [p[i] for i in range(len(p))] == list(p.roles)
    assert p.signature() == tuple(
        (r, p.pool_factor if i in pools else None) for i, r in enumerate(p.roles)
    )


def test_sources_of_an_example():
    p = Pattern("FSRSFS@4")
    assert [p.source(i) for i in range(6)] == [0, 0, 0, 2, 4, 4]
    assert p.publishers() == {0}
    assert p.groups() == [(0, 1, 2, 3), (4, 5)]
    for bad in (6, -7):
        with pytest.raises(IndexError):
            p.source(bad)


@QUICK
@given(patterns, st.data())
def test_replace_changes_one_layer(p, data):
    layer = data.draw(st.integers(0, len(p) - 1))
    role = data.draw(st.sampled_from("FRS"))
    if layer == 0 and role != "F":
        refused(lambda: p.replace(layer, role), "Layer 0")
        return
    q = p.replace(layer, role)
    assert len(q) == len(p)
    assert q == p.replace(layer - len(p), role)  # Negative layers count from the end.
    assert all(q[i] == (role if i == layer else p[i]) for i in range(len(p)))
    if "R" in p.roles and "R" in q.roles:
        assert q.pool_factor == p.pool_factor
    assert q.replace(layer, p[layer]).roles == p.roles


def test_replace_refuses_what_changes_the_length():
    p = Pattern("FSSS")
    for role in ("", "SS", "FS", "S@8"):
        refused(lambda role=role: p.replace(1, role), "one role")
    refused(lambda: p.replace(1, "s"), "'s'")
    for layer in (4, 9, -5):
        with pytest.raises(IndexError):
            p.replace(layer, "F")


@QUICK
@given(patterns, st.integers(1, 99))
def test_with_rest_keeps_the_full_layers(p, factor):
    assert p.with_rest("S").roles == p.roles.replace("R", "S")
    assert p.with_rest("S").pool_factor is None
    q = p.with_rest("R", factor)
    assert q.roles == p.roles.replace("S", "R")
    assert q.full_layers == p.full_layers
    assert q.pool_factor == (factor if "R" in q.roles else None)


def test_with_rest_refuses_other_roles_and_factors():
    for role in ("F", "s", "", "SS", "RS"):
        refused(lambda role=role: Pattern("FSS").with_rest(role), "S or R")
    assert Pattern("FSS").with_rest("R") == Pattern("FRR@8")
    refused(lambda: Pattern("FSS").with_rest("R", 0), "pool factor")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ("", ["empty"]),
        ([], ["empty"]),
        ("SFF", ["Layer 0", "S", "must be F"]),
        ("RFF", ["Layer 0", "R", "must be F"]),
        (["shared", "full"], ["Layer 0"]),
        ("FsF", ["Layer 1", "'s'", "Write 'S'"]),
        ("FSrF", ["Layer 2", "'r'", "Write 'R'"]),
        ("FXF", ["Layer 1", "'X'"]),
        ("F F", ["Layer 1", "' '"]),
        ("FS\n", ["Layer 2", "'\\n'"]),
        ("F\ud800", ["Layer 1", "\\ud800"]),
        (["full", "Shared"], ["Layer 1", "Shared"]),
        (["full", None], ["Layer 1", "None"]),
        (["full", ["shared"]], ["Layer 1"]),
        ([0, 1], ["Layer 0"]),
        (b"FS", ["Layer 0"]),
        (None, ["NoneType"]),
        (3, ["int"]),
        ({"F": 1}, ["dict"]),
        ({"F"}, ["set"]),
        ("FSS@8", ["no R"]),
        ("FRR@", ["pool factor"]),
        ("FRR@0", ["pool factor", "at least 1"]),
        ("FRR@-1", ["pool factor"]),
        ("FRR@1.5", ["pool factor"]),
        ("FRR@8@8", ["pool factor"]),
        ("FRR@\u0663", ["pool factor"]),  # It is a digit, but not of ASCII.
        ("FRR@1000000", ["pool factor"]),
        ("@8", ["empty"]),
    ],
)
def test_roles_that_are_refused(roles, parts):
    refused(lambda: Pattern(roles), *parts)


def test_pool_factor_is_read_and_checked():
    assert Pattern("FRR").pool_factor == 8
    assert Pattern("FRR", 3) == Pattern("FRR@3") == Pattern(["F", "R", "R"], 3)
    assert Pattern("FRR") != Pattern("FRR", 3)
    assert Pattern("FRS@8").pool_factor == 8
    assert Pattern("FSS").pool_factor is None
    refused(lambda: Pattern("FSS", 8), "no R")
    refused(lambda: Pattern("FRR@8", 8), "twice")
    for bad in (0, -1, 1.5, "8", [8]):
        refused(lambda bad=bad: Pattern("FRR", bad), "pool factor")
    assert Pattern(str(Pattern("FR", 999_999))).pool_factor == 999_999


def test_check_refuses_what_cannot_be_used():
    p = Pattern("FSSFSS")
    assert (
        p.check()
        is p.check(layers=6, stages=(0, 3), reindex=False, without_indexer=(1, 2, 4, 5))
        is p
    )
    refused(lambda: p.check(layers=7), "6 layers", "7")
    refused(lambda: p.check(stages=(0, 2)), "stage", "layer 2", "S", "F")
    refused(lambda: p.check(without_indexer=(1, 3)), "Layer 3", "no indexer")
    r = Pattern("FRSFRS")
    assert r.check(stages=(0, 3)) is r
    refused(lambda: r.check(reindex=False), "Layer 1", "R")
    refused(lambda: r.check(without_indexer=(1,)), "Layer 1", "R", "no indexer")
    refused(r.to_types, "Layer 1", "R")
    refused(r.to_config, "Layer 1", "R")


def test_stages_have_nearly_equal_lengths():
    for layers in range(1, 30):
        for stages in range(1, layers + 1):
            starts = stage_starts(layers, stages)
            sizes = [b - a for a, b in zip(starts, [*starts[1:], layers], strict=True)]
            assert starts[0] == 0
            assert len(starts) == stages
            assert sum(sizes) == layers
            assert set(sizes) <= {layers // stages, -(-layers // stages)}
            assert sizes == sorted(sizes, reverse=True)
    assert stage_starts(7, 3) == (0, 3, 5)
    for bad in (0, 8, -1):
        refused(lambda bad=bad: stage_starts(7, bad), "7 layers", str(bad))


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


# -- a value ---------------------------------------------------------------------------------------


def test_patterns_are_immutable():
    p = Pattern("FSS")
    for change in (
        lambda: setattr(p, "roles", "FFF"),
        lambda: delattr(p, "roles"),
        lambda: setattr(p, "pool_factor", 3),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    with pytest.raises(TypeError):
        p[0] = "S"  # type: ignore[index]
    p.replace(1, "F")
    p.with_rest("R")
    assert str(p) == "FSS"
    assert pickle.loads(pickle.dumps(p)) == copy.deepcopy(p) == p


@QUICK
@given(patterns, patterns)
def test_equality_and_hash_are_those_of_the_string(p, q):
    assert (p == q) == (str(p) == str(q))
    assert Pattern(str(p)) == p
    assert hash(Pattern(str(p))) == hash(p)
    assert len({p, Pattern(str(p))}) == 1
    assert p != str(p)


@pytest.mark.parametrize("text", ["FRRFRSF@1/4,1/16", "FRFSRFFR@1/3,1/2,1/8"])
def test_every_group_may_have_its_own_pool(text, tmp_path):
    pattern = Pattern(text)
    assert str(pattern) == text
    assert Pattern(str(pattern)) == pattern != Pattern(pattern.roles, Fraction(1, 4))
    assert pattern.pool_share == max(pattern.pool_shares) == max(pattern.pools().values())
    assert list(pattern.pools()) == sorted(pattern.publishers())
    pattern.to_file(tmp_path / "p.json")
    assert Pattern.from_file(tmp_path / "p.json") == pattern
    (tmp_path / "p.txt").write_text(text)
    assert Pattern.from_file(tmp_path / "p.txt") == pattern
    with pytest.raises(ValueError, match="a share of the context, for which there is no kernel"):
        pattern.check(share=False)


def test_equal_pools_are_one_and_wrong_ones_are_refused():
    assert Pattern("FRFR@1/4,1/4") == Pattern("FRFR@1/4")
    assert str(Pattern("FRFR@1/4,2/8")) == "FRFR@1/4"
    for text, word in (
        ("FRFR@1/4,1/8,1/2", "2 full layers"),
        ("FRFS@1/4,1/8", "1 full layers"),
        ("FRFR@1/4,8", "1/4,8"),
        ("FRFR@1/4,", "1/4,"),
        ("FRFR@1/4,3/2", "below 1"),
        ("FSFS@1/4,1/8", "no R layer"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            Pattern(text)


def test_layers_that_change_their_role_keep_their_pools():
    pattern = Pattern("FRRFRSF@1/4,1/16")
    assert str(pattern.replace(6, "R")) == "FRRFRSR@1/4,1/16"
    assert str(pattern.replace(3, "R")) == "FRRRRSF@1/4"
    assert str(pattern.replace(4, "S")) == "FRRFSSF@1/4"
    assert str(pattern.replace(1, "F")) == "FFRFRSF@1/4,1/16"
    assert str(Pattern("FFRFR@1/4,1/16").replace(1, "S")) == "FSRFR@1/4,1/16"
    assert pattern.signature()[0] == ("F", Fraction(1, 4))
    assert pattern.signature()[3] == ("F", Fraction(1, 16))
