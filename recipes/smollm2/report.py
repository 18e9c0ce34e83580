"""Tables of an experiment's result.json, in Markdown.

python recipes/smollm2/report.py [benchmarks/results/smollm2_training_aware.json] [--into docs/smollm2.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from indexcache.cli import guarded

RESULT = (
    Path(__file__).resolve().parent.parent.parent
    / "benchmarks"
    / "results"
    / "smollm2_training_aware.json"
)
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
KEPT = (2, 4, 8)
GRID = ("untouched", "own", "multi", "searched", "searched+R4", "searched+R8", "oracle")
MASS = (("full", 1), ("own", 4), ("multi", 4))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row: dict[str, Any] | None) -> str:
    return (
        ""
        if row is None
        else f"{row['delta_loss']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    )


def share(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['share']:.1%} [{row['ci_low']:.1%}, {row['ci_high']:.1%}]"


def report(result: dict[str, Any]) -> str:
    """All tables, each under a line that says what it shows."""
    rows = {(r["method"], r["kept"], r["domain"]): r for r in result["rows"]}
    ways = [w for w in GRID if any((w, k, "all") in rows for k in KEPT)]
    domains = sorted({r["domain"] for r in result["rows"]} - {"all"})
    full, dense = rows["full", 1, "all"], rows["dense", 1, "all"]
    fractions = [f"1/{k}" for k in KEPT]
    seeds = f"{full['seeds']} seed" + "s" * (full["seeds"] > 1)
    above = 100 * (full["loss"] / dense["loss"] - 1)
    parts = [
        f"{result['device']}, {result['date']}, {seeds}. Loss with dense attention {dense['loss']:.4f}, with all indexers "
        f"{full['loss']:.4f} ({above:+.2f} %), with an oracle in each layer {rows['oracle', 1, 'all']['loss']:.4f}.",
        f"Loss above that of all indexers, {len(domains)} domains together:",
        table(
            ["", *fractions], ([w, *(cell(rows.get((w, k, "all"))) for k in KEPT)] for w in ways)
        ),
    ]
    of_pairs = {(p["method"], p["against"], p["kept"], p["domain"]): p for p in result["pairs"]}
    names = list(dict.fromkeys((a, b, p["seeds"]) for (a, b, *_), p in of_pairs.items()))
    every = (
        [f"{a} - {b}", str(n), *(cell(of_pairs.get((a, b, k, "all"))) for k in (1, *KEPT))]
        for a, b, n in names
    )
    parts += [
        "One way less another, document by document:",
        table(["", "seeds", "all", *fractions], every),
    ]
    two = ("searched", "multi")
    cells = ([f"1/{k}", *(cell(of_pairs.get((*two, k, d))) for d in domains)] for k in KEPT)
    parts += [f"{two[0]} - {two[1]} by domain:", table(["", *domains], cells)]
    of_closed = {(c["method"], c["kept"]): c for c in result["closed"]}
    names = list(dict.fromkeys(m for m, _ in of_closed))
    parts += [
        "Share of what untouched indexers lose (those of the same pattern) that training closes:",
        table(
            ["", "seeds", *fractions],
            (
                [m, str(of_closed[m, 4]["seeds"]), *(share(of_closed.get((m, k))) for k in KEPT)]
                for m in names
            ),
        ),
    ]
    for k in KEPT:
        parts += [
            f"At 1/{k}, by domain:",
            table(
                ["", *domains], ([w, *(cell(rows.get((w, k, d))) for d in domains)] for w in ways)
            ),
        ]
    shown = {(w, k) for w in GRID for k in KEPT} | {("full", 1), ("dense", 1), ("oracle", 1)}
    others = sorted((k, m) for m, k, d in rows if d == "all" and (m, k) not in shown)
    if others:
        found = [(m, k, rows[m, k, "all"]) for k, m in others]
        parts += [
            "Other ways:",
            table(
                ["", "kept", "seeds", "above all indexers", "answers found"],
                (
                    [m, f"1/{k}", str(r["seeds"]), cell(r), f"{r['retrieval']:.3f}"]
                    for m, k, r in found
                ),
            ),
        ]
    if result["groups"]:
        groups = {(g["method"], *g["layers"]): g for g in result["groups"]}
        layers = list(dict.fromkeys(tuple(g["layers"]) for g in result["groups"]))
        cells = (
            [f"{g[0]} to {g[-1]}", *(cell(groups.get((w, *g))) for w in ("own", "multi"))]
            for g in layers
        )
        parts += [
            f"Loss above all indexers where one group of uniform 1/4 alone shares, {result['groups'][0]['seeds']} seed(s):",
            table(["layers", "own", "multi"], cells),
        ]
    each = {
        w: [rows.get((w, k, "all"), {}).get("of_seeds", {}) for k in KEPT]
        for w in ways
        if w != "oracle"
    }
    seed_by_seed = (
        [w, *(", ".join(f"{n}: {x:+.4f}" for n, x in found.items()) for found in of_seeds)]
        for w, of_seeds in each.items()
    )
    answers = {
        w: [rows.get((w, k, "all"), {}).get("retrieval_of_seeds", {}) for k in KEPT] for w in each
    }
    parts += [
        "Seed by seed, loss above all indexers:",
        table(["", *fractions], seed_by_seed),
        "Seed by seed, answers found:",
        table(
            ["", *fractions],
            (
                [w, *(", ".join(f"{n}: {x:.3f}" for n, x in a.items()) for a in found)]
                for w, found in answers.items()
            ),
        ),
    ]
    tasks = {(t["method"], t["kept"], t["task"], t["length"]): t for t in result["tasks"]}
    kinds = sorted({key[2:] for key in tasks})
    grid = [
        ("dense", 1),
        ("oracle", 1),
        ("full", 1),
        *((w, k) for k in KEPT for w in ways if (w, k, *kinds[0]) in tasks),
    ]
    parts += [
        "Answers found:",
        table(
            ["", "kept", "seeds", *(f"{task} {length}" for task, length in kinds)],
            (
                [
                    w,
                    f"1/{k}",
                    str(tasks[w, k, *kinds[0]]["seeds"]),
                    *(f"{tasks[w, k, *kind]['accuracy']:.2f}" for kind in kinds),
                ]
                for w, k in grid
            ),
        ),
    ]
    found = result["mass_kept"]["of"]
    kept = {(w, k): found[f"{w} 1/{k}"] for w, k in MASS if f"{w} 1/{k}" in found}
    layers = range(len(next(iter(kept.values()))))
    costs = result["sharing_costs"]
    mass = [
        [
            str(i),
            *(f"{m[i]:.3f}" for m in kept.values()),
            *(f"{c[i]:+.4f}" if i else "" for c in costs.values()),
        ]
        for i in layers
    ]
    mass.append(["mean", *(f"{sum(m) / len(m):.3f}" for m in kept.values()), *("" for _ in costs)])
    parts += [
        f"Share of each layer's attention on its selection, seed {result['mass_kept']['seed']}; and the loss where that layer alone reads "
        "the selection of the one before it, on each seed's calibration text, as the search's first step found it:",
        table(
            ["layer", *(f"{w}, 1/{k}" for w, k in kept), *(f"alone, seed {s}" for s in costs)], mass
        ),
    ]
    return "\n\n".join(parts)


def insert(tables: str, page: str) -> str:
    """The page with the tables between its two marks. Raises ValueError where it has not just these."""
    parts = [page.split(mark) for mark in MARKS]
    if any(len(p) != 2 for p in parts) or len(parts[1][0]) < len(parts[0][0]):
        raise ValueError(
            f"The page needs the lines {' and '.join(MARKS)}, once each and in this order."
        )
    return f"{parts[0][0]}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{parts[1][1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULT)
    parser.add_argument(
        "--into",
        type=Path,
        help="write them into this page, between the lines " + " and ".join(MARKS),
    )
    o = parser.parse_args()
    if not o.result.is_file():
        raise ValueError(
            f"{o.result}: no such file; experiment.py writes result.json into its --out."
        )
    tables = report(json.loads(o.result.read_text(encoding="utf-8")))
    if o.into is None:
        print(tables)
    else:
        o.into.write_text(insert(tables, o.into.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(main))
