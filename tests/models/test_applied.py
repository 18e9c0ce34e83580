"""A trained delta is evaluated, exported and timed by every verb, on the checkpoint it is for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from indexcache import accelerate, evaluate, export
from indexcache.checkpoint import fingerprint
from indexcache.cli import main
from indexcache.distilling.delta import apply_delta, save_delta
from indexcache.models.loading import load
from indexcache.pattern import Pattern
from tests.support import SHAPE, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERN = "FSSFSS"


@pytest.fixture(scope="module", params=["glm_moe_dsa", "deepseek_v32"])
def place(request, tmp_path_factory):
    """A folder with a checkpoint, the ids of a text, and a delta that was not trained for fun."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder / "model")
    base = {"base": "model", "base_digest": fingerprint(folder / "model")}
    other = make_model(request.param, seed=1)
    save_delta(other, Pattern(PATTERN), folder / "delta.safetensors", base)
    save_delta(other, Pattern(PATTERN), folder / "foreign.safetensors", {"base_digest": "0" * 64})
    rng = np.random.default_rng(0)
    (folder / "ids").mkdir()
    for i in range(6):
        np.save(folder / "ids" / f"{i}.npy", rng.integers(0, SHAPE["vocab_size"], 200))
    return folder


@pytest.mark.parametrize("fast", [False, True])
def test_patterns_run_with_the_delta_and_the_baseline_without(place, fast):
    delta = place / "delta.safetensors"
    trained, own, by_hand = (load(place / "model", delta=d) for d in (delta, None, None))
    apply_delta(by_hand.module, delta, base=by_hand.path)
    if fast:
        for model in (trained, own, by_hand):
            accelerate(model.module)
    batches = own.batches(place / "ids", length=64, sequences=4)
    got = evaluate(trained, {"p": PATTERN, "full": "FFFFFF"}, batches)
    before = evaluate(own, {"full": "FFFFFF"}, batches).overall[0].loss
    after = {
        r.name: r.loss for r in evaluate(by_hand, {"p": PATTERN, "full": "F" * 6}, batches).overall
    }
    for row in got.overall:
        assert row.loss == after[row.name]
        assert row.loss - row.delta_loss == pytest.approx(before, abs=1e-12)
        assert row.beyond == pytest.approx((63 - 8) / 63)  # Full layers differ beyond k too.
    assert after["full"] != before
    assert got.conditions.delta == str(delta)
    assert got.conditions.delta_digest is not None
    for name, p in trained.module.state_dict().items():  # The delta is back in its place.
        assert torch.equal(p, by_hand.module.state_dict()[name])


def test_verbs_take_a_delta(place, tmp_path, capsys):
    text = ["--data", place / "ids", "--split", "all", "--length", "64", "--sequences", "4"]
    delta = ["--delta", place / "delta.safetensors"]
    for argv in (
        ["evaluate", "--pattern", place / "delta.safetensors", *text],
        ["search", "--keep", "5/6", "--no-uniform", "--out", tmp_path / "s", *text],
    ):
        command = [argv[0], place / "model", *argv[1:], *delta, "--json"]
        assert main([str(a) for a in command]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        assert json.loads(shown.splitlines()[-1])["conditions"]["delta"] == str(delta[1])
    settings = json.loads((tmp_path / "s" / "settings.json").read_text())
    assert settings["delta"] in shown


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--pattern", "1/2", "--data", "ids"],
        ["search", "--out", "o", "--data", "ids"],
        ["overlap", "--out", "o", "--data", "ids"],
        ["export", "--pattern", "FSSFSS", "--out", "o", "--engine", "vllm"],
        ["generate", "--prompt-file", "prompt"],
        ["bench", "--contexts", "50", "--patterns", "1/2", "--device", "cpu"],
        ["profile", "--contexts", "50", "--device", "cpu"],
        ["distill", "--pattern", "1/2", "--out", "o", "--data", "ids", "--length", "64"],
    ],
)
def test_a_delta_of_another_checkpoint_is_refused(place, monkeypatch, capsys, argv):
    monkeypatch.chdir(place)
    (place / "prompt").write_text("Once")
    for delta, says in (
        ("foreign.safetensors", "another checkpoint"),
        ("model/model.safetensors", "not a delta"),
        ("none.safetensors", "no such delta"),
    ):
        assert main([argv[0], "model", *argv[1:], "--delta", delta]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert says in lines[-1]
        assert not (place / "o").exists() or argv[0] == "distill"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_the_trained_indexers(place, tmp_path, dtype):
    """It equals the delta in the checkpoint's dtype, and every other byte is the checkpoint's."""
    source, delta = tmp_path / "source", tmp_path / "delta.safetensors"
    make_model(json.loads((place / "model" / "config.json").read_text())["model_type"]).to(
        dtype
    ).save_pretrained(source)
    trained = load_file(place / "delta.safetensors")
    base = {"base": "source", "base_digest": fingerprint(source)}
    save_delta(load(place / "model", delta=place / "delta.safetensors").module, Pattern(PATTERN),
               delta, base)  # fmt: skip
    for prune in (True, False):
        out = tmp_path / f"out{prune}"
        result = export(source, PATTERN, out, engines="vllm", prune=prune, delta=delta)
        assert set(result.files) == {"checkpoint", "vllm"}
        before = load_file(source / "model.safetensors")
        after = load_file(out / "checkpoint" / "model.safetensors")
        assert (set(before) == set(after)) is not prune
        for name, tensor in after.items():
            expected = trained[name].to(before[name].dtype) if name in trained else before[name]
            assert torch.equal(tensor, expected)
            assert tensor.dtype == before[name].dtype
    warned = export(source, "FSFFSS", tmp_path / "w", engines="vllm", delta=delta).warnings
    assert any("layers 2" in warning for warning in warned)
