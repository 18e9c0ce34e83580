"""Run the main verbs on the packaged model `tiny`: inspect, search, overlap, evaluate, export.

    python examples/demo.py --out demo

Every step is the command that a user would type. If you run the demo again, the search goes on from
its journal.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from indexcache.cli import main as indexcache


def step(*command: str) -> None:
    """Print a command, run it, and stop the demo if it fails."""
    print("\n$ indexcache " + " ".join(command), flush=True)
    code = indexcache(command)
    if code:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out: Path = parser.parse_args().out
    search = str(out / "search")
    best = str(out / "search" / "pattern.json")
    began = time.time()
    step("inspect", "tiny")
    step("search", "tiny", "--out", search, "--keep", "1/8", "--no-uniform")
    step("overlap", "tiny", "--out", str(out / "overlap"), "--pattern", f"{search}:1/4")
    patterns = [
        "full=full",
        "uniform 1/2=uniform:1/2",
        "uniform 1/4=uniform:1/4",
        "uniform 1/4, offset 2=uniform:1/4:2",
        f"searched 1/2={search}:1/2",
        f"searched 1/4={search}:1/4",
        f"searched 1/8={search}:1/8",
        f"searched 1/4, rest R, pool 1/16={search}:1/4+R2",
        f"searched 1/4, rest R, pool 1/8={search}:1/4+R4",
        f"searched 1/4, rest R={search}:1/4+R8",
        f"searched 1/8, rest R={search}:1/8+R8",
    ]
    evidence = str(out / "evidence")
    step("evaluate", "tiny", "--out", evidence, "--sequences", "36", "--pattern", *patterns)
    shutil.rmtree(out / "export", ignore_errors=True)
    step("export", "tiny", "--pattern", f"{search}:1/4", "--out", str(out / "export"))
    print(
        f"\nDone in {time.time() - began:.0f} s. The pattern that keeps the fewest full layers is "
        f"in {best}; everything else is in {out}."
    )


if __name__ == "__main__":
    main()
