"""Make the tables of what searches cost, and of where they start."""

from __future__ import annotations

from docs.tables.registry import markdown, read, table


@table("search-cost")
def search_cost() -> str:
    rows = read("search_cost.json")["rows"]
    exact = {(r["model"], r["seed"]): r for r in rows if r["method"] == "exact"}
    budgets = {
        model: sorted({r["full"] for r in rows if r["model"] == model}, reverse=True)
        for model, _ in exact
    }
    lines = []
    for model, seed, method in dict.fromkeys((r["model"], r["seed"], r["method"]) for r in rows):
        own = {
            r["full"]: r
            for r in rows
            if (r["model"], r["seed"], r["method"]) == (model, seed, method)
        }
        first = next(iter(own.values()))
        work = first["layer_tokens"] / exact[model, seed]["layer_tokens"]
        cells = [_loss(own.get(full)) for full in budgets[model]]
        lines.append([f"{model}, {seed}", method, str(first["evaluations"]), f"{work:.3f}", *cells])
    return markdown(["model, seed", "search", "evaluations", "work", "1/2", "1/4", "1/8"], lines)


def _loss(row: dict | None) -> str:
    """Write the exact search's loss, or how far above it another search's loss is."""
    if row is None:
        return "not measured"
    if row["method"] == "exact":
        return f"{row['held_out_loss']:.4f}"
    return f"{row['above_exact']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"


@table("search-starts")
def search_starts() -> str:
    return markdown(
        ["model, seed", "gradients", "flips on the smallest part", "similarity of selections"],
        [
            [
                f"{r['model']}, {r['seed']}",
                *(f"{r[key]:.2f}" for key in ("gradients", "smallest_part", "similarity")),
            ]
            for r in read("search_cost.json").get("starts", [])
        ],
    )
