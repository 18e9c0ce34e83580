"""Register tables, read the result files that they quote, and fill pages with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns the markdown of the table `name`."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = make
        return make

    return register


def pages() -> list[Path]:
    """Return README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return a page with every table made anew from its result files."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def exists(name: str) -> bool:
    """Return whether there is a result file of this name."""
    return (RESULTS / name).exists()


def read(name: str) -> Any:
    """Return the content of one result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a markdown table."""
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def kilo(tokens: int) -> str:
    return f"{tokens // 1000}K"


def seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
