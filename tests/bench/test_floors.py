"""Test floors against figures that were derived by hand, and against counting."""

from __future__ import annotations

import pytest

from indexcache.bench.floors import PARTS, decode_floor, prefill_floor
from indexcache.pattern import Pattern
from indexcache.shapes import Rates, count_pairs, rates_named, shape_of
from tests.support import refused

H100 = rates_named("H100")
FLASH = shape_of("glm-4.7-flash-dsa")


def test_floors_are_the_figures_that_were_derived_by_hand():
    """One request of 200K tokens on an H100.

    A layer takes 113 ms of scores and 22 ms of attention, all linears 1.73 s, the prefill 8.1 s all
    full and 4.2 s at 1/4. Decoding takes 8.8 microseconds an indexer: 339 and 378 tokens/s.
    """
    full, quarter = Pattern.full(47), Pattern.uniform(47, 4)
    floor = prefill_floor(FLASH, 200_000, full, H100)
    assert floor["index_topk"] / 47 == pytest.approx(113, rel=0.01)
    assert prefill_floor(FLASH, 200_000, full, H100, index_dtype="bf16")[
        "index_topk"
    ] / 47 == pytest.approx(207, rel=0.01)
    assert floor["attention"] / 47 == pytest.approx(22.4, rel=0.01)
    assert (floor["linears"] + floor["mlp"] + floor["indexer"]) / 1e3 == pytest.approx(
        1.73, rel=0.01
    )
    assert sum(floor.values()) / 1e3 == pytest.approx(8.1, rel=0.02)
    assert sum(prefill_floor(FLASH, 200_000, quarter, H100).values()) / 1e3 == pytest.approx(
        4.2, rel=0.02
    )
    step = decode_floor(FLASH, 200_000, full, H100)
    assert step["index_topk"] / 47 == pytest.approx(8.8e-3, rel=0.01)
    assert 1e3 / sum(step.values()) == pytest.approx(339, rel=0.02)
    assert 1e3 / sum(decode_floor(FLASH, 200_000, quarter, H100).values()) == pytest.approx(
        378, rel=0.05
    )


def test_floors_of_scores_are_the_scores_that_are_needed():
    """Count query by query: a row with at most k keys needs no scores, R scores only its pool."""
    shape = shape_of("tiny-random")
    k, peak = shape.topk, 2 * shape.index_heads * shape.index_dim / H100.fp8 * 1e3
    for length in (1, k, k + 1, 500):
        assert count_pairs(length, k) == sum(min(t, k) for t in range(1, length + 1))
        for roles, widths in (("FSSSSSSS", [length]), ("FRSSSSSS@2", [length, 2 * k])):
            needed = sum(min(t, width) for width in widths for t in range(k + 1, length + 1)) * peak
            slow = Rates("x", H100.fp8, H100.bf16, 1e30, 1.0, 0.0)  # Memory is no bound here.
            assert prefill_floor(shape, length, Pattern(roles), slow)[
                "index_topk"
            ] == pytest.approx(needed)
    one = decode_floor(shape, 500, Pattern("FRSSSSSS@2"), H100)["index_topk"]
    assert one == pytest.approx((500 + 2 * k) * (shape.index_dim + 4) / H100.hbm * 1e3)
    assert decode_floor(shape, k, Pattern.full(8), H100)["index_topk"] == 0


def test_decoding_more_requests_reads_more_experts_and_other_weights_once():
    one, many = (decode_floor(FLASH, 60_000, Pattern.full(47), H100, batch=b) for b in (1, 4))
    assert one["linears"] == many["linears"]
    assert many["attention"] == pytest.approx(4 * one["attention"])
    assert many["index_topk"] == pytest.approx(4 * one["index_topk"])
    assert many["mlp"] / one["mlp"] == pytest.approx(3.0, abs=0.3)
    h200 = decode_floor(FLASH, 60_000, Pattern.full(47), rates_named("h200"))
    assert sum(h200.values()) == pytest.approx(sum(one.values()) * 3.02 / 4.3)
    assert tuple(one) == tuple(prefill_floor(FLASH, 10, Pattern.full(47), H100)) == PARTS
    refused(lambda: rates_named("A100"), "A100", "H100, H200")
