"""Say where the time of a model goes at given lengths: each part of prefill and decoding beside its floor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from indexcache.cli.bench import show
from indexcache.cli.flags import emit, flag, required
from indexcache.cli.timing import PATTERNS, TimingSettings, open_model

EPILOG = f"PATTERN is {PATTERNS}. N is a number of tokens, K a thousand."


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    verb: ClassVar[str] = "profile"
    contexts: tuple[str, ...] = required("lengths of the prompt", metavar="N")
    pattern: tuple[str, ...] = flag(("all",), "pattern to run under, or several", metavar="PATTERN")
    batch: str = flag("1", "requests decoded together", metavar="N")
    out: str | None = flag(None, "folder for profile.json", metavar="DIR")


def run(s: Settings) -> int:
    from indexcache.bench.run import run_bench
    from indexcache.records import write_json

    if s.out is not None:
        Path(s.out).mkdir(parents=True, exist_ok=True)
    subject, grid, text = open_model(s, s.pattern, s.batch)
    result = run_bench(subject, grid, text=text)
    show(result)
    if s.out is not None:
        write_json(Path(s.out) / "profile.json", result)
    emit(s.json, result)
    return 0
