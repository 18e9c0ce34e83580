"""Run the verbs that stream on the command line: chosen, forecast, refused, and disks that fill."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from indexcache.cli import main
from indexcache.models.stream import loading, store
from indexcache.models.stream.run import Stream
from tests.fp8_support import edit_config, write_fp8

TEXT = ["--split", "all", "--length", "64", "--sequences", "4", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_fp8(tmp_path_factory.mktemp("m"), "deepseek_v32", num_hidden_layers=4)
    np.save(folder / "text.npy", np.random.default_rng(0).integers(0, 128, 2000))
    return folder


@pytest.fixture
def run(folder, capsys):
    """Call a verb; return its exit code, its JSON, and its lines on stderr."""

    def call(verb, *flags, model=folder):
        code = main([verb, str(model), "--data", str(folder / "text.npy"), *TEXT, *flags])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err.splitlines()

    return call


SEARCH = ("search", "--keep", "1/2")


def test_what_does_not_fit_is_streamed_and_that_is_said(run, tmp_path, monkeypatch):
    code, loaded, err = run(*SEARCH, "--out", str(tmp_path / "a"))
    assert code == 0
    assert not any("one at a time" in line for line in err)
    monkeypatch.setattr(loading, "free_memory", lambda device: 1_000_000)
    code, streamed, err = run(*SEARCH, "--out", str(tmp_path / "b"))
    assert (code, streamed) == (0, loaded)
    notes = [line for line in err if "one at a time" in line]
    assert len(notes) == 1
    assert "cpu has 0.0 GB free" in notes[0]
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in "ab"]
    assert journals[0] == journals[1]
    _, _, err = run("overlap", "--out", str(tmp_path / "c"), "--no-stream")
    assert not any("one at a time" in line for line in err)


@pytest.mark.parametrize("verb", ["evaluate", "overlap"])
def test_other_verbs_give_the_same_numbers(run, tmp_path, verb):
    flags = ["--pattern", "1/2", "FRSF@2"] if verb == "evaluate" else []
    found = [
        run(verb, *flags, "--out", str(tmp_path / str(n)), *how)[:2]
        for n, how in enumerate(([], ["--stream", "--host-memory", "30KB"]))
    ]
    assert found[0][0] == 0
    assert found[0] == found[1]
    assert not list(tmp_path.glob("1/.*spill*"))


def test_the_first_of_several_processes_measures_the_overlap(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("overlap", "--stream", "--out", str(tmp_path / "o"))[:2] == (0, None)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "passes", "states"),
    [
        ((*SEARCH,), 2, 4),
        (("search", "--keep", "1/2", "--stages", "2"), 2, 2),
        (("evaluate", "--pattern", "1/2", "1/4"), 1, 3),
        (("overlap",), 1, 1),
    ],
)
def test_a_forecast_counts_passes_and_writes_nothing(run, tmp_path, flags, passes, states):
    if flags[0] != "evaluate":
        flags = (*flags, "--out", str(tmp_path / "out"))
    rates = ("--read-rate", "0.001", "--compute-rate", "1000")
    code, found, _ = run(*flags, "--stream", "--dry-run", *rates, "--host-memory", "1KB")
    assert code == 0
    assert found["passes"] == passes
    assert found["bytes_read"] == passes * found["bytes_of_pass"]
    # The disk alone decides: 1 MB a second.
    assert found["seconds"] == pytest.approx(found["bytes_read"] / 1e6)
    assert found["spilled_bytes"] == found["states_bytes"] - 1000
    hidden = 4 * 64 * 64 * 4  # 4 sequences of 64 tokens, 64 wide, in fp32
    assert states * hidden <= found["states_bytes"] < states * hidden * 1.3
    assert not list(tmp_path.iterdir())
    _, measured, _ = run(*flags, "--stream", "--dry-run")
    assert measured["measured"] == ["read", "compute"]
    assert measured["read_rate"] > 0 < measured["compute_rate"]


FAST = ("search", "--method", "fast", "--stream")


@pytest.mark.parametrize(
    "flags",
    [
        ("--keep", "1/4"),
        ("--keep", "1/4", "--objective", "kl"),
        ("--keep", "1/2", "--stages", "2"),
        ("--keep", "1/4", "--no-racing"),
    ],
)
def test_a_fast_search_lies_in_the_range_that_was_foreseen(run, tmp_path, monkeypatch, flags):
    passes = []
    real = Stream.run

    def counted(self, variants, *args, **kwargs):
        passes.append(len(variants))
        return real(self, variants, *args, **kwargs)

    flags = (*FAST, *flags, "--out", str(tmp_path / "out"))
    rates = ("--read-rate", "1", "--compute-rate", "1")
    code, found, _ = run(*flags, "--dry-run", *rates)
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert set(found) == {"least", "most", "exact", "assumed"}
    assert set(found["assumed"]) == {"least", "most", "exact"}
    monkeypatch.setattr(Stream, "run", counted)
    code, result, _ = run(*flags)
    assert code == 0
    least, most = found["least"], found["most"]
    assert least["seconds"] <= most["seconds"]
    assert least["passes"] - 1 <= len(passes) <= most["passes"]
    assert least["evaluations"] - 1 <= result["work"]["evaluations"] <= most["evaluations"]


def test_a_forecast_of_a_fast_search_says_what_it_assumes(run, folder, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    assert main([*FAST[:1], str(folder), "--data", str(folder / "text.npy"), *TEXT[:-1],
                 *FAST[1:], "--dry-run", *out]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    for word in ("least", "most", "exact", "evaluations", "passes over the layers", "time"):
        assert word in shown
    assert "most: no part of the text tells candidates apart" in shown
    assert run(*FAST, "--roles", "FRS", "--dry-run", *out)[0] == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dry-run"], "--dry-run is a setting of streaming; add --stream"),
        (["--no-stream", "--host-memory", "1GB"], "--host-memory is a setting of streaming"),
        (["--checkpoint-layers", "2"], "--checkpoint-layers is a setting of streaming"),
        (["--stream", "--host-memory", "lots"], "--host-memory is an amount of memory"),
        (["--stream", "--host-memory", "\u0661GB"], "--host-memory is an amount of memory"),
        (["--stream", "--read-rate", "0"], "--read-rate is a number above 0"),
        (["--stream", "--checkpoint-layers", "-2"], "--checkpoint-layers is a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(run, tmp_path, flags, says):
    code, _, err = run(*SEARCH, "--out", str(tmp_path / "out"), *flags)
    assert code == 2
    assert says in err[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: edit_config(f, hidden_size=128), "but the config says"),
        (lambda f: edit_config(f, n_routed_experts=8), "but the config says"),
        (lambda f: drop(f, "model.layers.2.self_attn.o_proj.weight"), "weight_scale_inv"),
        (lambda f: drop(f, "model.norm.weight"), "1 weights are missing"),
    ],
)
def test_a_forecast_refuses_what_the_run_would_refuse(run, folder, tmp_path, damage, says):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    for how in (("--dry-run",), ()):
        code, _, err = run("overlap", "--stream", *how, "--out", str(tmp_path / "o"), model=copy)
        assert code == 2
        assert says in err[-1]
        assert not (tmp_path / "o").exists()


def drop(folder, name):
    """Take a tensor out of its file and out of the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)


def test_a_full_disk_ends_a_run_that_goes_on_later(run, tmp_path, monkeypatch):
    flags = (*SEARCH, "--stream", "--host-memory", "1KB", "--out", str(tmp_path / "out"))
    written, pwrite = [], os.pwrite

    def full(handle, data, place):
        written.append(len(data))
        if len(written) == 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data, place)

    monkeypatch.setattr(store.os, "pwrite", full)
    code, _, err = run(*flags)
    assert code == 2
    assert "The disk is full" in err[-1]
    before = (tmp_path / "out" / "journal.jsonl").read_bytes()
    assert before
    monkeypatch.undo()
    code, resumed, _ = run(*flags)
    _, whole, _ = run(*SEARCH, "--out", str(tmp_path / "whole"))
    assert (code, resumed) == (0, whole)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes().startswith(before)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(".lock", "settings.json", "journal.jsonl", "result.json", "pattern.json")
    }
