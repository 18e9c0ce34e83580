"""Load an exported checkpoint in stock transformers: same logits, same tensors and files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from indexcache.checkpoint import (
    INDEX_NAME,
    indexer_part,
    layers_without_indexer,
    read_config,
    read_header,
    read_headers,
    tensor_names,
)
from indexcache.exporting import check_export, export
from indexcache.exporting import transformers as export_transformers
from indexcache.pattern import Pattern
from tests.exporting.support import LAYERS, PATTERN, edit_config, load, logits, packed, refused

pytestmark = pytest.mark.usefixtures("one_thread")


# -- the checkpoint for transformers -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["glm_folder", "sharded"])
@pytest.mark.parametrize("pattern", [PATTERN, "FSSSSS"])
def test_pruned_checkpoint_gives_bitwise_the_stock_logits(kind, pattern, request, tmp_path):
    base = request.getfixturevalue(kind)
    result = export(base, pattern, tmp_path / "out")
    pruned = tmp_path / "out" / "transformers"
    assert result.files["transformers"] == [str(pruned)]
    assert result.pattern == pattern

    model, info = load(pruned)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.indexer_types == Pattern(pattern).to_types()
    stock, _ = load(base, indexer_types=Pattern(pattern).to_types())
    full, _ = load(base, indexer_types=["full"] * LAYERS)
    assert torch.equal(logits(model), logits(stock))
    # Otherwise the comparison above would prove nothing.
    assert not torch.equal(logits(model), logits(full))

    names = tensor_names(pruned)
    with_indexer = {part[0] for name in names if (part := indexer_part(name))}
    assert with_indexer == set(Pattern(pattern).full_layers)
    gone = set(tensor_names(base)) - set(names)
    assert gone
    assert not set(names) - set(tensor_names(base))
    assert all(Pattern(pattern)[indexer_part(name)[0]] == "S" for name in gone)
    assert layers_without_indexer(pruned) == tuple(i for i, r in enumerate(pattern) if r == "S")


def test_every_kept_tensor_and_the_metadata_are_the_same(sharded, tmp_path):
    export(sharded, PATTERN, tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    before = tensor_names(sharded)
    after = tensor_names(pruned)
    for name, shard in after.items():
        assert shard == before[name]
    for shard in set(after.values()):
        old, new = load_file(sharded / shard), load_file(pruned / shard)
        assert all(
            torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype for name in new
        )
        with safe_open(pruned / shard, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_index_of_a_sharded_export(sharded, tmp_path):
    export(sharded, "FSSSSS", tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    old, new = (json.loads((folder / INDEX_NAME).read_text()) for folder in (sharded, pruned))
    headers = read_headers(pruned)
    assert new["weight_map"] == tensor_names(pruned)
    assert new["metadata"]["total_size"] == sum(
        t.end - t.begin for h in headers.values() for t in h.tensors.values()
    )
    assert new["metadata"]["total_size"] < old["metadata"]["total_size"]
    model, _ = load(pruned)
    assert new["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert {path.name for path in pruned.glob("*.safetensors")} == set(new["weight_map"].values())


def test_empty_shards_vanish_and_unchanged_ones_are_linked(glm_folder, tmp_path):
    base = Path(shutil.copytree(glm_folder, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {f"{letter}.safetensors": {} for letter in "abc"}
    for name, tensor in weights.items():
        match = indexer_part(name)
        letter = "c" if match is None else "b" if match[0] == 1 else "a"
        files[f"{letter}.safetensors"][name] = tensor
    for name, tensors in files.items():
        save_file(tensors, base / name, metadata={"format": "pt", "note": "é"})
    (base / INDEX_NAME).write_text(
        json.dumps({"weight_map": {name: file for file, names in files.items() for name in names}})
    )

    result = export(base, "FSSFFF", tmp_path / "out", engines="transformers")
    pruned = tmp_path / "out" / "transformers"
    assert {p.name for p in pruned.glob("*.safetensors")} == {"a.safetensors", "c.safetensors"}
    assert "b.safetensors" not in (pruned / INDEX_NAME).read_text()
    assert os.path.samefile(base / "c.safetensors", pruned / "c.safetensors")
    assert any("1 of the exported weight files" in warning for warning in result.warnings)
    with safe_open(pruned / "a.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "é"}
    assert not load(pruned)[1]["missing_keys"]


def test_without_hard_links_bytes_are_copied(broken, tmp_path, monkeypatch):
    def no_links(*_args, **_kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    result = export(broken, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    source = broken / "model.safetensors"
    target = tmp_path / "out" / "transformers" / "model.safetensors"
    assert source.read_bytes() == target.read_bytes()
    assert not os.path.samefile(source, target)
    assert not any("hard link" in warning for warning in result.warnings)


def test_links_are_made_to_files_not_to_symbolic_links(glm_folder, tmp_path):
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in glm_folder.iterdir():
        (base / path.name).symlink_to(os.path.relpath(path, base))
    export(base, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    weights = tmp_path / "out" / "transformers" / "model.safetensors"
    assert not weights.is_symlink()
    assert os.path.samefile(weights, glm_folder / "model.safetensors")


def test_unpruned_export_keeps_every_tensor(glm_folder, tmp_path):
    export(glm_folder, PATTERN, tmp_path / "out", engines="transformers", prune=False)
    assert tensor_names(tmp_path / "out" / "transformers") == tensor_names(glm_folder)
    assert read_config(tmp_path / "out" / "transformers")["index_topk_pattern"] == PATTERN


def test_wide_elements_come_first_and_odd_dtypes_survive(tmp_path):
    """After an odd number of bytes was dropped, wide tensors can still be mapped into memory."""
    tensors = {
        "model.layers.1.self_attn.indexer.wk.weight": torch.arange(3, dtype=torch.uint8),
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.arange(4, dtype=torch.int64),
        "c": torch.arange(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    # Written by hand in an order that the library would not choose.
    dtypes = {
        torch.uint8: "U8",
        torch.int64: "I64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
    }
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += raw
    (tmp_path / "model.safetensors").write_bytes(packed(entries, data))

    (shard,) = export_transformers.shard_layout(tmp_path, Pattern("FS"), prune=True)
    assert shard.dropped == {"model.layers.1.self_attn.indexer.wk.weight"}
    export_transformers.write_shard(
        tmp_path / "model.safetensors", tmp_path / "new.safetensors", shard
    )
    header = read_header(tmp_path / "new.safetensors")
    assert all((header.data_start + t.begin) % (t.bits // 8) == 0 for t in header.tensors.values())
    new = load_file(tmp_path / "new.safetensors")
    assert set(new) == set(tensors) - shard.dropped
    for name, tensor in new.items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor.float(), tensors[name].float())


def test_layers_outside_the_pattern_keep_their_indexer(broken, tmp_path):
    weights = load_file(broken / "model.safetensors")
    mtp = (
        f"model.layers.{LAYERS}.self_attn.indexer.wk.weight",
        "mtp.layers.1.self_attn.indexer.wk.weight",
    )
    save_file(
        weights | {name: torch.ones(2) for name in mtp},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit_config(broken, num_nextn_predict_layers=1)
    result = export(broken, PATTERN, tmp_path / "out")
    assert set(mtp) <= set(tensor_names(tmp_path / "out" / "transformers"))
    assert any("MTP" in warning for warning in result.warnings)


def test_saved_config_has_the_pattern_and_no_stale_key(broken, tmp_path):
    edit_config(
        broken,
        index_topk_freq=4,
        index_skip_topk_offset=3,
        index_topk_pattern="F" * LAYERS,
        auto_map={"A": "b"},
    )
    export(broken, PATTERN, tmp_path / "out")
    config = read_config(tmp_path / "out" / "transformers")
    assert config["indexer_types"] == Pattern(PATTERN).to_types()
    assert config["index_topk_pattern"] == PATTERN
    assert config["use_index_cache"] is True
    assert not {"index_topk_freq", "index_skip_topk_offset", "layer_types", "auto_map"} & set(
        config
    )
    before = read_config(broken)
    for key in set(before) - {"indexer_types", "index_topk_pattern", "layer_types", "auto_map"}:
        assert key.startswith("index_") or config[key] == before[key]


def test_a_nested_text_config_gets_the_pattern(broken, tmp_path):
    text = json.loads((broken / "config.json").read_text())
    outer = {"model_type": "glm_moe_dsa_vision", "text_config": text, "index_topk_pattern": "stale"}
    (broken / "config.json").write_text(json.dumps(outer))
    result = export(broken, PATTERN, tmp_path / "out")
    config = read_config(tmp_path / "out" / "transformers")
    assert config["text_config"]["index_topk_pattern"] == PATTERN
    assert "layer_types" not in config["text_config"]
    assert set(config) == {"model_type", "text_config"}
    keys = Pattern(PATTERN).to_config()
    assert json.loads((tmp_path / "out" / "vllm.json").read_text()) == {"text_config": keys}
    both = {"text_config": keys, **keys}
    assert json.loads((tmp_path / "out" / "sglang.json").read_text()) == both
    assert any("multimodal" in warning for warning in result.warnings)


def test_other_files_are_copied_but_no_code_and_no_other_weights(glm_folder, tmp_path):
    result = export(glm_folder, PATTERN, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "transformers").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "LICENSE",
        "model.safetensors",
        "tokenizer.json",
    }
    assert any("Python" in warning for warning in result.warnings)
    top = {path.name for path in (tmp_path / "out").iterdir()}
    assert top == {
        "pattern.json",
        "sglang.json",
        "sglang.txt",
        "transformers",
        "vllm.json",
        "vllm.txt",
    }
    assert Pattern.from_file(tmp_path / "out" / "pattern.json") == Pattern(PATTERN)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# -- warnings ------------------------------------------------------------------------------------


def test_export_warns_of_what_users_should_know(broken):
    edit_config(
        broken,
        indexer_types=Pattern("FSSSSS").to_types(),
        num_nextn_predict_layers=1,
        index_topk=2048,
    )
    text = " ".join(check_export(broken, PATTERN))
    for word in (
        "MTP",
        "two-batch overlap",
        "no-op here",
        "already shares",
        "Some versions of vLLM",
        "Python",
    ):
        assert word in text
    edit_config(broken, index_topk=8)
    assert "contexts of up to index_topk = 8" in " ".join(check_export(broken, PATTERN))
    assert not any("no-op" in w or "overlap" in w for w in check_export(broken, "F" * LAYERS))


def test_uneven_stages_name_the_cut_that_was_checked(glm_folder):
    assert any("2,2,1,1" in warning for warning in check_export(glm_folder, "FSFSFF", stages=4))
    assert not any(
        "PARTITION" in warning for warning in check_export(glm_folder, "FSSFSS", stages=2)
    )


def test_a_pruned_checkpoint_can_be_pruned_but_not_widened(glm_folder, tmp_path):
    export(glm_folder, PATTERN, tmp_path / "one")
    pruned = tmp_path / "one" / "transformers"
    result = export(pruned, "FSSFSS", tmp_path / "two")
    assert any("no indexer at layers 1, 2, 4" in warning for warning in result.warnings)
    assert layers_without_indexer(tmp_path / "two" / "transformers") == (1, 2, 4, 5)
    refused(lambda: export(pruned, "FFSFFF", tmp_path / "three"), "layers 1, 4,", "only be S")
