"""Find the frontier of cost against loss and recall among F, R and S, beside F and S alone.

    python -m benchmarks.frs_frontier --out work/frs --length 512 --seeds 0
    python -m benchmarks.frs_frontier --out work/frs-k64 --model FOLDER --topk 64 --data TEXT \\
        --length 8192 --sequences 16 --task-sequences 6 --device cuda --dtype bfloat16 --seeds 0

For every seed it searches among F and S, and among F, R and S with the costs of a GPU at every
context; text and retrieval are in the objective of both. Patterns of these
frontiers, and the F layers of the first with R elsewhere, are measured on held-out documents and
questions. Every search is a run folder and measured patterns are kept, so an interrupted benchmark
goes on; several processes may do other seeds in the same --out.

The costs are those of this package's kernels on an H100: a fit to `bench` rows of F layers at 10K
to 200K tokens (glm-4.7-flash-dsa_h100.json), and to pools and R layers at 200K (ops_h100.json),
whose scores are taken as proportional to the pool. Other contexts are extrapolated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import indexcache as ic
from benchmarks.held_out import Text, collect, common_arguments, measured, open_model
from indexcache.cli import guarded
from indexcache.pattern import full_count
from indexcache.records import read_json, write_json
from indexcache.searching.costs import RoleCosts, fitted
from indexcache.searching.run import SearchResult

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "frs_frontier.json"
LEAST_KEEP = 1 / 8  # The search among F and S stops there.
ELSEWHERE = tuple(Fraction(1, n) for n in (32, 16, 8, 4))
COSTS = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Costs at which a frontier among F, R and S is measured."""
LOSS, RECALL = 0.001, 0.02  # A pattern is as good as all full within this share, and these points.
MEASURED_POOL = Fraction(16384, 200_000)


def write_costs(path: Path) -> Path:
    """Write the figures of the kernels in the form of a bench.json, for `--costs`."""
    bench = read_json(RESULTS / "glm-4.7-flash-dsa_h100.json")
    rows = [r for r in bench["rows"] if r["batch"] == 1 and set(r["pattern"]) == {"F"}]
    rows = [{k: r[k] for k in ("pattern", "context", "parts_ms")} for r in rows]
    longest = max(rows, key=lambda r: r["context"])
    parts = {p: longest["parts_ms"][p] / len(longest["pattern"]) for p in longest["parts_ms"]}
    own = parts["indexer"] + parts["plan"]  # what an R layer does too, whatever its pool
    full = own + parts["index_topk"]
    ops = {r["op"]: r["ms"] for r in read_json(RESULTS / "ops_h100.json")["rows"] if _at_200k(r)}
    publish = ops["index_topk F with pool"] - ops["index_topk prefill"] + ops["group_queries"]
    scores = ops["index_topk pool 16384, 4 neighbours together"]
    for pool, again in ((MEASURED_POOL, 1), (MEASURED_POOL, 3), (MEASURED_POOL / 8, 3)):
        part = float(pool / MEASURED_POOL)
        ms = full + publish * part + again * (own + scores * part)
        pattern = f"F{'R' * again}@{pool}"
        rows.append({"pattern": pattern, "context": 200_000, "parts_ms": {"index_topk": ms}})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"device": bench["device"], "rows": rows})
    return path


def _at_200k(row: dict[str, Any]) -> bool:
    """Return whether a row of ops_h100.json is of a prefill of 200,000 tokens with 32 heads."""
    return row["shape"].startswith("200000 causal") and "H=64" not in row["shape"]


def costs_at(file: Path, context: int, sizes: Sequence[int | Fraction], topk: int) -> RoleCosts:
    """Return the costs at a context with pools of these sizes."""
    first, *others = dict.fromkeys(sizes)
    found = {size: fitted(file, context, size, topk) for size in others}
    return fitted(file, context, first, topk).beside(found)


def near_costs(result: SearchResult, costs: RoleCosts) -> list[ic.Pattern]:
    """Return, for every one of COSTS, the dearest pattern of a frontier that costs no more."""
    patterns = [p.pattern for p in result.frontier]
    chosen = [[p for p in patterns if costs.of(p) <= most] for most in COSTS]
    return [max(some, key=costs.of) for some in chosen if some]


def one_seed(o: argparse.Namespace, model: ic.Model, seed: int, folder: Path) -> None:
    """Search and measure with one seed, and write its rows."""
    text, name = Text.of(model, o, seed), folder.parent.name
    both, k = text.text + text.asked, model.topk
    costs_file = write_costs(folder / "costs.json")

    def search(run: str, **settings: Any) -> SearchResult:
        asked = ic.SearchSettings(method="fast", uniform=False, **settings)
        result = ic.search(model, both, folder / run, asked, progress=True)
        print(f"{name}, seed {seed}, {run}: {result.work}; {result.pattern}", flush=True)
        return result

    shared = search("fs", keep=LEAST_KEEP)
    fulls = sorted({full_count(model.layers, keep) for keep in COSTS if keep >= LEAST_KEEP})
    by_full = {p.full: p.pattern for p in shared.frontier}
    groups: dict[str, list[ic.Pattern]] = {"FS": [by_full[n] for n in fulls]}
    # A pool of k or less leaves R nothing to choose from.
    pools = [p for p in ELSEWHERE if p * o.length > k]
    some = {by_full[full_count(model.layers, keep)] for keep in (1 / 4, 1 / 8)}
    groups["greedy's F, R elsewhere"] = [
        p.with_rest("R", pool) for p in sorted(some, key=str) for pool in pools
    ]
    contexts: dict[int, dict[str, list[ic.Pattern]]] = {}
    for context in o.contexts:
        found = contexts[context] = {"FRS": []}
        for pool in o.pools:
            result = search(
                f"frs-{context}-{pool.replace('/', 'of').replace(',', '-')}",
                roles="FRS",
                pool=pool,
                costs=str(costs_file),
                cost_context=context,
                keep=COSTS[-1],
            )
            sizes = ic.SearchSettings(pool=pool).pool_sizes()
            found["FRS"] += near_costs(result, costs_at(costs_file, context, sizes, k))
    every = [p for found in (groups, *contexts.values()) for ps in found.values() for p in ps]
    facts = measured(model, every, text.held_out, folder / "measured.json")
    rows = []
    for context, own in contexts.items():
        for roles, patterns in (groups | own).items():
            for pattern in {str(p): p for p in patterns}.values():
                sizes = list(pattern.pools().values()) or [MEASURED_POOL]
                costs = costs_at(costs_file, context, sizes, k)
                rows.append(
                    {
                        "model": name,
                        "context": context,
                        "pattern": str(pattern),
                        "roles": roles,
                        "cost_share": costs.of(pattern),
                        "seed": seed,
                        "full": len(pattern.full_layers),
                        "length": o.length,
                        "k": k,
                        **facts[str(pattern)],
                    }
                )
    write_json(folder / "rows.json", rows)


def cheapest(rows: list[dict[str, Any]]) -> list[str]:
    """Name, for every context and seed, the cheapest pattern that is as good as all full."""
    lines = []
    for context, seed in sorted({(r["context"], r["seed"]) for r in rows}):
        own = [r for r in rows if (r["context"], r["seed"]) == (context, seed)]
        good = [
            r
            for r in own
            if r["delta_loss"] <= LOSS * (r["loss"] - r["delta_loss"])
            and r["recall"] >= r["recall_full"] - RECALL
        ]
        best = min(good, key=lambda r: r["cost_share"], default=None)
        what = "none" if best is None else f"{best['cost_share']:.3f} {best['pattern']}"
        lines.append(f"context {context}, seed {seed}, cheapest as good as all full: {what}")
    return lines


def main() -> None:
    parser = common_arguments(__doc__.split("\n")[0], RESULT)
    parser.add_argument("--contexts", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument(
        "--pools",
        nargs="+",
        default=["1/8,1/16,1/32"],
        help="Sizes of pools, one search for each; 1/8,1/16 lets every group have its own.",
    )
    o = parser.parse_args()
    model = open_model(o)
    name = model.path.name
    for seed in o.seeds:
        one_seed(o, model, seed, o.out / name / f"{seed}")
    rows = collect(o.out / name, o.result, name)
    print("\n".join(cheapest(rows)))


if __name__ == "__main__":
    sys.exit(guarded(main))
