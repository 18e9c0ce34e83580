"""Make the tables of SmolLM2."""

from __future__ import annotations

from typing import Any

from docs.tables.registry import markdown, read, table


@table("smollm2-short")
def smollm2_short() -> str:
    rows = {
        (r["method"], r["kept"]): r
        for r in read("smollm2_training_aware.json")["rows"]
        if r["domain"] == "all"
    }
    named = (
        ("uniform pattern, nothing trained for it", "untouched"),
        ("uniform pattern, trained with L_multi", "multi"),
        ("searched pattern, nothing trained for it", "searched"),
    )
    return markdown(
        ["loss above all full; answers found", "1/2 (15 of 30)", "1/4 (8)", "1/8 (4)"],
        [
            [
                name,
                *(
                    f"{rows[way, k]['delta_loss']:+.3f}; {100 * rows[way, k]['retrieval']:.0f} %"
                    for k in (2, 4, 8)
                ),
            ]
            for name, way in named
        ],
    )


@table("smollm2-changes")
def smollm2_changes() -> str:
    rows = {
        r["method"]: r
        for r in read("smollm2_training_aware.json")["rows"]
        if r["domain"] == "all" and r["kept"] == 4
    }
    named = (
        ("a fifth of the steps", "multi, short"),
        ("four times the steps", "multi, long"),
        ("a third of the learning rate", "multi, slow"),
        ("three times the learning rate", "multi, fast"),
        ("400 steps of the sparse stage behind it", "multi, sparse"),
        ("layers weighted by what sharing them alone costs (`--layer-weights`)", "multi, weighted"),
        ("the engines' own rule: offset 2, nine full layers", "multi, offset2"),
        ("an oracle that selects by the mean attention of each group", "oracle"),
    )
    return markdown(
        ["change", "loss above all indexers"],
        [[title, f"{rows[way]['delta_loss']:.3f}"] for title, way in named],
    )


@table("smollm2-early")
def smollm2_early() -> str:
    loss = {
        (r["way"], len(r["served"])): f"{r['delta_loss']:.3f}"
        for r in read("smollm2_reasons_cpu.json")["rows"]
    }
    named = (
        ("layer 16's, as it is", "layer 16's own"),
        ("layer 16's, 240 steps of L_multi", "16, L_multi"),
        ("the same with 27 heads instead of nine", "16, 27 heads, L_multi"),
        ("layer 16's, trained on layer 17 alone", "16, layer 17 alone"),
        ("layer 17's, as it is", "layer 17's own"),
        ("layer 17's, with L_multi", "17, L_multi"),
    )
    alone = {"layer 17's own": "layer 17's own, for itself"}
    return markdown(
        ["indexer", "layers 17 to 19", "layer 17 alone"],
        [
            [title, loss.get((way, 3), ""), loss.get((alone.get(way, way), 1), "")]
            for title, way in named
        ],
    )


@table("smollm2-pool")
def smollm2_pool() -> str:
    result = read("smollm2_pool_share.json")
    shares = (None, "1/32", "1/16", "1/8", "1/4")
    rows = []
    for full in (8, 4):
        of = {r["pool_share"]: r for r in result["rows"] if r["full"] == full}
        rows.append([f"{full} of {result['layers']}", *(_loss_and_kl(of[s]) for s in shares)])
    header = ["full layers", "S", *(f"R, pool {s} of the context" for s in shares[1:])]
    return markdown(header, rows)


def _loss_and_kl(r: dict[str, Any]) -> str:
    return f"{r['delta_loss']:+.3f}, KL {r['kl']:.3f}"
