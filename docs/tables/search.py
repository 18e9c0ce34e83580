"""Make the tables of what searches cost, and of where they start."""

from __future__ import annotations

from docs.tables.registry import markdown, read, table


@table("search-cost")
def search_cost() -> str:
    rows = read("search_cost.json")["rows"]
    exact = {(r["model"], r["seed"]): r for r in rows if r["method"] == "exact"}
    lines = []
    for model, seed, method in dict.fromkeys((r["model"], r["seed"], r["method"]) for r in rows):
        own = [r for r in rows if (r["model"], r["seed"], r["method"]) == (model, seed, method)]
        work = own[0]["layer_tokens"] / exact[model, seed]["layer_tokens"]
        cells = [
            f"{r['above_exact']:+.4f} [{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]"
            for r in sorted(own, key=lambda r: -r["full"])
        ]
        if method == "exact":
            cells = [f"{r['held_out_loss']:.4f}" for r in sorted(own, key=lambda r: -r["full"])]
        first = own[0]
        lines.append([f"{model}, {seed}", method, str(first["evaluations"]), f"{work:.2f}", *cells])
    return markdown(["model, seed", "search", "evaluations", "work", "1/2", "1/4", "1/8"], lines)


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
