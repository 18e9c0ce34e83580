"""Test uniform patterns, what was published, the frequency of a pattern, and pipeline stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexcache.pattern import Pattern, stage_starts
from tests.pattern.support import QUICK
from tests.support import refused

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
