"""Compute the statistics of an experiment from its evaluations.

An evaluation is one line of a journal: one method, fraction and seed. All have the same documents
and the same rows of tasks. A line is {"seed" (null for what has none), "method", "kept" (k where
1/k of the layers keep their indexer), "documents": [[domain, name, sum of losses, tokens], ..],
"tasks": what `tasks.score` returns}.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

Line = dict[str, Any]

# The first method is compared with the second at each fraction that has both.
PAIRS = (
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
VARIANTS = ("short", "long", "slow", "fast", "sparse", "weighted")
# Of the loss of the second method, untouched indexers, the training of the first closes a share.
CLOSED = (
    ("own", "untouched"),
    ("multi", "untouched"),
    *((f"multi, {name}", "untouched") for name in VARIANTS),
    ("own, offset2", "untouched, offset2"),
    ("multi, offset2", "untouched, offset2"),
)
KEPT = (1, 2, 4, 8)  # One layer in so many keeps its indexer.


def accuracy(lines: list[Line], key: str = "accuracy") -> float:
    """Average the accuracy of the answers over tasks and lengths, or with "loss" their loss."""
    return float(np.mean([task[key] for line in lines for task in line["tasks"]]))


def tasks_of(lines: list[Line]) -> list[dict[str, Any]]:
    """Average each method, task and length over the seeds. All seeds have the same rows."""
    scores: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        for task in line["tasks"]:
            scores[line["method"], line["kept"], task["task"], task["length"]].append(task)
    return [
        {
            "method": method,
            "kept": kept,
            "task": task,
            "length": length,
            "accuracy": float(np.mean([s["accuracy"] for s in seeds])),
            "loss": float(np.mean([s["loss"] for s in seeds])),
            "answers": seeds[0]["answers"],
            "seeds": len(seeds),
        }
        for (method, kept, task, length), seeds in scores.items()
    ]


def rows_of(lines: list[Line]) -> list[dict[str, Any]]:
    """Compare each method with full of the same seed, document by document.

    The seeds are averaged before documents are resampled. The dense model and the oracle, which
    have no seed, are compared with the mean of all.
    """
    full: dict[Any, dict[str, float]] = {
        line["seed"]: losses_of(line) for line in lines if line["method"] == "full"
    }
    full[None] = {
        name: float(np.mean([losses[name] for losses in full.values()]))
        for name in next(iter(full.values()))
    }
    by_method: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in lines:
        by_method[line["method"], line["kept"]].append(line)
    rows = []
    for (method, kept), seeds in by_method.items():
        seeds.sort(key=lambda line: -1 if line["seed"] is None else line["seed"])
        documents = documents_of(seeds[0])
        differences = [difference(losses_of(line), full[line["seed"]]) for line in seeds]
        for domain in domains_of(documents):
            names = names_of(documents, domain)
            tokens = [documents[n][3] for n in names]
            total = sum(tokens)
            loss = np.mean(
                [sum(d[2] for d in line["documents"] if d[1] in names) for line in seeds]
            )
            of_seeds = {
                str(line["seed"]): round(sum(d[n] for n in names) / total, 6)
                for line, d in zip(seeds, differences, strict=True)
            }
            retrieval = {str(line["seed"]): round(accuracy([line]), 6) for line in seeds}
            rows.append(
                {
                    "kept": kept,
                    "method": method,
                    "domain": domain,
                    **paired(differences, names, tokens),
                    "loss": float(loss) / total,
                    "retrieval": accuracy(seeds),
                    "retrieval_loss": accuracy(seeds, "loss"),
                    "of_seeds": of_seeds,
                    "retrieval_of_seeds": retrieval,
                }
            )
    return rows


def documents_of(line: Line) -> dict[str, list[Any]]:
    """Return the documents of a line by name."""
    return {document[1]: document for document in line["documents"]}


def losses_of(line: Line) -> dict[str, float]:
    """Return the sum of losses of each document by name."""
    return {document[1]: document[2] for document in line["documents"]}


def difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Subtract the losses `b` from `a`, document by document."""
    return {name: loss - b[name] for name, loss in a.items()}


def domains_of(documents: dict[str, list[Any]]) -> list[str]:
    """Return "all" and the domains of these documents."""
    return ["all", *sorted({d[0] for d in documents.values()})]


def names_of(documents: dict[str, list[Any]], domain: str) -> list[str]:
    """Return the names of the documents of one domain, or of "all"."""
    return [name for name, d in documents.items() if domain in ("all", d[0])]


def percentile_interval(sums: list[float], counts: list[float] | list[int]) -> tuple[float, float]:
    """Compute the 95 % percentile bootstrap interval of sum(sums) / sum(counts) over documents.

    The published tables have it. It is too narrow for few documents (docs/smollm2.md says how much,
    `benchmarks/coverage.py` measures it); `indexcache.evals.statistics` has the one to use.
    """
    picks = np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))
    means = np.asarray(sums)[picks].sum(1) / np.asarray(counts)[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired(per_seed: list[dict[str, float]], names: list[str], tokens: list[int]) -> dict[str, Any]:
    """Average differences of loss in nats a token, with an interval over the documents.

    Args:
        per_seed: the differences of each seed by document, summed over its tokens.
        names: the documents that count.
        tokens: their numbers of tokens.
    """
    sums = [float(np.mean([seed[n] for seed in per_seed])) for n in names]
    low, high = percentile_interval(sums, tokens)
    return {
        "delta_loss": sum(sums) / sum(tokens),
        "ci_low": low,
        "ci_high": high,
        "seeds": len(per_seed),
    }


def documents_by_method(
    lines: list[Line],
) -> dict[tuple[str, int, int | None], dict[str, list[Any]]]:
    """Return the documents by name of each method, fraction and seed."""
    return {(line["method"], line["kept"], line["seed"]): documents_of(line) for line in lines}


def closed_of(lines: list[Line]) -> list[dict[str, Any]]:
    """Compute which share of a loss to full a method closes, for the pairs in CLOSED.

    The seeds that have both methods count. Documents are resampled for the interval, both losses of
    a document together.
    """
    documents = documents_by_method(lines)
    rows = []
    for (method, other), kept in ((pair, kept) for pair in CLOSED for kept in KEPT):
        triples = [
            (documents[method, kept, seed], documents[other, kept, seed], full)
            for (name, _, seed), full in documents.items()
            if name == "full"
            and (method, kept, seed) in documents
            and (other, kept, seed) in documents
        ]
        if triples:
            names = list(triples[0][0])
            gains = [float(np.mean([b[n][2] - a[n][2] for a, b, _ in triples])) for n in names]
            gaps = [float(np.mean([b[n][2] - f[n][2] for _, b, f in triples])) for n in names]
            low, high = percentile_interval(gains, gaps)
            rows.append(
                {
                    "kept": kept,
                    "method": method,
                    "of": other,
                    "share": sum(gains) / sum(gaps),
                    "ci_low": low,
                    "ci_high": high,
                    "seeds": len(triples),
                }
            )
    return rows


def pairs_of(lines: list[Line]) -> list[dict[str, Any]]:
    """Subtract one method's losses from another's, for the pairs in PAIRS.

    The seeds that have both methods count. There is a row for all domains together and for each.
    """
    by_method = documents_by_method(lines)
    rows = []
    for (method, other), kept in ((pair, kept) for pair in PAIRS for kept in KEPT):
        both = [
            (a, by_method[other, kept, seed])
            for (name, k, seed), a in by_method.items()
            if (name, k) == (method, kept) and (other, kept, seed) in by_method
        ]
        if not both:
            continue
        per_seed = [{n: a[n][2] - b[n][2] for n in a} for a, b in both]
        documents = both[0][0]
        for domain in domains_of(documents):
            names = names_of(documents, domain)
            row = {"kept": kept, "method": method, "against": other, "domain": domain}
            rows.append(row | paired(per_seed, names, [documents[n][3] for n in names]))
    return rows


def groups_of(lines: list[Line], evaluated: list[Line]) -> list[dict[str, Any]]:
    """Compute what is lost where one group of layers alone shares a selection.

    Each method and group is compared with full of the same seed, document by document.

    Args:
        lines: the evaluations of the groups; "layers" is the group.
        evaluated: the evaluations that include full.
    """
    full = {line["seed"]: losses_of(line) for line in evaluated if line["method"] == "full"}
    by_group: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        if line["seed"] in full:
            by_group[line["method"], *line["layers"]].append(line)
    rows = []
    for (method, *layers), seeds in by_group.items():
        documents = documents_of(seeds[0])
        tokens = [d[3] for d in documents.values()]
        per_seed = [difference(losses_of(line), full[line["seed"]]) for line in seeds]
        row = {"method": method, "layers": layers}
        rows.append(row | paired(per_seed, list(documents), tokens))
    return rows
