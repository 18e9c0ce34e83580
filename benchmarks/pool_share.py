"""Measure what R layers lose on `tiny` by the share of the context that their pool is.

    python -m benchmarks.pool_share [--out FILE] [--device cuda]

The searched patterns with 3 and 2 of 12 full layers are evaluated on the shipped held-out text, at
several lengths, with S in the other layers and with R at pools of 1/16 to 1/2 of the length. The
rows go to benchmarks/results/tiny_pool_share.json; with the sums of every document, from which an
interval can be computed anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from indexcache import Pattern, accelerate, evaluate, load

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tiny_pool_share.json"

PATTERNS = (Pattern("FFSSSSSSSFSS"), Pattern("FFSSSSSSSSSS"))  # the demo's at 1/4 and at 1/8
LENGTHS = {1024: 24, 2048: 12}
"""Number of sequences by their length; each is cut from documents of its own."""
SHARES = (16, 8, 4, 2)
"""The length over the pool."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    model = load("tiny", device=o.device)
    accelerate(model.module)
    rows = []
    for length, sequences in LENGTHS.items():
        batches = model.batches("heldout", length=length, sequences=sequences)
        factors = [length // (share * model.topk) for share in SHARES]
        patterns = [p for s in PATTERNS for p in (s, *(s.with_rest("R", c) for c in factors))]
        for row in evaluate(model, patterns, batches, progress=True).overall:
            pool = (row.pattern.pool_factor or 0) * model.topk
            rows.append(
                {
                    "pattern": str(row.pattern),
                    "full": row.full,
                    "length": length,
                    "sequences": sequences,
                    "pool": pool or None,
                    "pool_share": pool / length or None,
                    "delta_loss": row.delta_loss,
                    "ci_low": row.ci_low,
                    "ci_high": row.ci_high,
                    "kl": row.kl,
                    "by_document": row.by_document,
                }
            )
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "by_document"}))
    result = {
        "command": "python -m benchmarks.pool_share",
        "device": f"{platform.machine()}, {o.device}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
