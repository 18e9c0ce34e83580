"""Make the tables of the packaged model."""

from __future__ import annotations

from docs.tables.registry import markdown, read, table


@table("tiny")
def tiny() -> str:
    rows = []
    for r in read("demo_tiny.json")["rows"]:
        if r["domain"] == "all":
            rows.append(
                [
                    f"{r['name']}: `{r['pattern']}`",
                    f"{r['full']} of {r['layers']}",
                    f"{r['loss']:.4f}",
                    f"{r['delta_loss']:+.4f}",
                    f"[{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]",
                    f"{r['kl']:.4f}",
                    f"{100 * r['agreement']:.1f}%",
                    f"{100 * r['pool_share']:.3g}%" if r.get("pool_share") else "",
                ]
            )
    header = ["pattern", "full layers", "loss", "vs full", "95 % interval", "KL", "same top-1"]
    return markdown([*header, "pool of the context"], rows)


@table("tiny-pool")
def tiny_pool() -> str:
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for r in read("tiny_pool_share.json")["rows"]:
        cells = rows.setdefault((r["full"], r["length"]), {})
        share = "S" if r["pool"] is None else f"R, pool 1/{round(1 / r['pool_share'])}"
        cells[share] = f"{r['delta_loss']:+.3f} [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
    shares = next(iter(rows.values()))
    return markdown(
        ["full layers", "length", *shares],
        [
            [f"{full} of 12", f"{n:,}", *(cells.get(share, "") for share in shares)]
            for (full, n), cells in sorted(rows.items(), key=lambda row: (-row[0][0], row[0][1]))
        ],
    )


@table("tiny-third-layer")
def tiny_third_layer() -> str:
    rows = read("tiny_third_layer.json")["rows"]
    return markdown(
        ["third full layer", "loss above the searched pattern's", "95 % interval"],
        [
            [
                f"`{r['pattern']}`",
                f"{r['delta_loss']:+.3f}",
                f"[{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]",
            ]
            for r in sorted(rows, key=lambda r: r["delta_loss"])
        ],
    )


@table("tiny-cpu")
def tiny_cpu() -> str:
    rows = []
    for r in read("tiny_cpu.json")["rows"]:
        formula = f"{r['stock_formula_mb']:,} MB" if r["path"] == "stock" else ""
        rows.append(
            [
                f"{r['context']:,}",
                r["path"],
                "" if r["seconds"] is None else f"{r['seconds']:.1f}",
                "" if r["peak_mb"] is None else f"{r['peak_mb']:,} MB",
                formula,
            ]
        )
    header = ["context", "path", "seconds", "peak of the process", "stock's scores by formula"]
    return markdown(header, rows)
