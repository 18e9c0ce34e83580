"""Tables and pictures of `bench`, `profile` and `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from indexcache.report.tables import table

Row = Mapping[str, Any]
COLOURS = ("#30343f", "#2a7fbd", "#35b0a8", "#d98324", "#9a5fb4", "#b8475a")


def tokens(count: int) -> str:
    """10000 -> 10K."""
    return f"{count // 1000}K" if count >= 1000 and count % 1000 == 0 else str(count)


def speeds(rows: Sequence[Row]) -> str:
    """One line per row: times, rates, gain over all full, memory, and the published figures where there are any."""
    published = any(r.get("published") for r in rows)
    added = any(r.get("added_gb") is not None for r in rows)
    batched = any(r.get("batch", 1) != 1 for r in rows)
    head = [
        "context",
        "pattern",
        "full",
        *(["batch"] if batched else []),
        "TTFT s",
        "gain",
        "tok/s",
        *(["tok/s, all"] if batched else []),
        "gain",
        "peak GB",
        *(["added GB"] if added else []),
        *(["published TTFT", "published tok/s"] if published else []),
    ]
    lines = []
    for r in rows:
        start = [tokens(r["context"]), r.get("name", r["pattern"]), f"{r['full']}/{r['layers']}"]
        if r.get("error"):
            lines.append(
                [
                    *start,
                    *([str(r.get("asked", ""))] if batched else []),
                    "failed",
                    *[""] * (len(head) - 4 - batched),
                ]
            )
            continue
        gain, found = r.get("speedup") or {}, r.get("published") or {}
        lines.append(
            [
                *start,
                *([r["batch"]] if batched else []),
                _number(r["ttft_s"]),
                _times(gain.get("ttft")),
                _number(r["decode_tok_s"]),
                *([_number(r["decode_total_tok_s"])] if batched else []),
                _times(gain.get("decode")),
                f"{r['peak_gb']:.2f}",
                *([_number(r["added_gb"])] if added else []),
                *(
                    [
                        _number(found.get("ttft_s")),
                        _number(found.get("decode_tok_s", found.get("decode_total_tok_s"))),
                    ]
                    if published
                    else []
                ),
            ]
        )
    return table(head, lines)


def parts(rows: Sequence[Row], which: str = "prefill") -> str:
    """Milliseconds of each part with its floor in brackets; `which` is "prefill" or "decode" (of one step)."""
    measured, floors = (
        ("parts_ms", "floor_ms") if which == "prefill" else ("decode_parts_ms", "decode_floor_ms")
    )
    rows = [r for r in rows if not r.get("error") and r.get(measured)]
    names = [
        p
        for p in dict.fromkeys(p for r in rows for p in (*r[floors], *r[measured]))
        if any(_shown(r, p, measured, floors) for r in rows)
    ]
    lines = []
    for r in rows:
        cells = [
            f"{_number(r[measured].get(p, 0.0))} ({_number(r[floors].get(p, 0.0), 3)})"
            for p in names
        ]
        total, floor = sum(r[measured].values()), sum(r[floors].values())
        lines.append(
            [
                tokens(r["context"]),
                r.get("name", r["pattern"]),
                *([r["batch"]] if which == "decode" else []),
                *cells,
                f"{_number(total)} ({_number(floor, 3)})",
            ]
        )
    return table(
        [
            f"{which}, ms (floor)",
            "pattern",
            *(["batch"] if which == "decode" else []),
            *names,
            "sum",
        ],
        lines,
    )


def _shown(row: Row, part: str, measured: str, floors: str) -> bool:
    return bool(row[measured].get(part) or row[floors].get(part))


def predictions(rows: Sequence[Row]) -> str:
    """The table of `plan`."""
    head = [
        "pattern",
        "full",
        "TTFT s",
        "tok/s",
        "GPU seconds a request",
        "cost of a million tokens",
        "saves",
    ]
    lines = []
    for r in rows:
        saves = "" if r["saving"] is None else f"{r['saving']:.1%}"
        lines.append(
            [
                r["name"],
                f"{r['full']}/{r['layers']}",
                _number(r["ttft_s"]),
                _number(r["decode_tok_s"]),
                _number(r["gpu_s"]),
                _number(r["cost_per_million"]),
                saves,
            ]
        )
    return table(head, lines)


def check_plots() -> None:
    """Raises ValueError when matplotlib is not installed."""
    _canvas(1)


def draw_speedups(
    rows: Sequence[Row],
    path: str | Path,
    title: str = "",
    published: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG of the gains over all full by context, one request: prefill on the left, decoding on the right; a white dot is
    the gain that was published.

    Raises:
        ValueError: matplotlib is not installed.
    """
    rows = [r for r in rows if not r.get("error") and r.get("speedup") and r["asked"] == 1]
    figure, axes = _canvas(2)
    contexts = sorted({r["context"] for r in rows})
    names = list(dict.fromkeys(r["name"] for r in rows if r["full"] < r["layers"]))
    width = 0.8 / max(len(names), 1)
    for axis, what, quantity, label in zip(
        axes,
        ("ttft", "decode"),
        ("ttft_s", "decode_tok_s"),
        ("time to first token", "decoding, tokens/s"),
        strict=True,
    ):
        for i, name in enumerate(names):
            by = {
                r["context"]: r["speedup"][what]
                for r in rows
                if r["name"] == name and r["speedup"][what]
            }
            places = {
                c: x + (i - (len(names) - 1) / 2) * width for x, c in enumerate(contexts) if c in by
            }
            bars = axis.bar(
                places.values(),
                [by[c] for c in places],
                width,
                label=name,
                color=COLOURS[(i + 1) % len(COLOURS)],
            )
            axis.bar_label(bars, fmt="%.2f", fontsize=7, label_type="center", color="white")
            gains = _published_gains(published, quantity, name)
            dots = {places[c]: gains[c] for c in places if c in gains}
            seen = "published" in axis.get_legend_handles_labels()[1]
            axis.plot(
                dots.keys(),
                dots.values(),
                "o",
                color="white",
                mec="black",
                ms=5,
                label="published" if dots and not seen else None,
            )
        axis.axhline(1, color=COLOURS[0], lw=0.8)
        axis.set_xticks(range(len(contexts)), [tokens(c) for c in contexts])
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("gain over all full")
        axis.set_title(label, fontsize=9)
    if names:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
        )
    _save(figure, path, title)


def _published_gains(
    published: Mapping[str, Any] | None, quantity: str, name: str
) -> dict[int, float]:
    """Context -> published gain of a pattern over all full."""
    values = (published or {}).get(quantity, {})
    if not published or name not in values:
        return {}
    pairs = zip(published["contexts"], values["all"], values[name], strict=True)
    return {c: (full / mine if quantity == "ttft_s" else mine / full) for c, full, mine in pairs}


def draw_share(
    rows: Sequence[Row],
    path: str | Path,
    title: str = "",
    published: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG of the indexers' share of the prefill by context, one line per pattern; dashed: the published share.

    Raises:
        ValueError: matplotlib is not installed.
    """
    rows = [r for r in rows if not r.get("error") and r.get("indexer_share") is not None]
    figure, (axis,) = _canvas(1)
    for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
        points = sorted((r["context"], 100 * r["indexer_share"]) for r in rows if r["name"] == name)
        axis.plot(
            *zip(*points, strict=True), marker="o", label=name, color=COLOURS[i % len(COLOURS)]
        )
    if published and published.get("indexer_share"):
        axis.plot(
            published["contexts"],
            [100 * s for s in published["indexer_share"]["all"]],
            "--",
            color="#888888",
            label="published, all",
        )
    axis.set_ylim(0, 100)
    ticks = sorted({r["context"] for r in rows})
    axis.set_xticks(ticks, [tokens(c) for c in ticks])
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("indexers' share of the prefill, %")
    if rows:
        axis.legend(fontsize=8)
    _save(figure, path, title)


def _canvas(count: int) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "Drawing needs matplotlib: pip install 'indexcache[plot]', or --no-plot."
        ) from None
    figure = Figure(figsize=(5.6 * count, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, path: str | Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(Path(path), metadata={"Software": None})


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
