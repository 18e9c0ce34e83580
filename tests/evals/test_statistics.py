"""Compare the interval and the greedy search with other implementations on toy data."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import beta

from indexcache.evals import statistics
from indexcache.evals.statistics import (
    LEAST_DOCUMENTS,
    bootstrap_interval,
    chance_above,
    per_document,
    upper_end,
)
from indexcache.pattern import Pattern, full_count, stage_starts
from indexcache.searching.greedy import evaluations, greedy

# -- the interval ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 36, 300])
def test_chance_against_random_weights(n):
    """Draw the weights of the Bayesian bootstrap in plain numpy, the unseen document included."""
    rng = np.random.default_rng(n)
    values = rng.lognormal(0, 1, n)
    ordered = np.sort(values)
    unseen = ordered[-1] + 3 * (ordered[-1] - ordered[-min(4, n)])
    weights = rng.exponential(size=(40_000, n + 1))
    means = weights @ np.append(values, unseen) / weights.sum(1)
    for q in (0.01, 0.3, 0.5, 0.9, 0.975, 0.999):
        margin = np.quantile(means, q)
        assert chance_above(values, margin) == pytest.approx(1 - q, abs=0.015)
    high = upper_end(values, 0.025)
    assert np.mean(means > high) == pytest.approx(0.025, abs=0.003)


@pytest.mark.parametrize(("ones", "zeros"), [(1, 1), (1, 40), (7, 30), (500, 1500)])
def test_chance_of_two_values_is_that_of_a_beta_variable(ones, zeros):
    for margin in (0.001, 0.02, 0.2, 0.5, 0.9):
        a = np.array([[1 - margin] * ones + [-margin] * zeros])
        exact = beta(ones, zeros).sf(margin)
        assert statistics._chance_positive(a)[0] == pytest.approx(exact, abs=1e-9)


def test_chance_where_nothing_varies():
    for values, margin, chance in (
        ([0.5] * 9, 0.5, 1),
        ([0.5] * 9, 0.6, 0),
        ([0.5] * 9, 0.4, 1),
        ([0, 0, 0, 1e-300], 1.0, 0),
        ([1e300, 2e300, 3e300, 4e300], 1.0, 1),
    ):
        assert chance_above(np.array(values, float), margin) == chance
    many = np.random.default_rng(0).normal(size=(5, 7, 40))
    at_once = chance_above(many, 0.1)
    assert at_once.shape == (5, 7)
    assert at_once[3, 2] == pytest.approx(float(chance_above(many[3, 2], 0.1)), abs=1e-12)


def test_too_few_documents_say_nothing():
    """A fault in one document of ten is among 36 documents with 97.5 %, but not among 35."""
    assert 0.9**LEAST_DOCUMENTS <= 0.025 < 0.9 ** (LEAST_DOCUMENTS - 1)
    for n in (0, 1, 2, LEAST_DOCUMENTS - 1):
        assert all(math.isnan(v) for v in bootstrap_interval(range(n), [10] * n))
    assert all(math.isfinite(v) for v in bootstrap_interval(range(36), [10] * 36))


def test_documents_weigh_by_their_tokens():
    counts = list(range(1, 41))
    low, high = bootstrap_interval([0.1 * c for c in counts], counts)
    assert low == pytest.approx(0.1) == high  # Every document has 0.1 per token.
    assert bootstrap_interval([0.0] * 40, [5] * 40) == (0.0, 0.0)
    short = bootstrap_interval([0.0] * 39 + [1.0], [10] * 39 + [1])
    long = bootstrap_interval([0.0] * 39 + [100.0], [10] * 39 + [100])
    assert short[1] < long[1]  # A document of 1 nat a token, of one token or of a hundred.


def test_interval_is_deterministic_and_grows_with_the_level():
    rng = random.Random(1)
    counts = [rng.randrange(50, 500) for _ in range(40)]
    sums = [c * rng.gauss(0, 1) for c in counts]
    assert bootstrap_interval(sums, counts) == bootstrap_interval(sums, counts)
    before = (math.inf, -math.inf)
    for level in (0.1, 0.5, 0.9, 0.95, 0.99):
        low, high = bootstrap_interval(sums, counts, level=level)
        assert low < high
        assert low < before[0]
        assert high > before[1]
        above = float(chance_above(per_document(sums, counts), high))
        assert above == pytest.approx((1 - level) / 2, abs=1e-6)
        assert type(low) is type(high) is float
        before = (low, high)
    assert low < sum(sums) / sum(counts) < high
    shifted = bootstrap_interval([s + 2 * c for s, c in zip(sums, counts, strict=True)], counts)
    assert shifted == pytest.approx([v + 2 for v in bootstrap_interval(sums, counts)])
    low, high = bootstrap_interval([-7 * s for s in sums], counts)
    assert (-high / 7, -low / 7) == pytest.approx(bootstrap_interval(sums, counts))


def test_many_documents_give_the_normal_interval():
    values = np.random.default_rng(0).normal(0.3, 2.0, 1500)
    low, high = bootstrap_interval((values * 50).tolist(), [50] * 1500)
    half = 1.96 * values.std() / math.sqrt(1500)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("documents", [36, 50])
def test_the_mean_of_skewed_and_rarely_broken_documents_is_covered(documents):
    """`benchmarks/coverage.py` is the long form. A percentile bootstrap fails at each of these."""
    rng = np.random.default_rng(7)
    repetitions = 1000
    shape = (repetitions, documents)
    broken = rng.random(shape) < 0.1
    for values, truth in (
        (rng.lognormal(0, 1.5, shape), math.exp(1.125)),
        (rng.normal(0, 0.01, shape) + broken, 0.1),
    ):
        below = chance_above(values, truth) < 0.025
        above = chance_above(-values, -truth) < 0.025
        assert below.mean() <= 0.035
        assert (below | above).mean() <= 0.07
        error = values.std(1) / math.sqrt(documents)
        assert (values.mean(1) + 1.96 * error < truth).mean() > 0.035  # An interval of its kind.


def test_interval_covers_the_true_mean_of_correlated_tokens():
    """In about 95 of 100 cases it does, and an interval over independent tokens does not."""
    rng = np.random.default_rng(7)
    truth = 0.05
    documents = 40
    repetitions = 300
    inside = 0
    inside_naive = 0
    for _ in range(repetitions):
        counts = rng.integers(50, 400, documents)
        means = rng.normal(truth, 0.1, documents)
        noise = rng.normal(0, 1, documents) * np.sqrt(counts)
        sums = counts * means + noise
        values = per_document(sums, counts)
        inside += min(chance_above(values, truth), chance_above(-values, -truth)) >= 0.025
        half = 1.96 / math.sqrt(counts.sum())
        inside_naive += abs(sums.sum() / counts.sum() - truth) <= half
    assert inside / repetitions >= 0.95
    assert inside_naive / repetitions < 0.85


# -- greedy ----------------------------------------------------------------------------------------


class Table:
    """A random loss for every pattern, one of `values` values, so that ties are common."""

    def __init__(self, seed: int, values: int):
        self.seed = seed
        self.values = values
        self.calls = []

    def __call__(self, pattern: Pattern) -> float:
        key = str(pattern)
        self.calls.append(key)
        return float(random.Random(f"{self.seed} {key}").randrange(self.values))


def algorithm_1(loss, layers: int, flips: int) -> list[tuple[str, float, int | None]]:
    """Run the paper's Algorithm 1 on lists of characters; the first of equal losses wins."""
    c = ["F"] * layers
    candidates = list(range(1, layers))
    path: list[tuple[str, float, int | None]] = [("".join(c), loss(Pattern("".join(c))), None)]
    for _ in range(flips):
        best, best_loss = None, math.inf
        for layer in candidates:
            trial = [*c]
            trial[layer] = "S"
            value = loss(Pattern("".join(trial)))
            if value < best_loss:
                best, best_loss = layer, value
        assert best is not None
        c[best] = "S"
        candidates.remove(best)
        path.append(("".join(c), best_loss, best))
    return path


def by_stages(
    loss, layers: int, full: int, starts: tuple[int, ...]
) -> list[tuple[str, float, int | None]]:
    """Flip one layer per stage and round until `full` are left; a used-up stage is skipped."""
    c = ["F"] * layers
    owner = [max(p for p, s in enumerate(starts) if s <= i) for i in range(layers)]
    path: list[tuple[str, float, int | None]] = [("".join(c), loss(Pattern("".join(c))), None)]
    for flip in itertools.count():
        if c.count("F") <= full:
            return path
        stage = flip % len(starts)
        trials = []
        for layer in range(layers):
            if owner[layer] == stage and layer not in starts and c[layer] == "F":
                text = "".join([*c[:layer], "S", *c[layer + 1 :]])
                trials.append((loss(Pattern(text)), layer, text))
        if trials:
            value, layer, text = sorted(trials)[0]
            c = list(text)
            path.append((text, value, layer))
    raise AssertionError


def steps(points) -> list[tuple[str, float, int | None]]:
    return [(str(p.pattern), p.loss, p.flipped) for p in points]


@pytest.mark.parametrize("values", [1, 2, 3, 10**9])
@pytest.mark.parametrize("layers", [1, 2, 3, 6, 9])
def test_greedy_is_algorithm_1(layers, values):
    for seed in range(5):
        for full in range(1, layers + 1):
            ours, theirs = Table(seed, values), Table(seed, values)
            got = list(greedy(ours, layers, full))
            assert steps(got) == algorithm_1(theirs, layers, layers - full)
            assert set(ours.calls) == set(theirs.calls)
            assert len(ours.calls) == len(set(ours.calls)) == evaluations(layers, full)
            assert [s.full for s in got] == list(range(layers, full - 1, -1))
            for a, b in itertools.pairwise(got):  # One layer goes from F to S, never layer 0.
                assert b.flipped
                assert b.pattern == a.pattern.replace(b.flipped, "S")
                assert a.pattern[b.flipped] == "F"


def test_ties_go_to_the_lower_layer():
    got = [s.flipped for s in greedy(lambda p: 1.0, 6, 1)]
    assert got == [None, 1, 2, 3, 4, 5]
    got = [s.flipped for s in greedy(lambda p: 1.0, 6, 2, (0, 3))]
    assert got == [None, 1, 4, 2, 5]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_against_every_pattern(seed):
    """Where each layer costs its own amount, greedy finds the best pattern of every budget.

    In general its losses are not below the best, and each flip is the best possible one.
    """
    rng, layers = random.Random(seed), 8
    cost = [rng.random() for _ in range(layers)]
    pair = {p: rng.gauss(0, 0.5) for p in itertools.combinations(range(layers), 2)}

    def additive(p: Pattern) -> float:
        return math.fsum(cost[i] for i, r in enumerate(p.roles) if r == "S")

    def tangled(p: Pattern) -> float:
        return additive(p) + math.fsum(v for (a, b), v in pair.items() if p[a] == p[b] == "S")

    every = ["F" + "".join(r) for r in itertools.product("FS", repeat=layers - 1)]
    for loss in (additive, tangled):
        best = {
            n: min(loss(Pattern(t)) for t in every if t.count("F") == n)
            for n in range(1, layers + 1)
        }
        got = list(greedy(loss, layers, 1))
        for s in got:
            assert s.loss == loss(s.pattern)
            assert s.loss >= best[s.full]
            if loss is additive:
                assert s.loss == pytest.approx(best[s.full])
        for a, b in itertools.pairwise(got):
            assert b.loss == min(
                loss(a.pattern.replace(i, "S")) for i in range(1, layers) if a.pattern[i] == "F"
            )


@pytest.mark.parametrize(("layers", "stages"), [(6, 2), (7, 3), (9, 4), (5, 5), (8, 1), (4, 3)])
def test_greedy_by_stages_is_the_stage_variant(layers, stages):
    starts = stage_starts(layers, stages)
    for values in (2, 10**9):
        for seed in range(4):
            for full in range(stages, layers + 1):
                ours, theirs = Table(seed, values), Table(seed, values)
                got = list(greedy(ours, layers, full, starts))
                assert steps(got) == by_stages(theirs, layers, full, starts)
                assert len(ours.calls) == len(set(ours.calls)) == evaluations(layers, full, starts)
                assert got[-1].full == full
                for s in got:
                    s.pattern.check(stages=starts)
                ends = [*starts[1:], layers]
                for s in got:  # Stages have equally many flips, as far as their lengths allow.
                    flips = [
                        s.pattern.roles[a:b].count("S") for a, b in zip(starts, ends, strict=True)
                    ]
                    open_ = [
                        f for f, a, b in zip(flips, starts, ends, strict=True) if f < b - a - 1
                    ]
                    assert not open_ or max(flips) - min(open_) <= 1


def test_too_few_full_layers_are_refused():
    for call in (
        lambda: greedy(lambda p: 1.0, 5, 0),
        lambda: greedy(lambda p: 1.0, 5, -3),
        lambda: greedy(lambda p: 1.0, 6, 1, (0, 3)),
    ):
        with pytest.raises(ValueError, match="stays full"):
            list(call())
    assert [s.full for s in greedy(lambda p: 1.0, 5, 9)] == [5]


def test_greedy_yields_each_step_at_once():
    """So a run can be interrupted anywhere."""
    table = Table(0, 9)
    search = greedy(table, 6, 1)
    next(search)
    assert len(table.calls) == 1
    next(search)
    assert len(table.calls) == 1 + 5


# -- the cost of a search --------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 30])
def test_evaluations_down_to_one_full_layer(layers):
    candidates = layers * (layers - 1) // 2
    assert evaluations(layers, 1) == candidates + 1  # The one is the pattern of all full.


@pytest.mark.parametrize(
    ("layers", "full", "candidates"), [(47, 12, 1015), (61, 15, 1725), (78, 20, 2813)]
)
def test_published_budgets(layers, full, candidates):
    """A search down to 1/4 takes the candidates of all steps, and one for the full model."""
    assert full_count(layers, 1 / 4) == full
    assert sum(layers - 1 - step for step in range(layers - full)) == candidates
    assert evaluations(layers, full) == candidates + 1


def test_stages_take_fewer_evaluations():
    for stages in (2, 3, 4, 6):
        ratio = evaluations(48, 12) / evaluations(48, 12, stage_starts(48, stages))
        assert ratio == pytest.approx(stages, rel=0.1)


def test_full_count_rounds_half_up():
    for layers in range(1, 100):
        for n in (1, 2, 3, 4, 8):
            assert full_count(layers, 1 / n) == max((2 * layers + n) // (2 * n), 1)
    assert full_count(6, 0.25) == 2
    assert full_count(5, 1e-9) == 1
    for bad in (0, -0.1, 1.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            full_count(6, bad)


def test_a_budget_can_be_a_number_of_layers():
    assert [full_count(30, n) for n in (2, 13, 13.0, 30, 1)] == [2, 13, 13, 30, 30]
    for bad in (31, 2.5, -3):
        with pytest.raises(ValueError, match="a whole number from 2 to 30"):
            full_count(30, bad)
