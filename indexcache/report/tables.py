"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

_ROW = DataRow("", "  ", "")
_FORMAT = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "-", "  ", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=_ROW,
    datarow=_ROW,
    padding=0,
    with_header_hide=None,
)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as aligned columns: text to the left, what looks like a number to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) or [("text",)] * len(head)
    numeric = [all(c[:1] in "+-0123456789" for c in column) for column in columns]
    text = tabulate(
        # The head is a row: tabulate would widen a column that it is told has a header.
        [list(head), SEPARATING_LINE, *cells],
        tablefmt=_FORMAT,
        colalign=["right" if right else "left" for right in numeric],
        disable_numparse=True,
        preserve_whitespace=True,
    )
    return "\n".join(line.rstrip() for line in text.split("\n"))
