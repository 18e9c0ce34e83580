"""Compare distillation of streamed models with that of loaded ones."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from indexcache.distilling import streamed
from indexcache.distilling.run import distill_checkpoint
from indexcache.distilling.settings import DistillSettings, RunSettings
from indexcache.pattern import Pattern
from tests.fp8_support import write_fp8
from tests.support import refused

SETTINGS = DistillSettings(steps=3, eval_every=2)
TIMES = ("tokens_s", "mfu")


def checkpoint(folder, family):
    write_fp8(folder, family, num_hidden_layers=5)
    rng = np.random.default_rng(0)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for i in range(24):
            words = " ".join(str(n) for n in rng.integers(0, 9, 150))
            file.write(json.dumps({"text": f"{i} {words}", "domain": f"d{i % 2}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def glm5(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("glm"), "glm_moe_dsa")


def distill(folder, out, pattern, settings=SETTINGS, **run):
    flags = {"data": str(folder / "text.jsonl"), "length": 64, "batch_tokens": 128}
    how = RunSettings(**flags, eval_sequences=3, **run)
    result, _ = distill_checkpoint(str(folder), Pattern(pattern), out, settings, how)
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return result, [{k: v for k, v in e.items() if k not in TIMES} for e in journal]


def same(a, b):
    deltas = [load_file(out / "delta.safetensors") for out in (a, b)]
    assert deltas[0].keys() == deltas[1].keys()
    assert all(bool((deltas[0][n] == deltas[1][n]).all()) for n in deltas[0])


@pytest.mark.parametrize(
    ("family", "pattern", "objective"),
    [("glm_moe_dsa", "FSSFS", "multi"), ("deepseek_v32", "FRSFR@2", "own")],
)
def test_streamed_training_gives_the_same_delta(tmp_path, family, pattern, objective):
    (tmp_path / "model").mkdir()
    folder = checkpoint(tmp_path / "model", family)
    settings = replace(SETTINGS, objective=objective)
    loaded, lines = distill(folder, tmp_path / "a", pattern, settings)
    found, streamed_lines = distill(
        folder, tmp_path / "b", pattern, settings, stream=True, host_memory="20KB"
    )
    assert streamed_lines == lines
    assert found.to_json() == loaded.to_json()
    same(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "stream").exists()
    again, _ = distill(folder, tmp_path / "b", pattern, settings, stream=True, host_memory="20KB")
    assert again.to_json() == loaded.to_json()  # A finished run trains nothing again.


def test_an_interrupted_run_trains_no_group_twice(glm5, tmp_path, monkeypatch):
    _, lines = distill(glm5, tmp_path / "a", "FSSFS")
    train = streamed.StreamTrainer._train_group
    trained = []

    def one(self, owner, *rest):
        if trained:
            raise KeyboardInterrupt
        trained.append(owner)
        train(self, owner, *rest)

    monkeypatch.setattr(streamed.StreamTrainer, "_train_group", one)
    with pytest.raises(KeyboardInterrupt):
        distill(glm5, tmp_path / "b", "FSSFS", stream=True)
    trained.clear()
    _, found = distill(glm5, tmp_path / "b", "FSSFS", stream=True)
    assert trained == [3]
    assert found == lines
    same(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_streamed_is_refused(glm5, tmp_path):
    def run(settings=SETTINGS, **flags):
        return lambda: distill(glm5, tmp_path / "out", "FSSFS", settings, **flags)

    sparse = DistillSettings(stage="sparse", freeze_backbone=True)
    refused(run(sparse, stream=True), "warmup")
    refused(run(stream=True, whole=True), "--whole")
    refused(run(host_memory="1GB"), "add --stream")
    refused(run(stream=True, host_memory="x"), "amount of memory")
    assert not (tmp_path / "out").exists()
