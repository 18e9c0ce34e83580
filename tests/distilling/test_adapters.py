"""Test training with low-rank adapters: what they change, what is written, and what goes on."""

from __future__ import annotations

import builtins
import json
import shlex

import pytest
import torch
from peft import PeftModel
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from indexcache import apply_delta
from indexcache.cli import main
from indexcache.distilling import DistillSettings
from indexcache.distilling import trainer as trainer_module
from indexcache.distilling.adapters import TARGETS
from indexcache.distilling.trainer import Trainer
from indexcache.models.loading import load
from indexcache.models.seam import use_pattern
from tests.distilling import worker
from tests.distilling.worker import steps
from tests.support import make_model, refused

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(out, **changes):
    fields = {"pattern": "FSSFSS", "steps": 3, "eval_every": 0, "save_every": 2} | changes
    model, result = worker.train(out, "lora", **fields)
    return model, result.weights, steps(out)[0]


def test_the_result_loads_as_it_is_and_as_adapters(checkpoint, tmp_path, capsys):
    """The merged checkpoint, in stock transformers, is the base with the adapters of peft on it."""
    ids = torch.randint(0, 128, (1, 2000), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "ids.jsonl"
    rows = ids.view(20, 100).tolist()
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    out = tmp_path / "run"
    command = f"distill {checkpoint} --pattern FSSFSS --data {text} --out {out} --stage sparse"
    command += " --lora 3 --backbone-lr 0.02 --steps 3 --length 64 --batch-tokens 128"
    assert main(shlex.split(f"{command} --eval-every 3 --eval-sequences 2")) == 0
    assert "checkpoint" in capsys.readouterr().out
    written = out / "checkpoint" / "transformers"
    config = json.loads((written / "config.json").read_text())
    assert config["indexer_types"] == ["full", "shared", "shared"] * 2
    assert config["index_topk_pattern"] == "FSSFSS"
    stock = AutoModelForCausalLM.from_pretrained(written, dtype="float32").eval()
    base = load(checkpoint)
    start = base.module(ids[:, :64]).logits
    # The indexers are wrong without the adapters, so nothing takes them alone.
    indexers = out / "adapter" / "indexers.safetensors"
    refused(lambda: apply_delta(base.module, indexers, base=checkpoint), "trained beside adapters")
    refused(lambda: load(checkpoint, delta=indexers), "trained beside adapters")
    alone = f"--data {text} --pattern FSSFSS --length 64 --split all --delta {indexers}"
    assert main(shlex.split(f"evaluate {checkpoint} {alone}")) == 2
    assert "trained beside adapters" in capsys.readouterr().err
    adapted = PeftModel.from_pretrained(base.module, out / "adapter").eval()
    apply_delta(base.module, indexers, base=checkpoint)
    with torch.no_grad(), use_pattern(base.module, "FSSFSS"):
        got = adapted(input_ids=ids[:, :64]).logits
        want = stock(ids[:, :64]).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert float((got - start).detach().abs().max()) > 1e-2


def test_adapters_alone_change_the_rest_of_the_model(tmp_path):
    start = make_model("glm_moe_dsa").state_dict()
    model, weights, lines = trained(tmp_path / "a")
    assert set(weights) == set(start)
    changed = {name.split(".")[-2] for name in start if not torch.equal(weights[name], start[name])}
    indexers = {"wq_b", "wk", "k_norm", "weights_proj"}
    assert changed - indexers == set(TARGETS)
    for name, value in weights.items():
        if name.endswith("o_proj.weight"):
            assert torch.linalg.matrix_rank((value - start[name]).double(), rtol=1e-5) <= 2
    # The first step is that of the unchanged model, and the model has its own layers again.
    _, _other = worker.train(tmp_path / "b", "full", pattern="FSSFSS", steps=1, eval_every=0)
    first = steps(tmp_path / "b")[0][0]
    assert lines[0]["lm_loss"] == pytest.approx(first["lm_loss"], rel=1e-6)
    assert lines[0]["kl"] == pytest.approx(first["kl"], rel=1e-5)
    assert not any("lora" in name for name, _ in model.named_modules())
    # Recomputing changes no number, and reaches the adapters of the first layer.
    _, kept, _ = trained(tmp_path / "c", recompute=False)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def test_a_killed_run_goes_on_from_the_adapters(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(self, entry, kind, _log=Trainer._log):
        _log(self, entry, kind)
        if entry["step"] == 3:
            raise Killed

    _, whole, _ = trained(tmp_path / "whole", steps=4, compute_dtype="bfloat16")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainer_module.Trainer, "_log", dies)
        trained(tmp_path / "killed", steps=4, compute_dtype="bfloat16")
    state = tmp_path / "killed" / "state-00000002"
    saved = FileSystemReader(state).read_metadata().state_dict_metadata
    backbone = {name for name in saved if name.startswith("backbone.model.")}
    others = {name.rpartition(".")[2] for name in backbone if ".lora_" not in name}
    assert backbone and others <= {"e_score_correction_bias"}  # buffers
    _, again, _ = trained(tmp_path / "killed", steps=4, compute_dtype="bfloat16")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_adapters_cannot_do_is_refused(tmp_path, monkeypatch):
    refused(DistillSettings(lora=4).check, "--lora", "--stage sparse")
    refused(DistillSettings(lora=4, stage="sparse", freeze_backbone=True).check, "--lora")
    refused(DistillSettings(lora=-1, stage="sparse").check, "lora", "-1")
    assert "lora" not in DistillSettings(stage="sparse").to_json()
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    refused(lambda: trained(tmp_path), "peft", "indexcache[lora]")
