"""Compare evaluate and overlap with direct computations on stock models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from indexcache import Pattern, evaluate, overlap, use_pattern
from indexcache.data import make_batches
from tests.support import SHAPE, documents, make_model, stock_loss


@pytest.fixture(scope="module")
def batches():
    return make_batches(documents(40, 150), length=64, sequences=40, batch=4)


@pytest.fixture(scope="module")
def evidence(glm, batches):
    return evaluate(
        glm, {"half": "FSFSFS", "quarter": "FSSSSS", "same": "FFFFFF", "R": "FRRRRR@2"}, batches
    )


def rows(evidence, name):
    return {r.where: r for r in evidence.rows if r.name == name}


def test_losses_are_those_of_stock_models(glm, batches, evidence):
    full = stock_loss(glm, "FFFFFF", batches)
    for name, pattern in (("half", "FSFSFS"), ("quarter", "FSSSSS")):
        row = rows(evidence, name)["all"]
        assert row.loss == pytest.approx(stock_loss(glm, pattern, batches), rel=1e-6)
        assert row.delta_loss == pytest.approx(row.loss - full, abs=1e-6)
        assert row.full == pattern.count("F")


def test_the_full_pattern_differs_by_exactly_nothing(evidence):
    row = rows(evidence, "same")["all"]
    assert (row.delta_loss, row.kl, row.agreement, row.ci_low, row.ci_high) == (0, 0, 1, 0, 0)


def test_kl_and_agreement_against_whole_logits(glm, batches, evidence):
    kl = agree = count = 0
    with torch.no_grad():
        for batch in batches:
            a = glm(batch.ids).logits[:, :-1].double()
            with use_pattern(glm, "FSSSSS"):
                b = glm(batch.ids).logits[:, :-1].double()
            kl += float(
                F.kl_div(
                    F.log_softmax(b, -1), F.log_softmax(a, -1), log_target=True, reduction="sum"
                )
            )
            agree += int((a.argmax(-1) == b.argmax(-1)).sum())
            count += a[..., 0].numel()
    row = rows(evidence, "quarter")["all"]
    assert row.kl == pytest.approx(kl / count, rel=1e-4)
    assert row.agreement == pytest.approx(agree / count)
    assert row.tokens == count == 40 * 63


def test_domains_and_positions_add_up_to_all(evidence):
    by = rows(evidence, "quarter")
    assert set(by) == {"all", "d0", "d1"}
    for parts in ([by["d0"], by["d1"]], [p for p in evidence.positions if p.name == "quarter"]):
        assert sum(p.tokens for p in parts) == by["all"].tokens
        for key in ("delta_loss", "kl", "agreement"):
            total = sum(getattr(p, key) * p.tokens for p in parts) / by["all"].tokens
            assert total == pytest.approx(getattr(by["all"], key), rel=1e-9)
    assert by["all"].documents == by["d0"].documents + by["d1"].documents == 40


def test_evidence_is_read_as_a_table_and_as_json(evidence):
    json = evidence.to_json()
    assert set(json) == {
        *("rows", "positions", "baseline", "path", "conditions", "blind_loss", "baseline_loss")
    }
    assert [r["domain"] for r in json["rows"]] == ["all", "d0", "d1"] * 4
    assert [(p["from"], p["to"]) for p in json["positions"][:2]] == [(0, 0.25), (0.25, 0.5)]
    overall, domains, positions, few, blind = evidence.table("half").split("\n\n")
    assert "d0 (20), d1 (20)" in few
    assert "no better than a blind guess" in blind
    assert overall.splitlines()[0].split()[:5] == ["pattern", "full", "loss", "vs", "half"]
    assert overall.splitlines()[0].endswith("pool of context  roles (64 tokens, k = 8)")
    assert domains.splitlines()[0].split() == ["vs", "half,", "by", "domain", "d0", "d1"]
    assert positions.count("%") == 8
    assert all(len(t.splitlines()) == 6 for t in (overall, domains, positions))


def test_interval_is_that_of_the_documents(glm, batches, evidence):
    """Weigh the per-document losses of stock passes at random, with one more document."""
    sums = []
    for batch in batches:
        for row in batch.ids:
            losses = []
            for pattern in ("FSSSSS", "FFFFFF"):
                with use_pattern(glm, pattern), torch.no_grad():
                    losses.append(
                        float(
                            F.cross_entropy(glm(row[None]).logits[0, :-1], row[1:], reduction="sum")
                        )
                    )
            sums.append((losses[0] - losses[1]) / 63)
    row = rows(evidence, "quarter")["all"]
    assert sorted(d / n for d, n in row.by_document) == pytest.approx(sorted(sums), abs=1e-5)
    rng = np.random.default_rng(9)
    for end, values in ((row.ci_high, np.sort(sums)), (-row.ci_low, np.sort(-np.array(sums)))):
        unseen = values[-1] + 3 * (values[-1] - values[-4])
        weights = rng.exponential(size=(20000, len(sums) + 1))
        means = weights @ np.append(values, unseen) / weights.sum(1)
        assert end == pytest.approx(
            np.quantile(means, 0.975), abs=0.05 * (row.ci_high - row.ci_low)
        )


def test_another_pattern_as_the_baseline(glm, batches, evidence):
    """The difference of two patterns is that of their differences from the full one."""
    against = evaluate(glm, {"half": "FSFSFS", "same": "FSSSSS"}, batches, against="FSSSSS")
    row, same = (rows(against, name)["all"] for name in ("half", "same"))
    expected = (
        rows(evidence, "half")["all"].delta_loss - rows(evidence, "quarter")["all"].delta_loss
    )
    assert row.delta_loss == pytest.approx(expected, abs=1e-6)
    assert row.ci_low < row.delta_loss < row.ci_high
    assert (same.delta_loss, same.kl) == (0, 0)
    assert str(against.baseline) == "FSSSSS"


@pytest.mark.parametrize("count", [1, 2, 35, 36])
def test_few_documents_have_no_interval_and_the_table_says_so(glm, count):
    few = make_batches(documents(count), length=64, sequences=count, batch=9)
    found = evaluate(glm, ["FSSSSS", "FFFFFF"], few)
    row = rows(found, "FSSSSS")["all"]
    assert (row.ci_low is None) == (row.ci_high is None) == (count < 36)
    assert (f"all ({count})" in found.table()) == (count < 36)
    assert "No interval and no verdict" in found.table()  # of the two domains, at the least.
    assert rows(found, "FFFFFF")["all"].ci_high == 0  # It is equal, whatever their number.


def test_evaluate_refuses_vacuous_text_and_nothing(glm):
    with pytest.raises(ValueError, match="too short"):
        evaluate(glm, ["FSSSSS"], make_batches(documents(), length=31, sequences=2))
    with pytest.raises(ValueError, match="no pattern"):
        evaluate(glm, [], make_batches(documents(), length=64, sequences=2))


def test_overlap_against_sets(model, batches):
    measured = overlap(model, batches[:2])
    k, expected, count = SHAPE["index_topk"], np.zeros((6, 6)), 0
    for batch in batches[:2]:
        with use_pattern(model, "FFFFFF", capture=True) as seam, torch.no_grad():
            model(batch.ids)
        for b in range(len(batch.ids)):
            for t in range(k, 64):
                sets = [set(seam.selections[i][b, t].tolist()) for i in range(6)]
                assert all(max(s) <= t and len(s) == k for s in sets)
                expected += [[len(x & y) / k for y in sets] for x in sets]
                count += 1
    assert measured.queries == count
    np.testing.assert_allclose(measured.shares, expected / count, rtol=1e-6)
    np.testing.assert_allclose(np.diag(measured.shares), 1)
    assert measured.chance == pytest.approx(np.mean([k / (t + 1) for t in range(k, 64)]))


def test_overlap_is_one_within_the_groups_of_native_sharing(batches):
    native = make_model(
        "glm_moe_dsa", indexer_types=["full", "shared", "shared", "full", "shared", "shared"]
    )
    shares = overlap(native, batches[:1]).shares
    assert shares[0][1] == shares[1][2] == shares[3][5] == pytest.approx(1)
    assert shares[0][3] < 1


def test_heat_map_is_drawn(glm, batches, tmp_path):
    from indexcache.report.plots import draw_overlap

    draw_overlap(overlap(glm, batches[:1]).to_json(), tmp_path / "map.png", Pattern("FSSFSS"))
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
