"""Test pools that are a share of what a query sees: words, selections by hand, and both paths."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from indexcache import Pattern, accelerate, evaluate, search, use_pattern
from indexcache.data import make_batches
from indexcache.distilling.checks import check_model
from indexcache.evals.gate import selects
from indexcache.models.lm import hidden_states
from indexcache.ops.shares import pool_sizes, pool_width
from indexcache.searching.settings import SearchSettings
from indexcache.spec import parse_pattern
from indexcache.vacuity import choosing_size, pool_of
from tests.support import FAMILIES, documents, make_model, refused

SHARE = Fraction(1, 4)


def test_a_share_is_a_word_of_the_pattern():
    pattern = Pattern("FRRFSR@2/8")
    assert str(pattern) == "FRRFSR@1/4"
    assert (pattern.pool_factor, pattern.pool_share, pattern.pool) == (None, SHARE, SHARE)
    assert pattern == Pattern("FRRFSR", SHARE) != Pattern("FRRFSR@4")
    assert str(pattern.replace(1, "S")) == "FSRFSR@1/4"
    assert str(Pattern("FSSF").with_rest("R", Fraction(1, 16))) == "FRRF@1/16"
    assert Pattern("FRSS@1/4").replace(1, "S").pool is None
    assert parse_pattern("a=FSSF+R1/8", 4).pattern == Pattern("FRRF@1/8")
    assert pattern.signature() != Pattern("FRRFSR@1/8").signature()
    assert pool_of(pattern, 8) is None
    assert choosing_size([pattern], 8) == 8


@pytest.mark.parametrize("text", ["1/1", "3/2", "0/4", "1/0", "1/", "/4", "0.5", "1/4/2"])
def test_what_is_no_share_is_refused(text):
    refused(lambda: Pattern(f"FRR@{text}"), "pool")
    refused(lambda: parse_pattern(f"FSS+R{text}", 3))


def test_a_file_holds_it(tmp_path):
    Pattern("FRSR@1/8").to_file(tmp_path / "p.json")
    assert str(Pattern.from_file(tmp_path / "p.json")) == "FRSR@1/8"
    (tmp_path / "p.txt").write_text("FRSR@1/8\n")
    assert str(Pattern.from_file(tmp_path / "p.txt")) == "FRSR@1/8"


def test_sizes_are_shares_rounded_up_and_at_least_k():
    seen = torch.arange(1, 101)
    expected = [max(8, -(-n // 4)) for n in range(1, 101)]
    assert pool_sizes(SHARE, seen, 8).tolist() == expected
    assert (pool_width(SHARE, 100, 8), pool_width(SHARE, 10, 8), pool_width(SHARE, 4, 8)) == (
        25,
        8,
        4,
    )


def selections(model, roles, ids):
    with use_pattern(model, roles, capture=True) as seam:
        hidden = hidden_states(model, ids)
    return hidden, seam.selections


def sets(ids, query):
    return {i for i in ids[0, query].tolist() if 0 <= i <= query}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_r_layer_chooses_from_the_share_that_the_query_sees(family):
    """Beside a pool that is a factor: at 64 tokens a quarter is 16 = 2 k, at 32 it is k."""
    model = make_model(family)
    ids = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    _, own = selections(model, "FRSSSS@1/4", ids)
    _, twice = selections(model, "FRSSSS@2", ids)
    _, shared = selections(model, "FSSSSS", ids)
    assert sets(own[1], 63) == sets(twice[1], 63) != sets(shared[1], 63)
    for query in range(32):
        assert sets(own[1], query) == sets(shared[1], query)  # The pool is k there.
    full = {q: sets(selections(model, "FFSSSS", ids)[1][1], q) for q in (50, 63)}
    # With nearly everything in the pool it is a full layer.
    _, most = selections(model, "FRSSSS@99/100", ids)
    assert sets(most[1], 50) == full[50]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_agree(family):
    model = make_model(family)
    ids = torch.randint(0, 128, (2, 96), generator=torch.Generator().manual_seed(1))
    for roles in ("FRSFRR@1/4", "FRRRRR@1/3", "FRSSSS@1/12"):
        slow, chosen = selections(model, roles, ids)
        with accelerate(model):
            fast, quick = selections(model, roles, ids)
        # Rounding decides between two keys at the edge of a pool now and then, and what follows.
        rows = (slow - fast).abs().amax(-1) < 1e-4
        assert rows.double().mean() > 0.95
        for layer in range(6):
            for query in range(0, 96, 7):
                same = sets(chosen[layer], query) == sets(quick[layer], query)
                assert same or not rows[0, query]


def test_evaluation_search_and_gate_take_it(glm, tmp_path):
    batches = make_batches(documents(), length=64, sequences=4)
    rows = {r.name: r for r in evaluate(glm, ["FRRRRR@1/2", "FSSSSS"], batches).overall}
    assert rows["FRRRRR@1/2"].kl < rows["FSSSSS"].kl
    assert rows["FRRRRR@1/2"].beyond == rows["FSSSSS"].beyond
    found = evaluate(glm, "FRRRRR@1/2", batches)
    assert found.to_json()["rows"][0]["pool_share"] == 0.5
    assert "50.0%" in found.table()
    assert selects(Pattern("FRR@1/8"), 8, 64) == "FSS"
    assert selects(Pattern("FRR@1/4"), 8, 64) == "FRR@1/4"
    result = search(glm, batches, tmp_path, SearchSettings(keep=1 / 2, uniform=False))
    assert result.pattern.with_rest("R", SHARE).pool_share == SHARE


def test_what_does_not_run_it_says_so(glm):
    from indexcache.bench.floors import prefill_floor
    from indexcache.shapes import DEVICES

    refused(
        lambda: check_model(glm, Pattern("FRRRRR@1/4"), 64), "share of the context", "such as @8"
    )
    rates = DEVICES["H200"].reachable
    shape = SimpleNamespace(topk=8)
    refused(lambda: prefill_floor(shape, 64, Pattern("FR@1/4"), rates), "share of the context")
