"""A whole checkpoint has the next-token layers of its source, or says that there are none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexcache.checkpoint import INDEX_NAME, read_headers
from indexcache.distilling.carried import carry_over
from indexcache.distilling.delta import save_checkpoint
from indexcache.exporting import export
from indexcache.models.loading import describe, load
from tests.fp8_support import edit_config, read_otherwise, write_fp8
from tests.support import SHAPE, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = SHAPE["num_hidden_layers"]


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_model("glm_moe_dsa").save_pretrained(folder)
    return folder


@pytest.fixture
def source(plain, tmp_path):
    """A checkpoint with one next-token layer, stored in bf16 beside fp32 layers."""
    folder = tmp_path / "source"
    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    last = f"layers.{LAYERS - 1}."
    extra = {n.replace(last, f"layers.{LAYERS}."): w.bfloat16() for n, w in weights.items()
             if last in n}  # fmt: skip
    extra[f"model.layers.{LAYERS}.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    return folder


def whole(source, folder):
    model = load(source)
    save_checkpoint(model.module, dict(model.module.state_dict()), folder, source)
    return carry_over(describe(source), folder)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_next_token_layers_keep_their_bytes(source, tmp_path):
    (said,) = whole(source, tmp_path / "out")
    assert "carried over" in said
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    behind = [n for n in before if f"layers.{LAYERS}." in n]
    assert behind
    for name in behind:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], before[name])
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(
        t.end - t.begin for h in read_headers(tmp_path / "out").values() for t in h.tensors.values()
    )
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1
    again = load(tmp_path / "out").module.state_dict()
    for name, weight in load(source).module.state_dict().items():
        assert torch.equal(again[name], weight)
    export(tmp_path / "out", "FSFSFS", tmp_path / "e", engines="transformers")
    pruned = tensors_of(tmp_path / "e" / "transformers")
    assert all(torch.equal(pruned[name], before[name]) for name in behind)


def test_a_key_without_layers_becomes_0_and_is_said(plain, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(plain, folder)
    edit_config(folder, num_nextn_predict_layers=2)
    (said,) = whole(folder, tmp_path / "out")
    assert "num_nextn_predict_layers is 0" in said
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    edit_config(folder, num_nextn_predict_layers=None)
    assert whole(folder, tmp_path / "none") == []
    assert not config_of(tmp_path / "none").get("num_nextn_predict_layers")


def test_an_fp8_source_gives_a_checkpoint_without_quantisation(tmp_path):
    source = write_fp8(tmp_path / "source", "glm_moe_dsa")
    (source / "hf_quant_config.json").write_text("{}")
    facts = describe(source)
    said = " ".join(whole(source, tmp_path / "out"))
    assert "dequantised" in said
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    after = tensors_of(tmp_path / "out")
    assert not [n for n, t in after.items() if t.dtype == torch.float8_e4m3fn or "scale" in n]
    layers = facts["num_hidden_layers"]
    behind = {n: a for n, a in read_otherwise(source).items() if f"layers.{layers}." in n}
    assert bool(behind) == bool(facts["mtp_layers"])
    for name, expected in behind.items():
        if "scale" not in name:
            assert torch.equal(
                after[name].float(), torch.from_numpy(expected.copy()).bfloat16().float()
            )
    assert describe(tmp_path / "out")["quantization"] is None
    load(tmp_path / "out")


def test_a_nested_source_gives_the_language_model_alone(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    nested = {n.replace("model.", "model.language_model.", 1): w for n, w in weights.items()}
    save_file(nested, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(
        json.dumps({"model_type": "glm5v", "text_config": config_of(source)})
    )
    said = " ".join(whole(source, tmp_path / "out"))
    assert "language model alone" in said
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["num_nextn_predict_layers"]) == ("glm_moe_dsa", 1)
    after = tensors_of(tmp_path / "out")
    assert set(after) >= {n for n in weights if f"layers.{LAYERS}." in n}
    assert describe(tmp_path / "out")["nested"] is False


def test_a_pattern_of_the_source_is_not_that_of_the_checkpoint(source, tmp_path):
    edit_config(source, index_topk_pattern="FSSFSS", indexer_types=None, index_topk_freq=4)
    whole(source, tmp_path / "out")
    assert describe(tmp_path / "out")["native_pattern"] == "F" * LAYERS
