"""Compare the fast search with the exact one: work, time, and held-out loss of what they find.

    python -m benchmarks.search_cost --out work/search-cost
    python -m benchmarks.search_cost --out work/search-cost --model FOLDER --data TEXT \\
        --length 8192 --sequences 16 --device cuda --dtype bfloat16

Every search is a run in a folder under --out, so an interrupted comparison goes on. Both see the
same calibration text; their patterns of every budget are compared on the same held-out documents,
in pairs, without those that share long passages with the calibration text. The rows of other
models and seeds in the result file stay.

Under "starts" the file has, for every seed, the rank correlation of what the flip of each layer
alone loses on the whole text with three guesses: the estimate by gradients on the smallest part of
the text, the flip measured on that part, and what the selections of neighbours have in common.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import indexcache as ic
from indexcache.cli import guarded
from indexcache.data import Batch
from indexcache.data.leaks import near_copies, seen_in
from indexcache.evals.evaluate import Measurement
from indexcache.pattern import full_count
from indexcache.records import read_json, write_json
from indexcache.searching.run import SearchResult
from indexcache.searching.samples import ModelSamples
from indexcache.searching.similarity import selection_overlap

RESULT = Path(__file__).parent / "results" / "search_cost.json"
BUDGETS = (2, 4, 8)
METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"method": "fast"},
    "fast-start": {"method": "fast", "start": "gradients"},
    "similarity": {"method": "similarity"},
    "fast-no-racing": {"method": "fast", "racing": False},
    "fast-no-lazy": {"method": "fast", "lazy": False},
    "fast-no-together": {"method": "fast", "together": False},
    "fast-no-swaps": {"method": "fast", "swaps": False},
}
ABLATED = tuple(METHODS)[4:]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a journal."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def timed(folder: Path) -> Iterator[dict[str, float]]:
    """Add the seconds of a block to those in a folder, every few seconds, so a kill loses few."""
    clock = folder / "seconds.json"
    found = read_json(clock) if clock.exists() else {"seconds": 0.0}
    before, began = found["seconds"], time.perf_counter()
    ended = threading.Event()

    def keep() -> None:
        found["seconds"] = before + time.perf_counter() - began
        write_json(clock, found)

    def beat() -> None:
        while not ended.wait(5):
            keep()

    folder.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        keep()


def timed_search(
    model: Any, batches: list[Batch], folder: Path, method: str
) -> tuple[SearchResult, float]:
    """Run a search, or read how long it took when it ran; a resumed one counts what it ran."""
    settings = ic.SearchSettings(keep=1 / max(BUDGETS), uniform=False, **METHODS[method])
    if (folder / "result.json").exists():
        result = ic.search(model, batches, folder, settings)
        return result, read_json(folder / "seconds.json")["seconds"]
    with timed(folder) as clock:
        result = ic.search(model, batches, folder, settings, progress=True)
    return result, clock["seconds"]


def compared(
    model: Any, patterns: dict[str, ic.Pattern], heldout: list[Batch]
) -> dict[str, Measurement]:
    """Measure patterns on held-out text in pairs with that of the exact search."""
    others = {n: p for n, p in patterns.items() if p != patterns["exact"]}
    base = patterns["exact"]
    # The baseline beside itself has its loss, and a difference of nothing.
    evidence = ic.evaluate(model, {"exact": base, **others}, heldout, against=base)
    found = {row.name: row for row in evidence.overall}
    return {name: found.get(name, found["exact"]) for name in patterns}


def starts(model: Any, batches: list[Batch], folder: Path) -> dict[str, float]:
    """Compare guesses of what the flip of each layer loses with the truth, by rank correlation."""
    journal = [e for m in ("fast", "fast-start") for e in read_lines(folder / m / "journal.jsonl")]
    samples = ModelSamples(model.module, batches, "weighted", journal, lambda entry: None)
    layers, small = range(1, model.layers), samples.parts()[0]
    exact = {e["pattern"]: e["loss"] for e in read_lines(folder / "exact" / "journal.jsonl")}
    flips = [samples.full.replace(i, "S") for i in layers]
    true = [exact[str(p)] - exact[str(samples.full)] for p in flips]
    samples.measure([samples.full, *flips], small)  # Those that the searches left out.
    pairs = samples.pairs(small)
    overlap = selection_overlap(model.module, batches)
    guesses = {
        "gradients": [pairs[i - 1, i] for i in layers],
        "smallest_part": [samples.difference([p], [samples.full], small).value for p in flips],
        "similarity": [-overlap[i - 1, i] for i in layers],
    }
    return {name: float(spearmanr(guess, true).statistic) for name, guess in guesses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="Calibration and held-out text; the default is tiny's.")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=36)
    parser.add_argument("--documents", type=int, default=54, help="Held-out sequences.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--ablations", type=int, default=1, help="Seeds below this, one saving off."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--result", type=Path, default=RESULT)
    o = parser.parse_args()
    model = ic.load(o.model, dtype=o.dtype, device=o.device)
    ic.accelerate(model.module)
    name = Path(o.model).name
    for seed in range(o.first_seed, o.first_seed + o.seeds):
        rows: list[dict[str, Any]] = []
        settings = {"length": o.length, "seed": seed}
        shipped = o.data is None
        batches = model.batches(
            "calibration" if shipped else o.data,
            split=None if shipped else "calibration",
            sequences=o.sequences,
            **settings,
        )
        heldout = model.batches(
            "heldout" if shipped else o.data,
            split=None if shipped else "heldout",
            sequences=o.documents,
            **settings,
        )
        seen = seen_in(batches)  # A licence header can be a fifth of a short sequence.
        heldout = [b for b in heldout if not near_copies([b], seen)]
        methods = [m for m in METHODS if m not in ABLATED or seed < o.ablations]
        found = {m: timed_search(model, batches, o.out / name / f"{seed}" / m, m) for m in methods}
        for budget in BUDGETS:
            full = full_count(model.layers, 1 / budget)
            patterns = {
                m: next(p.pattern for p in result.frontier if p.full == full)
                for m, (result, _) in found.items()
            }
            measured = compared(model, patterns, heldout)
            for m, (result, seconds) in found.items():
                one, work = measured[m], result.work
                rows.append(
                    {
                        "model": name,
                        "full": full,
                        "seed": seed,
                        "method": m,
                        "evaluations": work.evaluations,
                        "layer_tokens": work.layer_tokens,
                        "seconds": round(seconds, 1),
                        "held_out_loss": one.loss,
                        "ci_low": one.ci_low,
                        "ci_high": one.ci_high,
                        "above_exact": one.delta_loss,
                        "pattern": str(patterns[m]),
                        "layers": model.layers,
                        "documents": one.documents,
                        "device": o.device,
                        "length": o.length,
                        "sequences": o.sequences,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
        start = {"model": name, "seed": seed} | starts(model, batches, o.out / name / f"{seed}")
        print(json.dumps(start), flush=True)
        write_result(o.result, rows, start)


def write_result(path: Path, rows: list[dict[str, Any]], start: dict[str, Any]) -> None:
    """Write the rows of one seed of a model over those that the file has of it."""
    before = read_json(path) if path.exists() else {}

    def merged(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        own = (start["model"], start["seed"])
        kept = [r for r in kept if (r["model"], r["seed"]) != own]
        return sorted(kept + new, key=lambda r: (r["model"], r["seed"]))

    found = {"rows": merged(before.get("rows", []), rows)}
    write_json(path, found | {"starts": merged(before.get("starts", []), [start])})


if __name__ == "__main__":
    sys.exit(guarded(main))
