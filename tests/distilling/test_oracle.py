"""Test what selections keep of the attention, the oracle, and layer weights of a search."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from indexcache import Pattern, use_pattern
from indexcache.distilling import Row, loss, measure_kept, oracle_states
from indexcache.distilling.forward import served_layers
from indexcache.distilling.layer_weights import layer_weights, sharing_costs
from indexcache.models.family import decoder_layers
from indexcache.models.lm import hidden_states, token_losses
from indexcache.searching.run import SearchSettings, search
from tests.distilling import worker
from tests.distilling.worker import dense, row_of
from tests.support import make_model, refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS"])
def test_attention_kept_is_that_of_stock_attention(pattern):
    """Compare with transformers' attention weights and selection, over the queries beyond k."""
    model, row = make_model("glm_moe_dsa").requires_grad_(False), row_of(40)
    ids = torch.from_numpy(row.ids)[None]
    eager = dense(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [a[0].mean(0) for a in eager(ids, output_attentions=True).attentions]
        chosen = {}
        for i, layer in enumerate(decoder_layers(eager)):
            layer.self_attn.indexer.register_forward_hook(
                lambda m, a, out, i=i: chosen.__setitem__(i, out[0])
            )
            layer.self_attn.indexer.index_topk = 4096
        eager(ids)
    kept = measure_kept(model, pattern, [row])
    for i, p in enumerate(weights):
        order = chosen[Pattern(pattern).source(i)].long()  # It has all keys, the best first.
        share = [float(p[t, [int(s) for s in order[t] if s <= t][:8]].sum()) for t in range(8, 40)]
        assert kept[i] == pytest.approx(np.mean(share), abs=2e-3)  # Scores of zero tie.
    refused(
        lambda: measure_kept(
            model, pattern, [Row(np.arange(40), tuple((a, a + 8) for a in range(0, 40, 8)))]
        ),
        "No query",
    )


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS", "FSSSSS"])
def test_the_oracle_selects_by_the_groups_mean_attention(pattern, monkeypatch):
    """Compare with stock transformers, given the top k of each group's mean dense attention."""
    model, row = make_model("glm_moe_dsa").requires_grad_(False), row_of(60)
    ids = torch.from_numpy(row.ids)[None]
    eager = dense(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack([a[0].mean(0) for a in eager(ids, output_attentions=True).attentions])
        for group in served_layers(Pattern(pattern)).values():
            # The model masks the keys that lie ahead.
            best = weights[list(group)].mean(0).topk(8).indices[None].int()
            for i in group:
                decoder_layers(eager)[i].self_attn.indexer.__dict__["forward"] = (
                    lambda *_, best=best, **__: best
                )
        expected = hidden_states(eager, ids)
    assert torch.allclose(oracle_states(model, pattern, row), expected, atol=1e-5)
    # Now there are many blocks, and one of the documents is shorter than k.
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 20000)
    cuts = ((0, 30), (30, 55), (55, 60))
    packed = oracle_states(model, pattern, Row(row.ids, cuts))
    assert torch.allclose(packed[:, :30], expected[:, :30], atol=1e-5)
    for a, b in cuts[1:]:
        alone = oracle_states(
            model, pattern, Row.one_document(np.concatenate([row.ids[a:b], row.ids[:40]]))
        )[:, : b - a]
        assert torch.allclose(packed[:, a:b], alone, atol=1e-5)
    assert not any("forward" in layer.self_attn.__dict__ for layer in decoder_layers(model))
    refused(lambda: oracle_states(model, "FSRFSS@2", row), "R layers select for themselves")


def test_layer_weights_from_a_search_or_numbers(tmp_path):
    folder = tmp_path / "search"
    folder.mkdir()
    refused(lambda: layer_weights(str(folder), 4), "no finished run")
    losses = {"FFFF": 2.0, "FSFF": 2.3, "FFSF": 1.9, "FFFS": 2.03, "FSFS": 9.0}
    (folder / "journal.jsonl").write_text(
        "".join(json.dumps({"pattern": p, "loss": x}) + "\n" for p, x in losses.items())
    )
    for name in ("result.json", "settings.json"):
        (folder / name).write_text('{"model": "a"}')
    assert sharing_costs(folder, 4) == [None, *map(pytest.approx, (0.3, -0.1, 0.03))]
    assert layer_weights(str(folder), 4) == [pytest.approx(x) for x in (0.11, 0.3, 0.011, 0.03)]
    assert layer_weights("1,2,3.5", 3) == [1, 2, 3.5]
    refused(lambda: layer_weights(str(folder), 6), "no search of 6 layers")
    assert layer_weights(str(folder), 4, "a") == layer_weights(str(folder), 4)
    refused(lambda: layer_weights(str(folder), 4, "b"), "another model")
    refused(lambda: layer_weights("1,2", 3), "2 numbers", "3 layers")
    refused(lambda: layer_weights("nowhere", 3), "'nowhere'")
    refused(lambda: layer_weights("", 3), "takes numbers")
    # This string is longer than a file's name may be.
    assert len(layer_weights(",".join(["1.2345678"] * 78), 78)) == 78
    (folder / "journal.jsonl").write_text('{"pattern": "FFFF", "loss": null}\n')
    refused(lambda: layer_weights(str(folder), 4), "changed by hand")


def test_sharing_costs_are_those_of_the_models_loss(tmp_path):
    """A search tries each layer alone, unless it has stages: then only those of the first."""
    model = make_model("glm_moe_dsa")
    ids = worker.held_out()[0].ids
    for stages in (1, 2):
        search(
            model,
            worker.held_out()[:1],
            tmp_path / str(stages),
            SearchSettings(keep=1 / 3, uniform=False, stages=stages),
        )
    first, *costs = sharing_costs(tmp_path / "1", 6)
    assert first is None
    for i, cost in enumerate(costs, 1):
        with use_pattern(model, "F" * i + "S" + "F" * (5 - i)), torch.no_grad():
            shared = token_losses(model, hidden_states(model, ids), ids).mean()
        full = token_losses(model, hidden_states(model, ids), ids).mean()
        assert cost == pytest.approx(float(shared - full), abs=1e-6)
    refused(lambda: sharing_costs(tmp_path / "2", 6), "--stages 1")
