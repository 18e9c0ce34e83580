"""Make the table of how often intervals cover what they should."""

from __future__ import annotations

from docs.tables.registry import markdown, read, table


@table("coverage")
def coverage() -> str:
    rows = {(r["differences"], r["documents"]): r for r in read("coverage.json")["rows"]}

    def cell(name: str, documents: int) -> str:
        r = rows[name, documents]
        rates = (r["covered"], r["false_safe"], r["aa_different"])
        return ", ".join(f"{100 * rate:.1f}" for rate in rates)

    return markdown(
        [
            "differences of documents",
            "percentile bootstrap covers at 3, 8, 24, 50",
            "false safe",
            "this at 36: covers, false safe, A/A",
            "at 50",
            "at 108",
            "width over t",
        ],
        [
            [
                f"{name.split()[0]} `{name.split()[1]}`" if name.startswith("tiny") else name,
                *(
                    ", ".join(f"{100 * rows[name, n][key]:.0f}" for n in (3, 8, 24, 50))
                    for key in ("percentile_covered", "percentile_false_safe")
                ),
                *(cell(name, n) for n in (36, 50, 108)),
                ", ".join(f"{rows[name, n]['width_over_t']:.1f}" for n in (36, 50, 108)),
            ]
            for name in dict.fromkeys(name for name, _ in rows)
        ],
    )
