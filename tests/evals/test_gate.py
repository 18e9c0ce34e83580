"""Judge synthetic differences, and refuse gates that nothing could fail."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from indexcache import Pattern, evaluate
from indexcache.data import make_batches
from indexcache.evals.evaluate import Evidence, Measurement
from indexcache.evals.gate import check_gate, check_margin, few_documents, judge
from indexcache.evals.statistics import per_document, upper_end
from tests.support import documents, refused

RNG = np.random.default_rng(0)
SAFE = RNG.normal(0.0, 0.01, 60)
BAD = RNG.normal(1.0, 0.01, 60)
WIDE = RNG.normal(0.0, 1.0, 60)


def row(where: str, values: np.ndarray, name: str = "p") -> Measurement:
    """Make the row of a pattern whose documents have these differences, of 10 tokens each."""
    few = len(values) < 36
    low, high = -upper_end(-values, 0.025), upper_end(values, 0.025)
    return Measurement(
        name=name,
        pattern=Pattern("FSSS"),
        where=where,
        loss=3.0,
        delta_loss=float(values.mean()),
        ci_low=None if few else low,
        ci_high=None if few else high,
        kl=0.1,
        agreement=0.9,
        tokens=10 * len(values),
        documents=len(values),
        by_document=tuple((10 * float(v), 10) for v in values),
    )


def evidence(*domains: np.ndarray, name: str = "p") -> Evidence:
    rows = [row(f"d{i}", values, name) for i, values in enumerate(domains)]
    rows = [row("all", np.concatenate(domains), name), *rows]
    return Evidence(tuple(rows), (), Pattern("FFFF"), "stock", None)  # type: ignore[arg-type]


def words(gate) -> list[str]:
    return [v.verdict for v in gate.verdicts]


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ([SAFE], ["safe", "safe"]),
        ([SAFE, SAFE - 1], ["safe", "safe", "safe"]),
        ([BAD, BAD], ["not safe", "not safe", "not safe"]),
        ([WIDE], ["inconclusive", "inconclusive"]),
        ([SAFE, SAFE[:35]], ["safe", "safe", "inconclusive"]),
        ([SAFE - 2, SAFE - 2, BAD], ["safe", "safe", "safe", "not safe"]),
        ([SAFE[:20], SAFE[:20]], ["safe", "inconclusive", "inconclusive"]),
        ([SAFE[:2]], ["inconclusive", "inconclusive"]),
    ],
)
def test_every_domain_has_a_verdict(domains, expected):
    gate = judge(evidence(*domains), 0.05)
    assert words(gate) == expected
    assert gate.passed == (set(expected) == {"safe"})
    assert ("is passed" in gate.table()) == gate.passed
    json = gate.to_json()
    assert json["passed"] == gate.passed
    assert [v["domain"] for v in json["verdicts"]][:2] == ["all", "d0"]
    for verdict in gate.verdicts:
        assert (verdict.upper is None) == (verdict.documents < 36)
        if verdict.upper is None:
            assert "fewer than 36 documents" in verdict.reason
            assert f"{verdict.name} on {verdict.domain}" in gate.sentence()


def test_a_difference_within_an_engines_noise_is_not_safe_below_that_noise():
    for noise, margin, expected in [
        (0.1, 0.05, "inconclusive"),  # It drowns the margin and the difference.
        (0.1, 0.2, "safe"),
        (0.001, 0.05, "safe"),
        (0.1, -0.05, "inconclusive"),
    ]:
        found = evidence(SAFE)
        rows = tuple(replace(r, noise=noise) for r in found.rows)
        gate = judge(replace(found, rows=rows), margin)
        assert words(gate) == [expected, expected]
        assert ("within the engine's noise" in gate.table()) == (expected != "safe")
    # A difference far beyond the noise is told from the margin.
    rows = tuple(replace(r, noise=0.1) for r in evidence(SAFE - 1).rows)
    assert words(judge(replace(found, rows=rows), 0.0)) == ["safe", "safe"]


def test_every_pattern_is_judged():
    both = evidence(SAFE)
    bad = evidence(BAD, name="q")
    gate = judge(replace(both, rows=(*both.rows, *bad.rows)), 0.05)
    assert words(gate) == ["safe", "safe", "not safe", "not safe"]
    assert not gate.passed


def test_holm_holds_the_surest_domain_to_the_strictest_level():
    domains = [WIDE - WIDE.mean() + shift for shift in (-0.9, -0.6, -0.75)]
    verdicts = judge(evidence(*domains), 0.0).verdicts
    assert words(judge(evidence(*domains), 0.0)) == ["safe"] * 4
    tails = [0.025, 0.025 / 3, 0.025 / 1, 0.025 / 2]
    for verdict, values, tail in zip(
        verdicts, [np.concatenate(domains), *domains], tails, strict=True
    ):
        assert verdict.upper == pytest.approx(upper_end(values, tail))
    # With a margin between the two ends of one domain, it is safe alone and not among three alike.
    one = upper_end(SAFE, 0.025)
    three = upper_end(SAFE, 0.025 / 3)
    assert words(judge(evidence(SAFE), (one + three) / 2)) == ["safe", "safe"]
    alike = judge(evidence(SAFE, SAFE, SAFE), (one + three) / 2)
    assert words(alike) == ["safe", *["inconclusive"] * 3]
    assert "Holm" in alike.verdicts[-1].reason


def test_a_domain_of_too_few_documents_counts_among_the_domains():
    _, first, _ = judge(evidence(SAFE, SAFE[:9]), 1.0).verdicts
    assert first.upper == pytest.approx(upper_end(SAFE, 0.025 / 2))


def test_tokens_weigh_the_documents():
    long = replace(row("all", SAFE), by_document=(*[(0.0, 10)] * 59, (900.0, 900)))
    gate = judge(replace(evidence(SAFE), rows=(long,)), 0.5)
    assert gate.verdicts[0].upper == pytest.approx(
        upper_end(per_document(*zip(*long.by_document, strict=True)), 0.025)
    )
    assert words(gate) == ["inconclusive"]


@pytest.mark.parametrize("most", [math.nan, math.inf, -math.inf, 1e4, 1e300, True, "0.1", None])
def test_a_margin_that_nothing_could_fail_is_refused(most):
    refused(lambda: check_margin(most), "gate")
    refused(lambda: judge(evidence(SAFE), most), "gate")


def test_margins_that_decide_something():
    assert [check_margin(m) for m in (0, -0.0, -5, 0.01, np.float32(0.5))] == [0, 0, -5, 0.01, 0.5]


@pytest.mark.parametrize(
    ("pattern", "baseline", "topk", "longest"),
    [
        ("FFFF", "FFFF", 8, 64),
        ("FSFS", "FSFS", 8, 64),  # of a checkpoint without the indexers of layers 1 and 3
        ("FRRF@8", "FFFF", 8, 64),  # The pool holds the whole context,
        ("FRRF@999", "FFFF", 8, 64),
        ("FRSF@8", "FFSF", 8, 64),
        ("FRRF@8", "FRRF@9", 8, 64),
        ("FRRF@1", "FSSF", 8, 64),  # or k tokens, which are the selection.
        ("FRSF@1", "FSRF@1", 8, 64),
        ("FSSS", "FFFF", 64, 64),  # Everything is selected.
    ],
)
def test_a_pattern_that_selects_what_the_baseline_does_is_refused(pattern, baseline, topk, longest):
    named = {"other": Pattern("FFSS"), "p": Pattern(pattern)}
    refused(
        lambda: check_gate(0.1, named, Pattern(baseline), topk=topk, longest=longest),
        "'other'" if topk == longest else "'p'",
        "with itself",
    )


def test_patterns_that_select_something_else_are_not_refused():
    for pattern, baseline in (
        ("FSSS", "FFFF"),
        ("FRRF@7", "FFFF"),
        ("FRRF@7", "FRRF@6"),
        ("FRRF@2", "FSSF"),
    ):
        check_gate(0.1, {"p": Pattern(pattern)}, Pattern(baseline), topk=8, longest=64)
    refused(lambda: check_gate(0.1, {}, Pattern("F"), topk=8, longest=64), "no pattern")


def test_nothing_measured_and_nothing_different_are_refused():
    some = evidence(SAFE)
    refused(lambda: judge(replace(some, rows=()), 0.1), "Nothing was measured")
    empty = tuple(replace(r, tokens=0, documents=0, by_document=()) for r in some.rows)
    refused(lambda: judge(replace(some, rows=empty), 0.1), "Nothing was measured")
    refused(lambda: judge(replace(some, baseline=Pattern("FSSS")), 0.1), "is the baseline")
    same = tuple(
        replace(r, kl=0.0, by_document=tuple((0.0, 10) for _ in r.by_document))
        if r.where == "d0"
        else r
        for r in some.rows
    )
    refused(lambda: judge(replace(some, rows=same), 0.1), "every token of the domain 'd0'")


def test_judge_reads_what_evaluate_measured(glm):
    batches = make_batches(documents(80, 70), length=64, sequences=80, batch=8)
    measured = evaluate(glm, {"p": "FSSSSS"}, batches)
    for most, word in ((100.0, "safe"), (-100.0, "not safe")):
        assert words(judge(measured, most, allow_blind=True)) == [word] * 3
    high = measured.rows[0].ci_high
    assert high is not None
    gates = [judge(measured, most, allow_blind=True) for most in (high, high - 1e-6)]
    assert [gate.verdicts[0].verdict for gate in gates] == ["safe", "inconclusive"]
    refused(lambda: judge(measured, 1.0), "no better than a blind guess", "4.85", "allow_blind")
    refused(lambda: judge(evaluate(glm, ["FSSSSS", "FFFFFF"], batches), 1.0), "is the baseline")


def test_a_margin_that_a_blind_guess_would_pass_is_named():
    some = replace(evidence(SAFE), blind_loss=8.3)  # The baseline loses 3 nats.
    room = 8.3 - some.baseline_loss
    for most, named in ((room - 0.01, False), (room, True), (100.0, True)):
        gate = judge(some, most)
        assert gate.passed
        assert ("blind guess" in gate.table()) == (gate.note is not None) == named
        assert gate.to_json()["note"] == gate.note


def test_domains_of_few_documents_are_counted():
    """Two sequences of one document are one document."""
    batches = make_batches(documents(76, 70) + documents(2, 700), length=64, sequences=96)
    units = {d: {u for b in batches if b.domain == d for u in b.units} for d in ("d0", "d1")}
    assert len(units["d0"]) == 38
    assert few_documents(batches) == {}
    few = make_batches(documents(4, 700), length=64, sequences=36)
    assert sum(len(b.units) for b in few) == 36
    assert few_documents(few) == {"d0": 2, "d1": 2}
