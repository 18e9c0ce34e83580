"""Test the page of run folders: its sections, its numbers, its text and its figures."""

from __future__ import annotations

import json
import re

import pytest

from indexcache.cli import main
from indexcache.pattern import Pattern
from indexcache.report.html import ReportSettings, make_report
from indexcache.report.html.charts import nice_ticks
from indexcache.report.html.markup import escape
from indexcache.report.html.structure import flip_order
from indexcache.report.html.theme import DARK, LIGHT
from tests.report.support import ALL, Page, folders

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_section_is_there_and_the_page_is_well_formed(whole):
    page = Page(whole.html)
    sections = [a["id"] for a in page.all("section")]
    assert sections == whole.sections
    assert set(sections) == {
        "decision", "patterns", "frontier", "domains", "verdicts", "speed", "cost", "flips",
        "overlap", "training", "sources", "words",
    }  # fmt: skip
    ids = [a["id"] for _, a in page.found if a.get("id")]
    assert len(set(ids)) == len(ids)
    links = {a["href"] for a in page.all("a")}
    assert {f"#{name}" for name in sections} == links
    assert {a["aria-labelledby"] for a in page.all("section")} <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1


def test_a_section_without_a_run_is_absent(runs):
    for name, present, absent in (
        ("search", {"flips"}, {"frontier", "overlap", "speed", "cost", "verdicts", "training"}),
        ("overlap", {"overlap"}, {"flips", "frontier", "speed", "patterns"}),
        ("bench", {"speed"}, {"flips", "frontier", "overlap", "cost"}),
        ("distill", {"training"}, {"frontier", "flips"}),
        ("evaluate", {"frontier", "domains", "verdicts"}, {"recall", "speed", "flips"}),
    ):
        made = make_report(folders(runs, name))
        assert present <= set(made.sections), name
        assert not absent & set(made.sections), name
        assert made.gaps
        Page(made.html)


def test_numbers_are_those_of_the_files(runs, whole):
    numbers = Page(whole.html).numbers
    evidence = json.loads((runs / "evaluate" / "evidence.json").read_text())
    for row in evidence["rows"]:
        assert {row["delta_loss"], row["ci_low"], row["ci_high"]} <= set(numbers)
    for verdict in evidence["gate"]["verdicts"]:
        assert verdict["upper"] in numbers
    bench = json.loads((runs / "bench" / "bench.json").read_text())["rows"]
    for row in bench:
        assert {row["ttft_s"], row["decode_tok_s"], row["speedup"]["decode"]} <= set(numbers)
        seconds = row["ttft_s"] + 100 / row["decode_total_tok_s"]
        assert any(n == pytest.approx(2 / 3600 * seconds / 164 * 1e6, rel=1e-12) for n in numbers)
    for point in json.loads((runs / "search" / "result.json").read_text())["frontier"]:
        assert point["loss"] in numbers
    shares = json.loads((runs / "overlap" / "overlap.json").read_text())["overlap"]
    assert {share for row in shares for share in row} <= set(numbers)


def test_speed_and_cost_name_what_they_hold_for(runs, whole):
    page = Page(whole.html).text
    rows = json.loads((runs / "bench" / "bench.json").read_text())["rows"]
    full, half = (next(r for r in rows if r["name"] == n) for n in ("all", "1/2"))
    assert f"to the first token, {half['speedup']['decode']:.2f}x decoding" in page
    device = json.loads((runs / "bench" / "bench.json").read_text())["device"]
    assert f"single requests of 64 tokens on {device}" in page
    cost = [2 / 3600 * (r["ttft_s"] + 100 / r["decode_total_tok_s"]) / 164e-6 for r in (full, half)]
    assert f"{cost[0] - cost[1]:.4g}" in page
    assert "at 2 a GPU hour; single requests of 64 tokens, 100 decoded for each" in page


def test_too_few_documents_have_no_interval(changed):
    def few(value):
        for row in value["rows"]:
            row["ci_low"] = row["ci_high"] = None

    made = make_report([changed("evaluate", "evidence.json", few)])
    assert "no interval" in Page(made.html).text
    assert any("too few documents" in gap for gap in made.gaps)


def test_recall_is_shown_by_task_and_length(changed):
    def answers(value):
        own = next(r for r in value["rows"] if r["pattern"] == "FSFSFS")
        asked = own | {"answers": 80, "found_baseline": 60, "found_ci_low": -0.45, "length": 64}
        value["rows"] += [
            asked | {"domain": "retrieval:needles", "found": 33, "found_ci_high": -0.21},
            asked | {"domain": "retrieval:passkey", "found": 7, "found_ci_low": -0.9}
            | {"found_ci_high": -0.4, "length": 128},
        ]  # fmt: skip

    made = make_report([changed("evaluate", "evidence.json", answers)])
    page = Page(made.html)
    assert "recall" in made.sections
    assert {27 / 80, 0.21, 0.45, 53 / 80, 0.4, 0.9} <= set(page.numbers)
    assert "33 of 80" in page.text
    assert "+66.2% [ +40.0% , +90.0% ] with 95 % confidence; the highest of 2 tasks" in page.text
    assert "passkey: 7 of 80 found, 60 by all layers full" in page.text
    assert "of 128 tokens" in page.text
    assert not any("Recall was not tested" in gap for gap in made.gaps)
    domains = page.text.split("By kind of text")[-1].split("Recall")[0]
    assert "needles" not in domains


def test_a_certificate_is_shown_and_stands_for_its_evaluation(runs, tmp_path):
    file = runs / "certificate" / "certificate.json"
    value = json.loads(file.read_text())
    both = make_report(folders(runs, "certificate"))
    assert [run.verb for run in both.runs] == ["evaluate", "certificate"]
    asked = {
        "task": "passkey", "length": 64, "sequences": 40, "answers": 80, "found_baseline": 60,
        "found": 33, "lost": 30, "gained": 3, "excess": 27 / 80, "ci_low": 0.21, "ci_high": 0.45,
        "delta_loss": 0.5, "beyond": 0.9, "upper": 0.45, "verdict": "safe", "why": "of the test",
    }  # fmt: skip
    value |= {"recall": [asked], "blind_loss": 9.0, "margins": {"loss": 1000.0, "recall": 0.5}}
    (tmp_path / "certificate.json").write_text(json.dumps(value))
    alone = make_report([str(tmp_path)])
    page = Page(alone.html)
    assert alone.decision.word == "safe"
    assert alone.sections.index("certificate") > 0
    for row in value["loss"]:
        assert {row["delta_loss"], row["ci_low"], row["ci_high"], row["upper"]} <= set(page.numbers)
    assert {0.21, 0.45, 27 / 80} <= set(page.numbers)
    assert value["digest"] in page.text
    assert f"doctor MODEL --certificate {tmp_path / 'certificate.json'}" in page.text
    assert f"margins of 1000 nats per token and {0.5:.1%} of answers" in page.text


def test_the_matrix_of_domains_compares_both_objectives(runs, tmp_path):
    evidence = json.loads((runs / "evaluate" / "evidence.json").read_text())
    excess = {("a", "mean"): 0.01, ("all", "mean"): 0.25, ("all", "worst"): 0.125}
    rows = [
        {
            "calibrated": domain, "objective": objective, "keep": 0.5, "full": 3, "tested": tested,
            "pattern": "FSFSFS", "length": 64, "delta_loss": own * (1 + i), "ci_low": own / 2,
            "ci_high": own * 3, "documents": 40,
        }
        for (domain, objective), own in excess.items()
        for i, tested in enumerate("ab")
    ]  # fmt: skip
    value = {"domains": ["a", "b"], "rows": rows}
    value["conditions"] = dict.fromkeys("ab", evidence["conditions"])
    (tmp_path / "matrix.json").write_text(json.dumps(value))
    made = make_report([str(tmp_path)])
    page = Page(made.html)
    assert made.sections[1] == "matrix"
    for row in rows:
        assert {row["delta_loss"], row["ci_low"], row["ci_high"]} <= set(page.numbers)
    assert "by the mean loss leaves +0.5000 nats on its worst domain, b" in page.text
    assert "one by the worst domain leaves +0.2500 on b" in page.text
    value["rows"] = []
    (tmp_path / "matrix.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="no matrix of these domains"):
        make_report([str(tmp_path)])


def test_layers_are_numbered_by_the_step_that_gave_them_their_role():
    patterns = [Pattern(p) for p in ("FFFFF", "FFFRF@8", "FFRSS@8", "FFSSF")]
    assert flip_order(patterns) == {2: 3, 3: 2}


def test_a_pool_that_is_a_share_says_so(changed):
    def share(value):
        for row in value["rows"]:
            if row["pattern"] == "FSFSFS":
                row.update(pattern="FRFSFS@1/8", pool_share=0.125)

    page = Page(make_report([changed("evaluate", "evidence.json", share)]).html).text
    assert "with a pool of 1/8 of what a query sees" in page
    assert "1 layer scores only a pool of 12.5% of the context, at any length" in page


def test_all_text_of_the_files_is_escaped(changed):
    evil = "</style><script>alert(1)</script><img src=x onerror=y>\"'\x00\u202e\udfff"

    def poison(value):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, (dict, list)):
                poison(inner)
            elif isinstance(inner, str) and key not in (
                "pattern", "baseline", "verdict", "domain", "name", "model_digest",
                "weights_digest", "identity",
            ):  # fmt: skip
                value[key] = evil
            elif key == "name":
                value[key] = f"{inner}{evil}"

    made = [
        make_report([changed(name, file, poison)])
        for name, file in (
            ("evaluate", "evidence.json"),
            ("search", "result.json"),
            ("overlap", "overlap.json"),
            ("bench", "bench.json"),
        )
    ]
    for report in made:
        page = Page(report.html)
        assert not page.all("script")
        assert not page.all("img")
        assert len(page.all("style")) == 1
        assert not re.search("[\x00\u202e\udfff]", report.html)
        report.html.encode("utf-8")
    assert "alert(1)" in made[0].html
    assert escape("<a>&\"'") == "&lt;a&gt;&amp;&quot;&#x27;"


def test_the_page_needs_no_network_and_is_the_same_every_time(runs, whole):
    assert make_report(folders(runs), ReportSettings(price=2.0, output_tokens=100)).html == (
        whole.html
    )
    assert not re.search(r"https?:|url\(|@import|\bsrc=|<script|<link|<iframe", whole.html)
    assert all(a["href"].startswith("#") for a in Page(whole.html).all("a"))


def test_every_figure_has_a_caption_a_name_and_its_numbers(whole):
    page = Page(whole.html)
    count = len(page.all("figure"))
    assert count >= 7
    reasons = 1  # The verdicts have a second table.
    assert len(page.all("figcaption")) == len(page.all("details")) - reasons == count
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a["scope"] in ("row", "col") for a in page.all("th"))
    regions = [a for _, a in page.found if a.get("role") == "region"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_the_contrast_that_readers_need(theme):
    def ratio(a, b):
        high, low = sorted((luminance(theme[a]), luminance(theme[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        for name in ("text", "soft", "full", "good", "bad", "unsure"):
            assert ratio(name, ground) >= 4.5, (name, ground)
    for name in ("full", "pool"):
        assert ratio(f"on-{name}", name) >= 4.5
    for name in ("s0", "s1", "s2", "s3"):
        assert ratio(name, "page") >= 3


def test_ticks_enclose_what_they_measure():
    for low, high in (
        (0, 0),
        (0, 5e-324),
        (-1e-9, 3e-9),
        (0.02, 0.031),
        (-5, 1e4),
        (7, 7),
        (-3, -3),
    ):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(set(ticks)) <= 8


def test_the_verb_writes_the_page_and_prints_the_decision(runs, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert main(["report", *folders(runs), "--out", str(page), "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == 'Deploy a <b>&"c.'
    facts = json.loads(shown[-1])
    assert facts["verdict"] == "safe"
    assert facts["pattern"] == "FSFSFS"
    assert [run["verb"] for run in facts["runs"]] == list(ALL)
    assert page.read_text(encoding="utf-8") == make_report(folders(runs)).html
    assert sorted(p.name for p in page.parent.iterdir()) == ["page.html"]
