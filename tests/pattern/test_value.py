"""Test the value: what it answers, what it becomes, what it refuses, and that it is immutable."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexcache.pattern import Pattern
from tests.pattern.support import QUICK, patterns
from tests.support import refused


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
    with pytest.raises(ValueError, match="a share of the context, which only search"):
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
