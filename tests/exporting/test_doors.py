"""Export from every kind of input: nested, bare config, bad pattern, family without sharing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from indexcache.checkpoint import INDEX_NAME, layers_without_indexer, tensor_names
from indexcache.cli import main
from indexcache.exporting import export
from indexcache.models.loading import describe
from tests.exporting.support import PATTERN, edit_config, refused

pytestmark = pytest.mark.usefixtures("one_thread")


def nest(folder: Path, model_type: str = "glm5v") -> Path:
    config = json.loads((folder / "config.json").read_text())
    outer = {"model_type": model_type, "text_config": config, "vision_config": {"depth": 2}}
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def bare(source: Path, folder: Path, file: bool) -> Path:
    folder.mkdir()
    path = Path(shutil.copy(source / "config.json", folder))
    return path if file else folder


def run(capsys, *argv: object) -> tuple[int, str]:
    code = main([str(a) for a in argv])
    return code, capsys.readouterr().err


def test_a_nested_config_is_exported_alike_at_both_doors(broken, tmp_path, capsys):
    nest(broken)
    export(broken, PATTERN, tmp_path / "python", engines="vllm")
    code, _ = run(capsys, "export", broken, "--pattern", PATTERN, "--engine", "vllm",
                  "--out", tmp_path / "shell")  # fmt: skip
    assert code == 0
    for name in ("vllm.txt", "vllm.json"):
        assert (tmp_path / "shell" / name).read_text() == (tmp_path / "python" / name).read_text()
    written = json.loads((tmp_path / "shell" / "vllm.json").read_text())
    assert written["text_config"]["index_topk_pattern"] == PATTERN
    nested = tmp_path / "full" / "transformers"
    export(broken, PATTERN, tmp_path / "full")
    config = json.loads((nested / "config.json").read_text())
    assert config["text_config"]["index_topk_pattern"] == PATTERN
    assert describe(nested)["native_pattern"] == PATTERN


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_bare_config_gets_flags_and_a_warning(glm_folder, tmp_path, capsys, file, nested):
    source = bare(glm_folder, tmp_path / "bare", file)
    if nested:
        nest(tmp_path / "bare")
    command = ("export", source, "--pattern", PATTERN, "--out")
    code, err = run(capsys, *command, tmp_path / "a")
    assert code == 0
    assert "unchecked" in err
    assert "transformers" in err
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "pattern.json", "vllm.txt", "vllm.json", "sglang.txt", "sglang.json",
    }  # fmt: skip
    code, err = run(capsys, *command, tmp_path / "b", "--engine", "vllm", "--prune")
    assert (code, "no weights to prune" in err) == (2, True)
    code, err = run(capsys, *command, tmp_path / "b", "--engine", "transformers")
    assert (code, "no weights" in err, "--engine" in err) == (2, True, True)
    code, err = run(capsys, *command[:3], "FSS", "--out", tmp_path / "b")
    assert (code, "3 layers" in err) == (2, True)
    code, err = run(capsys, "inspect", source)
    assert code == 0
    assert not (tmp_path / "b").exists()


def test_a_bare_config_that_shares_names_the_layers_at_risk(glm_folder, tmp_path):
    bare(glm_folder, tmp_path / "bare", False)
    edit_config(tmp_path / "bare", indexer_types=["full", *["shared"] * 5])
    warnings = export(tmp_path / "bare", "FSSFSS", tmp_path / "o", engines="vllm").warnings
    assert any("shares layers 3" in warning for warning in warnings)


def test_indexers_are_checked_by_an_index_whose_files_are_absent(sharded, tmp_path):
    bare(sharded, tmp_path / "bare", False)
    index = json.loads((sharded / INDEX_NAME).read_text())
    names = index["weight_map"]
    kept = {n: f for n, f in names.items() if "layers.3.self_attn.indexer" not in n}
    (tmp_path / "bare" / INDEX_NAME).write_text(json.dumps(index | {"weight_map": kept}))
    result = export(tmp_path / "bare", "FSSSSS", tmp_path / "o", engines="vllm")
    assert any(INDEX_NAME in warning for warning in result.warnings)
    refused(
        lambda: export(tmp_path / "bare", PATTERN, tmp_path / "p", engines="vllm"),
        "layers 3",
        "no indexer weights",
    )


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({"index_topk_pattern": "ffsfsf"}, True),
        ({"index_topk_pattern": "FFS"}, False),
        ({"indexer_types": ["Full"] * 6}, False),
        ({"index_topk_freq": "4"}, True),
    ],
)
def test_a_bad_pattern_in_the_config_is_replaced(broken, tmp_path, capsys, keys, stops):
    edit_config(broken, **{"indexer_types": None, **keys})
    for i, engine in enumerate(("vllm", "sglang", "transformers")):
        code, err = run(capsys, "export", broken, "--pattern", PATTERN, "--engine", engine,
                        "--out", tmp_path / str(i))  # fmt: skip
        assert code == 0
        assert next(iter(keys)) in err
        assert ("before a flag counts" in err) == (engine != "transformers" and stops)
    config = json.loads((tmp_path / "2" / "transformers" / "config.json").read_text())
    assert config["index_topk_pattern"] == PATTERN
    assert describe(tmp_path / "2" / "transformers")["native_pattern"] == PATTERN
    refused(lambda: describe(broken), "config.json", next(iter(keys)))


def test_a_family_without_sharing_gets_what_its_engines_need(deepseek, tmp_path, capsys):
    command = ("export", deepseek, "--pattern", PATTERN, "--out")
    code, err = run(capsys, *command, tmp_path / "all")
    assert code == 0
    assert "for transformers" in err
    code, _ = run(capsys, *command, tmp_path / "pruned", "--engine", "vllm", "--prune")
    assert code == 0
    for name in ("all", "pruned"):
        folder = tmp_path / name / "checkpoint"
        assert layers_without_indexer(folder) == (1, 2, 4)
        assert json.loads((folder / "config.json").read_text())["index_topk_pattern"] == PATTERN
    code, _ = run(capsys, *command, tmp_path / "flags", "--engine", "vllm", "sglang")
    assert code == 0
    assert not (tmp_path / "flags" / "checkpoint").exists()
    code, _ = run(capsys, *command, tmp_path / "kept", "--no-prune")
    assert code == 0
    assert not (tmp_path / "kept" / "checkpoint").exists()
    code, err = run(capsys, *command, tmp_path / "no", "--engine", "transformers")
    assert (code, "--engine vllm sglang" in err) == (2, True)
    result = export(deepseek, "FFFFFF", tmp_path / "full", engines="vllm", prune=True)
    assert any("nothing to prune" in warning for warning in result.warnings)


def test_missing_indexers_and_unknown_families_are_one_sentence(broken, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    dense = {n: t for n, t in weights.items() if "indexer" not in n}
    save_file(dense, broken / "model.safetensors", {"format": "pt"})
    assert tensor_names(broken)
    for verb in (["inspect", broken], ["export", broken, "--pattern", "F" * 6, "--out", "o"]):
        code, err = run(capsys, *verb)
        assert (code, err.count("\n"), "dense" in err) == (2, 1, True)
    for model_type in ("glm5_next", "hy_v4", "minimax_m3", "deepseek_v4", "deepseek_v3", None):
        edit_config(broken, model_type=model_type)
        for verb in (["inspect", broken], ["export", broken, "--pattern", "1/2", "--out", "o"]):
            code, err = run(capsys, *verb)
            assert (code, err.count("\n"), "known" in err) == (2, 1, True)


@pytest.mark.parametrize("key", ["index_topk", "max_position_embeddings", "vocab_size"])
def test_a_config_without_a_size_is_one_sentence(broken, capsys, key):
    edit_config(broken, **{key: None})
    code, err = run(capsys, "evaluate", broken, "--pattern", "1/2", "--data", "x.txt")
    assert (code, key in err, err.count("\n")) == (2, True, 1)
