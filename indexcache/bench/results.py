"""Read the result of a bench, compare its rows, and render tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from indexcache.bench.floors import INDEX_PARTS
from indexcache.pattern import Pattern
from indexcache.records import number_of, read_json
from indexcache.report.plots import draw_share, draw_speedups
from indexcache.report.speed import format_length, parts_table, speed_table
from indexcache.vacuity import choosing_size

GAINS, SHARE = "speedup.png", "indexer_share.png"  # the pictures of a bench
FILL = "fill"  # This batch means as many requests as fit.
CELL_KEYS = {"context", "pattern", "full", "layers"}  # A row that failed has these keys too.


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The measurements of a bench: the content of bench.json.

    Attributes:
        device: name of the device.
        date: ISO date of the last row.
        model: the model as the user named it.
        random: whether its weights are random.
        note: sentences that a reader of the rows must know.
        shape: the sizes of the model; see `shapes.Shape`.
        ceilings: the rates of the device, by which the floors divide; see `shapes.Rates`.
        settings: the settings that all rows share.
        published: the published figures of the model, or None.
        rows: the results of `measure.measure`, with "name", "asked" (the batch that was asked for),
            "speedup" against all full, "indexer_share" and the "published" figures where there are
            any. A row that could not be measured has an "error" in their place.
    """

    device: str
    date: str
    model: str
    random: bool
    note: str
    shape: dict[str, Any]
    ceilings: dict[str, Any]
    settings: dict[str, Any]
    published: dict[str, Any] | None
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, file: str | Path) -> BenchResult:
        """Read a bench.json.

        Raises:
            ValueError: the file cannot be read, or it is no bench.json.
        """
        value = read_json(Path(file))
        if not (
            isinstance(value, dict)
            and {"device", "date", "shape", "settings", "rows"} <= set(value)
            and isinstance(value["rows"], list)
            and all(isinstance(row, dict) for row in value["rows"])
        ):
            raise ValueError(f"{file}: is not a bench.json of an earlier run.")
        for row in value["rows"]:
            if not set(row) >= CELL_KEYS or not ("chunk" in row or row.get("error")):
                raise ValueError(
                    f"{file}: a row lacks what a bench writes ({', '.join(sorted(CELL_KEYS))}, "
                    "chunk)."
                )
        optional = {
            "model": "unknown",
            "random": False,
            "note": "",
            "ceilings": {},
            "published": None,
        }
        names = [field.name for field in fields(cls)]
        result = cls(**{name: value.get(name, optional.get(name)) for name in names})
        try:
            result.report()
        except (TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{file}: a row is not what a bench writes, so the file was changed; measure anew."
            ) from None
        return result

    def to_json(self) -> dict[str, Any]:
        """Return the content of bench.json."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def table(self) -> str:
        """Render times, rates, gains and memory, one line per row."""
        return speed_table(self.rows)

    def report(self) -> str:
        """Render a title, the tables of speeds and parts, and the notes."""
        measured = not self.ceilings.get("memory")
        source = "measured here" if measured else f"of an {self.ceilings['name']}"
        note = f"Floors: rates {source}. Parts are timed in a pass of their own. {self.note}"
        note += "".join(f"\n{sentence}" for sentence in self._same_as_full())
        if self.published:
            note += f"\nPublished: {self.published['source']}"
        return "\n\n".join(
            [
                f"{self.model}, {self.shape['layers']} layers, {self.device}, {self.date}",
                self.table(),
                parts_table(self.rows, "prefill"),
                parts_table(self.rows, "decode"),
                note,
            ]
        )

    def _same_as_full(self) -> list[str]:
        """Say at which contexts the roles of a row select what full layers select."""
        topk = int(self.shape.get("topk") or 0)
        same: dict[str, list[int]] = {}
        for row in self.rows:
            pattern = Pattern.of(row["pattern"])
            size = choosing_size([pattern], topk)
            if size is not None and row["context"] <= size:
                same.setdefault(f"{row.get('name', pattern)} ({size} tokens)", []).append(
                    row["context"]
                )
        return [
            f"At {' and '.join(map(format_length, sorted(set(contexts))))} the layers of {what} "
            "choose from all there is and select what full layers select."
            for what, contexts in same.items()
        ]

    def draw(self, folder: Path) -> tuple[Path, Path]:
        """Write speedup.png and indexer_share.png into the folder, and return their paths.

        Raises:
            ValueError: matplotlib is not installed.
        """
        title = f"{self.model}, {self.shape['layers']} layers, {self.device}"
        gains = folder / GAINS
        share = folder / SHARE
        draw_speedups(self.rows, gains, title, self.published)
        draw_share(self.rows, share, title, self.published)
        return gains, share


def check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for a line of a journal that no bench has written."""
    counts = ["context", "full", "layers"]
    if row["asked"] != FILL:
        counts.append("asked")
    for key in counts:
        if type(row[key]) is not int or row[key] < 1:
            raise ValueError(f"its {key} is {row[key]!r:.60}")
    for key in ("name", "pattern"):
        if not isinstance(row[key], str):
            raise ValueError(f"its {key} is {row[key]!r:.60}")
    Pattern(row["pattern"]).check(layers=row["layers"])
    if row.get("error"):
        return
    for key in ("cache_gb", "weights_gb"):
        number_of(row, key)
    for key in ("batch", "chunk", "decode_tok_s", "decode_total_tok_s"):
        if number_of(row, key) <= 0:
            raise ValueError(f"its {key} is {row[key]!r:.60}")
    if row["batch"] == 1 or row["ttft_s"] is not None:
        number_of(row, "ttft_s")
    for key in ("parts_ms", "decode_parts_ms", "floor_ms", "decode_floor_ms"):
        for name in row[key]:
            number_of(row[key], name)


def cell_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of a row's cell: context, pattern and the batch that was asked for."""
    return row["context"], row["pattern"], row.get("asked", row.get("batch", 1))


def derive_rows(
    journal: Sequence[Mapping[str, Any]], published: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Return the last measurement of each cell, and add its gains and published figures.

    Args:
        journal: rows in the order in which they were measured.
        published: published figures of this model, see `published_figures`.
    """
    latest = {cell_key(row): dict(row) for row in journal}
    rows = sorted(
        latest.values(), key=lambda r: (str(r["asked"]), r["context"], -r["full"], r["name"])
    )
    all_full = {
        (r["context"], r["asked"]): r
        for r in reversed(rows)
        if set(r["pattern"]) == {"F"} and not r.get("error")
    }
    for row in rows:
        if row.get("error"):
            continue
        if full := all_full.get((row["context"], row["asked"])):
            row["speedup"] = _speedup(row, full)
        row["indexer_share"] = indexer_share(row)
        if figures := _published_row(published, row):
            row["published"] = figures
    return rows


def _speedup(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the gains of a row over the one with all layers full."""
    prefills = row["ttft_s"] and full["ttft_s"]
    return {
        "ttft": round(full["ttft_s"] / row["ttft_s"], 6) if prefills else None,
        "decode": round(row["decode_total_tok_s"] / full["decode_total_tok_s"], 6),
    }


def indexer_share(row: Mapping[str, Any]) -> float | None:
    """Return the indexers' share of a prefill, from the pass that was timed in parts."""
    parts = row.get("parts_ms") or {}
    total = sum(parts.values())
    return sum(parts.get(name, 0.0) for name in INDEX_PARTS) / total if total else None


def published_figures(model: str) -> dict[str, Any] | None:
    """Return the published figures of a named shape, or None where there are none.

    They are "contexts", and for each quantity and pattern a list of values at these.
    """
    return _published().get(model)


def published_source() -> str:
    """Return where the published figures are from."""
    return str(_published()["source"])


def _published() -> dict[str, Any]:
    file = resources.files("indexcache") / "assets" / "published.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _published_row(published: Mapping[str, Any] | None, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the published figures of a row's context and share of full layers, if it has no R."""
    if published is None or row["context"] not in published["contexts"] or "R" in row["pattern"]:
        return {}
    if row["asked"] not in (1, FILL):
        return {}
    share = row["full"] / row["layers"]
    shares = {"all": 1.0, "1/2": 0.5, "1/4": 0.25}
    name = next((name for name, value in shares.items() if abs(share - value) < 0.03), None)
    at = published["contexts"].index(row["context"])
    quantities = ("ttft_s", "decode_tok_s") if row["batch"] == 1 else ("decode_total_tok_s",)
    return {q: published[q][name][at] for q in quantities if name in published[q]}
