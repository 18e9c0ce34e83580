"""Write the tables of an experiment's result.json in Markdown.

python -m recipes.smollm2.report [benchmarks/results/smollm2_training_aware.json]
    [--into docs/smollm2.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from docs.tables import RESULTS, markdown
from indexcache.cli import guarded

RESULT = RESULTS / "smollm2_training_aware.json"
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
KEPT = (2, 4, 8)
FRACTIONS = tuple(f"1/{kept}" for kept in KEPT)
GRID = ("untouched", "own", "multi", "searched", "searched+R4", "searched+R8", "oracle")
REFERENCES = (("dense", 1), ("oracle", 1), ("full", 1))
MASS = (("full", 1), ("own", 4), ("multi", 4))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table without a last end of line."""
    return markdown(head, rows).rstrip("\n")


def interval(row: dict[str, Any] | None) -> str:
    """Format a difference of loss and its interval; an empty cell where there is none."""
    if row is None:
        return ""
    return f"{row['delta_loss']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"


def share(row: dict[str, Any] | None) -> str:
    """Format a share and its interval; an empty cell where there is none."""
    if row is None:
        return ""
    return f"{row['share']:.1%} [{row['ci_low']:.1%}, {row['ci_high']:.1%}]"


def by_seed(values: dict[str, float], form: str) -> str:
    """Format a value of each seed in one cell."""
    return ", ".join(f"{seed}: {value:{form}}" for seed, value in values.items())


class Report:
    """The tables of one result. Every method returns lines of text and tables in their order."""

    def __init__(self, result: dict[str, Any]):
        self.result = result
        self.rows = {(r["method"], r["kept"], r["domain"]): r for r in result["rows"]}
        self.methods = [m for m in GRID if any((m, k, "all") in self.rows for k in KEPT)]
        self.domains = sorted({r["domain"] for r in result["rows"]} - {"all"})
        self.pairs = {
            (p["method"], p["against"], p["kept"], p["domain"]): p for p in result["pairs"]
        }

    def pool(self, method: str) -> int:
        """Return the number of tokens in the pool of a method's R layers; 0 without them."""
        return int(method.partition("+R")[2] or 0) * int(self.result["overlap"]["topk"])

    def label(self, method: str) -> str:
        """Return a method's name, with the share of the longest context that a pool is."""
        share = Fraction(self.pool(method), self.result["settings"]["length"])
        return f"{method}, pool {share} of the context" if share else method

    def answer(self, method: str, length: int, accuracy: float) -> str:
        """Format the share of right answers, in brackets where R layers are nearly full ones."""
        return f"({accuracy:.2f})" if 2 * self.pool(method) > length else f"{accuracy:.2f}"

    def losses(self) -> list[str]:
        """Compare every method with all indexers."""
        full = self.rows["full", 1, "all"]
        dense = self.rows["dense", 1, "all"]
        oracle = self.rows["oracle", 1, "all"]
        seeds = f"{full['seeds']} seed" + "s" * (full["seeds"] > 1)
        above = 100 * (full["loss"] / dense["loss"] - 1)
        rows = [
            [self.label(m), *(interval(self.rows.get((m, k, "all"))) for k in KEPT)]
            for m in self.methods
        ]
        return [
            f"{self.result['device']}, {self.result['date']}, {seeds}. Loss with dense attention "
            f"{dense['loss']:.4f}, with all indexers {full['loss']:.4f} ({above:+.2f} %), with an "
            f"oracle in each layer {oracle['loss']:.4f}.",
            f"Loss above that of all indexers, {len(self.domains)} domains together:",
            table(["", *FRACTIONS], rows),
        ]

    def comparisons(self) -> list[str]:
        """Compare methods with each other."""
        names = dict.fromkeys((a, b, p["seeds"]) for (a, b, *_), p in self.pairs.items())
        rows = [
            [
                f"{self.label(a)} - {self.label(b)}",
                str(seeds),
                *(interval(self.pairs.get((a, b, k, "all"))) for k in (1, *KEPT)),
            ]
            for a, b, seeds in names
        ]
        two = ("searched", "multi")
        by_domain = [
            [f"1/{k}", *(interval(self.pairs.get((*two, k, d))) for d in self.domains)]
            for k in KEPT
        ]
        return [
            "One way less another, document by document:",
            table(["", "seeds", "all", *FRACTIONS], rows),
            f"{two[0]} - {two[1]} by domain:",
            table(["", *self.domains], by_domain),
        ]

    def closed(self) -> list[str]:
        """Show how much of the loss of untouched indexers training closes."""
        closed = {(c["method"], c["kept"]): c for c in self.result["closed"]}
        rows = [
            [m, str(closed[m, 4]["seeds"]), *(share(closed.get((m, k))) for k in KEPT)]
            for m in dict.fromkeys(method for method, _ in closed)
        ]
        return [
            "Share of what untouched indexers lose (those of the same pattern) that training "
            "closes:",
            table(["", "seeds", *FRACTIONS], rows),
        ]

    def by_domain(self) -> list[str]:
        """Compare every method with all indexers in each domain."""
        lines = []
        for k in KEPT:
            rows = [
                [self.label(m), *(interval(self.rows.get((m, k, d))) for d in self.domains)]
                for m in self.methods
            ]
            lines += [f"At 1/{k}, by domain:", table(["", *self.domains], rows)]
        return lines

    def others(self) -> list[str]:
        """Show the methods that are not in the grid."""
        shown = {(m, k) for m in GRID for k in KEPT} | set(REFERENCES)
        others = sorted((k, m) for m, k, d in self.rows if d == "all" and (m, k) not in shown)
        rows = []
        for k, m in others:
            r = self.rows[m, k, "all"]
            rows.append([m, f"1/{k}", str(r["seeds"]), interval(r), f"{r['retrieval']:.3f}"])
        head = ["", "kept", "seeds", "above all indexers", "answers found"]
        return ["Other ways:", table(head, rows)] if rows else []

    def groups(self) -> list[str]:
        """Show what each group of layers loses alone."""
        groups = {(g["method"], *g["layers"]): g for g in self.result["groups"]}
        if not groups:
            return []
        layers = dict.fromkeys(tuple(g["layers"]) for g in self.result["groups"])
        rows = [
            [f"{g[0]} to {g[-1]}", *(interval(groups.get((m, *g))) for m in ("own", "multi"))]
            for g in layers
        ]
        return [
            "Loss above all indexers where one group of uniform 1/4 alone shares, "
            f"{self.result['groups'][0]['seeds']} seed(s):",
            table(["layers", "own", "multi"], rows),
        ]

    def seeds(self) -> list[str]:
        """Show the losses and the answers of each seed."""

        def cells(key: str, form: str) -> list[list[str]]:
            return [
                [
                    self.label(m),
                    *(by_seed(self.rows.get((m, k, "all"), {}).get(key, {}), form) for k in KEPT),
                ]
                for m in self.methods
                if m != "oracle"
            ]

        return [
            "Seed by seed, loss above all indexers:",
            table(["", *FRACTIONS], cells("of_seeds", "+.4f")),
            "Seed by seed, answers found, a mean over all lengths. Shorter ones flatter R, whose "
            "pool is a larger share of them (the table of answers by length is below):",
            table(["", *FRACTIONS], cells("retrieval_of_seeds", ".3f")),
        ]

    def answers(self) -> list[str]:
        """Show the share of right answers for each task and length."""
        tasks = {(t["method"], t["kept"], t["task"], t["length"]): t for t in self.result["tasks"]}
        kinds = sorted({key[2:] for key in tasks})
        grid = [*REFERENCES, *((m, k) for k in KEPT for m in self.methods)]
        rows = [
            [
                self.label(m),
                f"1/{k}",
                str(tasks[m, k, *kinds[0]]["seeds"]),
                *(self.answer(m, n, tasks[m, k, task, n]["accuracy"]) for task, n in kinds),
            ]
            for m, k in grid
            if (m, k, *kinds[0]) in tasks
        ]
        head = ["", "kept", "seeds", *(f"{task} {length}" for task, length in kinds)]
        return [
            "Answers found. In brackets: the pool is more than half of that context, so R layers "
            "are nearly full ones, and the figure says nothing of R:",
            table(head, rows),
        ]

    def layers(self) -> list[str]:
        """Show how much attention each layer's selection keeps, and what sharing it alone costs."""
        measured = self.result["mass_kept"]["of"]
        kept = {(m, k): measured[f"{m} 1/{k}"] for m, k in MASS if f"{m} 1/{k}" in measured}
        costs = self.result["sharing_costs"]
        rows = [
            [
                str(i),
                *(f"{mass[i]:.3f}" for mass in kept.values()),
                *(f"{c[i]:+.4f}" if i else "" for c in costs.values()),
            ]
            for i in range(len(next(iter(kept.values()))))
        ]
        means = (f"{sum(mass) / len(mass):.3f}" for mass in kept.values())
        rows.append(["mean", *means, *("" for _ in costs)])
        head = ["layer", *(f"{m}, 1/{k}" for m, k in kept), *(f"alone, seed {s}" for s in costs)]
        return [
            "Share of each layer's attention on its selection, seed "
            f"{self.result['mass_kept']['seed']}; and the loss where that layer alone reads the "
            "selection of the one before it, on each seed's calibration text, as the search's "
            "first step found it:",
            table(head, rows),
        ]


def report(result: dict[str, Any]) -> str:
    """Return all tables, each under a line that says what it shows."""
    r = Report(result)
    sections = (
        r.losses(),
        r.comparisons(),
        r.closed(),
        r.by_domain(),
        r.others(),
        r.groups(),
        r.seeds(),
        r.answers(),
        r.layers(),
    )
    return "\n\n".join(line for section in sections for line in section)


def insert(tables: str, page: str) -> str:
    """Return the page with the tables between its two marks.

    Raises:
        ValueError: the page does not have each mark once, in their order.
    """
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
        help=f"Write the tables into this page, between the lines {' and '.join(MARKS)}.",
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
