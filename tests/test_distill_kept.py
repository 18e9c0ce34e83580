"""What selections keep of the attention, the best that layers could share, and how much layers count that learn together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_model, refused
from test_distill_worker import dense, row_of

from indexcache import Pattern
from indexcache.distill import Row, best_states, measure_kept
from indexcache.distill.attention import served_layers
from indexcache.models.family import decoder_layers
from indexcache.models.lm import hidden_states
from indexcache.search.costs import layer_weights, sharing_costs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS"])
def test_attention_kept_is_that_of_stock_attention(pattern):
    """Against transformers' own attention weights and its own selection, over the queries beyond k."""
    model, row = make_model("glm_moe_dsa").requires_grad_(False), row_of(40)
    ids = torch.from_numpy(row.ids)[None]
    eager = dense(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [a[0].mean(0) for a in eager(ids, output_attentions=True).attentions]
        chosen = {}
        for i, layer in enumerate(decoder_layers(eager)):
            layer.self_attn.indexer.register_forward_hook(lambda m, a, out, i=i: chosen.__setitem__(i, out[0]))
            layer.self_attn.indexer.index_topk = 4096
        eager(ids)
    kept = measure_kept(model, pattern, [row])
    for i, p in enumerate(weights):
        order = chosen[Pattern(pattern).source(i)].long()  # all keys, the best first
        share = [float(p[t, [int(s) for s in order[t] if s <= t][:8]].sum()) for t in range(8, 40)]
        assert kept[i] == pytest.approx(np.mean(share), abs=2e-3)  # zero scores tie
    refused(lambda: measure_kept(model, pattern, [Row(np.arange(40), tuple((a, a + 8) for a in range(0, 40, 8)))]), "No query")


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS", "FSSSSS"])
def test_the_best_selection_is_of_the_groups_mean_attention(pattern):
    """Stock transformers, each layer given the top k of its group's mean attention, which its own dense pass has."""
    model, row = make_model("glm_moe_dsa").requires_grad_(False), row_of(60)
    ids = torch.from_numpy(row.ids)[None]
    eager = dense(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack([a[0].mean(0) for a in eager(ids, output_attentions=True).attentions])
        for group in served_layers(Pattern(pattern)).values():
            best = weights[list(group)].mean(0).topk(8).indices[None].int()  # a mask takes what lies ahead
            for i in group:
                decoder_layers(eager)[i].self_attn.indexer.__dict__["forward"] = lambda *_, best=best, **__: best
        want = hidden_states(eager, ids)
    assert torch.allclose(best_states(model, pattern, row), want, atol=1e-5)
    halves = best_states(model, pattern, Row(row.ids, ((0, 30), (30, 60))))[:, :30]
    assert torch.allclose(halves, want[:, :30], atol=1e-5)
    assert not any("forward" in layer.self_attn.__dict__ for layer in decoder_layers(model))
    refused(lambda: best_states(model, "FSRFSS@2", row), "R layers select for themselves")


def test_weights_from_what_sharing_costs(tmp_path):
    folder = tmp_path / "search"
    folder.mkdir()
    refused(lambda: layer_weights(str(folder), 4), "no finished run")
    losses = {"FFFF": 2.0, "FSFF": 2.3, "FFSF": 1.9, "FFFS": 2.03, "FSFS": 9.0}
    (folder / "journal.jsonl").write_text("".join(json.dumps({"pattern": p, "loss": x}) + "\n" for p, x in losses.items()))
    (folder / "result.json").write_text("{}")
    assert sharing_costs(folder, 4) == [None, *map(pytest.approx, (0.3, -0.1, 0.03))]
    assert layer_weights(str(folder), 4) == [pytest.approx(x) for x in (0.11, 0.3, 0.011, 0.03)]
    assert layer_weights("1,2,3.5", 3) == [1, 2, 3.5]
    refused(lambda: layer_weights(str(folder), 6), "no search of 6 layers")
    refused(lambda: layer_weights("1,2", 3), "2 numbers", "3 layers")
    refused(lambda: layer_weights("nowhere", 3), "'nowhere'")
