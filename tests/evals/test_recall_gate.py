"""Judge the answers that a pattern loses by a margin of their own, and each length by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import beta

from indexcache import evaluate
from indexcache.data import make_batches
from indexcache.data.batch import Batch
from indexcache.evals.gate import check_recall_margin, judge, least_sequences, little_text
from indexcache.evals.recall import Recall, worst
from indexcache.evals.statistics import (
    LEAST_DOCUMENTS,
    bootstrap_interval,
    chance_above,
    per_document,
    upper_end,
)
from tests.evals.test_gate import SAFE, evidence, row
from tests.support import documents, logits, refused

TASKS = ("passkey", "needles")


@pytest.fixture(scope="module")
def text():
    return make_batches(documents(80, 70), length=64, sequences=80, batch=40)


@pytest.fixture(scope="module")
def asked(glm):
    """Sequences whose last two tokens the full model finds likeliest: it finds every answer."""
    batches = []
    for i, task in enumerate(TASKS):
        ids = torch.randint(0, 128, (40, 64), generator=torch.Generator().manual_seed(i))
        for place in (62, 63):
            ids[:, place] = logits(glm, ids)[:, place - 1].argmax(-1)
        units = tuple(f"{task} {n}" for n in range(40))
        answers = (((62, 63), (63, 64)),) * 40
        batches.append(Batch(ids, f"retrieval:{task}", units, units, answers=answers))
    return batches


@pytest.fixture(scope="module")
def found(glm, text, asked):
    return evaluate(glm, {"bad": "FSSSSS", "last": "FFFFFS"}, [*text, *asked])


def test_the_kinds_add_up_to_all_of_them(found):
    rows = {(r.name, r.where): r for r in found.rows if r.recall}
    kinds = [f"retrieval:{task}" for task in (*sorted(TASKS), "all")]
    assert list(rows) == [(name, kind) for name in ("bad", "last") for kind in kinds]
    for name in ("bad", "last"):
        *parts, total = [rows[name, kind] for kind in kinds]
        for key in ("answers", "found", "found_baseline", "lost", "gained"):
            assert getattr(total.recall, key) == sum(getattr(p.recall, key) for p in parts)
        assert total.documents == 80
        assert total.recall.found_baseline == 160
        assert total.recall.lost == 160 - total.recall.found
    assert rows["bad", "retrieval:all"].recall.excess > 0.3
    assert found.to_json()["retrieval"]["answers"] == 160


def test_lost_recall_fails_a_gate_that_loss_passes(glm, text, asked, found):
    """A bad pattern of a random model hardly changes its loss, which is that of a blind guess."""
    gate = judge(found, 1.0, recall_most=0.2, allow_blind=True)
    verdicts = {(v.name, v.domain): v.verdict for v in gate.verdicts}
    assert {v for (n, d), v in verdicts.items() if n == "bad" and d[:9] != "retrieval"} == {"safe"}
    assert verdicts["bad", "retrieval:all"] == verdicts["bad", "retrieval:passkey"] == "not safe"
    assert not gate.passed
    assert "bad on retrieval:all" in gate.sentence()
    assert judge(evaluate(glm, "FSSSSS", text), 1.0, allow_blind=True).passed
    # The default margin counts too, and a generous one passes.
    assert not judge(found, 1.0, allow_blind=True).passed
    assert judge(found, 1.0, recall_most=0.99, allow_blind=True).passed
    assert gate.to_json()["recall_most"] == 0.2


def asked_row(lost: int, n: int, *, before: int | None = None, task: str = "all"):
    recall = Recall(
        found=n - lost,
        found_baseline=n if before is None else before,
        answers=n,
        lost=lost,
        gained=0,
        low=None,
        high=None,
        by_sequence=((1, 1),) * lost + ((0, 1),) * (n - lost),
    )
    return replace(row(f"retrieval:{task}", SAFE), recall=recall, documents=n)


def judged(*rows, most: float = 0.1) -> list[str]:
    some = evidence(SAFE)
    gate = judge(replace(some, rows=(*some.rows, *rows)), 0.05, recall_most=most)
    return [v.verdict for v in gate.verdicts if v.of_recall]


def test_no_lost_answer_is_no_proof_by_itself():
    """The upper end is Clopper and Pearson's."""
    for lost, n in ((0, 36), (0, 200), (2, 64), (64, 64)):
        sums = np.array([1] * lost + [0] * (n - lost))
        low, high = bootstrap_interval(sums, np.ones(n), bound=1.0)
        expected = 1.0 if lost == n else beta.ppf(0.975, lost + 1, n - lost)
        assert high == pytest.approx(expected, abs=1e-6)
        assert low <= lost / n
    assert judged(asked_row(0, 36)) == ["safe"]
    assert judged(asked_row(0, 36), most=0.09) == ["inconclusive"]
    assert judged(asked_row(0, 35)) == ["inconclusive"]


def test_a_task_at_which_the_baseline_fails_decides_nothing():
    assert judged(asked_row(0, 400, before=40)) == ["inconclusive"]
    assert judged(asked_row(0, 400, before=41)) == ["safe"]


def test_holm_counts_tasks_among_the_domains():
    """Of one domain and three tasks the tasks are the last, at a third of the level."""
    least = least_sequences(0.1, 3)
    for n, expected in ((least, "safe"), (least - 1, "inconclusive")):
        rows = [asked_row(0, 3 * n), *(asked_row(0, n, task=t) for t in "abc")]
        assert judged(*rows) == ["safe", *[expected] * 3]


def test_bounds_and_least_numbers():
    assert least_sequences(0.1, 1) == LEAST_DOCUMENTS == 36
    assert [least_sequences(0.1, 8), least_sequences(0.03, 8), least_sequences(0, 1)] == [
        *(55, 190),
        None,
    ]
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = rng.integers(1, 5, 9)
        lost = rng.integers(-asked, asked + 1)
        assert np.abs(per_document(lost, asked)).max() <= worst(lost, asked) + 1e-12
    for most in (-0.1, 1, 3, float("nan"), True, "0.1"):
        refused(lambda most=most: check_recall_margin(most), "share of the answers")
    refused(lambda: judge(evidence(SAFE), 0.1, recall_most=0.1), "no retrieval was measured")


def test_too_few_sequences_are_named_before_the_run(text, asked):
    assert little_text([*text, *asked], 0.2) == []
    (sentence,) = little_text([*text, *asked], 0.05)
    assert "40 retrieval sequences" in sentence
    assert f"at least {least_sequences(0.05, 2)} can" in sentence
    assert "no number of sequences" in little_text([*text, *asked], 0.0)[0]


def test_intervals_of_recall_cover_and_equal_patterns_are_rarely_worse():
    """Answers flip both ways with equal chances; four are asked of a sequence, alike ones."""
    rng = np.random.default_rng(1)
    flips = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(400, 40))
    assert (chance_above(-flips, 0.0, 1.0) < 0.025).sum() <= 20
    lost = (rng.random((400, 40)) < 0.04).astype(float)
    covered = (chance_above(lost, 0.04, 1.0) >= 0.025) & (chance_above(-lost, -0.04, 1.0) >= 0.025)
    assert covered.sum() >= 372


def test_each_length_is_measured_by_itself(glm):
    short, longer = (
        make_batches(documents(6, n), length=n, sequences=6, batch=3) for n in (64, 96)
    )
    both = evaluate(glm, "FSSSSS", [*longer, *short])
    assert [(r.where, r.length) for r in both.rows] == [
        (d, n) for n in (64, 96) for d in ("all", "d0", "d1")
    ]
    alone = [evaluate(glm, "FSSSSS", batches) for batches in (short, longer)]
    assert [r.to_json() for r in both.rows] == [r.to_json() for e in alone for r in e.rows]
    assert "FSSSSS, 96 tokens" in both.table()
    assert {n: [s.size for s in shares] for n, shares in both.shares.items()} == {64: [8], 96: [8]}


@pytest.mark.parametrize("bad", [None, 64, 128])
def test_a_pattern_that_is_bad_at_one_length_fails(bad):
    rows = [
        replace(row(where, SAFE + (n == bad)), length=n)
        for n in (64, 128)
        for where in ("all", "d")
    ]
    gate = judge(replace(evidence(SAFE), rows=tuple(rows)), 0.05)
    assert gate.passed == (bad is None)
    assert [(v.domain, v.length) for v in gate.verdicts] == [(r.where, r.length) for r in rows]
    assert "d, 64 tokens" in gate.table()
    if bad is None:  # Holm counts both lengths.
        strictest = max(gate.verdicts[1].upper, gate.verdicts[3].upper)
        assert strictest == pytest.approx(upper_end(SAFE, 0.0125))
