"""Compare a search inside vLLM with this package's own, on the model of recipes/vllm.

    python -m benchmarks.vllm_search --model work/vllm/model --data work/vllm/calibration.jsonl
        --runs work/runs

It searches with stock transformers in bf16 (`own`), on the fast path (`fast`), inside vLLM (`vllm`)
and with vLLM's older class (`older`), then once more inside vLLM, killed twice on the way
(`killed`), and compares the run folders in --runs. Finished folders are not searched again, so
`--runs` alone compares them. With `--two-gpus` it searches inside vLLM with tensor parallel 2
(`tp2`) and pipeline parallel 2 (`pp2`, whose second stage begins with a full layer, so it stops at
two) as well. Writes benchmarks/results/vllm_search.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.pattern import Pattern

ROOT = Path(__file__).parents[1]
TEXT = "--split all --length 4096 --sequences 48 --no-uniform"
ENGINE = (
    "--engine vllm --engine-arg dtype=bfloat16 --engine-arg kv_cache_memory_bytes=2000000000 "
    "--engine-arg gpu_memory_utilization=0.4"
)
OLDER = '{"GlmMoeDsaForCausalLM":"vllm.model_executor.models.deepseek_v2:GlmMoeDsaForCausalLM"}'
TWO = "--engine-arg disable_custom_all_reduce=true"
RUNS = {
    "own": "--dtype bfloat16 --device cuda --no-fast",
    "fast": "--dtype bfloat16 --device cuda",
    "vllm": ENGINE,
    "older": f"{ENGINE} --engine-arg model_class_overrides={OLDER}",
    "killed": ENGINE,
    "tp2": f"{ENGINE} {TWO} --tensor-parallel-size 2",
    "pp2": f"{ENGINE} {TWO} --pipeline-parallel-size 2",
}
KILLED_AT = (5, 14)  # lines of the journal


def search(o: argparse.Namespace, name: str, kill_at: int | None = None) -> None:
    """Run one search, or kill it with signal 9 once its journal has so many lines."""
    out = o.runs / name
    command = [sys.executable, "-m", "indexcache", "search", o.model, "--out", out]
    command += ["--data", o.data, "--keep", "1/4" if name == "pp2" else "1/8"]
    command += [*TEXT.split(), *RUNS[name].split()]
    with open(o.runs / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, start_new_session=True
        )
    while process.poll() is None:
        if kill_at is not None and len(journal(out)) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name}: the search failed; see {o.runs / name}.log.")


def journal(folder: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a journal."""
    path = folder / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def frontier(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "result.json").read_text())["frontier"]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the gap between the best flip of each step and the next best one, in nats."""
    losses = {e["pattern"]: e["loss"] for e in journal(folder) if "pattern" in e}
    found, points = [], [point["pattern"] for point in frontier(folder)]
    for before, after in pairwise(points):
        flips = [
            str(Pattern("".join("S" if j == i else r for j, r in enumerate(before))))
            for i in range(1, len(before))
            if before[i] == "F"
        ]
        order = sorted((losses[p], p) for p in flips if p in losses)
        assert order[0][1] == after or order[0][0] == losses[after]
        gap = order[1][0] - order[0][0] if len(order) > 1 else None
        found.append({"pattern": after, "gap": gap})
    return found


def compare(runs: Path) -> dict[str, Any]:
    """Compare the run folders; stop if a killed run computed an evaluation twice."""
    names = [name for name in RUNS if (runs / name / "result.json").exists()]
    entries = {name: journal(runs / name) for name in names}
    patterns = [e["pattern"] for e in entries["killed"] if "pattern" in e]
    assert len(patterns) == len(set(patterns)), "An evaluation was computed again after a kill."
    losses = {
        name: {e["pattern"]: e["loss"] for e in lines if "pattern" in e}
        for name, lines in entries.items()
    }
    settings = json.loads((runs / "vllm" / "settings.json").read_text())
    noise = next(e["noise"] for e in entries["vllm"] if "noise" in e)
    points = {name: frontier(runs / name) for name in names}
    engine, own = points["vllm"], points["own"]
    result: dict[str, Any] = {
        "vllm": engine_fact(settings, "vllm"),
        "device": engine_fact(settings, "device"),
        "model": "recipes/vllm",
        "noise": noise,
        "rows": [
            {
                "full": a["pattern"].count("F"),
                "pattern_engine": a["pattern"],
                "pattern_own": b["pattern"],
                "loss_engine": a["loss"],
                "loss_own": b["loss"],
            }
            for a, b in zip(engine, own, strict=True)
        ],
        "steps_engine": steps(runs / "vllm"),
        "steps_own": steps(runs / "own"),
        "same_patterns": {
            name: [x["pattern"] for x in points[name]] == [x["pattern"] for x in engine]
            for name in names
            if name != "pp2"
        },
        "evaluations": len(losses["vllm"]),
    }
    common = sorted(set(losses["own"]) & set(losses["vllm"]) & set(losses["fast"]))
    pairs = [("vllm", "own"), ("fast", "own")]
    pairs += [(name, "vllm") for name in ("older", "killed", "tp2", "pp2")]
    for name, reference in [pair for pair in pairs if pair[0] in names]:
        both = [p for p in common if p in losses[name]]
        difference = np.array([losses[name][p] - losses[reference][p] for p in both])
        result[f"{name}_minus_{reference}"] = {
            "patterns": len(both),
            "mean": float(difference.mean()),
            "largest": float(np.abs(difference).max()),
        }
    if "pp2" in points:
        result["pp2"] = [{"full": x["pattern"].count("F"), **x} for x in points["pp2"]]
    return result


def engine_fact(settings: dict[str, Any], name: str) -> Any:
    """Find a fact of the engine wherever the settings keep it."""
    queue: list[Any] = [settings]
    while queue:
        item = queue.pop(0)
        if isinstance(item, dict):
            if isinstance(item.get(name), str):
                return item[name]
            queue += item.values()
    raise KeyError(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--model", type=Path, help="checkpoint of recipes/vllm")
    parser.add_argument("--data", type=Path, help="its calibration.jsonl")
    parser.add_argument("--two-gpus", action="store_true", help="search on two GPUs as well")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/vllm_search.json")
    o = parser.parse_args()
    if o.model:
        o.runs.mkdir(parents=True, exist_ok=True)
        for name in RUNS if o.two_gpus else [n for n in RUNS if n[1:] != "p2"]:
            if not (o.runs / name / "result.json").exists():
                for lines in KILLED_AT if name == "killed" else ():
                    search(o, name, lines)
                search(o, name)
    result = compare(o.runs)
    for row in result["rows"]:
        same = "same" if row["pattern_engine"] == row["pattern_own"] else row["pattern_own"]
        losses = f"{row['loss_engine']:.5f} {row['loss_own']:.5f}"
        print(f"{row['full']} full  {row['pattern_engine']}  {losses}  {same}")
    o.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
