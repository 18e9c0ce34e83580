"""Make the result file of the comparison from what was measured; see docs/training-aware.md."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from indexcache.evals.statistics import bootstrap_interval
from recipes.training_aware.arms import ALL, folder_of

Facts = dict[str, Any]

PAIRS = tuple(
    (f"{a}-{kept}", f"{b}-{kept}")
    for kept in (2, 4, 8)
    for a, b in (
        ("multi", "own"),
        ("multi", "lm"),
        ("searched", "multi"),
        ("r", "multi"),
        ("max", "multi"),
        ("cover", "multi"),
        ("weighted", "multi"),
        ("answers", "multi"),
        ("cover-answers", "multi"),
        ("max-searched", "searched"),
        ("cover-searched", "searched"),
        ("answers-searched", "searched"),
        ("own-searched", "searched"),
    )
)
"""The first arm is compared with the second, where both were measured."""
LOSS_MARGIN = 0.005
RECALL_MARGIN = 0.03
"""What uniform 1/4 may lose to all full, of its loss and in recall, for the paper's claim."""


def sums_of(facts: Facts, domain: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of each document, summed, and the numbers of tokens."""
    chosen = [d for d in facts["documents"] if domain in (None, d[0])]
    return np.array([d[2] for d in chosen]), np.array([d[3] for d in chosen])


def found_of(facts: Facts, **where: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers found of each sequence, and the numbers asked."""
    chosen = [e for e in facts["recall"] if all(e[k] == v for k, v in where.items())]
    found = [np.array(e["found_each"]) for e in chosen]
    asked = [np.array(e["asked_each"]) for e in chosen]
    return np.concatenate(found), np.concatenate(asked)


def share(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the ratio of the sums."""
    return float(pair[0].sum() / pair[1].sum())


def rounded(value: float) -> float | None:
    """Round, and return None for what is no number."""
    return round(value, 6) if math.isfinite(value) else None


def paired(firsts: list[Facts], seconds: list[Facts], domain: str | None = None) -> Facts:
    """Compare arms seed by seed: differences of loss and recall, with 95 % intervals.

    Seeds are averaged first; the intervals are over documents and over retrieval sequences.
    """
    both = list(zip(firsts, seconds, strict=True))
    counts = sums_of(firsts[0], domain)[1]
    losses = np.mean([sums_of(a, domain)[0] - sums_of(b, domain)[0] for a, b in both], 0)
    low, high = bootstrap_interval(losses, counts)
    facts = {
        "delta_loss": rounded(float(losses.sum() / counts.sum())),
        "ci_low": rounded(low),
        "ci_high": rounded(high),
        "seeds": len(both),
    }
    if domain is not None:
        return facts | {"documents": len(counts)}
    found = np.mean([found_of(a)[0] - found_of(b)[0] for a, b in both], 0)
    asked = found_of(firsts[0])[1]
    low, high = bootstrap_interval(found, asked)
    return facts | {
        "delta_recall": rounded(float(found.sum() / asked.sum())),
        "recall_ci_low": rounded(low),
        "recall_ci_high": rounded(high),
    }


def read_measured(out: Path) -> dict[tuple[int, str], Facts]:
    """Read what was measured of each seed and arm."""
    measured = {}
    for path in sorted(out.glob("seed*/*/measured.json")):
        seed = int(path.parent.parent.name.removeprefix("seed"))
        if path.parent.name in ALL:
            measured[seed, path.parent.name] = json.loads(path.read_text())
    return measured


def row_of(model: str, seed: int, name: str, facts: Facts, full: Facts) -> Facts:
    """Make one row: an arm of one seed against the equally trained full arm."""
    arm = ALL[name]
    lengths = sorted({e["length"] for e in facts["recall"]})
    kinds = sorted({e["kind"] for e in facts["recall"]})
    domains = sorted({d[0] for d in facts["documents"]})
    compared = paired([facts], [full])
    return {
        "model": model,
        "arm": arm.name,
        "kept": f"1/{arm.kept}",
        "seed": seed,
        "loss": rounded(share(sums_of(facts))),
        **{key: compared[key] for key in ("delta_loss", "ci_low", "ci_high")},
        "recall": rounded(share(found_of(facts))),
        "recall_full": rounded(share(found_of(full))),
        "tokens": facts["tokens"],
        "adapt_tokens": facts["adapt_tokens"],
        "tokens_s": facts.get("tokens_s"),
        "mfu": facts.get("mfu"),
        "name": name,
        "offset": arm.offset,
        "pattern": facts["pattern"],
        "by_domain": {d: paired([facts], [full], d) for d in domains},
        "recall_by_length": {n: rounded(share(found_of(facts, length=n))) for n in lengths},
        "recall_by_kind": {k: rounded(share(found_of(facts, kind=k))) for k in kinds},
        "attention_kept": facts["attention_kept"],
        "overlap_adjacent": adjacent(facts),
    }


def adjacent(facts: Facts) -> float | None:
    """Return the mean overlap of neighbouring layers that select for themselves."""
    roles = facts["pattern"].partition("@")[0]
    own = [i for i, role in enumerate(roles) if role != "S"]
    shares = [facts["overlap"][i][j] for i, j in pairwise(own)]
    return rounded(float(np.mean(shares))) if shares else None


def summary_of(measured: dict[tuple[int, str], Facts]) -> list[Facts]:
    """Compare every arm with "full" over all seeds that have both."""
    rows = []
    for name, arm in ALL.items():
        seeds = [s for s, n in measured if n == name and (s, "full") in measured]
        if not seeds:
            continue
        firsts = [measured[s, name] for s in seeds]
        fulls = [measured[s, "full"] for s in seeds]
        loss = float(np.mean([share(sums_of(f)) for f in fulls]))
        row = {"name": name, "arm": arm.name, "kept": f"1/{arm.kept}", "offset": arm.offset}
        row |= paired(firsts, fulls)
        row["share_of_loss"] = rounded(row["delta_loss"] / loss)
        row["recall"] = rounded(float(np.mean([share(found_of(f)) for f in firsts])))
        row["within_margins"] = bool(
            row["share_of_loss"] <= LOSS_MARGIN and row["delta_recall"] >= -RECALL_MARGIN
        )
        rows.append(row)
    return rows


def pairs_of(measured: dict[tuple[int, str], Facts]) -> list[Facts]:
    """Compare the pairs of arms over all seeds that have both."""
    rows = []
    for first, second in PAIRS:
        seeds = [s for s, n in measured if n == first and (s, second) in measured]
        if seeds:
            compared = paired(
                [measured[s, first] for s in seeds], [measured[s, second] for s in seeds]
            )
            rows.append({"name": first, "against": second, **compared})
    return rows


def untrained_of(facts: Facts) -> list[Facts]:
    """Compare patterns with all full on one model that was not trained under them."""
    full = facts["full"]
    return [
        {
            "pattern_name": name,
            "pattern": value["pattern"],
            "loss": rounded(share(sums_of(value))),
            **paired([value], [full]),
            "recall": rounded(share(found_of(value))),
        }
        for name, value in facts.items()
    ]


def table(out: Path, model: str, setup: Facts) -> Facts:
    """Return the content of the result file."""
    measured = read_measured(out)
    if len({facts["tokens"] for facts in measured.values()}) > 1:
        raise SystemExit(f"{out}: arms were trained on different numbers of tokens.")
    rows = [
        row_of(model, seed, name, facts, measured[seed, "full"])
        for (seed, name), facts in sorted(measured.items())
        if (seed, "full") in measured
    ]
    content: Facts = {"setup": setup, "rows": rows}
    content["summary"] = [{"model": model, **row} for row in summary_of(measured)]
    content["pairs"] = [{"model": model, **row} for row in pairs_of(measured)]
    before = out / "before.json"
    if before.exists():
        facts = json.loads(before.read_text())
        content["before"] = {
            "patterns": untrained_of(facts["patterns"]),
            "attention_kept": {n: f["attention_kept"] for n, f in facts["patterns"].items()},
            "overlap": facts["patterns"]["full"]["overlap"],
            "search": facts["search"],
        }
    after = {}
    for path in sorted(out.glob("seed*/*/after.json")):
        facts = json.loads(path.read_text())
        after[f"{path.parent.parent.name}/{path.parent.name}"] = {
            "search": facts["search"],
            "patterns": untrained_of(facts["patterns"]) if facts["patterns"] else [],
        }
    content["after"] = after
    content["overlap_after"] = {
        f"seed{seed}/{name}": facts["overlap"]
        for (seed, name), facts in sorted(measured.items())
        if name in ("full", "multi-4")
    }
    return content


def merged(old: Facts, new: Facts, model: str) -> Facts:
    """Put the content of one model into a result file that may have other models.

    Rows, summary and pairs are those of all models. The rest of tiny's lies on top, that of another
    model under its name.
    """
    lists = ("rows", "summary", "pairs")
    out = {
        name: [r for r in old.get(name, []) if r.get("model", "tiny") != model] for name in lists
    }
    out = {name: sorted(out[name] + new[name], key=lambda r: r["model"] != "tiny") for name in out}
    rest = {name: value for name, value in new.items() if name not in lists}
    kept = {name: value for name, value in old.items() if name not in lists}
    return kept | (rest if model == "tiny" else {model: rest}) | out


def text_of(content: Facts) -> str:
    """Format the summary for people."""
    lines = ["arm               seeds  delta loss  [95 %]               of loss  recall"]
    for row in content["summary"]:
        numbers = [math.nan if row[k] is None else row[k] for k in ("ci_low", "ci_high")]
        lines.append(
            f"{row['name']:16}  {row['seeds']:5}  {row['delta_loss']:+.4f}     "
            f"[{numbers[0]:+.4f}, {numbers[1]:+.4f}]  {row['share_of_loss']:+8.2%}  "
            f"{row['recall']:.3f} ({row['delta_recall']:+.3f})"
        )
    return "\n".join(lines)


def measured_path(out: Path, seed: int, name: str) -> Path:
    """Return the file of what was measured of an arm."""
    return folder_of(out, seed, name) / "measured.json"
