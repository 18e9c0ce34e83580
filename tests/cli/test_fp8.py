"""Search and evaluate with weights that stay in FP8, on the command line."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from indexcache import evaluate, load
from indexcache.cli import main
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.reader import Reader
from tests.fp8_support import write_fp8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_fp8(tmp_path_factory.mktemp("m"), "glm_moe_dsa", num_hidden_layers=4)
    np.save(folder / "text.npy", np.random.default_rng(0).integers(0, 128, 4000))
    return folder


@pytest.fixture
def run(folder, capsys):
    """Call a verb; return its exit code, its JSON, and the last line on stderr."""

    def call(verb: str, flags: str):
        text = f"--data {folder}/text.npy --split all --length 256 --sequences 4 --json"
        code = main([verb, str(folder), *shlex.split(f"{text} {flags}")])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err.splitlines()[-1]

    return call


@pytest.mark.parametrize("way", ["keep", "both"])
def test_the_numbers_are_those_of_the_model_that_was_loaded_so(run, folder, way):
    code, found, _ = run("evaluate", f"--pattern FSSS --fp8 {way}")
    assert code == 0
    model = load(folder, fp8=way)
    accelerate(model.module)
    batches = Reader(folder).batches(
        folder / "text.npy", model.module.config, length=256, sequences=4
    )
    row = evaluate(model, "FSSS", batches).rows[0]
    assert (found["rows"][0]["loss"], found["rows"][0]["kl"]) == (row.loss, row.kl)
    _, whole, _ = run("evaluate", "--pattern FSSS")
    assert whole["conditions"]["dtype"] == "float32"
    assert found["conditions"]["dtype"].startswith("float32, weights ")
    assert ("inputs" in found["conditions"]["dtype"]) == (way == "both")
    if way == "keep":  # In fp32 on a CPU it is bitwise the same.
        assert found["rows"][0]["loss"] == whole["rows"][0]["loss"]


@pytest.mark.parametrize("flags", ["--keep 1/2", "--keep 1/2 --method fast"])
def test_a_search_does_not_go_on_in_another_way(run, tmp_path, flags):
    flags = f"{flags} --no-uniform --out {tmp_path}"
    code, found, _ = run("search", f"{flags} --fp8 both")
    assert code == 0
    assert run("search", f"{flags} --fp8 both")[:2] == (0, found)
    for way in ("keep", "dequantize"):
        code, _, err = run("search", f"{flags} --fp8 {way}")
        assert code == 2
        assert "other settings (dtype was" in err


def test_overlap_takes_it(run, tmp_path):
    code, found, _ = run("overlap", f"--fp8 keep --out {tmp_path / 'kept'}")
    assert code == 0
    _, whole, _ = run("overlap", f"--out {tmp_path / 'whole'}")
    assert found["overlap"] == whole["overlap"]


def test_it_is_refused_where_layers_are_dequantised(run, tmp_path):
    flags = f"--pattern FSSS --fp8 keep --out {tmp_path / 'o'}"
    code, _, err = run("evaluate", f"{flags} --stream")
    assert code == 2
    assert "--fp8 keep needs the whole model in memory" in err
    assert not (tmp_path / "o").exists()
