"""Test the trainer: what it trains, kill -9, two processes, checkpoints and the delta."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from indexcache import Pattern, use_pattern
from indexcache.cli import main
from indexcache.data import Document
from indexcache.distilling import DistillSettings, Row, apply_delta, distill, pack_rows, parallel
from indexcache.distilling.forward import (
    DistillForward,
    attention_replaced,
    run_decoder,
    served_layers,
)
from indexcache.distilling.indexers import trainable_indexers
from indexcache.distilling.rows import check_beyond, rows_of_step
from indexcache.distilling.trainer import Trainer
from indexcache.models.family import decoder_layers, indexers
from indexcache.models.lm import counted_losses, found_answers, hidden_states, token_losses
from tests.distilling import worker
from tests.distilling.worker import dense, row_of, steps
from tests.support import make_model, refused

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("glm_moe_dsa", "deepseek_v32")


# -- rows ------------------------------------------------------------------------------------------


def test_packing_keeps_every_token_and_boundary():
    documents = worker.documents()
    rows = pack_rows(documents, 64, seed=3)
    assert all(len(r.ids) == 64 and r.cuts[0][0] == 0 and r.cuts[-1][1] == 64 for r in rows)
    assert all(a[1] == b[0] for r in rows for a, b in zip(r.cuts, r.cuts[1:], strict=False))
    contents = {d.ids.tobytes() for d in documents}
    joined = 0
    unfinished = np.empty(0, np.int64)
    for r in rows:
        for a, b in r.cuts:
            unfinished = np.concatenate([unfinished, r.ids[a:b]])
            if unfinished.tobytes() in contents:
                joined += len(unfinished)
                unfinished = np.empty(0, np.int64)
    tokens = sum(len(d.ids) for d in documents)
    assert joined + len(unfinished) == 64 * len(rows) == tokens // 64 * 64
    refused(lambda: pack_rows(documents, 4096), "811 tokens", "one row of 4096")
    short = pack_rows([Document(np.arange(9), "t", str(i), str(i)) for i in range(30)], 64)
    refused(lambda: check_beyond(short, 8), "10%", "longer documents")


def test_every_epoch_takes_every_row_once():
    rows = [row_of(4, i) for i in range(5)]
    taken = [r for step in range(5) for r in rows_of_step(rows, step, 2, seed=1)]
    assert {id(r) for r in taken[:5]} == {id(r) for r in taken[5:]} == {id(r) for r in rows}
    assert [id(r) for r in taken[:5]] != [id(r) for r in taken[5:]]


# -- the forward pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSFSS", "FSFRSS@2"])
def test_forward_is_stock_and_documents_do_not_meet(family, pattern):
    model, row = make_model(family).requires_grad_(False), row_of(96)
    trained = trainable_indexers(model, Pattern(pattern), torch.float32)
    ids = torch.from_numpy(row.ids)[None]
    stock = {False: hidden_states(dense(model), ids)}
    with use_pattern(model, pattern):
        stock[True] = hidden_states(model, ids)
    other = row_of(40, 5)
    packed = Row(np.concatenate([other.ids, row.ids]), ((0, 40), (40, 136)))
    for sparse in (False, True):
        forward = DistillForward(model, Pattern(pattern), trained, sparse=sparse)
        with attention_replaced(model, forward), torch.no_grad():
            with forward.row(row, collect=True):
                hidden = run_decoder(model, row, "cpu")
            alone = {i: float(v) for i, v in forward.losses.items()}
            with forward.row(packed, collect=True):
                together = run_decoder(model, packed, "cpu")
            with forward.row(other, collect=True):
                run_decoder(model, other, "cpu")
        assert float((hidden - stock[sparse]).norm() / stock[sparse].norm()) < 1e-5
        assert float((together[:, 40:] - hidden).norm() / hidden.norm()) < 1e-5
        with torch.no_grad(), attention_replaced(model, forward), forward.row(packed, collect=True):
            run_decoder(model, packed, "cpu")
        both = {i: float(v) for i, v in forward.losses.items()}
        with torch.no_grad(), attention_replaced(model, forward), forward.row(other, collect=True):
            run_decoder(model, other, "cpu")
        for i in alone:
            assert both[i] == pytest.approx(
                (40 * float(forward.losses[i]) + 96 * alone[i]) / 136, rel=1e-4
            )
    assert all("forward" not in layer.self_attn.__dict__ for layer in decoder_layers(model))


@pytest.mark.parametrize("sparse", [False, True])
def test_attention_of_rotated_queries_alone(sparse):
    """SmolLM2 as a DSA model has qk_nope_head_dim 0, so attention compares rotated keys only."""
    model = make_model("glm_moe_dsa", qk_nope_head_dim=0, qk_rope_head_dim=16)
    model.requires_grad_(False)
    row = row_of(64)
    trained = trainable_indexers(model, Pattern("FSSFSS"), torch.float32)
    with use_pattern(model, "FSSFSS"):
        selecting = hidden_states(model, torch.from_numpy(row.ids)[None])
    stock = selecting if sparse else hidden_states(dense(model), torch.from_numpy(row.ids)[None])
    forward = DistillForward(model, Pattern("FSSFSS"), trained, sparse=sparse)
    with attention_replaced(model, forward), torch.no_grad(), forward.row(row, collect=True):
        hidden = run_decoder(model, row, "cpu")
    assert float((hidden - stock).norm() / stock.norm()) < 1e-5
    assert set(forward.losses) == {0, 3}
    assert all(float(p.grad.norm()) > 0 for p in trained.parameters())


def test_served_layers():
    p = Pattern("FSFRSS@2")
    assert served_layers(p) == {0: (0, 1), 2: (2,), 3: (3, 4, 5)}
    assert served_layers(p, own=True) == {0: (0,), 2: (2,), 3: (3,)}
    trained = trainable_indexers(make_model("glm_moe_dsa"), p, torch.float32)
    assert set(trained) == {"0", "2", "3"}  # S layers get no indexer.


# -- what trains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["warmup", "frozen"])
def test_frozen_changes_nothing_but_the_indexers(family, mode, tmp_path):
    before = make_model(family).state_dict()
    model, result = worker.train(tmp_path / "run", mode, family, eval_every=0)
    assert result.held_out is None
    for name, value in model.state_dict().items():
        trained = ".indexer." in name and int(name.split(".")[2]) in (0, 2, 3)
        assert torch.equal(value, before[name]) != trained, name
    delta = load_file(tmp_path / "run" / "delta.safetensors")
    assert len(delta) == 3 * 5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in delta.items())
    fresh = make_model(family)
    assert apply_delta(fresh, tmp_path / "run" / "delta.safetensors") == Pattern(worker.PATTERN)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )
    other = make_model(family, num_hidden_layers=5)
    refused(lambda: apply_delta(other, tmp_path / "run" / "delta.safetensors"), "6 layers", "has 5")


def test_rows_of_zeros_stay_zero_with_keep_zeros(tmp_path):
    for keep in (True, False):
        model, _ = worker.train(tmp_path / str(keep), "zeros", keep_zeros=keep, eval_every=0)
        for i in (0, 2, 3):  # These are F or R, and the other rows of their indexers train.
            q, k = indexers(model)[i].wq_b.weight, indexers(model)[i].wk.weight
            assert bool((q[1::3] == 0).all()) is bool((k[2:5] == 0).all()) is keep
            assert not torch.equal(q[::3], indexers(make_model("glm_moe_dsa"))[i].wq_b.weight[::3])


def test_full_mode_trains_backbone_and_indexers_apart(tmp_path):
    """Compare the backbone's step with that of the stock LM loss, the indexers' with the frozen."""
    settings = {
        "steps": 1,
        "rows": 2,
        "eval_every": 0,
        "lr": 1e-3,
        "backbone_lr": 1e-3,
        "clip": 1e9,
    }
    _, result = worker.train(tmp_path / "full", "full", pattern="FSSFSS", **settings)
    frozen, _ = worker.train(tmp_path / "frozen", "frozen", pattern="FSSFSS", **settings)
    weights = result.weights
    delta = {name: p for name, p in frozen.state_dict().items() if ".indexer." in name}
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in delta.items())

    model = make_model("glm_moe_dsa")
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if ".indexer." not in n],
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0,
    )
    rows = rows_of_step(pack_rows(worker.documents(), 96), 0, 2, 0)
    total = 0
    for row in rows:  # Each document goes alone through stock attention.
        for a, b in row.cuts:
            ids = torch.from_numpy(row.ids[a:b])[None]
            with use_pattern(model, "FSSFSS"):
                logits = model(ids, use_cache=False).logits
            if b - a > 1:
                total = total + F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / (
                    96 * 2
                )
    total.backward()
    moved = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert len(moved) > 50
    for name, p in model.named_parameters():
        if name in moved:  # Elsewhere rounding decides the sign that Adam's first step is.
            sure = moved[name].abs() > 1e-5
            assert torch.allclose(weights[name][sure], p[sure], atol=2e-5), name


def test_own_is_each_layer_alone_and_avg_is_multi(tmp_path):
    def delta(name, pattern, mode="warmup", **changes):
        fields = {"pattern": pattern, "steps": 3, "eval_every": 0, "clip": 0.01} | changes
        worker.train(tmp_path / name, mode, **fields)
        return load_file(tmp_path / name / "delta.safetensors")

    alone = delta("all", "FFFFFF")
    own = delta("own", "FSSFSS", objective="own")
    multi = delta("multi", "FSSFSS")
    avg = delta("avg", "FSSFSS", objective="avg")
    uneven = {"layer_weights": (1.0, 5.0, 2.0, 3.0, 1.0, 0.5)}
    uneven_multi = delta("uneven multi", "FSSFSS", **uneven)
    uneven_avg = delta("uneven avg", "FSSFSS", objective="avg", **uneven)
    assert all(torch.equal(uneven_multi[name], uneven_avg[name]) for name in own)
    assert any(not torch.equal(uneven_multi[name], multi[name]) for name in own)
    assert len(alone) == 3 * len(own) == 3 * len(multi) == 30
    for name in own:
        assert torch.equal(own[name], alone[name])
        assert torch.equal(multi[name], avg[name])
    assert any(not torch.equal(own[name], multi[name]) for name in own)
    sparse = delta("sparse", "FSSFSS", "frozen")
    uneven_sparse = delta("uneven sparse", "FSSFSS", "frozen", **uneven)
    assert any(not torch.equal(sparse[name], uneven_sparse[name]) for name in own)
    same = delta("same", "FSSFSS", layer_weights=(2.0,) * 6)
    first = delta("first", "FSSFSS", layer_weights=(1.0, 1e-9, 1e-9, 3.0, 1e-9, 1e-9))
    assert all(
        torch.equal(same[name], multi[name]) and torch.allclose(first[name], own[name], atol=1e-6)
        for name in own
    )


def test_evaluation_is_that_of_the_stock_model(tmp_path):
    model, result = worker.train(tmp_path / "run", "frozen", steps=3, eval_every=3)
    losses = result.held_out
    assert losses.best == min(losses.first, losses.last)
    ids = worker.held_out()[0].ids
    with use_pattern(model, worker.PATTERN):
        stock = token_losses(model, hidden_states(model, ids), ids).mean()
    assert float(stock) == pytest.approx(losses.best, abs=1e-5)
    found, asked = {}, {}
    for b in worker.retrieval():
        with use_pattern(model, worker.PATTERN):
            _, right = counted_losses(model, hidden_states(model, b.ids), b.ids, b.counted)
        kind = b.domain.removeprefix("retrieval:")
        found[kind] = int(found_answers(right, b.counted, b.answers).sum())
        asked[kind] = sum(map(len, b.answers))
    shares = {kind: found[kind] / asked[kind] for kind in found}
    shares["all"] = sum(found.values()) / sum(asked.values())
    assert result.recall["best"] == shares
    assert shares["passkey"] > 0 and shares["needles"] == 0
    lines = steps(tmp_path / "run")[1]
    assert [line["recall"]["all"] for line in lines][:1] == [result.recall["first"]["all"]]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["recall"] == result.recall
    assert f"answers found: {result.recall['first']['all']:.0%} before" in result.table()


def test_the_loss_of_tiny_falls_from_new_indexers(tiny, tmp_path):
    model = copy.deepcopy(tiny.module)
    generator = torch.Generator().manual_seed(0)
    for indexer in indexers(model):
        for p in indexer.parameters():
            if p.dim() > 1:
                p.data.normal_(0, p.shape[1] ** -0.5, generator=generator)
    text = (
        (Path(worker.__file__).parents[2] / "indexcache" / "assets" / "text" / "calibration.jsonl")
        .read_text()
        .splitlines()
    )
    ids = np.concatenate(
        [np.array(tiny.encode(json.loads(line)["text"][:4000])) for line in text[:8]]
    )
    rows = pack_rows([Document(ids, "t", "t", "t")], 160)
    distill(
        model,
        "FSSSFSSSFSSS",
        rows,
        tmp_path / "run",
        DistillSettings(steps=30, rows=1, lr=4e-3, eval_every=0),
    )
    losses = [e["loss"] for e in steps(tmp_path / "run")[0]]
    assert len(losses) == 30
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6]), losses


def test_learning_rate_rises_and_falls_as_a_cosine():
    s = DistillSettings(steps=1000, lr_warmup=0.1)
    assert [s.lr_scale(i) for i in (0, 49, 99, 100)] == pytest.approx([0.01, 0.5, 1, 1])
    assert s.lr_scale(550) == pytest.approx(0.525)
    assert s.lr_scale(999) == pytest.approx(0.05, abs=1e-5)


def test_one_step_is_adamw_with_each_gradient_clipped_apart(tmp_path, monkeypatch):
    """Compute Adam's first step by hand: lr * g / (|g| + eps), with g so small that eps shows."""
    gradients: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    clip, lr = 1e-9, 1e-2
    update = Trainer.update

    def watched(self, scale):
        for i, trained in self.indexers.items():
            for name, p in trained.indexer.named_parameters():
                gradients[f"{i}.{name}"] = p.grad.clone()
        update(self, scale)
        for i, trained in self.indexers.items():
            for name, p in trained.indexer.named_parameters():
                weights[f"{i}.{name}"] = p.detach().clone()

    monkeypatch.setattr(Trainer, "update", watched)
    before = make_model("glm_moe_dsa")
    settings = DistillSettings(steps=1, rows=2, eval_every=0, lr=lr, weight_decay=0.1, clip=clip)
    rows = pack_rows(worker.documents(), 96)
    distill(make_model("glm_moe_dsa"), "FSSFSS", rows, tmp_path / "run", settings)
    for layer in ("0", "3"):
        grads = {name: g for name, g in gradients.items() if name.startswith(f"{layer}.")}
        norm = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        assert norm == pytest.approx(clip, rel=1e-3)
        assert len(grads) == 5
        old = dict(indexers(before)[int(layer)].named_parameters())
        for name, g in grads.items():
            p = old[name.removeprefix(f"{layer}.")].detach()
            decayed = p * (1 - lr * 0.1 * (p.dim() > 1))
            assert torch.allclose(weights[name], decayed - lr * g / (g.abs() + 1e-8), atol=1e-6)


def test_bf16_keeps_fp32_masters(tmp_path):
    model = make_model("glm_moe_dsa").bfloat16()
    for indexer in indexers(model):
        indexer.weights_proj.float()
    assert {
        p.dtype for p in trainable_indexers(model, Pattern("FSSFSS"), torch.bfloat16).parameters()
    } == {torch.float32}
    settings = DistillSettings(steps=2, rows=2, eval_every=0)
    distill(model, "FSSFSS", pack_rows(worker.documents(), 96), tmp_path / "run", settings)
    kinds = {
        name.rsplit(".indexer.")[1]: v.dtype
        for name, v in load_file(tmp_path / "run" / "delta.safetensors").items()
    }
    assert kinds["wk.weight"] == torch.bfloat16
    assert kinds["weights_proj.weight"] == torch.float32
    full = make_model("glm_moe_dsa")
    more = DistillSettings(stage="sparse", steps=2, rows=2, eval_every=0, compute_dtype="bfloat16")
    rows = pack_rows(worker.documents(), 96)
    weights = distill(full, "FSSFSS", rows, tmp_path / "full", more).weights
    assert {v.dtype for v in weights.values()} == {torch.float32}


# -- kill -9, and more than one process ------------------------------------------------------------


def run_worker(*argv, processes=0):
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        if processes
        else []
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(main.__code__.co_filename).parents[2])]),
    }
    command = [sys.executable, *launch, worker.__file__, *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.mark.parametrize("mode", ["warmup", "full"])
def test_kill_and_resume(mode, tmp_path):
    killed = run_worker("kill", tmp_path / "a", mode)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [e["step"] for e in steps(tmp_path / "a")[0]] == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "a").glob("state*")] == ["state-00000003"]
    (tmp_path / "a" / "state.part").mkdir()  # A kill while saving leaves it.
    results = [worker.train(tmp_path / name, mode) for name in "ab"]
    for a, b in zip(*(steps(tmp_path / name) for name in "ab"), strict=True):
        for x, y in zip(a, b, strict=True):
            assert {k: v for k, v in x.items() if k != "tokens_s"} == {
                k: v for k, v in y.items() if k != "tokens_s"
            }
    if mode == "full":
        first, second = (r.weights for _, r in results)
    else:
        first, second = (m.state_dict() for m, _ in results)
    assert len(first) == len(second) > 100
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    again = worker.train(tmp_path / "a", mode)[1]  # A finished run does not run again.
    assert again.held_out == results[1][1].held_out
    refused(lambda: worker.train(tmp_path / "a", mode, lr=1e-3), "other settings", "lr was 0.002")


@pytest.mark.parametrize(
    "modes", [("warmup", "full"), pytest.param(("lora", "zeros"), marks=pytest.mark.long)], ids=str
)
def test_two_processes_give_the_curve_of_one(checkpoint, tmp_path, modes):
    """Also of a checkpoint that the first of them alone reads."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = [json.dumps({"input_ids": rng.integers(0, 128, 90).tolist()}) for _ in range(16)]
    (folder / "ids.jsonl").write_text("\n".join(rows))
    done = run_worker("train", tmp_path / "two", *modes, folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    worker.train_checkpoint(folder, tmp_path / "one" / "checkpoint")
    files = [tmp_path / n / "checkpoint/checkpoint/transformers" for n in ("one", "two")]
    one, two = (load_file(path / "model.safetensors") for path in files)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    for mode in (*modes, "checkpoint"):
        if mode in modes:
            worker.train(tmp_path / "one" / mode, mode)
        for a, b in zip(*(steps(tmp_path / n / mode) for n in ("one", "two")), strict=True):
            assert len(a) == len(b) > 2
            for x, y in zip(a, b, strict=True):
                assert x.get("recall") == y.get("recall")
                for key in ("loss", "lm_loss", "norm", "backbone_norm", "held_out"):
                    if x.get(key) is not None:
                        assert y[key] == pytest.approx(x[key], rel=1e-4), (mode, key, x["step"])


def test_cuda_means_the_current_gpu_or_that_of_the_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: None)
    with parallel.open_world(torch.device("cuda"), sharded=True) as world:
        assert world.device == torch.device("cuda", 3) and chosen == [world.device]
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "6"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with parallel.open_world(torch.device("cuda"), sharded=True) as world:
        assert world.device == torch.device("cuda", 2) and chosen[1:] == [world.device]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on the CPU is tested above")
def test_full_mode_on_a_gpu_has_the_losses_of_the_cpu(tmp_path):
    rows = [row_of(96, i) for i in range(4)]
    settings = DistillSettings(stage="sparse", steps=3, rows=2, eval_every=0)
    for device in ("cpu", "cuda"):
        model = make_model("glm_moe_dsa")
        distill(model, worker.PATTERN, rows, tmp_path / device, settings, device=device)
    for a, b in zip(*(steps(tmp_path / device)[0] for device in ("cpu", "cuda")), strict=True):
        for key in ("loss", "lm_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3)
