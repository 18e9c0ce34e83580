"""Refuse wrong exports in one sentence; full disks, kills and races leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from indexcache.checkpoint import INDEX_NAME
from indexcache.exporting import export
from indexcache.exporting import transformers as export_transformers
from indexcache.pattern import Pattern
from indexcache.records import atomic_folder
from tests.exporting.support import PATTERN, edit_config, packed, refused

pytestmark = pytest.mark.usefixtures("one_thread")


# -- refusals ------------------------------------------------------------------------------------


def test_patterns_that_are_refused(glm_folder, deepseek, tmp_path):
    out = tmp_path / "out"
    refused(lambda: export(glm_folder, "FSRFSS", out), "Layer 2 is R", "F and S")
    refused(lambda: export(glm_folder, "FSS", out), "3 layers", "6")
    refused(lambda: export(glm_folder, "fssfss", out), "Layer 0")
    refused(lambda: export(glm_folder, "SFFFFF", out), "Layer 0")
    refused(lambda: export(glm_folder, PATTERN, out, stages=3), "stage begins at layer 2", "S")
    refused(lambda: export(glm_folder, PATTERN, out, stages=0), "0 pipeline stages")
    refused(lambda: export(deepseek, PATTERN, out), "deepseek_v32", "use_pattern", "vllm", "sglang")
    assert not any(tmp_path.iterdir())


def test_engines_that_are_refused(glm_folder, tmp_path):
    refused(
        lambda: export(glm_folder, PATTERN, tmp_path / "o", engines=("vllm", "tgi")),
        "'tgi'",
        "sglang",
    )
    refused(lambda: export(glm_folder, PATTERN, tmp_path / "o", engines="tgi"), "'tgi'")
    refused(lambda: export(glm_folder, PATTERN, tmp_path / "o", engines=()), "No engine")


def test_configs_that_are_refused(broken, tmp_path):
    call = partial(export, broken, PATTERN, tmp_path / "out")
    refused(lambda: export(tmp_path / "nowhere", PATTERN, tmp_path / "out"), "nowhere", "no such")
    edit_config(broken, model_type="llama")
    refused(call, "'llama'", "glm_moe_dsa")
    edit_config(broken, model_type="glm_moe_dsa", num_hidden_layers=None)
    refused(call, "num_hidden_layers")
    (broken / "config.json").write_text("[]")
    refused(call, "config.json", "object")
    (broken / "config.json").write_text("{")
    refused(call, "config.json", "JSON")
    (broken / "config.json").unlink()
    refused(call, "no config.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-5], ["model.safetensors", "cut off"]),
        (lambda raw: raw[:100], ["cut off", "100"]),
        (lambda raw: b"", ["cut off"]),
        (lambda raw: raw + b"more", ["longer"]),
        (lambda raw: struct.pack("<Q", 4) + b"{{{{", ["not a safetensors"]),
        (lambda raw: packed({"a": 1}), ["not a safetensors"]),
        (lambda raw: packed([1]), ["not a safetensors"]),
        (
            lambda raw: packed(
                {"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc"
            ),
            ["corrupt", "'a'"],
        ),
        (
            lambda raw: packed(
                {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 3]}}, b"abc"
            ),
            ["corrupt", "'a'"],
        ),
        (
            lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            ["Git LFS"],
        ),
    ],
)
def test_damaged_weight_files_are_refused(damage, words, broken, tmp_path):
    path = broken / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: export(broken, PATTERN, tmp_path / "out"), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_incomplete_weights_are_refused(broken, tmp_path):
    call = partial(export, broken, PATTERN, tmp_path / "out")
    path = broken / "model.safetensors"
    weights = load_file(path)
    save_file(
        {name: t for name, t in weights.items() if "layers.3.self_attn.indexer.k_norm" not in name},
        path,
    )
    refused(call, "layer 3", "lacks k_norm")
    shutil.copy(path, broken / "model-00001-of-00001.safetensors")
    (broken / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    refused(call, "both there")
    (broken / INDEX_NAME).unlink()
    path.unlink()
    refused(call, "neither model.safetensors nor")
    (broken / "model-00001-of-00001.safetensors").unlink()
    refused(call, "weights are read from safetensors only")


def test_indexes_that_are_refused(sharded, tmp_path):
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    index = json.loads((base / INDEX_NAME).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    call = partial(export, base, PATTERN, tmp_path / "out")

    for bad, words in (
        ({}, ["weight_map"]),
        ([], ["weight_map"]),
        ({"weight_map": {name: "../x.safetensors"}}, ["../x.safetensors"]),
        ({"weight_map": {name: 3}}, ["3"]),
        ({"weight_map": index["weight_map"] | {"not.there": shard}}, ["not.there", shard]),
    ):
        (base / INDEX_NAME).write_text(json.dumps(bad))
        refused(call, *words)
    (base / INDEX_NAME).write_text(json.dumps(index))
    (base / shard).unlink()
    refused(call, shard, "not there")


def test_an_existing_folder_is_never_overwritten(glm_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(glm_folder, PATTERN, out, engines="vllm")  # An empty folder is allowed.
    refused(lambda: export(glm_folder, PATTERN, out, engines="vllm"), "not an empty folder")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(lambda: export(glm_folder, PATTERN, file), "not an empty folder")
    refused(lambda: export(glm_folder, PATTERN, file / "below"), "below")
    assert file.read_text() == "mine"


# -- disks and kills -----------------------------------------------------------------------------


def test_too_little_space_is_seen_before_writing(glm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    monkeypatch.setattr(export_transformers, "write", lambda *_a: pytest.fail("began to write"))
    refused(lambda: export(glm_folder, PATTERN, tmp_path / "out"), "free", "MiB")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(glm_folder, tmp_path, monkeypatch):
    def full(_source, target, _shard):
        target.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_transformers, "write_shard", full)
    refused(lambda: export(glm_folder, PATTERN, tmp_path / "out"), "disk is full")
    assert not any(tmp_path.iterdir())


def test_a_source_that_shrinks_is_an_error(broken, tmp_path):
    (shard,) = export_transformers.shard_layout(broken, Pattern(PATTERN), prune=True)
    path = broken / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    refused(
        lambda: export_transformers.write_shard(
            broken / "model.safetensors", tmp_path / "new.safetensors", shard
        ),
        "became shorter",
    )


def test_interrupted_exports_leave_nothing_behind(glm_folder, tmp_path, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_transformers, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            export(glm_folder, PATTERN, tmp_path / "out")
    assert not any(tmp_path.iterdir())

    killed = tmp_path / ".out.part"
    (killed / "transformers").mkdir(parents=True)
    (killed / "junk").write_text("left by a killed run")
    export(glm_folder, PATTERN, tmp_path / "out", engines="vllm")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "pattern.json",
        "vllm.json",
        "vllm.txt",
    }


def test_two_exports_to_one_folder_do_not_mix(glm_folder, tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        refused(
            lambda: export(glm_folder, PATTERN, tmp_path / "out", engines="vllm"), "another process"
        )
        (folder / "mine").write_text("kept")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_the_source_is_never_changed(sharded, tmp_path):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    export(sharded, PATTERN, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
