"""Test what an evaluation says of retrieval: answers found, and rows of their own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from indexcache import evaluate, use_pattern
from indexcache.data import Batch, make_batches
from tests.stand_ins import TorchLlm, engine_around, worker
from tests.support import documents


@pytest.fixture(scope="module")
def batches(glm):
    """Text, and 40 sequences whose answers are what the full model says, but for every third."""
    ids = torch.randint(0, 128, (40, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for at in range(42, 46):
            ids[:, at] = glm(ids[:, :at]).logits[:, -1].argmax(-1)
    ids[::3, 45] = (ids[::3, 45] + 1) % 128
    spans = ((42, 44), (44, 46))
    names = tuple(f"r{i}" for i in range(40))
    asked = Batch(ids, "retrieval:x", names, names, answers=(spans,) * 40)
    return [*make_batches(documents(40), length=48, sequences=40, batch=40), asked]


def found_by_hand(model, roles, batch):
    with torch.no_grad(), use_pattern(model, roles):
        right = model(batch.ids).logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    return sum(int(right[:, a - 1 : b - 1].all(-1).sum()) for a, b in batch.answers[0])


def test_answers_found_are_counted_beside_the_baseline(glm, batches):
    found = evaluate(glm, {"full": "FFFFFF", "one": "FSSSSS"}, batches)
    rows = {(r.name, r.where): r for r in found.rows}
    full, one = rows["full", "retrieval:x"].recall, rows["one", "retrieval:x"].recall
    assert (full.found, full.answers) == (40 + 26, 80)
    assert one.found == found_by_hand(glm, "FSSSSS", batches[-1]) < one.found_baseline == 66
    assert one.low <= (one.found - 66) / 80 <= one.high < 0
    assert rows["one", "d0"].recall is None
    assert rows["one", "retrieval:x"].tokens == 160
    assert f"{one.found / 80:.0%} of 80" in found.table()
    row = next(r for r in found.to_json()["rows"] if r["domain"] == "retrieval:x")
    assert row["answers"] == 80


def test_retrieval_is_no_part_of_all_text(glm, batches):
    with_it = evaluate(glm, "FSSFSS", batches)
    without = evaluate(glm, "FSSFSS", batches[:-1])
    assert with_it.overall == without.overall
    assert with_it.positions == without.positions
    assert {r.where for r in with_it.rows} == {"all", "d0", "d1", "retrieval:x"}
    alone = evaluate(glm, "FSSFSS", batches[-1:])
    assert alone.overall[0].tokens == 160


def test_only_tokens_that_count_are_measured(glm):
    batch = make_batches(documents(), length=48, sequences=2)[0]
    only = torch.zeros(batch.ids.shape, dtype=torch.bool)
    only[:, 40:] = True
    late = Batch(batch.ids, "d", batch.units, batch.digests, only=only)
    row = evaluate(glm, "FSSSSS", [late]).overall[0]
    with torch.no_grad(), use_pattern(glm, "FSSSSS"):
        log_p = glm(batch.ids).logits[:, :-1].log_softmax(-1)
    loss = -log_p.gather(-1, batch.ids[:, 1:, None])[..., 0]
    assert row.loss == pytest.approx(float(loss[:, 39:].mean()), abs=1e-5)
    assert row.tokens == 8


def test_an_engine_finds_the_same(glm, batches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kw: kw))
    glm.config.save_pretrained(tmp_path)
    engine = engine_around(TorchLlm(glm, [worker()]), tmp_path, glm.config.index_topk)
    engine.facts |= {"vllm": "0.33.0", "ids_sorted": True}
    rows = [evaluate(m, "FSSSSS", batches).rows[-1] for m in (engine, glm)]
    assert rows[0].recall == rows[1].recall
    assert rows[0].loss == pytest.approx(rows[1].loss, abs=1e-5)
