"""Draw pictures: the overlap heat map, gains by context, and the indexers' share of a prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from indexcache.pattern import Pattern
from indexcache.report.speed import Row, format_length

COLOURS = ("#30343f", "#2a7fbd", "#35b0a8", "#d98324", "#9a5fb4", "#b8475a")
BLOCK_COLOUR = "#35d0ff"
MAX_CELL_TEXT = 24  # layers; a larger heat map has no numbers in its cells
MAX_ROLE_TICKS = 48  # layers; a larger heat map has no roles on its axis


def check_plots() -> None:
    """Raise ValueError where matplotlib is not installed."""
    _figure(1, 1)


def draw_overlap(
    measured: Mapping[str, Any], path: str | Path, pattern: Pattern | None = None, title: str = ""
) -> None:
    """Write a PNG of the overlap between layers, with one square per pair of layers.

    Args:
        measured: "layers", "overlap" (that many rows of as many shares), "topk" and "chance".
        path: the file to write.
        pattern: each full layer and those that share its selection are framed as a block.
        title: the title; an empty one stands for the default.

    Raises:
        ValueError: matplotlib is not installed.
    """
    layers = measured["layers"]
    figure = _figure(max(5.0, 0.32 * layers + 2), max(4.4, 0.32 * layers + 1.4))
    axes = figure.add_subplot()
    image = axes.imshow(measured["overlap"], vmin=0, vmax=1, cmap="magma")
    if layers <= MAX_CELL_TEXT:
        for i, row in enumerate(measured["overlap"]):
            for j, share in enumerate(row):
                colour = "black" if share > 0.6 else "white"
                label = f"{100 * share:.0f}"
                axes.text(j, i, label, ha="center", va="center", fontsize=6, color=colour)
    if pattern is not None:
        for group in pattern.groups():
            corner = (group[0] - 0.5, group[0] - 0.5)
            axes.add_patch(_frame(corner, len(group)))
        roles = [f"{i}\n{role}" for i, role in enumerate(pattern.roles)]
        axes.set_xticks(range(layers), roles if layers <= MAX_ROLE_TICKS else [], fontsize=7)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    default_title = (
        f"Shared part of the selections, k = {measured['topk']} (chance {measured['chance']:.2f})"
    )
    axes.set_title(title or default_title, fontsize=9)
    figure.colorbar(image, label="|Ti and Tj| / k")
    _save(figure, path)


def draw_speedups(
    rows: Sequence[Row],
    path: str | Path,
    title: str = "",
    published: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG of the gains over all full by context, for single requests.

    Prefill is on the left and decoding on the right. A white dot is the gain that was published.

    Args:
        rows: rows of `bench`.
        path: the file to write.
        title: a title above both pictures.
        published: "contexts", and per quantity and pattern a value at each context.

    Raises:
        ValueError: matplotlib is not installed.
    """
    rows = [r for r in rows if not r.get("error") and r.get("speedup") and r["asked"] == 1]
    figure = _figure(11.2, 4)
    left, right = figure.subplots(1, 2)
    contexts = sorted({r["context"] for r in rows})
    names = list(dict.fromkeys(r["name"] for r in rows if r["full"] < r["layers"]))
    _draw_gains(left, rows, contexts, names, "ttft", _published_gains(published, "ttft_s"))
    _draw_gains(right, rows, contexts, names, "decode", _published_gains(published, "decode_tok_s"))
    left.set_title("time to first token", fontsize=9)
    right.set_title("decoding, tokens/s", fontsize=9)
    if names:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    _save(figure, path, title)


def _draw_gains(
    axes: Any,
    rows: Sequence[Row],
    contexts: Sequence[int],
    names: Sequence[str],
    quantity: str,
    published: Mapping[str, Mapping[int, float]],
) -> None:
    """Draw one group of bars per context, one bar per pattern name, and dots of published gains."""
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        gains = {
            r["context"]: r["speedup"][quantity]
            for r in rows
            if r["name"] == name and r["speedup"][quantity]
        }
        offset = (i - (len(names) - 1) / 2) * width
        places = {c: x + offset for x, c in enumerate(contexts) if c in gains}
        heights = [gains[c] for c in places]
        colour = COLOURS[(i + 1) % len(COLOURS)]
        bars = axes.bar(places.values(), heights, width, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, label_type="center", color="white")
        dots = {places[c]: gain for c, gain in published.get(name, {}).items() if c in places}
        labelled = "published" in axes.get_legend_handles_labels()[1]
        axes.plot(
            dots.keys(),
            dots.values(),
            "o",
            color="white",
            mec="black",
            ms=5,
            label="published" if dots and not labelled else None,
        )
    axes.axhline(1, color=COLOURS[0], lw=0.8)
    axes.set_xticks(range(len(contexts)), [format_length(c) for c in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("gain over all full")


def _published_gains(
    published: Mapping[str, Any] | None, quantity: str
) -> dict[str, dict[int, float]]:
    """Return pattern name -> context -> published gain over all full."""
    values = (published or {}).get(quantity)
    if not published or not values:
        return {}
    gains: dict[str, dict[int, float]] = {}
    for name, shared in values.items():
        pairs = zip(published["contexts"], values["all"], shared, strict=True)
        gains[name] = {
            context: full / value if quantity == "ttft_s" else value / full
            for context, full, value in pairs
        }
    return gains


def draw_share(
    rows: Sequence[Row],
    path: str | Path,
    title: str = "",
    published: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG of the indexers' share of the prefill by context, one line per pattern.

    A dashed line is the share that was published. The arguments are those of `draw_speedups`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    rows = [r for r in rows if not r.get("error") and r.get("indexer_share") is not None]
    figure = _figure(5.6, 4)
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
        points = sorted((r["context"], 100 * r["indexer_share"]) for r in rows if r["name"] == name)
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
    if published and published.get("indexer_share"):
        shares = [100 * share for share in published["indexer_share"]["all"]]
        axes.plot(published["contexts"], shares, "--", color="#888888", label="published, all")
    axes.set_ylim(0, 100)
    ticks = sorted({r["context"] for r in rows})
    axes.set_xticks(ticks, [format_length(c) for c in ticks])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("indexers' share of the prefill, %")
    if rows:
        axes.legend(fontsize=8)
    _save(figure, path, title)


def _figure(width: float, height: float) -> Any:
    """Make an empty figure of that size in inches, without a window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "Drawing needs matplotlib: pip install 'indexcache[plot]' (bench runs without it with "
            "--no-plot)."
        ) from None
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _frame(corner: tuple[float, float], size: int) -> Any:
    """Make the outline of a square whose lower left corner is `corner`."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, size, size, fill=False, edgecolor=BLOCK_COLOUR, lw=2)


def _save(figure: Any, path: str | Path, title: str = "") -> None:
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(Path(path), metadata={"Software": None})
