"""A checkpoint without tokenizer does everything that needs token ids alone."""

from __future__ import annotations

import numpy as np
import pytest

from indexcache.cli import main
from indexcache.models.loading import load
from tests.support import SHAPE, make_model, refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    make_model("glm_moe_dsa").save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    (folder / "ids").mkdir()
    for i in range(6):
        np.save(folder / "ids" / f"{i}.npy", rng.integers(0, SHAPE["vocab_size"], 300))
    return folder


def test_token_ids_need_no_tokenizer(bare, capsys):
    text = f"--data {bare}/ids --split all --length 64 --sequences 4".split()
    for argv in (
        ["evaluate", "--pattern", "1/2", *text],
        [
            "bench",
            "--contexts",
            "64",
            "--patterns",
            "1/2",
            "--decode-tokens",
            "1",
            "--device",
            "cpu",
        ],
    ):
        assert main([argv[0], str(bare / "model"), *argv[1:]]) == 0, capsys.readouterr().err


def test_text_needs_one_and_no_model_is_loaded_for_it(bare, tmp_path, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("The model was loaded before its tokenizer was missed.")

    for module in ("indexcache.models.loading", "indexcache.bench.subject"):
        monkeypatch.setattr(f"{module}.load", loaded)
    file = tmp_path / "prompt.txt"
    file.write_text("word " * 2000)
    for argv in (
        ["evaluate", "--pattern", "1/2", "--data", str(file)],
        ["generate", "--prompt-file", str(file)],
        ["bench", "--contexts", "100", "--device", "cpu", "--data", str(file)],
    ):
        assert main([argv[0], str(bare / "model"), *argv[1:]]) == 2
        error = capsys.readouterr().err
        assert "tokenizer" in error
        assert error.count("\n") == 1


def test_a_handle_misses_its_tokenizer_only_when_asked(bare):
    model = load(bare / "model")
    refused(lambda: model.encode("text"), "tokenizer")
    refused(lambda: model.tokenizer, "tokenizer")
    refused(lambda: model.generate("text"), "tokenizer")
    assert model.batches(bare / "ids", length=64, sequences=2)
