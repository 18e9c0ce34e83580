"""Compare the fast search with the exact one: work, time, and held-out loss of what they find.

    python -m benchmarks.search_cost --out work/search-cost
    python -m benchmarks.search_cost --out work/search-cost --model FOLDER --data TEXT \\
        --length 8192 --sequences 16 --device cuda --dtype bfloat16

Every search is a run in a folder under --out, so an interrupted comparison goes on. Both see the
same calibration text; their patterns of every budget are compared on the same held-out documents,
in pairs, without those that share long passages with the calibration text. The result file gets
each search ("searches") and each budget ("rows") when it is finished, and keeps those of other
models, seeds and methods. With --reuse exact the exact searches of an earlier run serve again
where they had the same weights and the same text.

Under "starts" the file has, for every seed, the rank correlation of what the flip of each layer
alone loses on the whole text with three guesses: the estimate by gradients on the first part of
the text, the flip measured on the smallest part, and what the selections of neighbours have in
common. The first part is two sequences where they are long, and else the smallest part.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import indexcache as ic
from indexcache.cli import guarded
from indexcache.data import Batch
from indexcache.data.batch import digest_of
from indexcache.data.leaks import near_copies, seen_in
from indexcache.evals.evaluate import Measurement
from indexcache.models.identity import weights_digest
from indexcache.pattern import full_count
from indexcache.records import read_json, write_json, write_text
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
DIGEST = 16  # Digests in the result file have this many hex digits.
DIGITS = 7  # Losses in the result file have this many.


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


@dataclass(frozen=True)
class Found:
    """Hold what a search found: its work and seconds, and its pattern by number of full layers."""

    evaluations: int
    layer_tokens: int
    seconds: float
    patterns: dict[str, str]


def timed_search(model: Any, batches: list[Batch], folder: Path, method: str) -> Found:
    """Run a search, or read how long it took when it ran; a resumed one counts what it ran."""
    settings = ic.SearchSettings(keep=1 / max(BUDGETS), uniform=False, **METHODS[method])
    if (folder / "result.json").exists():
        result = ic.search(model, batches, folder, settings)
        seconds = read_json(folder / "seconds.json")["seconds"]
    else:
        with timed(folder) as clock:
            result = ic.search(model, batches, folder, settings, progress=True)
        seconds = clock["seconds"]
    wanted = {full_count(model.layers, 1 / budget) for budget in BUDGETS}
    patterns = {str(p.full): str(p.pattern) for p in result.frontier if p.full in wanted}
    work = result.work
    return Found(work.evaluations, work.layer_tokens, round(seconds, 1), patterns)


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


def flip_losses(model: Any, folder: Path) -> list[float]:
    """Read what the flip of each layer but the first loses on all text, from the exact search."""
    exact = {e["pattern"]: e["loss"] for e in read_lines(folder / "exact" / "journal.jsonl")}
    full = ic.Pattern("F" * model.layers)
    flips = [full.replace(i, "S") for i in range(1, model.layers)]
    return [round(exact[str(p)] - exact[str(full)], DIGITS) for p in flips]


def starts(model: Any, batches: list[Batch], folder: Path, true: list[float]) -> dict[str, float]:
    """Compare guesses of what the flip of each layer loses with the truth, by rank correlation."""
    journal = [e for m in ("fast", "fast-start") for e in read_lines(folder / m / "journal.jsonl")]
    samples = ModelSamples(model.module, batches, "weighted", journal, lambda entry: None)
    layers, small = range(1, model.layers), samples.parts()[0]
    flips = [samples.full.replace(i, "S") for i in layers]
    samples.measure([samples.full, *flips], small)  # Those that the searches left out.
    pairs = samples.pairs(small)
    overlap = selection_overlap(model.module, batches)
    guesses = {
        "gradients": [pairs[i - 1, i] for i in layers],
        "smallest_part": [samples.difference([p], [samples.full], small).value for p in flips],
        "similarity": [-overlap[i - 1, i] for i in layers],
    }
    return {
        name: round(float(spearmanr(guess, true).statistic), 4) for name, guess in guesses.items()
    }


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
    parser.add_argument(
        "--reuse",
        nargs="+",
        choices=METHODS,
        default=[],
        help="Take what these searches found from the result file, where it has them.",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--result", type=Path, default=RESULT)
    o = parser.parse_args()
    model = ic.load(o.model, dtype=o.dtype, device=o.device)
    ic.accelerate(model.module)
    name = Path(o.model).name
    for seed in range(o.first_seed, o.first_seed + o.seeds):
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
        own = {"model": name, "seed": seed, "device": o.device} | {
            key: getattr(o, key) for key in ("length", "sequences")
        }
        folder = o.out / name / f"{seed}"
        same = {
            "data": digest_of(batches)[:DIGEST],
            "weights": weights_digest(model.module)[:DIGEST],
        }
        known = known_searches(o.result, own | same)
        found: dict[str, Found] = {}
        for method in (m for m in METHODS if m not in ABLATED or seed < o.ablations):
            if method in o.reuse and method in known:
                found[method] = Found(**{k: known[method][k] for k in Found.__annotations__})
                continue
            found[method] = timed_search(model, batches, folder / method, method)
            search = own | same | {"method": method} | asdict(found[method])
            if method == "exact":
                search["flips"] = flip_losses(model, folder)
            known[method] = search
            write_rows(o.result, "searches", [search])
        for budget in BUDGETS:
            full = full_count(model.layers, 1 / budget)
            patterns = {m: ic.Pattern(search.patterns[str(full)]) for m, search in found.items()}
            measured = compared(model, patterns, heldout)
            rows = [
                own
                | {"full": full, "method": m}
                | {k: v for k, v in asdict(search).items() if k != "patterns"}
                | {
                    "held_out_loss": rounded(measured[m].loss),
                    "ci_low": rounded(measured[m].ci_low),
                    "ci_high": rounded(measured[m].ci_high),
                    "above_exact": rounded(measured[m].delta_loss),
                    "pattern": str(patterns[m]),
                    "layers": model.layers,
                    "documents": measured[m].documents,
                }
                for m, search in found.items()
            ]
            print(*map(json.dumps, rows), sep="\n", flush=True)
            write_rows(o.result, "rows", rows)
        journals = all((folder / m / "journal.jsonl").exists() for m in ("fast", "fast-start"))
        if journals and "flips" in known["exact"]:
            start = starts(model, batches, folder, known["exact"]["flips"])
            print(json.dumps(start), flush=True)
            write_rows(o.result, "starts", [{"model": name, "seed": seed} | start])


def known_searches(path: Path, same: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the searches of the result file that agree in all of `same`, by method."""
    return {s["method"]: s for s in read_rows(path, "searches") if same.items() <= s.items()}


def rounded(x: float | None) -> float | None:
    """Leave out digits that say nothing; too few documents have no interval."""
    return None if x is None else round(x, DIGITS)


def read_rows(path: Path, part: str) -> list[dict[str, Any]]:
    """Read a part of the result file; without a file it has none."""
    return read_json(path).get(part, []) if path.exists() else []


def write_rows(path: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Write rows over those of a part of the result file that are of the same search."""

    def identity(row: dict[str, Any]) -> tuple:
        return tuple(row.get(key) for key in ("model", "seed", "method", "full"))

    content = read_json(path) if path.exists() else {}
    new = {identity(r) for r in rows}
    kept = [r for r in content.get(part, []) if identity(r) not in new]
    content[part] = sorted(kept + rows, key=place)
    parts = (
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, own)) + "\n]"
        for name, own in content.items()
    )
    write_text(path, "{" + ", ".join(parts) + "}\n")  # a line for each row


def place(row: dict[str, Any]) -> tuple:
    """Return the place of a row: models and seeds, budgets falling, methods as listed."""
    method = list(METHODS).index(row["method"]) if "method" in row else 0
    return row["model"], row["seed"], -row.get("full", 0), method


if __name__ == "__main__":
    sys.exit(guarded(main))
