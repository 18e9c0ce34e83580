"""Compare searches that see recall with those that see the loss of text alone.

    python -m benchmarks.search_recall --out work/recall --length 512 --seeds 0
    python -m benchmarks.search_recall --out work/recall --model FOLDER --data TEXT \\
        --length 8192 --sequences 24 --device cuda --dtype bfloat16 --exhaustive 10

For every seed it searches among F and S down to 1/8: by the loss of text ("loss"), by text and
retrieval weighed alike ("recall"), and by the worst of their parts ("worst"). Their patterns at 1/4
and 1/8 are measured on the same held-out documents and questions. With --exhaustive N it also
measures every pattern of these budgets whose shared layers among the N that matter most to recall
are chosen in every way ("exhaustive"), on the calibration questions, and the best one held-out:
what no pattern of that kind reaches, no search can. Runs are folders, so an interrupted benchmark
goes on; several processes may do other seeds in the same --out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import indexcache as ic
from benchmarks.held_out import Text, collect, common_arguments, measured, open_model
from indexcache.cli import guarded
from indexcache.pattern import full_count
from indexcache.records import read_json, write_json
from indexcache.searching.objective import Evaluation, Objective

RESULT = Path(__file__).parent / "results" / "search_recall.json"
BUDGETS = (4, 8)
SEARCHES: dict[str, dict[str, Any]] = {
    "loss": {"objective": "mean"},
    "recall": {},
    "worst": {"objective": "worst"},
}


def found_share(evaluation: Evaluation) -> float:
    """Return the share of all answers that is found."""
    pairs = evaluation.found.values()
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def exhaustive(model: ic.Model, text: Text, many: int, kept: Path) -> dict[int, ic.Pattern]:
    """Try every choice of full layers among those that matter most to recall.

    The layers whose flip alone loses most on the questions are full or shared in every combination;
    all others are shared, so a budget has as many patterns as there are such choices.

    Returns:
        By budget, the pattern that finds most answers, of equal ones with the least loss of them.
    """
    known = read_json(kept) if kept.exists() else {}
    evaluated = {k: Evaluation.from_json(v) for k, v in known.items()}
    objective = Objective(model.module, text.asked, evaluated)
    full = ic.Pattern.full(model.layers)
    singles = {i: full.replace(i, "S") for i in range(1, model.layers)}
    losses = dict(zip(singles, objective.together(list(singles.values()), full), strict=True))
    layers = sorted(sorted(losses, key=lambda i: -losses[i])[:many])
    best = {}
    for budget in BUDGETS:
        count = full_count(model.layers, 1 / budget) - 1
        scores = {}
        for chosen in itertools.combinations(layers, min(count, len(layers))):
            roles = "".join("F" if i in (0, *chosen) else "S" for i in range(model.layers))
            found = objective.evaluate(ic.Pattern(roles))
            scores[roles] = (-found_share(found), found.loss)
        best[budget] = ic.Pattern(min(scores, key=lambda roles: scores[roles]))
        write_json(kept, {k: e.to_json() for k, e in objective.evaluated.items()})
    return best


def one_seed(o: argparse.Namespace, model: ic.Model, seed: int, folder: Path) -> None:
    """Search and measure with one seed, and write its rows."""
    text, name = Text.of(model, o, seed), folder.parent.name
    found: dict[tuple[str, int], tuple[ic.Pattern, Any]] = {}
    for method, objective in SEARCHES.items():
        batches = text.text if method == "loss" else text.text + text.asked
        settings = ic.SearchSettings(
            method=o.method, keep=1 / max(BUDGETS), uniform=False, **objective
        )
        result = ic.search(model, batches, folder / method, settings, progress=True)
        print(f"{name}, seed {seed}, {method}: {result.work}; {result.pattern}", flush=True)
        for budget in BUDGETS:
            full = full_count(model.layers, 1 / budget)
            pattern = next(p.pattern for p in result.frontier if p.full == full)
            found[method, budget] = (pattern, result.work)
    if o.exhaustive:
        best = exhaustive(model, text, o.exhaustive, folder / "exhaustive.json")
        found |= {("exhaustive", b): (p, None) for b, p in best.items()}
    facts = measured(model, [p for p, _ in found.values()], text.held_out, folder / "measured.json")
    rows = [
        {
            "model": name,
            "full": len(pattern.full_layers),
            "seed": seed,
            "method": method,
            "pattern": str(pattern),
            "evaluations": work and work.evaluations,
            "layer_tokens": work and work.layer_tokens,
            "length": o.length,
            "k": model.topk,
            **facts[str(pattern)],
        }
        for (method, _), (pattern, work) in found.items()
    ]
    write_json(folder / "rows.json", rows)


def main() -> None:
    parser = common_arguments(__doc__.split("\n")[0], RESULT)
    parser.add_argument("--method", choices=["exact", "fast"], default="fast")
    parser.add_argument("--exhaustive", type=int, default=0, metavar="LAYERS")
    o = parser.parse_args()
    model = open_model(o)
    name = model.path.name
    for seed in o.seeds:
        one_seed(o, model, seed, o.out / name / f"{seed}")
    for row in collect(o.out / name, o.result, name):
        print(
            f"seed {row['seed']}, {row['full']} full, {row['method']}: {row['delta_loss']:+.4f}, "
            f"recall {row['recall']:.3f} of {row['recall_full']:.3f}, {row['pattern']}"
        )


if __name__ == "__main__":
    sys.exit(guarded(main))
