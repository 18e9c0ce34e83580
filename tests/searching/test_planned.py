"""Test the start from gradients: its estimates, the patterns that it plans, and its runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from indexcache import Pattern, SearchSettings, accelerate, search, use_pattern
from indexcache.data import make_batches
from indexcache.models.family import decoder_layers
from indexcache.models.gradients import pair_losses
from indexcache.models.lm import hidden_states, summed_loss
from indexcache.searching.greedy import greedy
from indexcache.searching.planned import PlannedSearch
from tests.searching.test_fast import COSTS, MadeUp, additive
from tests.searching.test_objectives import mixed  # noqa: F401 - a fixture
from tests.support import documents, make_model, refused

START = {"method": "fast", "start": "gradients", "uniform": False}


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(), length=64, sequences=6)


def estimates(model, ids):
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    return pair_losses(model, [ids], [counted], [np.ones(len(ids))])


@pytest.mark.parametrize("family", ["glm_moe_dsa", "deepseek_v32"])
def test_an_estimate_is_half_the_square_of_what_small_changes_lose(family):
    model = make_model(family).double()
    model.set_experts_implementation("eager")
    ids = torch.randint(0, model.config.vocab_size, (1, 14), generator=torch.manual_seed(1))
    found = estimates(model, ids)
    assert not np.tril(found).any()
    for layer in (2, 5):
        attention = decoder_layers(model)[layer].self_attn
        outputs = []

        def keep(module, args, output, outputs=outputs):
            outputs.append(output[0])

        with attention.register_forward_hook(keep):
            for role in "FS":
                with use_pattern(model, Pattern.full(6).replace(layer, role)):
                    hidden_states(model, ids)
        change = outputs[1] - outputs[0]

        def loss_with(step, at, attention=attention, change=change):
            def add(module, args, output):
                moved = output[0].clone()
                moved[:, at] += step * change[:, at]
                return (moved, *output[1:])

            with attention.register_forward_hook(add), use_pattern(model, "FFFFFF"):
                hidden = hidden_states(model, ids)
            counted = torch.ones_like(ids, dtype=torch.bool)
            counted[:, 0] = False
            return summed_loss(model, hidden, ids, counted).item()

        slopes = [(loss_with(1e-3, t) - loss_with(-1e-3, t)) / 2e-3 for t in range(14)]
        expected = 0.5 * sum(s**2 for s in slopes)
        assert expected > 0
        # The loss itself is in fp32.
        assert found[layer - 1, layer] == pytest.approx(expected, rel=0.02)


def test_the_fast_path_gives_the_same_estimates(glm, batches):
    ids = torch.cat([b.ids for b in batches[:2]])
    stock = estimates(glm, ids)
    with accelerate(glm):
        fast = estimates(glm, ids)
    assert np.allclose(fast, stock, rtol=1e-3, atol=1e-7)
    apart = estimates(glm, ids[:1]) + estimates(glm, ids[1:])
    assert np.allclose(stock, apart, rtol=1e-4, atol=1e-9)


def planned(samples, full, pairs, starts=(0,), fixed=()):
    settings = SearchSettings(method="fast", start="gradients")
    search = PlannedSearch(samples, full, starts, settings, 0.0, fixed, pairs=pairs)
    return list(search.run())


def test_good_estimates_give_the_exact_patterns_with_a_twentieth_of_the_work():
    pairs = np.triu(np.tile(COSTS, (30, 1)), 1)
    samples = MadeUp(30, additive(COSTS), noise=1e-4)
    points = planned(samples, 4, pairs)
    exact = {p.full: p for p in greedy(MadeUp(30, additive(COSTS)).mean, 30, 4)}
    assert [p.full for p in points] == list(range(30, 3, -1))
    for p in points:
        assert samples.loss(p.pattern) <= exact[p.full].loss - 2 + 1e-9
        assert p.estimated == (p.full not in (30, 15, 8, 4))
        assert p.loss == pytest.approx(2 + samples.loss(p.pattern), abs=0.002 + 0.3 * p.estimated)
    assert samples.work.layer_tokens < 430 / 20 * samples.work.whole


def test_swaps_put_right_what_the_estimates_get_wrong():
    pairs = np.triu(np.tile(COSTS, (30, 1)), 1)
    cheap = int(np.argsort(COSTS)[13])
    pairs[:, cheap] = 0.15  # It seems to be dearer than it is.
    samples = MadeUp(30, additive(COSTS), noise=1e-4)
    best = sum(sorted(COSTS)[:16])
    assert {p.full: p for p in planned(samples, 15, pairs)}[15].loss == pytest.approx(
        2 + best, abs=0.001
    )


@pytest.mark.parametrize(("starts", "fixed"), [((0, 4, 8), (6,)), ((0, 5), (3, 9))])
def test_stages_share_in_turn_and_layers_stay_full(starts, fixed):
    rng = np.random.default_rng(7)
    pairs = np.triu(rng.random((12, 12)), 1)
    points = planned(MadeUp(12, additive(rng.random(12))), 5, pairs, starts, fixed)
    ends = [*starts[1:], 12]
    for p in points:
        assert all(p.pattern[i] == "F" for i in (*starts, *fixed))
        counts = [p.pattern.roles[a:b].count("F") for a, b in zip(starts, ends, strict=True)]
        assert max(counts) - min(counts) <= 2


def test_a_run_resumes_and_repeats(glm, mixed, tmp_path):  # noqa: F811
    settings = SearchSettings(keep=1 / 3, **START)
    whole = search(glm, mixed, tmp_path / "a", settings)
    lines = (tmp_path / "a/journal.jsonl").read_text().splitlines(keepends=True)
    assert [p.full for p in whole.frontier] == [6, 5, 4, 3, 2]
    assert sum("pairs" in json.loads(line) for line in lines) == 1
    for kept in (1, 3, len(lines) - 1):
        (tmp_path / "a/result.json").unlink()
        (tmp_path / "a/journal.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9])
        assert search(glm, mixed, tmp_path / "a", settings).to_json() == whole.to_json()
        assert (tmp_path / "a/journal.jsonl").read_text() == "".join(lines)
    for bad in ([[1.0]], [["x"] * 6] * 6, [[0.0] * 6] * 5, 3):
        line = json.dumps({"pairs": bad}) + "\n"
        (tmp_path / "a/journal.jsonl").write_text(line + "".join(lines[1:]))
        refused(lambda: search(glm, mixed, tmp_path / "a", settings), "changed by hand")
    flips = search(glm, mixed, tmp_path / "b", SearchSettings(method="fast", keep=1 / 3))
    assert whole.work.evaluations < flips.work.evaluations


@pytest.mark.parametrize("objective", ["worst", "kl"])
def test_every_objective_has_a_start(glm, mixed, tmp_path, objective):  # noqa: F811
    settings = SearchSettings(keep=1 / 2, objective=objective, **START)
    assert search(glm, mixed, tmp_path, settings).pattern.roles.count("F") == 3


def test_where_there_are_no_gradients_it_is_refused(glm, batches, tmp_path):
    def run(**settings):
        return lambda: search(glm, batches, tmp_path, SearchSettings(**settings))

    refused(run(start="gradients"), "--start is a setting of the fast search")
    refused(run(method="fast", start="gradients", roles="FRS"), "leave --roles FRS out")
    refused(SearchSettings(method="fast", start="gradients").check_engine, "vLLM gives no gradient")
