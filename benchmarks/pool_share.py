"""Measure what R layers lose on `tiny` by the share of the context that their pool is.

    python -m benchmarks.pool_share [--out FILE] [--device cuda]

The searched patterns with 3 and 2 of 12 full layers are evaluated on the shipped held-out text, at
several lengths, with S in the other layers and with R at pools of 1/16 to 1/2 of the length. The
rows go to benchmarks/results/tiny_pool_share.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from indexcache import Pattern, accelerate, evaluate, load
from indexcache.models.conditions import Origin

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tiny_pool_share.json"

PATTERNS = (Pattern("FFSSSSSSSFSS"), Pattern("FFSSSSSSSSSS"))  # the demo's at 1/4 and at 1/8
SHARES = {1024: (16, 8, 4, 2), 2048: (16, 8, 4, 2), 4096: (16, 8, 4)}
"""By length, the length over the pool. Too few documents are long enough for 1/2 of 4,096."""
SEQUENCES = 36
"""The least number of documents for an interval; each sequence is cut from its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    model = load("tiny", device=o.device)
    accelerate(model.module)
    rows = []
    conditions = []
    for length, shares in SHARES.items():
        factors = [length // (share * model.topk) for share in shares]
        patterns = [p for s in PATTERNS for p in (s, *(s.with_rest("R", c) for c in factors))]
        batches = model.batches("heldout", length=length, sequences=SEQUENCES, batch=2)
        evidence = evaluate(model, patterns, batches, origin=Origin(text="heldout"), progress=True)
        print(evidence.table())
        found = evidence.to_json()
        conditions.append(found["conditions"] | {"model": "tiny"})
        rows += [row | {"length": length} for row in found["rows"] if row["domain"] == "all"]
    result = {
        "command": "python -m benchmarks.pool_share",
        "date": datetime.date.today().isoformat(),
        "conditions": conditions,
        "rows": rows,
    }
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
