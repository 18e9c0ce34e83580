"""Prove a pattern safe on held-out text: loss difference to the full model (or --against another) with its interval, KL, agreement."""

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
    verb: ClassVar[str] = "evaluate"
    pattern: tuple[str, ...] = required(
        "one or more patterns; the forms of SPEC are below", metavar="SPEC"
    )
    against: str | None = flag(
        None, "baseline of all differences (default: the model itself, all full)", metavar="SPEC"
    )
    out: str | None = flag(None, "folder for evidence.json", metavar="DIR")
    split: str = split_flag("heldout", "evaluate on")
    sequences: int = flag(24, "sequences of held-out text, spread over the domains")
    most: float | None = flag(
        None, "gate: exit 1 when a pattern's loss difference has an upper end above this (nats)"
    )


def run(s: Settings) -> int:
    from indexcache.data import check_unseen
    from indexcache.evals.evaluate import evaluate
    from indexcache.models.family import indexers
    from indexcache.records import write_json
    from indexcache.spec import parse_pattern

    loaded, batches = load(s, s.split, s.sequences)
    chosen = [parse_pattern(spec, len(indexers(loaded.module))) for spec in s.pattern]
    for c in chosen:
        check_unseen(batches, c.seen)
    if len({c.name for c in chosen}) < len(chosen):
        raise ValueError("Two patterns have the same name; give each its own with NAME=...")
    against = parse_pattern(s.against, len(indexers(loaded.module))) if s.against else None
    if against:
        check_unseen(batches, against.seen)
    patterns = {c.name: c.pattern for c in chosen}
    result = evaluate(
        loaded.module,
        patterns,
        batches,
        against=against.pattern if against else None,
        seed=s.seed,
        progress=True,
    )
    base = against.name if against else "full"
    if not against and "S" in result.baseline.roles:
        print(
            f"The model has layers without an indexer; 'full' below is what it does by itself: {result.baseline}\n"
        )
    print(result.table(base))
    if s.out is not None:
        Path(s.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(s.out) / "evidence.json", result.to_json())
    emit(s.json, result.to_json())
    if s.most is None:
        return 0
    return int(any(r.ci_high is None or r.ci_high > s.most for r in result.overall))
