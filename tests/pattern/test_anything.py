"""Test that any text, value, list, config or file gives a sound pattern or one sentence."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexcache.pattern import Pattern
from tests.support import one_line

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 999),
    st.floats(),
    st.text(max_size=8),
    st.text("FRS@128fs", max_size=12),
)
junk = st.recursive(
    st.one_of(scalars, st.sampled_from(["full", "shared", "F", "S", "R"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def sound_or_refused(make: Any) -> None:
    """Expect a pattern that holds its invariants and round-trips, or a refusal in one line."""
    try:
        p = make()
    except ValueError as error:
        one_line(error)
        return
    assert p.roles[0] == "F"
    assert set(p.roles) <= set("FRS")
    assert len(p) >= 1
    assert (p.pool_factor is None) == ("R" not in p.roles)
    assert Pattern(str(p)) == p
    if "R" not in p.roles:
        assert Pattern(p.to_types()) == p
        assert Pattern.from_config({"num_hidden_layers": len(p), **p.to_config()}) == p


@QUICK
@given(
    st.one_of(
        st.text(),
        st.text("FRSfrs@0123456789", max_size=20),
        st.from_regex(r"F[FRS]{0,9}@?[0-9]{0,9}", fullmatch=True),
    )
)
def test_any_string_is_parsed_or_refused(text):
    sound_or_refused(lambda: Pattern(text))


@QUICK
@given(junk, st.one_of(st.none(), st.integers(-1, 9), junk))
def test_any_value_is_parsed_or_refused(value, factor):
    sound_or_refused(lambda: Pattern(value, factor))


@QUICK
@given(st.lists(st.one_of(st.sampled_from(["full", "shared", "F", "S", "R"]), junk), max_size=8))
def test_any_list_is_parsed_or_refused(value):
    sound_or_refused(lambda: Pattern(value))


KEYS = (
    "num_hidden_layers",
    "indexer_types",
    "index_topk_pattern",
    "index_topk_freq",
    "index_skip_topk_offset",
    "text_config",
    "pattern",
)
plausible = st.fixed_dictionaries(
    {"num_hidden_layers": st.one_of(st.integers(1, 6), junk)},
    optional={
        "indexer_types": st.one_of(
            st.none(), st.lists(st.sampled_from(["full", "shared", "F", ""]), max_size=6), junk
        ),
        "index_topk_pattern": st.one_of(st.none(), st.text("FSR", max_size=6), junk),
        "index_topk_freq": st.one_of(st.integers(-2, 6), junk),
        "index_skip_topk_offset": st.one_of(st.integers(-2, 6), junk),
        "text_config": junk,
    },
)
configs = st.one_of(
    plausible,
    st.fixed_dictionaries({}, optional={k: st.one_of(plausible, junk) for k in KEYS}),
    junk,
)


@QUICK
@given(configs)
def test_any_config_is_read_or_refused(config):
    sound_or_refused(lambda: Pattern.from_config(config))


@QUICK
@given(
    st.one_of(
        st.binary(max_size=200),
        configs.map(lambda c: json.dumps(c).encode()),
        st.text("FRS@8 \n", max_size=9).map(str.encode),
    )
)
def test_any_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    sound_or_refused(lambda: Pattern.from_file(tmp_path / "file"))
