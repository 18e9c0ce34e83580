"""Weights that are not finite are refused, on loading and in a model that is at hand."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache.data import make_batches
from indexcache.distilling.rows import pack_rows
from indexcache.distilling.settings import DistillSettings
from indexcache.distilling.training import distill
from indexcache.evals.evaluate import evaluate
from indexcache.evals.gate import judge
from indexcache.evals.overlap import overlap
from indexcache.models.family import indexers
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.loading import load
from indexcache.models.soundness import check_scores, check_weights
from indexcache.searching.run import search
from tests.fp8_support import write_tokenizer
from tests.support import FAMILIES, documents, logits, make_model, refused

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
    for tensor, before in reversed(saved):
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
    model = make_model("glm_moe_dsa", **SMALL)
    accelerate(model)
    with torch.no_grad():
        model.state_dict()[BROKEN[0]].view(-1)[0] = float("inf")

    def run():
        with check_scores(model):
            logits(model, ids)

    refused(run, "layer 1", "wq_b gives NaN or infinities")


@pytest.fixture
def text():
    return make_batches(documents(4, 80), length=64, sequences=4)


CALLS = {
    "evaluate": lambda model, text, out: evaluate(model, "FSS", text),
    "overlap": lambda model, text, out: overlap(model, text),
    "search": lambda model, text, out: search(model, text, out),
    "accelerate": lambda model, text, out: accelerate(model),
    "distill": lambda model, text, out: distill(
        model,
        "FSS",
        pack_rows(documents(4, 80), 64, 0),
        out,
        DistillSettings(steps=1, eval_every=0),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_weights_that_changed_after_loading_are_found(small, changed, name, text, tmp_path):
    changed(BROKEN[0], float("nan"))
    refused(lambda: CALLS[name](small, text, tmp_path / "out"), BROKEN[0], "not finite")
    assert not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["evaluate", "overlap", "search"])
def test_scores_that_overflow_are_found_while_running(name, fast, text, tmp_path):
    """The weights are finite, so only the scores show it; the loss stays finite."""
    model = make_model("glm_moe_dsa", **SMALL)
    with torch.no_grad():
        for part in (BROKEN[0], BROKEN[2]):
            model.state_dict()[part].mul_(1e20)
    if fast:
        accelerate(model)
    refused(lambda: CALLS[name](model, text, tmp_path / "out"), "layer 1", "no finite scores")


def test_a_model_no_better_than_a_blind_guess_is_said(small, text, tmp_path):
    evidence = evaluate(small, "FSS", text)
    assert evidence.blind_loss == pytest.approx(math.log(128))
    assert evidence.baseline_loss > evidence.blind_loss
    assert "no better than a blind guess" in evidence.table().splitlines()[-1]
    assert evidence.to_json()["blind_loss"] == evidence.blind_loss
    refused(lambda: judge(evidence, 0.1), "blind guess")
    found = search(small, text, tmp_path)
    assert "no better than a blind guess" in found.notes[-1]
    settings = DistillSettings(steps=1, eval_every=1)
    rows = pack_rows(documents(4, 80), 64, 0)
    trained = distill(small, "FSS", rows, tmp_path / "d", settings, held_out=text)
    assert trained.held_out.blind == evidence.blind_loss
    assert "no better than a blind guess" in trained.table().splitlines()[-1]


def test_a_trained_model_is_not_called_blind(tiny):
    evidence = evaluate(tiny, "F" * 11 + "S", tiny.batches(length=256, sequences=3))
    assert evidence.baseline_loss < 4
    assert "blind" not in evidence.table()
    with torch.no_grad():
        head = tiny.module.lm_head.weight
        before = head.clone()
        head.copy_(head[torch.randperm(len(head), generator=torch.Generator().manual_seed(0))])
    try:
        evidence = evaluate(tiny, "F" * 11 + "S", tiny.batches(length=256, sequences=3))
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert evidence.baseline_loss > evidence.blind_loss == pytest.approx(math.log(4096))
    refused(lambda: judge(evidence, 0.5), "no better than a blind guess")
