"""Prune sharded FP8 checkpoints of both families, with several MTP layers, flat and nested."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import indexcache
from indexcache.checkpoint import INDEX_NAME, indexer_part
from indexcache.cli import main
from indexcache.configs import text_section
from indexcache.exporting import export
from indexcache.exporting import transformers as export_transformers
from indexcache.pattern import Pattern
from tests.exporting.support import refused
from tests.fp8_support import edit_config, read_raw, save_sharded, write_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"glm_moe_dsa": "transformers", "deepseek_v32": "checkpoint"}
ROLES = "FSFS"
MTP = (4, 5)
SIZES = {
    "num_hidden_layers": 4,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
}


def family_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_sharded(folder, tensors, files)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Path:
    """Make a checkpoint of one family: FP8 with scales in other files, and two MTP layers."""
    folder = write_fp8(tmp_path_factory.mktemp("base") / "b", request.param, block=32, **SIZES)
    weights = all_tensors(folder)
    first, second = (f"layers.{i}." for i in MTP)
    weights |= {n.replace(first, second): t.clone() for n, t in weights.items() if first in n}
    rewrite(folder, weights, files=5)
    edit_config(folder, num_nextn_predict_layers=2, index_topk_freq=2)
    return folder


def nested(source: Path, folder: Path) -> Path:
    """Copy a checkpoint as a multimodal one has it, with a tower of its own."""
    folder.mkdir()
    weights = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
        for n, t in all_tensors(source).items()
    }
    weights["model.visual.layers.1.self_attn.indexer.wk.weight"] = torch.ones(2)
    save_sharded(folder, weights, 4)
    text = json.loads((source / "config.json").read_text())
    outer = {"model_type": "some_vl", "text_config": text, "vision_config": {"depth": 2}}
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def check_pruned(source: Path, pruned: Path, roles: str) -> dict[str, str]:
    """Compare all bytes with the source's, and index and config with what is there."""
    before, after = read_raw(source), read_raw(pruned)
    gone = set(before) - set(after)
    assert not set(after) - set(before)
    assert all(after[name] == before[name] for name in after)
    expected = {
        n for n in before if (p := indexer_part(n)) and p[0] < len(roles) and roles[p[0]] == "S"
    }
    assert gone == expected
    index = json.loads((pruned / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in after.values())
    assert {p.name for p in pruned.glob("*.safetensors")} == set(index["weight_map"].values())
    section = text_section(json.loads((pruned / "config.json").read_text()))
    assert Pattern.from_config(section) == Pattern(roles)
    assert section["index_topk_pattern"] == roles
    assert section["indexer_types"] == Pattern(roles).to_types()
    assert section["num_nextn_predict_layers"] == len(MTP)
    return index["weight_map"]


def test_every_kept_byte_stays_and_scales_go_with_their_indexers(base, tmp_path):
    family = family_of(base)
    assert FAMILIES[family] in export(base, ROLES, tmp_path / "out", engines=None).files
    pruned = tmp_path / "out" / FAMILIES[family]
    names = check_pruned(base, pruned, ROLES)
    assert "model.layers.0.self_attn.indexer.wq_b.weight_scale_inv" in names
    assert "model.layers.1.self_attn.indexer.wq_b.weight_scale_inv" not in names
    for layer in MTP:
        assert f"model.layers.{layer}.self_attn.indexer.wq_b.weight_scale_inv" in names
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        pruned, output_loading_info=True, dtype=torch.float32
    )
    assert not info["mismatched_keys"]
    assert all(name.startswith(("model.layers.4.", "model.layers.5.")) for name in
               info["unexpected_keys"])  # fmt: skip
    lacking = {indexer_part(name)[0] for name in info["missing_keys"]}
    # Stock transformers shares on one family only; on the other it would make these up.
    assert lacking == (set() if family == "glm_moe_dsa" else {1, 3})
    for name, weight in model.state_dict().items():
        if "indexer.weights_proj" in name and indexer_part(name)[0] in (0, 2):
            assert torch.equal(weight, all_tensors(base)[name].float())


def test_the_pruned_checkpoint_is_the_same_model_here_or_refused(base, tmp_path):
    export(base, ROLES, tmp_path / "out", engines="tensorrt-llm")
    folder = tmp_path / "out" / "checkpoint"
    if family_of(base) == "deepseek_v32":
        refused(lambda: indexcache.load(folder), "layers 1, 3", "no sharing", "original")
        return
    pruned, whole = (indexcache.load(p) for p in (folder, base))
    ids = torch.randint(0, 128, (1, 96), generator=torch.Generator().manual_seed(0))
    found = []
    for model, roles in ((pruned, ROLES), (whole, ROLES), (whole, "FFFF")):
        with torch.no_grad(), indexcache.use_pattern(model, roles):
            found.append(model.module(ids).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_progress_counts_every_byte_that_stays(base, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, unit, **settings):
            self.total, self.unit, self.settings, self.done = total, unit, settings, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.done.append(count)

    monkeypatch.setattr(export_transformers, "progress", Bar)
    for shown in (False, True):
        export(base, ROLES, tmp_path / str(shown), engines="tensorrt-llm", progress=shown)
    kept = sum(len(raw) for _, _, raw in read_raw(tmp_path / "True" / "checkpoint").values())
    assert [bar.settings["shown"] for bar in bars] == [False, True]
    for bar in bars:
        assert bar.unit == "B"
        assert len(bar.done) == 5  # One for each file.
        assert sum(bar.done) == bar.total == kept


@pytest.mark.parametrize("roles", [ROLES, "FSSS"])
def test_a_nested_checkpoint_is_pruned_in_its_decoder_alone(base, tmp_path, roles):
    source = nested(base, tmp_path / "vl")
    export(source, roles, tmp_path / "out", engines=("vllm", "tensorrt-llm"))
    names = check_pruned(source, tmp_path / "out" / "checkpoint", roles)
    assert "model.visual.layers.1.self_attn.indexer.wk.weight" in names
    assert "model.language_model.layers.5.self_attn.indexer.wk.weight" in names


def test_every_kind_of_linking_is_said(base, tmp_path, capsys, monkeypatch):
    """A file without indexers of S layers is linked or copied, and its bytes are the same."""
    weights = all_tensors(base)
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "config.json").write_text((base / "config.json").read_text())
    shared = {n: t for n, t in weights.items() if (p := indexer_part(n)) and p[0] in (1, 3)}
    rewrite(apart, {n: t for n, t in weights.items() if n not in shared}, 2)
    index = json.loads((apart / INDEX_NAME).read_text())
    from safetensors.torch import save_file

    save_file(shared, apart / "indexers.safetensors")
    index["weight_map"] |= dict.fromkeys(shared, "indexers.safetensors")
    (apart / INDEX_NAME).write_text(json.dumps(index))
    command = ["export", str(apart), "--pattern", ROLES, "--engine", "vllm", "--prune", "--out"]

    def run(name: str, *flags: str) -> tuple[list[bool], str]:
        assert main([*command, str(tmp_path / name), *flags]) == 0
        pruned = tmp_path / name / "checkpoint"
        check_pruned(apart, pruned, ROLES)
        files = sorted(pruned.glob("*.safetensors"))
        assert len(files) == 2  # The one that held nothing else is gone.
        return [f.samefile(apart / f.name) for f in files], capsys.readouterr().err

    linked, said = run("link", "--link")
    assert (linked, "hard links" in said) == ([True, True], True)
    linked, said = run("copy", "--no-link")
    assert (linked, "link" in said) == ([False, False], False)

    def elsewhere(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    linked, said = run("elsewhere")
    assert linked == [False, False]
    assert "2 of the exported weight files" in said
    assert "on another disk" in said
