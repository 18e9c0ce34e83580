"""Test the search among F, R and S, its costs, and the limits that any search takes."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise, product

import pytest

from benchmarks.frs_frontier import MEASURED_POOL, write_costs
from indexcache import Pattern, SearchSettings, search
from indexcache.data import make_batches
from indexcache.searching.costs import RoleCosts, by_arithmetic, fitted, pool_tokens
from indexcache.searching.mixed import MixedSearch
from tests.searching.test_fast import OFF, MadeUp
from tests.support import documents, refused

SHARE = Fraction(1, 8)
COSTS = RoleCosts(1000, 0.1, 0.25, "a test")


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(), length=64, sequences=4)


def loss_of(costs, again=0.1):
    def loss(pattern):
        share = {"F": 0.0, "R": again, "S": 1.0}
        return sum(c * share[r] for c, r in zip(costs, pattern.roles, strict=True))

    return loss


def mixed(samples, cost, **kind):
    settings = SearchSettings(method="fast", roles="FRS")
    return list(MixedSearch(samples, COSTS, SHARE, frozenset((0,)), settings, cost, **kind).run())


def test_costs_count_roles_and_pools():
    assert COSTS.of(Pattern.full(4)) == 1
    assert COSTS.of(Pattern("FSSS")) == 0.25
    assert COSTS.of(Pattern("FRSF@1/8")) == pytest.approx((2 + 0.1 + 0.25) / 4)
    assert COSTS.of(Pattern("FRSFR@8")) == pytest.approx((2 + 0.2 + 0.5) / 5)
    assert pool_tokens(SHARE, 200_001, 2048) == 25_001
    assert pool_tokens(SHARE, 8_000, 2048) == 2048
    assert pool_tokens(8, 200_000, 2048) == 16_384
    assert by_arithmetic(200_000, SHARE, 2048).reindex == SHARE
    assert by_arithmetic(1_000_000, 8, 2048).reindex == pytest.approx(0.016384)


def test_costs_are_fitted_to_measured_rows(tmp_path):
    def row(pattern, context):
        p = Pattern(pattern)
        pool = 0 if p.pool is None else pool_tokens(p.pool, context, 10)
        full, again, pools = len(p.full_layers), p.roles.count("R"), len(p.publishers())
        each = full * (3 + 0.01 * context) + pools * 0.02 * pool + again * (2 + 0.05 * pool)
        parts = {"index_topk": context * each * 0.7, "indexer": context * each * 0.3, "mlp": 9.0}
        return {"pattern": pattern, "context": context, "parts_ms": parts}

    patterns = ("FFFF", "FSSF", "FRRF@8", "FRRR@8", "FRSF@2", "FSSR@4")
    rows = [row(p, n) for p in patterns for n in (1000, 5000)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    costs = fitted(tmp_path, 20_000, Fraction(1, 16), 10)
    assert costs.reindex == pytest.approx((2 + 0.05 * 1250) / 203, rel=1e-3)
    assert costs.publish == pytest.approx(0.02 * 1250 / 203, rel=1e-3)
    only = [r for r in rows if "R" not in r["pattern"]]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": only}))
    refused(lambda: fitted(tmp_path, 100, 8, 10), "no measured row has R layers", "1/4+R8")
    refused(lambda: fitted(tmp_path / "none", 100, 8, 10), "none")


def test_dear_layers_become_r_and_cheap_ones_s():
    lost = [0, 0.001, 0.5, 0.002, 0.4, 0.003, 0.6, 0.001]
    samples = MadeUp(8, loss_of(lost))
    points = mixed(samples, 0.3)
    last = points[-1]
    assert last.cost <= 0.3 < points[-2].cost
    assert all(a.cost > b.cost for a, b in pairwise(points))
    # Beside the best of all patterns that cost no more.
    best = min(
        loss_of(lost)(p)
        for roles in product("FRS", repeat=7)
        if COSTS.of(p := Pattern("F" + "".join(roles), SHARE if "R" in roles else None))
        <= last.cost
    )
    assert loss_of(lost)(last.pattern) <= best + 0.02
    assert {last.pattern[i] for i in (1, 3, 5, 7)} == {"S"}
    assert last.loss == pytest.approx(2 + loss_of(lost)(last.pattern))
    assert points[0].pattern == Pattern.full(8)


def test_a_search_ends_at_the_loss_that_it_may_cost():
    lost = [0, *(0.01 * 2**i for i in range(7))]
    points = mixed(MadeUp(8, loss_of(lost)), 0.0, most_loss=0.1)
    assert points[-1].loss - points[0].loss <= 0.1
    further = mixed(MadeUp(8, loss_of(lost)), 0.0)
    assert further[len(points)].loss - points[0].loss > 0.1
    assert further[-1].pattern == Pattern("FSSSSSSS")


def test_lazy_moves_save_work():
    lost = [0, *(0.01 * i for i in range(1, 12))]
    lazy, plain = MadeUp(12, loss_of(lost)), MadeUp(12, loss_of(lost))
    a = mixed(lazy, 0.3)
    settings = SearchSettings(method="fast", roles="FRS", **OFF)
    b = list(MixedSearch(plain, COSTS, SHARE, frozenset((0,)), settings, 0.3).run())
    assert a[-1].loss <= b[-1].loss + 0.02
    assert lazy.work.layer_tokens < 0.4 * plain.work.layer_tokens


def test_a_run_has_costs_and_resumes(glm, batches, tmp_path):
    settings = SearchSettings(
        method="fast", roles="FRS", keep=0.4, pool="1/4", cost_context=4096, uniform=False
    )
    whole = search(glm, batches, tmp_path / "a", settings)
    lines = (tmp_path / "a/journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/settings.json").write_bytes((tmp_path / "a/settings.json").read_bytes())
    (tmp_path / "b/journal.jsonl").write_text("".join(lines[:9]) + lines[9][:12])
    again = search(glm, batches, tmp_path / "b", settings)
    assert again.to_json() == whole.to_json()
    assert (tmp_path / "b/journal.jsonl").read_text() == "".join(lines)
    found = whole.to_json()
    assert found["costs"]["context"] == 4096
    assert found["frontier"][-1]["cost_share"] <= 0.4
    assert whole.pattern.pool in (None, Fraction(1, 4))
    assert "cost" in whole.table()
    assert any("R" in json.loads(line)["pattern"] for line in lines)


def test_the_costs_of_the_frontier_are_those_that_the_kernels_took(tmp_path):
    file = write_costs(tmp_path / "costs.json")
    at = {p: fitted(file, 200_000, p, 64) for p in (MEASURED_POOL, Fraction(1, 32))}
    full = (9262.53 + 341.22 + 291.0) / 47
    again = (341.22 + 291.0) / 47 + 66.1481
    assert at[MEASURED_POOL].reindex == pytest.approx(again / full, rel=0.05)
    publish = (272.298 - 190.2665 + 26.6718) / full
    assert at[MEASURED_POOL].publish == pytest.approx(publish, rel=0.05)
    assert at[Fraction(1, 32)].reindex < 0.6 * at[MEASURED_POOL].reindex


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_layers_stay_full_and_a_loss_ends_any_search(glm, batches, tmp_path, method):
    settings = SearchSettings(method=method, keep=2, stay_full=(3,), uniform=False)
    result = search(glm, batches, tmp_path / "a", settings)
    assert result.pattern.full_layers == (0, 3)
    assert all(p.pattern[3] == "F" for p in result.frontier)
    free = search(
        glm, batches, tmp_path / "b", SearchSettings(method=method, keep=1 / 6, uniform=False)
    )
    losses = [p.loss - free.frontier[0].loss for p in free.frontier]
    limit = max(losses[1], 0.0) + 1e-9
    settings = SearchSettings(method=method, keep=1 / 6, most_loss=limit, uniform=False)
    short = search(glm, batches, tmp_path / "c", settings)
    count = next((i for i, lost in enumerate(losses) if lost > limit), len(losses))
    assert [str(p.pattern) for p in short.frontier] == [
        str(p.pattern) for p in free.frontier[:count]
    ]


def test_limits_that_do_not_fit_are_refused(glm, batches, tmp_path):
    def run(**settings):
        return lambda: search(glm, batches, tmp_path, SearchSettings(**settings))

    mix = {"method": "fast", "roles": "FRS"}
    refused(run(roles="FRS"), "--method fast")
    refused(run(pool="8"), "--pool is a setting of R layers")
    refused(run(costs="x"), "--costs is a setting of R layers")
    refused(run(**mix, pool="big"), "--pool is a share such as 1/8", "'big'")
    refused(run(**mix, pool="3/2"), "below 1")
    refused(run(**mix, pool="8"), "pool")  # It holds all 64 tokens.
    refused(run(**mix, costs=str(tmp_path / "no.json")), "no.json")
    refused(run(**mix, cost_context=0), "--cost-context")
    refused(run(**mix, keep=2), "--keep is a share of the indexers' cost", "not 2")
    refused(run(keep=7), "a whole number from 2 to 6", "not 7")
    refused(run(keep=2.5), "a whole number from 2 to 6", "not 2.5")
    refused(run(most_loss=float("nan")), "--most-loss is a number")
    refused(run(stay_full=(6,)), "layers 0 to 5")
    refused(run(stay_full=(1, 2, 3), keep=1 / 3), "4 layers stay full", "keep more")
