"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: text to the left, everything that looks like a number to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [
        max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(head)
    ]
    right = [
        bool(cells) and all(r[i][:1] in "+-0123456789" or not r[i] for r in cells)
        for i in range(len(head))
    ]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(r) for r in cells)])


def evidence(rows: Sequence[dict], base: str = "full") -> str:
    """The table of `evaluate`: one line per pattern, all domains; `base` names what the differences are to."""
    lines = []
    for r in (r for r in rows if r["domain"] == "all"):
        interval = "" if r["ci_low"] is None else f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
        lines.append(
            [
                r["name"],
                f"{r['full']}/{r['layers']}",
                f"{r['loss']:.4f}",
                f"{r['delta_loss']:+.4f}",
                interval,
                f"{r['kl']:.4f}",
                f"{r['agreement']:.1%}",
                r["pattern"],
            ]
        )
    return table(
        ["pattern", "full", "loss", f"vs {base}", "95 % interval", "KL", "same top-1", "roles"],
        lines,
    )


def positions(rows: Sequence[dict], base: str = "full") -> str:
    """Loss difference per part of the sequence, one column per part."""
    parts = sorted({(r["from"], r["to"]) for r in rows})
    by = {(r["name"], r["from"]): r for r in rows}
    lines = [
        [name, *(f"{by[name, a]['delta_loss']:+.4f}" for a, _ in parts)]
        for name in dict.fromkeys(r["name"] for r in rows)
    ]
    return table([f"vs {base}, by position", *(f"{a:.0%} to {b:.0%}" for a, b in parts)], lines)


def domains(rows: Sequence[dict], base: str = "full") -> str:
    """Loss difference per domain, one column per domain."""
    names = sorted({r["domain"] for r in rows} - {"all"})
    by = {(r["name"], r["domain"]): r for r in rows}
    lines = []
    for name in dict.fromkeys(r["name"] for r in rows):
        cells = []
        for d in names:
            r = by[name, d]
            width = "" if r["ci_low"] is None else f" [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
            cells.append(f"{r['delta_loss']:+.4f}{width}")
        lines.append([name, *cells])
    return table([f"vs {base}, by domain", *names], lines)
