"""Test the look beside a pattern: what is measured and promised, and the swaps it proposes."""

from __future__ import annotations

import numpy as np
import pytest

from indexcache import Pattern, SearchSettings
from indexcache.searching.planned import PlannedSearch
from indexcache.searching.refining import LOOK, Neighbours, changed, look_around
from tests.searching.test_fast import COSTS, MadeUp, additive


def test_changes_are_measured_on_the_first_part_and_the_best_on_the_second():
    samples = MadeUp(30, additive(COSTS), noise=0.0)
    trunk = Pattern("FFS" * 10)
    parts = samples.parts()[:2]
    drops = [i for i in trunk.full_layers if i]
    near = look_around(samples, trunk, drops, parts, {})
    for i in (*drops, *(j for j in range(30) if trunk[j] == "S")):
        expected = COSTS[i] if trunk[i] == "F" else -COSTS[i]
        assert near.lost[i] == pytest.approx(expected, abs=1e-9)
        on = parts[1] if i in (*near.drops, *near.returns) else parts[0]
        assert samples.measured(changed(trunk, i)) == on
    assert len(near.drops) == -(-len(drops) * LOOK // 1)
    assert near.drops == sorted(drops, key=lambda i: COSTS[i])[: len(near.drops)]
    assert near.returns[0] == max((j for j in range(30) if trunk[j] == "S"), key=COSTS.__getitem__)


def test_swaps_gain_are_disjoint_and_stay_in_their_stage():
    trunk = Pattern("FFFSSFFFSS")
    lost = {1: 0.1, 2: 0.2, 6: 0.1, 7: 0.9, 3: -0.5, 4: -0.3, 8: -0.4, 9: -0.05}
    near = Neighbours(trunk, lost, [1, 2, 6, 7], [3, 4, 8, 9])
    found = near.swaps(lambda i: i // 5)
    assert len(found) == len(set(found))
    for pattern in found:
        assert len(pattern.full_layers) == len(trunk.full_layers)
        for stage in (slice(0, 5), slice(5, 10)):
            assert pattern.roles[stage].count("F") == trunk.roles[stage].count("F")
    best = min(found, key=near.promise)
    assert best == Pattern("FSSFFFSFFS")
    assert near.promise(best) == pytest.approx(0.1 - 0.5 + 0.2 - 0.3 + 0.1 - 0.4)


def test_several_errors_of_the_estimates_are_put_right_at_once():
    pairs = np.triu(np.tile(COSTS, (30, 1)), 1)
    order = np.argsort(COSTS)
    for layer in order[[11, 13]]:
        pairs[:, layer] = 0.3  # They seem to be dearer than they are, and these cheaper.
    for layer in order[[17, 19]]:
        pairs[:, layer] = 1e-4
    samples = MadeUp(30, additive(COSTS), noise=1e-4)
    settings = SearchSettings(method="fast", start="gradients")
    points = {
        p.full: p for p in PlannedSearch(samples, 15, (0,), settings, 0.0, (), pairs=pairs).run()
    }
    assert points[15].loss == pytest.approx(2 + sum(sorted(COSTS)[:16]), abs=0.001)
