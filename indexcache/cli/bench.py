"""Time prefill and decoding at several lengths under several patterns, beside the floors; tables, JSON, two PNGs.

Every row is written down when it is measured; a killed run goes on with the same command. On a finished bench.json
(in the place of MODEL) the tables and pictures are made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from indexcache.cli.flags import emit, flag
from indexcache.cli.timing import PATTERNS, TimingSettings, open_model

EPILOG = f"PATTERN is {PATTERNS}. N is a number of tokens, K a thousand. Several may be parted by commas."


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    verb: ClassVar[str] = "bench"
    patterns: tuple[str, ...] = flag(
        ("all", "1/2", "1/4", "1/8+R"), "patterns, named as below", metavar="PATTERN"
    )
    batch: str = flag(
        "1",
        "requests decoded together: a number, or fill for as many as fit; 1,fill for both",
        metavar="N",
    )
    out: str | None = flag(None, "folder for bench.json and the pictures", metavar="DIR")
    fresh: bool = flag(False, "measure everything anew instead of keeping the rows in --out")
    plot: bool = flag(True, "draw the pictures")


def run(s: Settings) -> int:
    from indexcache.bench.run import RESULT, run_bench
    from indexcache.records import read_json
    from indexcache.report.speed import check_plots

    out = None if s.out is None else Path(s.out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if s.plot:
            check_plots()
    if s.model.endswith(".json"):
        result = read_json(Path(s.model))
        if (
            not isinstance(result, dict)
            or not isinstance(result.get("rows"), list)
            or "shape" not in result
        ):
            raise ValueError(f"{s.model}: is not a {RESULT} of an earlier run.")
    else:
        subject, grid, text = open_model(s, s.patterns, s.batch)
        result = run_bench(subject, grid, out, fresh=s.fresh, text=text)
        if out is not None:
            print(f"{out / RESULT}\n")
    try:
        show(result)
        if out is not None and s.plot:
            draw(result, out)
    except (TypeError, KeyError, AttributeError):
        if not s.model.endswith(".json"):
            raise
        raise ValueError(
            f"{s.model}: a row is not what a bench writes, so the file was changed; measure anew."
        ) from None
    emit(s.json, result)
    return 0


def show(result: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    from indexcache.report.speed import parts, speeds

    print(
        f"{result['model']}, {result['shape']['layers']} layers, {result['device']}, {result['date']}\n"
    )
    print(speeds(result["rows"]))
    for which in ("prefill", "decode"):
        print("\n" + parts(result["rows"], which))
    whose = (
        "measured here"
        if result["ceilings"]["memory"] == 0
        else f"of an {result['ceilings']['name']}"
    )
    print(f"\nFloors: rates {whose}. Parts are timed in a pass of their own. {result['note']}")
    if result.get("published"):
        print(f"Published: {result['published']['source']}")


def draw(result: Mapping[str, Any], out: Path) -> None:
    from indexcache.report.speed import draw_share, draw_speedups

    title = f"{result['model']}, {result['shape']['layers']} layers, {result['device']}"
    draw_speedups(result["rows"], out / "speedup.png", title, result.get("published"))
    draw_share(result["rows"], out / "indexer_share.png", title, result.get("published"))
    print(f"\n{out / 'speedup.png'}, {out / 'indexer_share.png'}")
