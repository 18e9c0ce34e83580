"""Find a sharing pattern by the paper's greedy search (training-free), for every budget down to --keep.

The run folder holds settings.json, journal.jsonl (one line per evaluation), result.json and pattern.json. A killed
run goes on with the same command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from indexcache.cli.common import ModelSettings, load, split_flag
from indexcache.cli.flags import emit, flag, required


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    verb: ClassVar[str] = "search"
    out: str = required("run folder; an interrupted run in it is continued", metavar="DIR")
    split: str = split_flag("calibration", "search on")
    sequences: int = flag(9, "sequences of calibration text, spread over the domains")
    keep: float = flag(
        0.25, "fraction of the layers that stay full at the end, e.g. 1/4", fraction=True
    )
    stages: int = flag(1, "pipeline stages of the engine: the first layer of each stays full")
    uniform: bool = flag(True, "also evaluate uniform patterns (S and R) for comparison")
    pool_factor: int = flag(8, "pool of the uniform R patterns, in units of k")


def run(s: Settings) -> int:
    from indexcache.models.loading import fingerprint
    from indexcache.searching.run import SearchSettings, search

    loaded, batches = load(s, s.split, s.sequences)
    settings = SearchSettings(
        keep=s.keep, stages=s.stages, uniform=s.uniform, pool_factor=s.pool_factor
    )
    identity = {"model": fingerprint(loaded.path), "seed": s.seed}
    result = search(loaded.module, batches, s.out, settings, identity=identity, progress=True)
    print(result.table())
    print(
        f"\n{s.out}: pattern.json, result.json, journal.jsonl. Calibration losses flatter a searched pattern: evaluate it on "
        "held-out text next."
    )
    emit(s.json, result.to_json())
    return 0
