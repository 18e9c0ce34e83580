"""Test what a search concludes from few measurements: corrected estimates, errors, near ties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from indexcache import Pattern, SearchSettings
from indexcache.searching.estimates import SCALES, Estimates
from indexcache.searching.fast import FastSearch, pooled
from indexcache.searching.planned import PlannedSearch, grown_errors, total
from indexcache.searching.samples import SKETCH_TOKENS, Difference
from indexcache.searching.similarity import best_patterns
from tests.searching.test_fast import MadeUp, additive

LAYERS = 12
FULL = Pattern.full(LAYERS)


@pytest.fixture
def true():
    rng = np.random.default_rng(3)
    return np.triu(rng.gamma(1.0, 0.01, (LAYERS, LAYERS)), 1)


def random_pattern(rng):
    return Pattern("F" + "".join(rng.choice(["F", "S"], LAYERS - 1)))


def test_what_is_learned_brings_the_estimates_to_the_truth(true):
    rng = np.random.default_rng(4)
    guess = Estimates(true * np.exp(0.5 * rng.normal(size=LAYERS)), 1e-4)
    tests = [random_pattern(rng) for _ in range(50)]

    def wrong():
        return np.mean([abs(total(guess.best() - true, p)) for p in tests])

    before = wrong()
    for layer in range(1, LAYERS):
        flip = Pattern.full(LAYERS).replace(layer, "S")
        guess.learn(flip, FULL, total(true, flip), 1e-4)
    flips = wrong()
    for _ in range(40):
        pattern = random_pattern(rng)
        guess.learn(pattern, FULL, total(true, pattern), 1e-4)
    assert wrong() < 0.5 * flips < 0.3 * before
    found = best_patterns(-guess.best(), 1)[4]
    assert total(true, found) <= 1.1 * total(true, best_patterns(-true, 1)[4])


def test_a_difference_to_another_pattern_tells_of_what_changed_alone(true):
    guess = Estimates(true * 1.5, 1e-4)
    trunk = Pattern("FSSFSSFSSFSS")
    more = trunk.replace(6, "S")
    before = guess.best()
    guess.learn(more, trunk, total(true, more) - total(true, trunk), 1e-4)
    moved = np.flatnonzero((guess.best() != before).any(0))
    # Layer 6 is shared, and those that read it read layer 3.
    assert moved.tolist() == [6, 7, 8]
    promised = total(guess.best(), more) - total(guess.best(), trunk)
    assert promised == pytest.approx(total(true, more) - total(true, trunk), abs=2e-3)


def test_a_measurement_with_a_large_error_changes_little(true):
    flip = Pattern.full(LAYERS).replace(5, "S")
    sure, unsure = Estimates(true, 1e-4), Estimates(true, 1e-4)
    sure.learn(flip, FULL, true[4, 5] + 0.02, 1e-5)
    unsure.learn(flip, FULL, true[4, 5] + 0.02, 1.0)
    assert unsure.best()[4, 5] == pytest.approx(true[4, 5], abs=1e-4)
    assert sure.best()[4, 5] > true[4, 5] + 0.005
    # What layer 5 loses with other selections was guessed too low alike; other layers stay.
    assert sure.best()[1, 5] > true[1, 5]
    assert np.delete(sure.best(), 5, 1) == pytest.approx(np.delete(true, 5, 1))


@pytest.mark.parametrize(("factor", "scale"), [(0.5, 0.5), (0.01, SCALES[0]), (3.0, SCALES[1])])
def test_the_scale_is_that_of_most_flips_within_bounds(true, factor, scale):
    guess = Estimates(true, 1e-4)
    flips = {i: factor * true[i - 1, i] for i in range(1, LAYERS)} | {3: 100.0}
    guess.scale(flips)
    assert guess.best() == pytest.approx(scale * true)


def test_errors_are_those_that_all_have_and_grow_with_the_loss():
    rng = np.random.default_rng(5)
    lost = {i: 1e-5 * 1.3**i for i in range(40)}
    spread = {i: math.hypot(1e-3, 0.3 * x) for i, x in lost.items()}
    found = {
        i: Difference(x, spread[i] * math.sqrt(rng.chisquare(2) / 2), 2) for i, x in lost.items()
    }
    errors = grown_errors(found | {40: Difference(1.0, math.inf, 0)})
    assert set(errors) == set(lost)
    for i, error in errors.items():
        assert spread[i] / 2 < error < 2 * spread[i]
    assert grown_errors({1: Difference(0.1, math.inf, 0)}) == {}


@pytest.mark.parametrize("freedom", [2.0, 5.0, math.inf])
@pytest.mark.parametrize("value", [-0.5, 0.0, 2.0])
def test_what_is_missed_is_an_expected_value(value, freedom):
    rng = np.random.default_rng(6)
    draws = rng.standard_t(freedom, 400_000) if freedom < math.inf else rng.normal(size=400_000)
    expected = np.maximum(-(value + 0.3 * draws), 0).mean()
    found = Difference(value, 0.3, freedom).missed()
    assert found == pytest.approx(expected, rel=0.15, abs=2e-4)


def test_nothing_is_missed_on_the_whole_text_and_anything_with_two_sequences():
    assert Difference(0.1, 0.0, math.inf).missed() == 0
    assert Difference(-0.1, 0.0, math.inf).missed() == 0.1
    assert Difference(0.1, 0.01, 1).missed() == math.inf


def test_a_sketch_drops_only_what_is_far_worse():
    apart = {i: Difference(v, 0.001, 1.0) for i, v in enumerate([0.0, 0.001, 0.002, 0.05])}
    alone = [i for i, d in apart.items() if d.low(0.01) > 0]
    together = [i for i, d in pooled(apart).items() if d.low(0.01) > 0]
    assert alone == [3]  # 0.05 is 50 errors
    assert together == [3]
    noisy = {i: Difference(d.value, 0.001 if i else 0.04, 1.0) for i, d in apart.items()}
    assert [i for i, d in pooled(noisy).items() if d.low(0.01) > 0] == []
    nothing = {0: Difference(0.1, math.inf, 0)}
    assert pooled(nothing) == nothing


def test_near_ties_end_a_race_early():
    work = []
    for tolerance in (0.005, 0.0):
        samples = MadeUp(16, additive([0, *[0.01 + 1e-6 * i for i in range(15)]]), 48, 1e-4)
        settings = SearchSettings(method="fast", tolerance=tolerance)
        best = FastSearch(samples, 4, (0,), settings).race(range(1, 16))
        assert samples.loss(Pattern.full(16).replace(best, "S")) < 0.0101
        work.append(samples.work.layer_tokens)
    assert work[0] < 0.4 * work[1]


def test_a_start_needs_no_tolerance_and_no_losses():
    pairs = np.zeros((LAYERS, LAYERS))
    settings = SearchSettings(method="fast", start="gradients", tolerance=0)
    search = PlannedSearch(MadeUp(LAYERS, lambda p: 0.0, 4), 2, (0,), settings, pairs=pairs)
    assert [p.full for p in search.run()][-1] == 2


def with_long_sequences(samples):
    ids = torch.zeros(1, SKETCH_TOKENS // 2, dtype=torch.int64)
    samples.batches = [replace(b, ids=ids) for b in samples.batches]
    return samples


@pytest.mark.parametrize("seed", range(4))
def test_stages_take_turns_behind_a_sketch(seed):
    costs = np.random.default_rng(seed).permutation(24) * 1e-4
    samples = with_long_sequences(MadeUp(24, additive(costs), 24, 2e-3, seed))
    search = FastSearch(samples, 6, (0, 8, 16), SearchSettings(method="fast", swaps=False))
    for point in search.run():
        counts = [point.pattern.roles[a : a + 8].count("F") for a in (0, 8, 16)]
        assert max(counts) - min(counts) <= 1


def test_a_sketch_has_two_sequences_and_enough_tokens():
    samples = MadeUp(4, additive([0, 0, 0, 0]), 40)
    assert samples.sketch() == ()  # Two of these sequences are 20 tokens.
    assert FastSearch(samples, 1, (0,), SearchSettings(method="fast")).parts == samples.parts()
    with_long_sequences(samples)
    assert len(samples.sketch()) == 2
    assert set(samples.sketch()) < set(samples.parts()[0])
    search = FastSearch(samples, 1, (0,), SearchSettings(method="fast"))
    assert search.parts == [samples.sketch(), *samples.parts()]
    assert search.small == samples.parts()[0]
