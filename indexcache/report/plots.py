"""The overlap heat map with the blocks of a pattern drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from indexcache.pattern import Pattern


def draw_overlap(
    measured: dict[str, Any], path: str | Path, pattern: Pattern | None = None, title: str = ""
) -> None:
    """Write a PNG of `overlap`'s result; each block of `pattern` is a full layer and those that live on it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise ValueError("Drawing needs matplotlib: pip install 'indexcache[plot]'.") from None
    n = measured["layers"]
    figure = Figure(
        figsize=(max(5.0, 0.32 * n + 2), max(4.4, 0.32 * n + 1.4)), dpi=120, layout="constrained"
    )
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    image = axes.imshow(measured["overlap"], vmin=0, vmax=1, cmap="magma")
    if n <= 24:
        for i in range(n):
            for j in range(n):
                v = measured["overlap"][i][j]
                axes.text(
                    j,
                    i,
                    f"{100 * v:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black" if v > 0.6 else "white",
                )
    if pattern is not None:
        for group in pattern.groups():
            size = len(group)
            axes.add_patch(
                Rectangle(
                    (group[0] - 0.5, group[0] - 0.5),
                    size,
                    size,
                    fill=False,
                    edgecolor="#35d0ff",
                    lw=2,
                )
            )
        axes.set_xticks(
            range(n),
            [f"{i}\n{r}" for i, r in enumerate(pattern.roles)] if n <= 48 else [],
            fontsize=7,
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    axes.set_title(
        title
        or f"Shared part of the selections, k = {measured['topk']} (chance {measured['chance']:.2f})",
        fontsize=9,
    )
    figure.colorbar(image, label="|Ti and Tj| / k")
    figure.savefig(Path(path), metadata={"Software": None})
