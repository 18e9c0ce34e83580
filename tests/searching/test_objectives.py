"""Test objectives with parts: what they are, that they see a collapse, and runs with them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from indexcache import Pattern, SearchSettings, search, use_pattern
from indexcache.data import Batch, make_batches
from indexcache.models.lm import hidden_states
from indexcache.searching.combining import Combination
from indexcache.searching.objective import Objective
from tests.stand_ins import TorchLlm, engine_around, worker
from tests.support import documents, refused

DOMAINS = ("a", "retrieval:x", "b", "retrieval:y", "a")
COUNTS = (100, 5, 300, 10, 100)
FULL = [100.0, 5.0, 600.0, 20.0, 100.0]


def combined(objective, sums):
    return Combination(objective, DOMAINS, COUNTS).value(sums, FULL)


def changed(entry, by):
    return [s + by * (i == entry) for i, s in enumerate(FULL)]


def test_combinations_of_parts():
    assert combined("mean", FULL) == pytest.approx(825 / 515)
    assert combined("weighted", FULL) == pytest.approx(0.5 * 800 / 500 + 0.25 * (1 + 2))
    assert combined("worst", FULL) == 0
    assert combined("worst", changed(3, 5)) == pytest.approx(0.5)
    assert combined("worst", changed(0, -5)) == pytest.approx(0)
    text = Combination("weighted", ("a", "b"), (100, 300))
    assert text.value([100.0, 600.0]) == Combination("mean", ("a", "b"), (100, 300)).value(
        [100.0, 600.0]
    )
    assert Combination("weighted", ("retrieval:x",), (4,)).value([8.0]) == 2
    assert text.means([100.0, 600.0]) == {"a": 1, "b": 2}


@pytest.mark.parametrize("objective", ["weighted", "worst"])
@pytest.mark.parametrize("entry", range(5))
def test_a_collapse_of_text_or_of_any_retrieval_is_seen(objective, entry):
    """Three nats more for each token of an entry; the mean over all tokens hides retrieval's."""
    collapsed = changed(entry, 3.0 * COUNTS[entry])
    assert combined(objective, collapsed) - combined(objective, FULL) > 0.25
    if COUNTS[entry] < 100:
        assert combined("mean", collapsed) - combined("mean", FULL) < 0.06


@pytest.mark.parametrize("objective", ["mean", "weighted", "worst"])
def test_weights_are_the_slopes_of_the_objective(objective):
    combination = Combination(objective, DOMAINS, COUNTS)
    sums = [s + d for s, d in zip(FULL, (1, 8, 2, 9, 3), strict=True)]
    weights = combination.weights(sums, FULL)
    for i in range(5):
        moved = [s + 1e-4 * (i == j) for j, s in enumerate(sums)]
        slope = (combined(objective, moved) - combined(objective, sums)) / 1e-4
        assert weights[i] == pytest.approx(slope, abs=1e-6)


@pytest.fixture(scope="module")
def mixed():
    """Text of two domains, and a kind of retrieval whose answers are the last tokens."""
    batches = make_batches(documents(), length=64, sequences=4, batch=2)
    ids = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(3))
    answers = (((40, 44), (44, 48)), ((45, 48),))
    return [*batches, Batch(ids, "retrieval:x", ("x0", "x1"), ("x0", "x1"), answers=answers)]


def reference(model, batches, objective, roles):
    """Compute an objective by the definitions, with all logits at once."""
    parts: dict[str, list[float]] = {}
    for b in batches:
        with torch.no_grad():
            out = []
            for pattern in ("FFFFFF", roles):
                with use_pattern(model, pattern):
                    hidden = hidden_states(model, b.ids)
                out.append(F.log_softmax(model.get_output_embeddings()(hidden).double(), -1))
        full, own = (x[:, :-1] for x in out)
        loss = -own.gather(-1, b.ids[:, 1:, None])[..., 0]
        kl = (full.exp() * (full - own)).sum(-1)
        values = (kl if objective == "kl" else loss)[b.counted[:, 1:]]
        parts.setdefault(b.domain, []).extend(values.tolist())
    if objective == "mean":
        return np.mean([v for own in parts.values() for v in own])
    text = np.mean([v for d, own in parts.items() if d != "retrieval:x" for v in own])
    return (text + np.mean(parts["retrieval:x"])) / 2


@pytest.mark.parametrize("name", ["mean", "weighted", "kl"])
def test_an_objective_is_what_its_definition_says(glm, mixed, name):
    measured = Objective(glm, mixed, name=name)
    for roles in ("FFFFFF", "FSFSSF"):
        expected = reference(glm, mixed, name, roles)
        assert measured(Pattern(roles)) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    if name == "kl":
        assert measured(Pattern("FFFFFF")) == 0
        assert measured(Pattern("FSFSSF")) > 0


def test_worst_is_the_worst_part(glm, mixed):
    parts = {r: Objective(glm, mixed).evaluate(Pattern(r)).parts for r in ("FFFFFF", "FSFSSF")}
    excess = [parts["FSFSSF"][d] - parts["FFFFFF"][d] for d in ("d0", "d1", "retrieval:x")]
    worst = Objective(glm, mixed, name="worst")
    assert worst(Pattern("FSFSSF")) == pytest.approx(max(excess), abs=1e-6)


def test_key_tokens_are_those_that_lose_without_the_long_context(glm, monkeypatch):
    from indexcache.searching import meter

    batches = make_batches(documents(), length=64, sequences=2)
    monkeypatch.setattr(meter, "GAIN", 0.0)
    monkeypatch.setattr(meter, "KNOWN", 100.0)
    keys = meter.key_tokens(glm, batches)
    for batch, key in zip(batches, keys, strict=True):
        assert not key[:, :17].any()  # They see all there is within 2 k = 16 tokens.
        assert key.any()
        at = int(key[0].nonzero()[-1])
        start = (at - 1) // 8 * 8 - 8  # the window in whose second half the token lies
        with torch.no_grad(), use_pattern(glm, "FFFFFF"):
            loss = [
                F.cross_entropy(glm(ids[None]).logits[0, -2], ids[-1])
                for ids in (batch.ids[0, : at + 1], batch.ids[0, start : at + 1])
            ]
        assert loss[0] < loss[1]
    monkeypatch.setattr(meter, "GAIN", 50.0)
    refused(lambda: Objective(glm, batches, name="key-kl"), "Only 0 of", "the objective kl")


@pytest.mark.parametrize("name", ["weighted", "worst", "kl"])
def test_a_run_resumes_to_the_same_result(glm, mixed, tmp_path, name):
    settings = SearchSettings(keep=1 / 2, objective=name)
    result = search(glm, mixed, tmp_path / "a", settings)
    lines = (tmp_path / "a" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    settings_file = (tmp_path / "a" / "settings.json").read_text()
    (tmp_path / "b" / "settings.json").write_text(settings_file)
    (tmp_path / "b" / "journal.jsonl").write_text("".join(lines[:7]) + lines[7][:9])
    assert search(glm, mixed, tmp_path / "b", settings).to_json() == result.to_json()
    assert "".join(lines) == (tmp_path / "b" / "journal.jsonl").read_text()
    first = json.loads(lines[0])
    assert set(first) == {"pattern", "loss", "parts", "found"}
    assert set(first["parts"]) == {"d0", "d1", "retrieval:x"}
    assert first["found"]["retrieval:x"][1] == 3
    assert "answers found" in result.table()
    assert result.to_json()["frontier"][-1]["parts"]
    assert result.work.evaluations == len(lines)
    with pytest.raises(ValueError, match="other settings .*objective was"):
        search(glm, mixed, tmp_path / "a", SearchSettings(keep=1 / 2, objective="mean"))


def test_the_mean_loss_of_text_keeps_its_journal(glm, tmp_path):
    batches = make_batches(documents(), length=64, sequences=2)
    result = search(glm, batches, tmp_path, SearchSettings(keep=1 / 2, uniform=False))
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"pattern", "loss"} for line in lines)
    assert "objective" not in json.loads((tmp_path / "settings.json").read_text())
    assert "answers found" not in result.table()
    # All full, then all layers again for the trunk; each candidate runs from its own layer on, and
    # a trunk from the layer that was flipped.
    flipped = [p.flipped for p in result.frontier[1:]]
    layers = 6 + 6 + sum(6 - i for i in range(1, 6))
    for a, b in ((flipped[0], flipped[1:]), (flipped[1], flipped[2:])):
        layers += 6 - a
        layers += sum(6 - i for i in range(1, 6) if i not in flipped[: 2 - len(b) + 1])
    assert result.work.layer_tokens == layers * 128


def test_an_engine_gives_what_the_model_itself_gives(glm, mixed, tmp_path, monkeypatch):
    vllm = SimpleNamespace(SamplingParams=lambda **kw: kw)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    settings = SearchSettings(keep=1 / 2, uniform=False)
    glm.config.save_pretrained(tmp_path)
    engine = engine_around(TorchLlm(glm, [worker()]), tmp_path, glm.config.index_topk)
    engine.facts |= {"vllm": "0.33.0"}
    found = search(engine, mixed, tmp_path / "engine", settings)
    own = search(glm, mixed, tmp_path / "own", settings)
    for a, b in zip(found.frontier, own.frontier, strict=True):
        assert a.pattern == b.pattern
        x, y = found.evaluations[str(a.pattern)], own.evaluations[str(b.pattern)]
        assert x.parts == pytest.approx(y.parts, abs=1e-5)
        assert x.found == y.found
    for name in ("kl", "key-kl"):
        refused(
            lambda name=name: search(
                engine, mixed, tmp_path / name, SearchSettings(objective=name)
            ),
            "vLLM does not give",
        )


def test_what_the_full_model_cannot_find_is_said(glm, mixed, tmp_path):
    result = search(glm, mixed, tmp_path, SearchSettings(keep=1 / 2, uniform=False))
    first = result.evaluations["FFFFFF"].found["retrieval:x"]
    assert any("finds no answer of x" in n for n in result.notes) == (first[0] == 0)
