"""Test the recipe of the packaged model: its arithmetic, its tasks, all stages and resuming."""

from __future__ import annotations

import json
import lzma
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from indexcache.data import shipped_text
from recipes.tiny import train
from recipes.tiny.model import Tiny
from recipes.tiny.retrieval import Retrieval


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        json.loads(x)
        for x in shipped_text("calibration").read_text(encoding="utf-8").splitlines()[:6]
    ]
    ids = np.concatenate([np.array([*tiny.encode(r["text"][:4000]), 0], np.uint16) for r in rows])
    (folder / "train.u16.xz").write_bytes(lzma.compress(ids.tobytes()))
    ids[:300].tofile(folder / "validation.u16")
    (folder / "tokenizer.json").write_bytes((tiny.path / "tokenizer.json").read_bytes())
    return folder


def test_the_recipe_computes_what_stock_computes(tiny):
    ids = torch.tensor(
        [
            tiny.encode(
                json.loads(shipped_text("heldout").read_text(encoding="utf-8").splitlines()[0])[
                    "text"
                ]
            )[:256]
        ]
    )
    ours = Tiny()
    ours.load_state_dict(
        {k: v for k, v in tiny.module.state_dict().items() if k != "lm_head.weight"}
    )
    with torch.no_grad():
        a, b = tiny.module(ids).logits, ours.eval()(ids, "plain")[0]
    assert (a - b).norm() / a.norm() < 1e-3


def test_retrieval_tasks_fit_every_window(corpus):
    task = Retrieval(Tokenizer.from_file(str(corpus / "tokenizer.json")), 4096)
    for length in (65, 129, 513, 4097):
        for seed in range(60):
            window = np.full(length, 7, np.int64)
            out = task(window, np.random.default_rng(seed))
            assert out.shape == window.shape
            assert (out >= 0).all()
            assert (out < 4096).all()
            assert (window == 7).all()


def test_all_stages_and_resume_on_a_cpu(corpus, tmp_path, monkeypatch):
    def run(out, *more):
        argv = [
            "train.py",
            "--corpus",
            str(corpus),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--sequence",
            "64",
            "--batch",
            "2",
            "--steps",
            "3",
        ]
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        train.main()

    monkeypatch.setattr(train, "SAVE", 1)
    monkeypatch.setattr(train, "validate", lambda *_: {})
    run(tmp_path / "whole")
    save = torch.save
    calls = []

    def die(value, path):
        save(value, path)
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path / "cut", "--batch", "3")
    run(tmp_path / "cut")
    for stage in ("dense", "warmup", "sparse"):
        a, b = (
            torch.load(tmp_path / name / f"{stage}.pt", weights_only=True)
            for name in ("whole", "cut")
        )
        assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [
        [
            (r["stage"], r["step"])
            for r in map(json.loads, (tmp_path / n / "log.jsonl").open())
            if "step" in r
        ]
        for n in ("whole", "cut")
    ]
    assert steps[0] == steps[1]
