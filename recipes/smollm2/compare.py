"""Statistics of an experiment's evaluations: a line is one way, fraction and seed; all lines have the same documents and task rows.

A line is {"seed" (null for what has none), "method", "kept", "documents": [[domain, name, sum of losses, tokens], ..], "tasks":
what `tasks.score` gives}.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from indexcache.evals.statistics import bootstrap_interval

PAIRS = (  # what is compared with what, at each fraction that has both
    ("own", "untouched"),
    ("multi", "own"),
    ("searched", "multi"),
    ("searched+R4", "searched"),
    ("searched+R8", "searched+R4"),
    ("multi", "multi, short"),
    ("multi, long", "multi"),
    ("multi, sparse", "multi"),
    ("multi, slow", "multi"),
    ("multi, fast", "multi"),
    ("multi, weighted", "multi"),
    ("multi, offset2", "own, offset2"),
    ("multi, offset2", "multi"),
    ("multi, found", "searched"),
    ("full", "full, short"),
    ("full, long", "full"),
    ("full, 8 bits", "full"),
    ("full, 4 bits", "full"),
    ("multi, 8 bits", "multi"),
    ("multi, 4 bits", "multi"),
)
CLOSED = (  # how much of the loss of untouched indexers training closes
    *(
        (m, "untouched")
        for m in (
            "own",
            "multi",
            *(f"multi, {v}" for v in ("short", "long", "slow", "fast", "sparse", "weighted")),
        )
    ),
    ("own, offset2", "untouched, offset2"),
    ("multi, offset2", "untouched, offset2"),
)
ALL = (1, 2, 4, 8)  # fractions: one in so many


def accuracy(lines: list[dict[str, Any]], what: str = "accuracy") -> float:
    """Mean over tasks and lengths; "loss": of the answers, nats a token."""
    return float(np.mean([t[what] for r in lines for t in r["tasks"]]))


def tasks_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every way, task and length, the seeds averaged; all have the same rows."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in lines:
        for t in r["tasks"]:
            found[r["method"], r["kept"], t["task"], t["length"]].append(t)
    names = ("method", "kept", "task", "length")
    return [
        dict(zip(names, key, strict=True))
        | {what: float(np.mean([t[what] for t in each])) for what in ("accuracy", "loss")}
        | {"answers": each[0]["answers"], "seeds": len(each)}
        for key, each in found.items()
    ]


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way against full of the same seed, document by document; the seeds are averaged before documents are resampled. The dense
    model, which has no seed, is compared with the mean of all."""
    losses: dict[Any, dict[str, float]] = {
        r["seed"]: {d[1]: d[2] for d in r["documents"]} for r in lines if r["method"] == "full"
    }
    losses[None] = {
        name: float(np.mean([full[name] for full in losses.values()]))
        for name in next(iter(losses.values()))
    }
    ways: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for r in lines:
        ways[r["method"], r["kept"]].append(r)
    rows = []
    for (method, kept), found in ways.items():
        found.sort(key=lambda r: -1 if r["seed"] is None else r["seed"])
        documents = {d[1]: d for d in found[0]["documents"]}
        for domain in ["all", *sorted({d[0] for d in documents.values()})]:
            names = [n for n, d in documents.items() if domain in ("all", d[0])]
            tokens = [documents[n][3] for n in names]
            per_seed = [
                {d[1]: d[2] - losses[r["seed"]][d[1]] for d in r["documents"]} for r in found
            ]
            loss = float(
                np.mean([sum(d[2] for d in r["documents"] if d[1] in set(names)) for r in found])
            ) / sum(tokens)
            of_seeds = {
                str(r["seed"]): round(sum(s[n] for n in names) / sum(tokens), 6)
                for r, s in zip(found, per_seed, strict=True)
            }
            rows.append(
                {
                    "kept": kept,
                    "method": method,
                    "domain": domain,
                    **paired(per_seed, names, tokens),
                    "loss": loss,
                    "retrieval": accuracy(found),
                    "retrieval_loss": accuracy(found, "loss"),
                    "of_seeds": of_seeds,
                    "retrieval_of_seeds": {str(r["seed"]): round(accuracy([r]), 6) for r in found},
                }
            )
    return rows


def paired(per_seed: list[dict[str, float]], names: list[str], tokens: list[int]) -> dict[str, Any]:
    """Of differences by document (sums over its tokens), one dict a seed: their mean in nats a token, and its interval."""
    sums = [float(np.mean([s[n] for s in per_seed])) for n in names]
    low, high = bootstrap_interval(sums, tokens)
    return {
        "delta_loss": sum(sums) / sum(tokens),
        "ci_low": low,
        "ci_high": high,
        "seeds": len(per_seed),
    }


def by_way(lines: list[dict[str, Any]]) -> dict[tuple[str, int, int | None], dict[str, list[Any]]]:
    """(method, kept, seed) -> the documents by name."""
    return {(r["method"], r["kept"], r["seed"]): {d[1]: d for d in r["documents"]} for r in lines}


def closed_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`CLOSED`: of what the other way loses to full, the share that a way does not lose, over the seeds that have both; documents are
    resampled for the interval, both losses of one together."""
    losses, found = by_way(lines), []
    for (method, other), kept in ((pair, kept) for pair in CLOSED for kept in ALL):
        three = [
            (losses[method, kept, s], losses[other, kept, s], full)
            for (w, _, s), full in losses.items()
            if w == "full" and (method, kept, s) in losses and (other, kept, s) in losses
        ]
        if three:
            names = list(three[0][0])
            gains = [float(np.mean([b[n][2] - a[n][2] for a, b, _ in three])) for n in names]
            gaps = [float(np.mean([b[n][2] - full[n][2] for _, b, full in three])) for n in names]
            low, high = bootstrap_interval(gains, gaps)
            share = {
                "share": sum(gains) / sum(gaps),
                "ci_low": low,
                "ci_high": high,
                "seeds": len(three),
            }
            found.append({"kept": kept, "method": method, "of": other, **share})
    return found


def pairs_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`PAIRS`, each way less the other over the seeds that have both; all domains together and each alone."""
    losses = by_way(lines)
    found = []
    for (method, other), kept in ((pair, kept) for pair in PAIRS for kept in ALL):
        both = [
            (losses[m, k, s], losses[other, k, s])
            for m, k, s in losses
            if (m, k) == (method, kept) and (other, k, s) in losses
        ]
        per_seed = [{n: a[n][2] - b[n][2] for n in a} for a, b in both]
        documents = both[0][0] if both else {}
        for domain in ["all", *sorted({d[0] for d in documents.values()})] if both else ():
            names = [n for n, d in documents.items() if domain in ("all", d[0])]
            row = paired(per_seed, names, [documents[n][3] for n in names])
            found.append(
                {"kept": kept, "method": method, "against": other, "domain": domain, **row}
            )
    return found


def groups_of(lines: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is lost where one group of layers alone shares: each way and group against full of the same seed, document by document."""
    full = {
        r["seed"]: {d[1]: d[2] for d in r["documents"]} for r in evaluated if r["method"] == "full"
    }
    ways: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in lines:
        if r["seed"] in full:
            ways[r["method"], *r["layers"]].append(r)
    found = []
    for (method, *layers), each in ways.items():
        names, tokens = zip(*((d[1], d[3]) for d in each[0]["documents"]), strict=True)
        per_seed = [{d[1]: d[2] - full[r["seed"]][d[1]] for d in r["documents"]} for r in each]
        found.append(
            {"method": method, "layers": layers, **paired(per_seed, list(names), list(tokens))}
        )
    return found
