"""Measure how much the selections of the layers have in common; writes overlap.json and a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from indexcache.cli.common import ModelSettings, load, split_flag
from indexcache.cli.flags import emit, flag, required
from indexcache.spec import SYNTAX

EPILOG = f"SPEC is {SYNTAX}"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    verb: ClassVar[str] = "overlap"
    out: str = required("folder for overlap.json and overlap.png", metavar="DIR")
    pattern: str | None = flag(
        None, "pattern whose blocks are drawn into the heat map", metavar="SPEC"
    )
    split: str = split_flag("heldout", "measure on")
    sequences: int = flag(6, "sequences of text, spread over the domains")


def run(s: Settings) -> int:
    from indexcache.evals.overlap import overlap
    from indexcache.models.family import indexers
    from indexcache.records import write_json
    from indexcache.report.plots import draw_overlap
    from indexcache.report.tables import table
    from indexcache.spec import parse_pattern

    loaded, batches = load(s, s.split, s.sequences)
    chosen = parse_pattern(s.pattern, len(indexers(loaded.module))) if s.pattern else None
    measured = overlap(loaded.module, batches)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "overlap.json", measured | {"pattern": str(chosen.pattern) if chosen else None}
    )
    draw_overlap(measured, out / "overlap.png", chosen.pattern if chosen else None)
    m = measured["overlap"]
    rows = [[i, f"{m[i - 1][i]:.3f}", f"{sum(m[i]) / len(m):.3f}"] for i in range(1, len(m))]
    print(table(["layer", "with the layer before", "mean over all layers"], rows))
    print(
        f"\nchance {measured['chance']:.3f}, {measured['queries']} queries with more than k = {measured['topk']} tokens; "
        f"{out / 'overlap.json'}, {out / 'overlap.png'}"
    )
    emit(s.json, measured)
    return 0
