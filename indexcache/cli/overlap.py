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
    from indexcache.spec import parse_pattern

    loaded, batches = load(s, s.split, s.sequences)
    chosen = parse_pattern(s.pattern, len(indexers(loaded.module))) if s.pattern else None
    result = overlap(loaded.module, batches, progress=True)
    measured = result.to_json()
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "overlap.json", measured | {"pattern": str(chosen.pattern) if chosen else None}
    )
    draw_overlap(measured, out / "overlap.png", chosen.pattern if chosen else None)
    print(result.table())
    print(
        f"\nchance {result.chance:.3f}, {result.queries} queries with more than k = {result.topk} tokens; "
        f"{out / 'overlap.json'}, {out / 'overlap.png'}"
    )
    emit(s.json, measured)
    return 0
