"""Test what the page decides: the verdicts it follows, and when it decides nothing."""

from __future__ import annotations

import json

import pytest

from indexcache.report.html import make_report
from tests.report.support import Page, folders

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_first_screen_names_the_safe_pattern_that_saves_most(runs, whole):
    page = Page(whole.html).text
    assert whole.decision.word == "safe"
    assert whole.decision.headline == 'Deploy a <b>&"c.'
    assert str(whole.decision.shown.pattern) == "FSFSFS"
    row = json.loads((runs / "evaluate" / "evidence.json").read_text())["rows"][3]
    assert row["pattern"] == "FSFSFS"
    assert f"{row['delta_loss']:+.4f} nats" in page
    assert f"[ {row['ci_low']:+.4f} , {row['ci_high']:+.4f} ]" in page
    assert "50.0% 3 of 6 layers run no indexer, at any length" in page
    assert "safe at a margin of 1000 nats per token, on all text and on each of 2 domains" in page
    assert "with 95 % confidence" in page
    assert f"{row['documents']} documents, 64 tokens, k = " in page.replace(
        "sequences of 64 tokens", "64 tokens"
    )
    facts = whole.to_json()
    assert (facts["excess"], facts["ci_high"]) == (row["delta_loss"], row["ci_high"])


def gate(*words):
    """Return an edit of the verdicts of the second pattern."""

    def edit(value):
        own = [v for v in value["gate"]["verdicts"] if v["name"].startswith("a <b>")]
        for verdict, word in zip(own, words, strict=False):
            verdict.update(verdict=word, reason="of the test")

    return edit


def test_a_pattern_that_is_not_safe_everywhere_is_not_deployed(runs, changed):
    for words, says in (
        (["not safe"], "not safe on all text (of the test)"),
        (["safe", "inconclusive"], "inconclusive on a (of the test)"),
    ):
        folder = changed("evaluate", "evidence.json", gate(*words))
        made = make_report([folder])
        assert made.decision.headline == "Deploy best."
        other = next(c for c in made.decision.all if c.name.startswith("a <b>"))
        assert other.word in words
        assert says in other.reasons[0]
    both = make_report([folder, str(runs / "evaluate")])  # A second opinion does not heal it.
    assert both.decision.headline == "Deploy best."


def test_without_a_safe_pattern_nothing_is_deployed(changed):
    def unsafe(value):
        for verdict in value["gate"]["verdicts"]:
            verdict["verdict"] = "inconclusive"

    made = make_report([changed("evaluate", "evidence.json", unsafe)])
    assert made.decision.word == "inconclusive"
    assert made.decision.headline.startswith("Deploy none of them: none of 2 evaluated patterns")


def test_no_margin_no_evaluation_and_vacuous_ones_are_said_to_be_so(runs, changed):
    made = make_report([changed("evaluate", "evidence.json", lambda v: v.pop("gate"))])
    assert made.decision.headline == "Nothing is decided: no margin was set."
    assert any("ran without a margin" in gap for gap in made.gaps)
    assert "verdicts" not in made.sections
    made = make_report(folders(runs, "search"))
    assert "no pattern was evaluated" in made.decision.headline

    def blind(value):
        value["baseline_loss"] = value["blind_loss"] + 1

    def short(value):
        value["baseline_loss"] = 0.5
        for row in value["rows"]:
            row["beyond"] = 0.1

    for edit, says in ((blind, "no better than a blind guess"), (short, "only 10% of the tokens")):
        made = make_report([changed("evaluate", "evidence.json", edit)])
        assert made.decision.word == "says nothing", says
        assert "the evaluation says nothing" in made.decision.headline
        assert any(says in text for text in made.decision.why)


def test_an_evaluation_without_a_gate_can_still_contradict_one(runs, changed):
    def other(value):
        del value["gate"]
        for row in value["rows"]:
            row["ci_high"] = 2000.0

    made = make_report([*folders(runs, "evaluate"), changed("evaluate", "evidence.json", other)])
    assert made.decision.word == "inconclusive"
    assert any("above 1000" in text for text in made.decision.why)
