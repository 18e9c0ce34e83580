"""Compare searches, evaluations and overlaps of streamed models with those of loaded ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import indexcache as ic
from indexcache import SearchSettings
from indexcache.data import Batch, make_batches
from indexcache.models.stream.loading import stream_of
from indexcache.models.stream.settings import SearchStreamSettings
from indexcache.searching import meter
from tests.fp8_support import write_fp8
from tests.support import documents, refused

FILES = ("journal.jsonl", "result.json", "settings.json", "pattern.json")
SETTINGS = SearchSettings(keep=0.4)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def glm5(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("glm"), "glm_moe_dsa", num_hidden_layers=5)


@pytest.fixture(scope="module")
def whole(glm5, tmp_path_factory):
    """The run folder of the loaded model, whose bytes all others must have."""
    out = tmp_path_factory.mktemp("whole")
    ic.search(opened(glm5, False), texts(), out, SETTINGS)
    return out


def same(out, whole):
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def texts():
    longer = make_batches(documents(), length=64, sequences=4, batch=2)
    return longer + make_batches(documents(seed=3), length=48, sequences=2, batch=1)


def opened(folder, stream, fast=True):
    model = ic.load(folder, stream=stream)
    if fast:
        ic.accelerate(model)
    return model


@pytest.mark.parametrize(
    ("family", "stages", "fast"), [("glm_moe_dsa", 2, False), ("deepseek_v32", 1, True)]
)
def test_streamed_runs_write_the_bytes_of_loaded_ones(tmp_path, family, stages, fast):
    folder = write_fp8(tmp_path / "model", family, num_hidden_layers=5)
    settings = SearchSettings(keep=0.4, stages=stages)
    results = []
    for stream in (False, True):
        model, out = opened(folder, stream, fast), tmp_path / str(stream)
        ic.search(model, texts(), out, settings)
        found = [(out / name).read_bytes() for name in FILES]
        found.append(json.dumps(ic.evaluate(model, ["FSSFS", "FRFRR@2"], texts()).to_json()))
        found.append(json.dumps(ic.overlap(model, texts()).to_json()))
        results.append(found)
    assert results[0] == results[1]
    assert not (tmp_path / "True" / "stream").exists()


def test_a_search_takes_one_pass_a_flip(glm5, tmp_path):
    model = opened(glm5, True)
    stream, passes = stream_of(model), []
    run = stream.run
    stream.run = lambda variants, *rest, **more: (
        passes.append(len(variants)),
        run(variants, *rest, **more),
    )
    ic.search(model, texts(), tmp_path, SETTINGS)
    # All full and two uniform patterns, one with a pool, go with the first round.
    assert passes[0] == 1 + 4 + 2
    assert len(passes) == 3


class Killed(Exception):
    """Ends a run without its leave."""


def follow(stream, layers, last=None):
    """Note the layers that are run, and end the run behind that many."""
    run = stream.run

    def later(variants, inputs, use, *, report=lambda done: None, **kwargs):
        def counted(done):
            layers.append(done.layer)
            if len(layers) == last:
                raise Killed
            report(done)

        return run(variants, inputs, use, report=counted, **kwargs)

    stream.run = later


def killed(folder, out, settings, last=8):
    model, layers = opened(folder, settings), []
    follow(stream_of(model), layers, last)
    with pytest.raises(Killed):
        ic.search(model, texts(), out, SETTINGS)
    return layers


def test_an_interrupted_round_goes_on_behind_its_last_checkpoint(glm5, whole, tmp_path):
    settings = SearchStreamSettings(checkpoint_layers=2, host_memory="20KB")
    assert killed(glm5, tmp_path, settings) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1 + 4
    model, again = opened(glm5, settings), []
    follow(stream_of(model), again)
    ic.search(model, texts(), tmp_path, SETTINGS)
    assert again[:3] == [2, 3, 4]  # Layers 0 and 1 are not run again.
    same(tmp_path, whole)
    assert not (tmp_path / "stream").exists()


@pytest.mark.parametrize("damage", ["cut", "other", "of more processes"])
def test_a_checkpoint_that_does_not_fit_is_not_used(glm5, whole, tmp_path, damage):
    settings = SearchStreamSettings(checkpoint_layers=2)
    killed(glm5, tmp_path, settings)
    (saved,) = (tmp_path / "stream").glob("*.bin")
    if damage == "cut":
        saved.write_bytes(saved.read_bytes()[:-100])
    elif damage == "of more processes":
        shutil.copy(saved, saved.with_name(".states-2-of-3.bin.tmp"))
        saved.rename(saved.with_name("states-0-of-3.bin"))
    else:
        journal = tmp_path / "journal.jsonl"  # The round before is the one under way.
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    ic.search(opened(glm5, settings), texts(), tmp_path, SETTINGS)
    same(tmp_path, whole)
    assert not (tmp_path / "stream").exists()


def mixed():
    """Text, and retrieval whose answers alone count."""
    ids = torch.tensor(np.random.default_rng(0).integers(0, 128, (2, 64)))
    answers = (((40, 44),), ((50, 53),))
    asked = [Batch(ids, "retrieval:x", ("a", "b"), ("1" * 64, "2" * 64), answers=answers)]
    return texts() + asked


@pytest.mark.parametrize("objective", ["worst", pytest.param("key-kl", marks=pytest.mark.long)])
def test_every_objective_is_that_of_the_loaded_model(glm5, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(meter, "GAIN", -1.0)
    monkeypatch.setattr(meter, "KNOWN", 20.0)
    settings = SearchSettings(keep=0.6, objective=objective)
    for name, stream in (("loaded", False), ("streamed", True)):
        ic.search(opened(glm5, stream), mixed(), tmp_path / name, settings)
    same(tmp_path / "streamed", tmp_path / "loaded")


FAST = SearchSettings(method="fast", keep=0.4)


@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(method="fast", keep=0.4, objective="kl", stages=2),
        SearchSettings(method="fast", keep=0.3, roles="FRS", pool="1/4", uniform=False),
    ],
    ids=["kl", "FRS"],
)
def test_a_fast_search_streamed_writes_the_bytes_of_a_loaded_one(glm5, tmp_path, settings):
    for name, stream in (("loaded", False), ("streamed", True)):
        ic.search(opened(glm5, stream), mixed(), tmp_path / name, settings)
    same(tmp_path / "streamed", tmp_path / "loaded")
    assert not (tmp_path / "streamed" / "stream").exists()


def test_a_killed_fast_search_goes_on(glm5, tmp_path):
    last = 8
    ic.search(opened(glm5, False), texts(), tmp_path / "loaded", FAST)
    model = opened(glm5, SearchStreamSettings(checkpoint_layers=2))
    follow(stream_of(model), [], last)
    with pytest.raises(Killed):
        ic.search(model, texts(), tmp_path / "streamed", FAST)
    model, again = opened(glm5, SearchStreamSettings(checkpoint_layers=2)), []
    follow(stream_of(model), again)
    ic.search(model, texts(), tmp_path / "streamed", FAST)
    assert again[0] == (last - 1) % 5 // 2 * 2  # It goes on behind the last checkpoint.
    same(tmp_path / "streamed", tmp_path / "loaded")


def test_a_streamed_model_says_what_it_cannot(glm5, tmp_path):
    def run(**settings):
        return lambda: ic.search(opened(glm5, True), texts(), tmp_path, SearchSettings(**settings))

    refused(run(method="similarity"), "does not run on a streamed model; take exact or fast")
    refused(run(method="fast", start="gradients"), "--start gradients does not run on a streamed")


SCRIPT = """
import os, pathlib, sys, torch
torch.set_num_threads(1)
import indexcache as ic
from tests.searching.test_streamed import FAST, SETTINGS, opened, texts
model = opened(sys.argv[1], True)
ic.search(model, texts(), sys.argv[2], SETTINGS)
ic.search(model, texts(), sys.argv[2] + "-fast", FAST)
rows = ic.evaluate(model, ["FSSFS", "FRFRR@2"], texts()).to_json()["rows"]
pathlib.Path(sys.argv[2] + "-" + os.environ["RANK"]).write_text(str(rows))
"""


def test_two_processes_write_the_journal_of_one(glm5, whole, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *command, tmp_path / "run.py", glm5, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    same(tmp_path / "out", whole)
    ic.search(opened(glm5, False), texts(), tmp_path / "fast", FAST)
    same(tmp_path / "out-fast", tmp_path / "fast")
    rows = ic.evaluate(opened(glm5, False), ["FSSFS", "FRFRR@2"], texts()).to_json()["rows"]
    assert [(tmp_path / f"out-{rank}").read_text() for rank in (0, 1)] == [str(rows)] * 2


def workers(process):
    """Return the processes that a process has started."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def running(process):
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_ends_with_the_torchrun_that_started_it():
    script = "from indexcache import process as p; p.end_with_torchrun(); input(print(1))"
    shell = f"exec 3<&0; {sys.executable} -c '{script}' <&3 & wait"
    with subprocess.Popen(
        ["sh", "-c", shell], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "x"},
    ) as parent:  # fmt: skip
        assert parent.stdout.readline() == b"1\n"
        (child,) = workers(parent.pid)
        parent.kill()
        parent.wait()
        until_gone([child])


def until_gone(processes):
    for _ in range(300):
        if not any(map(running, processes)):
            return
        time.sleep(0.1)
    raise AssertionError(processes)


@pytest.mark.long
@pytest.mark.parametrize(("size", "kills"), [(1, 20), (2, 5)])
def test_kill_nine_at_random_moments(glm5, tmp_path, size, kills):
    """A search that was killed many times ends with the files of one that ran through.

    Of two processes torchrun, which started them, or either of them is killed.
    """
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 128, 3000))
    flags = f"--data {tmp_path}/text.npy --split all --length 64 --sequences 6 --keep 0.4 --out"
    search = ["-m", "indexcache", "search", str(glm5), *flags.split()]
    how = ["--stream", "--host-memory", "20KB", "--checkpoint-layers", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *search, tmp_path / "whole"], check=True, **quiet)
    rng = random.Random(0)
    out = tmp_path / "killed"
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    run = [sys.executable, *(together if size > 1 else []), *search, out, *how]
    began = time.monotonic()
    subprocess.run(run, check=True, **quiet)
    taken = time.monotonic() - began
    same(out, tmp_path / "whole")
    shutil.rmtree(out)
    killed = 0
    for _ in range(kills):
        with subprocess.Popen(run, **quiet) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.6, 1.0) * taken)
            if process.poll() is None:
                started = workers(process.pid)
                killed += 1
                os.kill(rng.choice([process.pid, *started]), signal.SIGKILL)
                process.wait()
                until_gone(started)
        if process.returncode == 0:
            shutil.rmtree(out)
    assert killed
    subprocess.run(run, check=True, **quiet)
    same(out, tmp_path / "whole")


def test_settings_that_make_no_sense_are_refused(glm5):
    for text in ("-1", "many", "", "5 XB", "1e3GB"):
        refused(lambda text=text: ic.load(glm5, stream=SearchStreamSettings(host_memory=text)))
    refused(lambda: ic.load(glm5, stream=SearchStreamSettings(checkpoint_layers=-1)), "at least")
