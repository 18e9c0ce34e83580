"""Weights that are not finite are refused, on loading and in a model that is at hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache.models.family import indexers
from indexcache.models.loading import load
from indexcache.models.soundness import check_scores, check_weights
from tests.fp8_support import write_tokenizer
from tests.support import FAMILIES, logits, make_model, refused

SMALL = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
BROKEN = [
    "model.layers.1.self_attn.indexer.wq_b.weight",
    "model.layers.1.self_attn.indexer.wk.weight",
    "model.layers.1.self_attn.indexer.weights_proj.weight",
    "model.layers.1.self_attn.indexer.k_norm.bias",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.1.mlp.experts.gate_up_proj",
]


@pytest.fixture(scope="module", params=FAMILIES)
def small(request):
    return make_model(request.param, **SMALL)


@pytest.fixture
def changed(small):
    """Change one value of a weight, and restore it."""
    saved = []

    def change(name, value, whole=False):
        tensor = small.state_dict()[name]
        saved.append((tensor, tensor.clone()))
        if whole:
            tensor.fill_(value)
        else:
            tensor.view(-1)[tensor.numel() // 2] = value

    yield change
    for tensor, before in saved:
        tensor.copy_(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", BROKEN)
def test_one_value_that_is_not_finite_is_found(small, changed, name, value):
    check_weights(small)
    changed(name, value)
    refused(lambda: check_weights(small), name, "not finite", "1 of", str(value))
    if ".indexer." in name or ".gate." in name:
        refused(lambda: check_weights(small, selecting=True), name)
    else:
        check_weights(small, selecting=True)


def test_an_indexer_of_one_value_is_found(small, changed):
    name = BROKEN[0]
    changed(name, 0.0, whole=True)
    refused(lambda: check_weights(small), name, "ranks nothing")


def test_indexers_come_first(small, changed):
    changed("model.embed_tokens.weight", float("nan"))
    changed(BROKEN[1], float("nan"))
    refused(lambda: check_weights(small), BROKEN[1])


def test_loading_looks_at_every_weight(tmp_path):
    make_model("glm_moe_dsa", **SMALL).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    for name in (BROKEN[0], "model.layers.1.mlp.experts.3.down_proj.weight", "lm_head.weight"):
        bad = good[name].clone()
        bad[-1, -1] = float("nan")
        save_file(good | {name: bad}, file, {"format": "pt"})
        stem = name.replace("experts.3.down_proj.weight", "experts.down_proj")
        refused(lambda: load(tmp_path), str(tmp_path), stem, "is nan")
    # 1e6 is finite as it is stored, and beyond float16.
    large = good["lm_head.weight"].clone()
    large[0, 0] = 1e6
    save_file(good | {"lm_head.weight": large}, file, {"format": "pt"})
    refused(lambda: load(tmp_path, dtype="float16"), "lm_head.weight", "is inf", "65504")
    load(tmp_path, dtype="bfloat16")


def test_scores_that_are_not_finite_are_found(small, changed, ids):
    with check_scores(small):
        logits(small, ids)
    changed(BROKEN[0], 1e30)
    with check_scores(small):
        logits(small, ids)  # The largest products are about 1e30, which fp32 holds.

    def run():
        with check_scores(small):
            logits(small, ids)

    changed(BROKEN[2], 1e30)
    refused(run, "layer 1", "no finite scores", "overflow")
    changed(BROKEN[2], float("nan"))
    refused(run, "layer 1", "weights_proj gives NaN")
    changed(BROKEN[2], 0.1)
    changed(BROKEN[1], 1e38)
    refused(run, "layer 1", "k_norm gives NaN")
    assert not any(m._forward_hooks for i in indexers(small) for m in i.modules())


def test_fast_path_shows_its_scores_too(ids):
    from indexcache.models.fast.accelerate import accelerate

    model = make_model("glm_moe_dsa", **SMALL)
    accelerate(model)
    with torch.no_grad():
        model.state_dict()[BROKEN[0]].view(-1)[0] = float("inf")

    def run():
        with check_scores(model):
            logits(model, ids)

    refused(run, "layer 1", "wq_b gives NaN or infinities")
