"""Test the fast search: beside the exact one, on made-up losses, and as a run that resumes."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from indexcache import Pattern, SearchSettings, search
from indexcache.data import Batch, make_batches
from indexcache.searching.fast import FastSearch
from indexcache.searching.foreseen import foresee
from indexcache.searching.greedy import greedy
from indexcache.searching.samples import Samples
from indexcache.searching.similarity import best_patterns, selection_overlap
from tests.searching.test_objectives import mixed  # noqa: F401 - a fixture
from tests.stand_ins import TorchLlm, engine_around, worker
from tests.support import documents, refused

OFF = {"racing": False, "lazy": False, "together": False, "swaps": False}


class MadeUp(Samples):
    """Samples of a model whose losses are known: `loss(pattern)`, and noise by sequence."""

    def __init__(self, layers, loss, sequences=24, noise=0.0, seed=0):
        ids = torch.zeros(1, 10, dtype=torch.int64)
        batches = [Batch(ids, "d", (f"u{i}",), (f"u{i}",)) for i in range(sequences)]
        self.loss, self.noise, self.seed = loss, noise, seed
        counts = [np.array([9])] * sequences
        super().__init__(
            batches, "weighted", counts, layers, Pattern.full(layers), [], lambda entry: None
        )

    def value(self, pattern, batch):
        rng = np.random.default_rng([self.seed, batch, *pattern.roles.encode()])
        return 9 * (2.0 + self.loss(pattern) + self.noise * rng.standard_normal())

    def _run(self, pattern, new):
        return [([self.value(pattern, b)], None) for b in new]

    def _layers_of(self, pattern, batch):
        return self.layers

    def mean(self, pattern):
        return sum(self.value(pattern, b) for b in self.whole) / 9 / len(self.whole)


def fast(samples, full, starts=(0,), **changes):
    settings = SearchSettings(method="fast", **changes)
    return list(FastSearch(samples, full, starts, settings).run())


def additive(costs):
    return lambda pattern: sum(
        c for c, role in zip(costs, pattern.roles, strict=True) if role == "S"
    )


COSTS = [0, *(np.random.default_rng(5).permutation(29) ** 2 * 1e-3).tolist()]


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(), length=64, sequences=6)


@pytest.mark.parametrize("stages", [1, 2])
def test_without_its_savings_it_is_the_exact_search(glm, batches, tmp_path, stages):
    settings = {"keep": 1 / 3, "stages": stages, "uniform": False}
    exact = search(glm, batches, tmp_path / "exact", SearchSettings(**settings))
    slow = search(glm, batches, tmp_path / "fast", SearchSettings(method="fast", **settings, **OFF))
    assert [str(p.pattern) for p in slow.frontier] == [str(p.pattern) for p in exact.frontier]
    for a, b in zip(slow.frontier, exact.frontier, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-9)
        assert not a.estimated
    assert slow.work.evaluations == exact.work.evaluations
    assert slow.work.layer_tokens == exact.work.layer_tokens - 6 * 384  # All full runs once.


def test_with_its_savings_it_finds_the_same_with_a_tenth_of_the_work():
    samples = MadeUp(30, additive(COSTS), 48, noise=1e-4)
    points = fast(samples, 4)
    exact = list(greedy(MadeUp(30, additive(COSTS)).mean, 30, 4))
    assert [p.full for p in points] == list(range(30, 3, -1))
    for budget in (15, 8, 4):
        own = next(p for p in points if p.full == budget)
        best = next(p for p in exact if p.full == budget)
        assert samples.loss(own.pattern) <= best.loss - 2 + 0.005
        assert not own.estimated
    assert samples.work.layer_tokens < 0.1 * 430 * samples.work.whole


@pytest.mark.parametrize("saving", ["racing", "lazy", "together"])
def test_every_saving_saves(saving):
    work = []
    for on in (True, False):
        costs = [1e-4 * i for i in range(16)] if saving == "together" else COSTS[:16]
        samples = MadeUp(16, additive(costs), noise=1e-4)
        points = fast(samples, 4, **(OFF | {saving: on}))
        assert points[-1].loss == pytest.approx(samples.mean(points[-1].pattern))
        assert samples.loss(points[-1].pattern) < sum(sorted(costs[1:])[:12]) + 0.006
        work.append(samples.work.layer_tokens)
    assert work[0] < 0.8 * work[1]


def test_what_is_bad_together_is_not_flipped_together():
    def loss(pattern):
        return 0.5 * (pattern.roles[3] == pattern.roles[4] == "S") + additive([0.001] * 12)(pattern)

    points = fast(MadeUp(12, loss), 4)
    for p in points:
        assert p.pattern.roles[3:5] != "SS"
    # At the budget the loss is measured; between two budgets it may be an estimate.
    assert points[-1].loss == pytest.approx(2 + loss(points[-1].pattern))


@pytest.mark.parametrize("helped", [9, 10])
def test_a_layer_that_sharing_makes_cheaper_is_seen_at_a_budget(helped):
    costs = [0, *(0.001 * i for i in range(1, 9)), 0.2, 0.3, 0.4]

    def loss(pattern):
        cheaper = pattern.roles[2] == pattern.roles[helped] == "S"
        return additive(costs)(pattern) - cheaper * costs[helped]

    found = [
        {p.full: p.pattern for p in points}[6]
        for points in (
            greedy(MadeUp(12, loss).mean, 12, 6),
            fast(MadeUp(12, loss), 6, swaps=False, together=False),
            fast(MadeUp(12, loss), 6, swaps=False),
        )
    ]
    assert found[0][helped] == found[1][helped] == found[2][helped] == "S"


def test_stages_flip_together_and_take_turns():
    work = []
    for together in (True, False):
        samples = MadeUp(24, additive([1e-4 * i for i in range(24)]), 24, noise=1e-5)
        points = fast(samples, 6, (0, 8, 16), **(OFF | {"together": together}))
        for p in points:
            counts = [p.pattern.roles[a : a + 8].count("F") for a in (0, 8, 16)]
            assert max(counts) - min(counts) <= 1
        assert points[-1].pattern.roles == "FSSSSSSF" * 3
        assert sum(p.estimated for p in points) == 9 * together
        work.append(samples.work.layer_tokens)
    assert work[0] < work[1]


def test_a_swap_leaves_a_path_that_ends_badly():
    def loss(pattern):
        # Layer 2 is cheapest first, but with it shared all others are dear.
        others = pattern.roles.count("S") - (pattern.roles[2] == "S")
        return 0.01 * others + (0.005 + 0.1 * others) * (pattern.roles[2] == "S")

    kept = fast(MadeUp(6, loss), 3, swaps=False)[-1]
    swapped = fast(MadeUp(6, loss), 3)[-1]
    assert kept.pattern.roles[2] == "S"
    assert swapped.pattern.roles[2] == "F"
    assert swapped.loss == pytest.approx(2.03)


def test_an_old_gain_that_is_too_small_is_measured_again():
    def loss(pattern):  # The cheap half becomes dear once layer 1 is shared.
        shared = [i for i in range(1, 12) if pattern.roles[i] == "S"]
        return sum((0.001 if i < 6 and 1 not in shared[:1] else 0.02) + 1e-5 * i for i in shared)

    points = fast(MadeUp(12, loss), 6, **(OFF | {"lazy": True}))
    exact = list(greedy(MadeUp(12, loss).mean, 12, 6))
    assert loss(points[-1].pattern) <= loss(exact[-1].pattern) + 0.002


def test_a_race_drops_the_best_no_more_often_than_it_says():
    wrong = 0
    for seed in range(100):
        samples = MadeUp(6, additive([0, 0.0, 0.03, 0.03, 0.04, 0.05]), 48, 0.1, seed)
        race = FastSearch(samples, 1, (0,), SearchSettings(method="fast", tolerance=0))
        best = min(range(1, 6), key=lambda i: samples.mean(Pattern.full(6).replace(i, "S")))
        wrong += race.race(range(1, 6)) != best
    assert wrong <= 0.05 * 100 + 3 * np.sqrt(100 * 0.05 * 0.95)


def test_a_paired_difference_errs_by_what_it_says():
    inside = 0
    a, b = Pattern("FSFF"), Pattern("FFSF")
    for seed in range(150):
        samples = MadeUp(4, additive([0, 0.02, 0.05, 0]), 40, 0.1, seed)
        part = samples.parts()[1]
        samples.measure([samples.full, a, b], samples.whole)
        found = samples.difference([a], [b], part)
        truth = samples.mean(a) - samples.mean(b)
        assert samples.difference([a], [b], samples.whole).value == pytest.approx(truth)
        assert samples.difference([a], [b], samples.whole).error == 0
        inside += found.low(0.05) <= truth <= found.high(0.05)
    assert 0.83 < inside / 150 < 0.97


def test_parts_grow_and_have_text_and_every_kind(mixed):  # noqa: F811
    class Parts(MadeUp):
        def __init__(self, batches):
            super().__init__(4, lambda p: 0.0)
            self.batches = batches

    text = make_batches(documents(16), length=64, sequences=16)
    parts = Parts([*text, *mixed[2:], *mixed[2:], *mixed[2:], *mixed[2:]]).parts()
    assert parts[-1] == tuple(range(20))
    for a, b in pairwise(parts):
        assert set(a) < set(b)
    for part in parts:
        assert {text[i].domain for i in part if i < 16} == {"d0", "d1"}
        assert sum(i >= 16 for i in part) >= 2


@pytest.mark.parametrize("objective", ["weighted", "worst", "kl"])
def test_a_run_resumes_and_repeats(glm, mixed, tmp_path, objective):  # noqa: F811
    settings = SearchSettings(method="fast", keep=1 / 3, objective=objective)
    whole = search(glm, mixed, tmp_path / "whole", settings)
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    for n in sorted({0, 2, len(lines) // 2, len(lines) - 1}):
        folder = tmp_path / f"cut{n}"
        folder.mkdir()
        (folder / "settings.json").write_bytes((tmp_path / "whole/settings.json").read_bytes())
        (folder / "journal.jsonl").write_text("".join(lines[:n]) + lines[n][: n % len(lines[n])])
        again = search(glm, mixed, folder, settings)
        assert again.to_json() == whole.to_json()
        assert (folder / "journal.jsonl").read_text() == "".join(lines)
    assert whole.to_json()["method"] == "fast"
    assert [p.full for p in whole.frontier] == [6, 5, 4, 3, 2]
    last = {"pattern": "FFFFFF", "batches": [0], "sums": [[1.0]]}
    for bad in (
        {"sums": [[1.0] * 9]},
        {"batches": [99]},
        {"batches": True},
        {"pattern": "FS"},
        {"sums": [["x", 1.0]]},
        {"sums": None},
    ):
        (tmp_path / "whole/journal.jsonl").write_text(
            "".join(lines) + json.dumps(last | bad) + "\n"
        )
        refused(lambda: search(glm, mixed, tmp_path / "whole", settings), "changed by hand")


def test_an_engine_searches_fast_too(glm, batches, tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kw: kw))
    glm.config.save_pretrained(tmp_path)
    engine = engine_around(TorchLlm(glm, [worker()]), tmp_path, glm.config.index_topk)
    engine.facts |= {"vllm": "0.33.0"}
    settings = SearchSettings(method="fast", keep=1 / 3, uniform=False)
    found = search(engine, batches, tmp_path / "engine", settings)
    own = search(glm, batches, tmp_path / "own", settings)
    assert found.pattern == own.pattern
    assert found.frontier[-1].loss == pytest.approx(own.frontier[-1].loss, abs=1e-5)
    assert found.work.layer_tokens > own.work.layer_tokens
    refused(
        lambda: search(engine, batches, tmp_path / "s", SearchSettings(method="similarity")),
        "--method similarity does not run on vLLM; take exact or fast",
    )


def test_similarity_is_what_selections_have_in_common(glm, batches):
    from indexcache import use_pattern
    from indexcache.models.lm import hidden_states

    measured = selection_overlap(glm, batches)
    shares = []
    for batch in batches:
        with use_pattern(glm, "FFFFFF", capture=True) as seam:
            hidden_states(glm, batch.ids)
            one, two = seam.selections[1][0], seam.selections[4][0]
        for t in range(8, 64):
            shares.append(len(set(one[t].tolist()) & set(two[t].tolist())) / 8)
    assert measured[1, 4] == pytest.approx(np.mean(shares), abs=1e-6)
    assert np.allclose(np.diag(measured), 1)


@pytest.mark.parametrize("starts", [(0,), (0, 3)])
def test_similarity_picks_the_best_of_all_patterns(starts):
    similarity = np.random.default_rng(3).random((6, 6))
    found = best_patterns(similarity, len(starts), starts)

    def score(pattern):
        return sum(similarity[pattern.source(i), i] for i in range(6) if pattern[i] == "S")

    assert [len(p.full_layers) for p in found.values()] == list(range(6, len(starts) - 1, -1))
    for count, pattern in found.items():
        others = []
        for full in combinations([i for i in range(6) if i not in starts], count - len(starts)):
            others.append(Pattern("".join("F" if i in (*full, *starts) else "S" for i in range(6))))
        assert score(pattern) == pytest.approx(max(map(score, others)))
        assert all(pattern[s] == "F" for s in starts)


def test_a_search_by_similarity_is_a_run(glm, batches, tmp_path):
    result = search(glm, batches, tmp_path, SearchSettings(method="similarity", keep=1 / 3))
    assert [p.full for p in result.frontier] == [6, 5, 4, 3, 2]
    assert result.to_json()["method"] == "similarity"


def test_settings_that_do_not_fit_are_refused(glm, batches, tmp_path):
    def run(**settings):
        return lambda: search(glm, batches, tmp_path, SearchSettings(**settings))

    refused(run(lazy=False), "--no-lazy is a setting of the fast search")
    refused(run(tolerance=0.1), "--tolerance is a setting", "--method fast")
    refused(run(method="fast", error_rate=0.5), "below 0.5, not 0.5")
    refused(run(method="fast", tolerance=float("nan")), "nats per token, 0 or more")
    refused(run(method="fast", keep=1 / 6, stages=2), "2 pipeline stages")


@pytest.mark.parametrize("layers", [12, 30])
@pytest.mark.parametrize("kind", ["apart", "equal", "noisy"])
def test_the_work_lies_in_the_range_that_is_foreseen(layers, kind):
    costs, noise = {
        "apart": (COSTS[:layers], 1e-4),
        "equal": ([0.001] * layers, 0.0),
        "noisy": ([1e-3 * i for i in range(layers)], 0.3),
    }[kind]
    samples = MadeUp(layers, additive(costs), noise=noise)
    full = layers // 4
    fast(samples, full)
    settings = SearchSettings(method="fast")
    found = foresee(samples.batches, layers, settings, full, [0], [0])
    low, high = found["least"], found["most"]
    assert low.evaluations / 2 < samples.work.evaluations <= high.evaluations
    # A pass runs what its patterns have in common once, which these samples do not.
    tokens = sum(r.states * r.share for r in high.rounds)
    assert samples.work.layer_tokens <= tokens * samples.work.whole
