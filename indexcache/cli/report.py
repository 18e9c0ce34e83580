"""The verb `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output
from indexcache.cli.results import deliver
from indexcache.report.html import ReportSettings

SUFFIXES = (".html", ".htm")


def report(
    runs: Annotated[
        tuple[str, ...],
        Parameter(name="RUN", help="Run folders of one model, written by any verbs."),
    ],
    /,
    *,
    out: Annotated[str, Parameter(metavar="FILE", help="The page to write, e.g. report.html.")],
    settings: Annotated[ReportSettings, FLAT] = ReportSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Make one HTML page of run folders: what to deploy, why, and the numbers behind it.

    It takes folders of search, evaluate, overlap, bench, distill and matrix, and certificates. The
    page is one file that needs no network and runs no script.
    """
    from indexcache.records import atomic
    from indexcache.report.html import make_report

    page = _page(out)
    made = make_report(runs, settings)

    def write(path: Path) -> None:
        with atomic(path) as temporary:
            temporary.write_text(made.html, encoding="utf-8")

    deliver(f"{made.table()}\n\n{page}", made.to_json(), output, {page: write})


def _page(out: str) -> Path:
    """Return the file of --out.

    Raises:
        ValueError: it has no name that ends as a page's does, is a folder, or lies in none.
    """
    from indexcache.records import check_folder

    page = Path(out)
    if "\0" in out or page.suffix.lower() not in SUFFIXES or page.stem.startswith("."):
        raise ValueError(
            f"--out is {out!r:.200}, but it takes the name of a page, e.g. report.html."
        )
    if page.is_dir():
        raise ValueError(f"{out}: this is a folder, but --out takes the name of a page.")
    check_folder(page.parent)
    return page
