"""Tables of `bench`, `profile` and `plan`.

A table is a list of `Column`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from indexcache.report.tables import table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its title, the function that makes its cell of a row, and whether it is shown."""

    title: str
    cell: Callable[[Row], object]
    shown: bool = True


def render(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Render the columns that are shown, one line per row."""
    shown = [column for column in columns if column.shown]
    return table([c.title for c in shown], [[c.cell(row) for c in shown] for row in rows])


def speed_table(rows: Sequence[Row]) -> str:
    """Render one line per row of `bench`.

    It has times, rates, gains over all full, memory, and published figures. A row that could not be
    measured says "failed".
    """
    batched = any(r.get("batch", 1) != 1 for r in rows)
    added = any(r.get("added_gb") is not None for r in rows)
    published = any(r.get("published") for r in rows)
    return render(
        [
            Column("context", lambda r: format_length(r["context"])),
            Column("pattern", _name),
            Column("full", _full),
            Column("batch", lambda r: r.get("batch", r.get("asked", "")), batched),
            Column("TTFT s", lambda r: "failed" if r.get("error") else _number(r["ttft_s"])),
            Column("gain", lambda r: _gain(r, "ttft")),
            Column("tok/s", lambda r: _number(r.get("decode_tok_s"))),
            Column("tok/s, all", lambda r: _number(r.get("decode_total_tok_s")), batched),
            Column("gain", lambda r: _gain(r, "decode")),
            Column("peak GB", lambda r: f"{r['peak_gb']:.2f}" if "peak_gb" in r else ""),
            Column("added GB", lambda r: _number(r.get("added_gb")), added),
            Column("published TTFT", lambda r: _published(r, "ttft_s"), published),
            Column(
                "published tok/s",
                lambda r: _published(r, "decode_tok_s") or _published(r, "decode_total_tok_s"),
                published,
            ),
        ],
        rows,
    )


def parts_table(rows: Sequence[Row], which: str = "prefill") -> str:
    """Render the milliseconds of each part with its floor in brackets.

    Args:
        which: "prefill", or "decode" for one step.
    """
    prefix = "" if which == "prefill" else "decode_"
    measured, floors = f"{prefix}parts_ms", f"{prefix}floor_ms"
    rows = [r for r in rows if not r.get("error") and r.get(measured)]
    names = dict.fromkeys(name for r in rows for name in (*r[floors], *r[measured]))

    def part_column(name: str) -> Column:
        def cell(r: Row) -> str:
            return _with_floor(r[measured].get(name, 0.0), r[floors].get(name, 0.0))

        used = any(r[measured].get(name) or r[floors].get(name) for r in rows)
        return Column(name, cell, used)

    return render(
        [
            Column(f"{which}, ms (floor)", lambda r: format_length(r["context"])),
            Column("pattern", _name),
            Column("batch", lambda r: r["batch"], which == "decode"),
            *(part_column(name) for name in names),
            Column(
                "sum", lambda r: _with_floor(sum(r[measured].values()), sum(r[floors].values()))
            ),
        ],
        rows,
    )


def prediction_table(rows: Sequence[Row]) -> str:
    """Render the rows of `plan`."""
    return render(
        [
            Column("pattern", _name),
            Column("full", _full),
            Column("TTFT s", lambda r: _number(r["ttft_s"])),
            Column("tok/s", lambda r: _number(r["decode_tok_s"])),
            Column("GPU seconds a request", lambda r: _number(r["gpu_s"])),
            Column("cost of a million tokens", lambda r: _number(r["cost_per_million"])),
            Column("saves", lambda r: "" if r["saving"] is None else f"{r['saving']:.1%}"),
        ],
        rows,
    )


def format_length(tokens: int) -> str:
    """Write a number of tokens as people say it: 10000 is "10K", 1500 is "1500"."""
    return f"{tokens // 1000}K" if tokens >= 1000 and tokens % 1000 == 0 else str(tokens)


def _name(row: Row) -> str:
    return row.get("name", row["pattern"])


def _full(row: Row) -> str:
    return f"{row['full']}/{row['layers']}"


def _gain(row: Row, quantity: str) -> str:
    gain = (row.get("speedup") or {}).get(quantity)
    return "" if gain is None else f"{gain:.2f}x"


def _published(row: Row, quantity: str) -> str:
    return _number((row.get("published") or {}).get(quantity))


def _with_floor(value: float, floor: float) -> str:
    return f"{_number(value)} ({_number(floor, 3)})"


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
