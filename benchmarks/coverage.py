"""Simulate how often the interval of `evaluate` covers the truth, with few and skewed documents.

    python -m benchmarks.coverage --measure    # tiny's own differences, minutes on a CPU
    python -m benchmarks.coverage              # the simulation, minutes on one core

Documents are drawn from distributions whose mean is known, the interval is computed, and three
things are counted:

    covered      the true mean lies in the 95 % interval
    false safe   the upper end is below a margin equal to the true mean, so that a gate of that
                 margin would pass a pattern that it must not pass
    A/A          the interval of two equally good patterns leaves 0 out

Beside the interval of the package stand the percentile bootstrap and the t interval. Below
LEAST_DOCUMENTS the package gives no interval. What its formula would do there is kept in the result
file and not in the table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from indexcache.evals.statistics import LEAST_DOCUMENTS, LEVEL, chance_above, upper_end
from indexcache.records import atomic
from indexcache.report.tables import table

OUT = Path(__file__).parent / "results" / "coverage.json"
DOCUMENTS = (3, 8, 24, 36, 50, 108)
REPETITIONS = 4_000
BOOTSTRAPS = 1_000  # repetitions and resamples of the percentile bootstrap, which is slow
WIDTHS = 100  # repetitions in which the width is measured
TAIL = (1 - LEVEL) / 2
PATTERNS = ("FSFSFSFSFSFS", "FFSSSFSSSFSS", "FFSSSSSSSFSS", "FFRRRRRRRFRR@2")  # of tiny
LENGTH = 512  # tokens of a sequence of tiny

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]


def lognormal(sigma: float) -> tuple[Draw, float]:
    """Return draws of a lognormal distribution of median 1, and its mean."""
    return lambda rng, shape: rng.lognormal(0, sigma, shape), math.exp(sigma**2 / 2)


def broken(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Draw documents of which one in ten loses 1 nat, and the others nothing."""
    return rng.normal(0, 0.02, shape) + (rng.random(shape) < 0.1) * rng.normal(1, 0.1, shape)


def resampled(values: Floats) -> tuple[Draw, float]:
    """Return draws of some documents with replacement, and their mean."""
    return lambda rng, shape: rng.choice(values, shape), float(values.mean())


def sources(measured: dict[str, Any]) -> dict[str, tuple[Draw, float]]:
    """Return draws and their true mean for every distribution, those of tiny last."""
    result: dict[str, tuple[Draw, float]] = {
        "normal": (lambda rng, shape: rng.normal(0, 1, shape), 0.0),
        "lognormal 1": lognormal(1.0),
        "lognormal 1.5": lognormal(1.5),
        "lognormal 1.5, gains": (
            lambda rng, shape: -rng.lognormal(0, 1.5, shape),
            -math.exp(1.125),
        ),
        "one in ten broken": (broken, 0.1),
    }
    for pattern, sums in measured["sums"].items():
        result[f"tiny {pattern}"] = resampled(np.array(sums) / measured["tokens"])
    return result


def measure() -> dict[str, Any]:
    """Measure the loss difference of tiny's patterns on every document of its held-out text."""
    from indexcache import evaluate, load

    model = load("tiny")
    batches = model.batches("heldout", length=LENGTH, sequences=72, batch=4)
    rows = evaluate(model, PATTERNS, batches, progress=True).overall
    return {
        "length": LENGTH,
        "tokens": LENGTH - 1,
        "sums": {str(r.pattern): [round(s, 2) for s, _ in r.by_document] for r in rows},
    }


def leaves_out(values: Floats, truth: float) -> tuple[Floats, Floats]:
    """Say of each row of documents whether the interval is below the truth, and whether above."""
    return chance_above(values, truth) < TAIL, chance_above(-values, -truth) < TAIL


def percentile_ends(values: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Compute percentile bootstrap intervals of rows of documents [rows, n]."""
    rows, n = values.shape
    means = np.empty((rows, BOOTSTRAPS))
    for row in range(rows):
        means[row] = values[row, rng.integers(0, n, (BOOTSTRAPS, n))].mean(1)
    low, high = np.quantile(means, [TAIL, 1 - TAIL], axis=1)
    return low, high


def student_ends(values: Floats) -> tuple[Floats, Floats]:
    """Compute t intervals of rows of documents [rows, n]."""
    n = values.shape[1]
    half = student.ppf(1 - TAIL, n - 1) * values.std(1, ddof=1) / math.sqrt(n)
    return values.mean(1) - half, values.mean(1) + half


def simulate(name: str, draw: Draw, truth: float, documents: int) -> dict[str, Any]:
    """Count coverage, false safe and A/A of one distribution and number of documents."""
    rng = np.random.default_rng([documents, *name.encode()])
    shape = (REPETITIONS, documents)
    values = draw(rng, shape)
    below, above = leaves_out(values, truth)
    aa_below, aa_above = leaves_out(draw(rng, shape) - draw(rng, shape), 0.0)
    widths = [upper_end(v, TAIL) + upper_end(-v, TAIL) for v in values[:WIDTHS]]
    t_low, t_high = student_ends(values)
    p_low, p_high = percentile_ends(values[:BOOTSTRAPS], rng)
    aa_low, aa_high = percentile_ends(
        draw(rng, (BOOTSTRAPS, documents)) - draw(rng, (BOOTSTRAPS, documents)), rng
    )
    numbers = {
        "covered": 1 - (below | above).mean(),
        "false_safe": below.mean(),
        "aa_different": (aa_below | aa_above).mean(),
        "width_over_t": np.mean(widths) / np.mean((t_high - t_low)[:WIDTHS]),
        "t_covered": ((t_low <= truth) & (truth <= t_high)).mean(),
        "t_false_safe": (t_high < truth).mean(),
        "percentile_covered": ((p_low <= truth) & (truth <= p_high)).mean(),
        "percentile_false_safe": (p_high < truth).mean(),
        "percentile_aa_different": ((aa_low > 0) | (aa_high < 0)).mean(),
    }
    return {
        "differences": name,
        "documents": documents,
        "interval": documents >= LEAST_DOCUMENTS,
        **{key: round(float(value), 3) for key, value in numbers.items()},
    }


def show(rows: list[dict[str, Any]]) -> str:
    """Format the rows; a cell holds the package's rate, then that of the percentile bootstrap."""
    lines = []
    for r in rows:
        own = r["interval"]
        lines.append(
            [
                r["differences"],
                str(r["documents"]),
                *(
                    f"{r[key]:.1%}" if own else "none"
                    for key in ("covered", "false_safe", "aa_different")
                ),
                f"{r['width_over_t']:.2f}" if own else "",
                *(
                    f"{r[f'percentile_{key}']:.1%}"
                    for key in ("covered", "false_safe", "aa_different")
                ),
            ]
        )
    head = ["differences", "documents", "covered", "false safe", "A/A", "width / t"]
    return table([*head, "percentile: covered", "false safe", "A/A"], lines)


def kept(row: dict[str, Any]) -> bool:
    """Tell whether a row has the rates that the package promises, or no interval."""
    rates = row["covered"] >= 0.93 and row["false_safe"] <= 0.03 and row["aa_different"] <= 0.05
    return rates or not row["interval"]


def write(path: Path, rows: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    """Write the result file, a row a line."""
    head = {
        "command": "python -m benchmarks.coverage",
        "repetitions": REPETITIONS,
        "percentile_repetitions": BOOTSTRAPS,
        "least_documents": LEAST_DOCUMENTS,
        "tiny": measured,
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head).removesuffix("}")
    with atomic(path) as temporary:
        temporary.write_text(f'{text},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure tiny's differences anew")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    before = json.loads(OUT.read_text(encoding="utf-8"))
    if arguments.measure:
        write(arguments.out, before["rows"], measure())
        return
    rows = [
        simulate(name, draw, truth, documents)
        for name, (draw, truth) in sources(before["tiny"]).items()
        for documents in DOCUMENTS
    ]
    print(show(rows))
    write(arguments.out, rows, before["tiny"])
    missed = [r for r in rows if not kept(r)]
    raise SystemExit(f"These rows miss the rates that are promised: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
