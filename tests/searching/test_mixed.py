"""Test the search among F, R and S, its costs, and the limits that any search takes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch

from benchmarks.frs_frontier import MEASURED_POOL, write_costs
from indexcache import Pattern, SearchSettings, accelerate, evaluate, search, use_pattern
from indexcache.data import make_batches
from indexcache.models.lm import hidden_states
from indexcache.models.prefix import PrefixCache
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
    return list(MixedSearch(samples, COSTS, [SHARE], frozenset((0,)), settings, cost, **kind).run())


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
    b = list(MixedSearch(plain, COSTS, [SHARE], frozenset((0,)), settings, 0.3).run())
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


SIZES = [Fraction(1, 4), Fraction(1, 16)]
BY_SIZE = RoleCosts(1000, 0.2, 0.4, "a test", {SIZES[1]: (0.05, 0.1)})


def test_the_cost_of_a_pattern_counts_every_pool_by_its_size():
    assert BY_SIZE.of(Pattern("FRRSFRSF@1/4,1/16")) == pytest.approx((3 + 0.2 + 0.8 + 0.15) / 8)
    assert BY_SIZE.of(Pattern("FRRSFRSF@1/4")) == pytest.approx((3 + 0.4 + 1.2) / 8)
    assert BY_SIZE.of(Pattern("FSSSFSSS")) == 0.25
    assert BY_SIZE.to_json()["others"] == {"1/16": [0.05, 0.1]}
    assert "1/16" in str(BY_SIZE)


def test_every_group_gets_the_pool_that_it_needs():
    def loss(pattern):  # The layers behind 4 need wide pools; those before need none.
        lost = 0.0
        for i, role in enumerate(pattern.roles):
            need = 1.0 if i > 4 else 0.01
            if role == "R":
                wide = pattern.pools()[pattern.source(i)] == SIZES[0]
                lost += need * (0.01 if wide else 0.2)
            lost += need * (role == "S")
        return lost + (pattern.roles[4] != "F")

    samples = MadeUp(8, loss, noise=1e-5)
    fixed = frozenset((0,))
    settings = SearchSettings(method="fast", roles="FRS")
    points = list(MixedSearch(samples, BY_SIZE, SIZES, fixed, settings, 0.53).run())
    found = points[-1].pattern
    assert found.pools()[4] == SIZES[0]
    assert found.pools().get(0, SIZES[1]) == SIZES[1]
    costs = [p.cost for p in points]
    assert all(a > b for a, b in pairwise(costs))
    one = [SIZES[0]]
    single = list(MixedSearch(samples, BY_SIZE, one, fixed, settings, 0.53).run())
    assert loss(found) <= loss(single[-1].pattern)


def test_the_pool_of_a_group_shrinks_where_that_is_cheap():
    def loss(pattern):
        sizes = [
            pattern.pools()[pattern.source(i)] for i, r in enumerate(pattern.roles) if r == "R"
        ]
        return sum(0.001 if s == SIZES[0] else 0.0011 for s in sizes) + pattern.roles.count("S")

    costs = RoleCosts(1000, 0.2, 0.3, "a test", {SIZES[1]: (0.2, 0.29)})
    settings = SearchSettings(method="fast", roles="FRS", tolerance=0)
    search_ = MixedSearch(MadeUp(4, loss), costs, SIZES, frozenset((0,)), settings, 0.0)
    search_.trunk = Pattern("FRRR", SIZES[0])
    assert dict(search_.changed(0, "F")) == {"F@1/16": Pattern("FRRR", SIZES[1])}
    points = list(search_.run())
    assert any(p.pattern == Pattern("FRRR", SIZES[1]) for p in points)


@pytest.mark.parametrize("fast", [False, True])
def test_every_group_runs_with_its_own_pool(glm, batches, fast):
    ids = batches[0].ids

    def hidden(pattern):
        with use_pattern(glm, pattern):
            return hidden_states(glm, ids)

    with accelerate(glm) if fast else nullcontext():
        # An R layer whose pool is everything does what an F layer does.
        mixed = hidden("FRFRFF@99/100,1/4")
        assert torch.allclose(mixed, hidden("FFFRFF@1/4"), atol=1e-5)
        assert torch.allclose(hidden("FRFRFF@1/4,99/100"), hidden("FRFFFF@1/4"), atol=1e-5)
        assert not torch.allclose(mixed, hidden("FRFRFF@1/4"), atol=1e-3)
        prefix = PrefixCache(glm, [ids])
        prefix.rebase(Pattern("FRFRFF@99/100,1/4"))
        for other in ("FRFRFF@99/100,1/8", "FRFRFS@99/100,1/4"):
            assert torch.equal(prefix.hidden(0, Pattern(other)), hidden(other))


@pytest.mark.parametrize("cheap", ["S", "R"])
def test_a_swap_leaves_a_path_that_ends_badly(cheap):
    def loss(pattern):  # Layer 2 is cheapest first, but with it changed all others are dear.
        others = sum(r != "F" for r in pattern.roles) - (pattern.roles[2] != "F")
        missing = 0.5 * pattern.roles.count("R" if cheap == "S" else "S")
        return 0.01 * others + (0.005 + 0.1 * others) * (pattern.roles[2] != "F") + missing

    costs = RoleCosts(1000, 0.0, 0.01, "a test")
    found = []
    for swaps in (True, False):
        settings = SearchSettings(method="fast", roles="FRS", swaps=swaps)
        state = MadeUp(6, loss), costs, [SHARE], frozenset((0,)), settings, 0.51
        found.append(list(MixedSearch(*state).run())[-1])
    assert found[0].pattern[2] == "F" != found[1].pattern[2]
    assert found[0].pattern.roles.count(cheap) == 3
    assert found[0].cost <= found[1].cost
    assert found[0].loss < found[1].loss


def test_a_run_with_pools_of_several_sizes_goes_on(glm, batches, tmp_path):
    settings = SearchSettings(
        method="fast",
        roles="FRS",
        pool="3/4,1/2",
        cost_context=4096,
        keep=0.7,
        objective="kl",
        stay_full=(3,),
        uniform=False,
    )
    whole = search(glm, batches, tmp_path, settings)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "result.json").unlink()
    (tmp_path / "journal.jsonl").write_text("".join(lines[:-3]) + lines[-3][:12])
    again = search(glm, batches, tmp_path, settings)
    assert again.to_json() == whole.to_json()
    assert (tmp_path / "journal.jsonl").read_text() == "".join(lines)
    tried = {json.loads(line)["pattern"] for line in lines}
    assert {"FRFFFF@3/4", "FRFFFF@1/2", "FSFFFF"} < tried
    assert whole.to_json()["costs"]["others"] == {"1/2": [0.0, 0.5]}
    assert evaluate(glm, "FRFFRF@3/4,1/2", batches).rows


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
    refused(run(**mix, pool="1/8,8"), "several such as 1/8,1/16", "'1/8,8'")
    refused(run(**mix, pool="1/8,2/2"), "below 1")
    refused(run(**mix, pool="8"), "pool")  # It holds all 64 tokens.
    refused(run(**mix, costs=str(tmp_path / "no.json")), "no.json")
    refused(run(**mix, cost_context=0), "--cost-context")
    refused(run(**mix, keep=2), "--keep is a share of the indexers' cost", "not 2")
    refused(run(keep=7), "a whole number from 2 to 6", "not 7")
    refused(run(keep=2.5), "a whole number from 2 to 6", "not 2.5")
    refused(run(most_loss=float("nan")), "--most-loss is a number")
    refused(run(stay_full=(6,)), "layers 0 to 5")
    refused(run(stay_full=(1, 2, 3), keep=1 / 3), "4 layers stay full", "keep more")
