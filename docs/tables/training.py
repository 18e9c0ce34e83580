"""Make the tables of training: what it gains under a pattern, and what it costs."""

from __future__ import annotations

from docs.tables.registry import exists, markdown, read, table
from indexcache.distilling.flops import flops_per_token
from indexcache.distilling.settings import DistillSettings
from indexcache.pattern import Pattern
from indexcache.shapes import DEVICES, shape_of

ARMS = {
    "full": "all full",
    "uniform_multi": "uniform, L_multi",
    "uniform_own": "uniform, own targets",
    "uniform_lm": "uniform, language-modelling loss alone",
    "searched": "searched before, L_multi",
    "uniform_r": "uniform F, R elsewhere",
    "uniform_max": "uniform, maximum over layers",
    "uniform_cover": "uniform, coverage",
    "uniform_weighted": "uniform, layers weighted by a search",
    "uniform_answers": "uniform, L_multi and the term on answers",
    "uniform_cover_answers": "uniform, coverage and the term on answers",
    "searched_cover": "searched before, coverage",
    "searched_answers": "searched before, L_multi and the term on answers",
    "searched_max": "searched before, maximum over layers",
    "searched_own": "searched before, own targets",
}


@table("training-aware")
def training_aware() -> str:
    """Compare the arms with the full one; nothing where the comparison has no result yet."""
    if not exists("training_aware.json"):
        return ""
    rows = [
        [
            r["model"],
            ARMS[r["arm"]] + (f", offset {r['offset']}" if r["offset"] > 1 else ""),
            r["kept"],
            str(r["seeds"]),
            f"{r['delta_loss']:+.4f} [{r['ci_low']:+.4f}, {r['ci_high']:+.4f}]",
            f"{r['share_of_loss']:+.2%}",
            f"{r['recall']:.1%} ({100 * r['delta_recall']:+.1f})",
        ]
        for r in read("training_aware.json")["summary"]
    ]
    against = "loss against all full, nats a token"
    header = ["model", "arm", "kept", "seeds", against, "of its loss", "answers found"]
    return markdown(header, rows)


TRAINED = {"30B": "glm-4.7-flash-dsa", "DeepSeek-V3.2, 671B": "deepseek-v3.2"}


@table("training-cost")
def training_cost() -> str:
    tokens, peak, length = 1e9, DEVICES["H100"].peak, 131072
    rates = {"13 % MFU": 0.13, "30 %": 0.3}
    if exists("training_aware.json"):  # Arms of SmolLM2 have a GPU to themselves.
        found = [r.get("mfu") for r in read("training_aware.json")["rows"] if r["model"] != "tiny"]
        if measured := [mfu for mfu in found if mfu]:
            rates[f"{max(measured):.1%}, measured on SmolLM2"] = max(measured)
    rows = []
    for name, source in TRAINED.items():
        shape = shape_of(source)
        for full, pattern in (("all", "F" * shape.layers), ("1/4", None)):
            roles = Pattern(pattern) if pattern else Pattern.uniform(shape.layers, 4)
            operations = flops_per_token(shape, roles, DistillSettings(stage="sparse"), length)
            hours = [tokens * operations / (peak * mfu) / 3600 for mfu in rates.values()]
            cells = [f"{h:,.0f}" for h in hours]
            rows.append([name, full, f"{operations / 1e9:,.0f}", *cells])
    hours = [f"{'at' if i else 'GPU hours at'} {name}" for i, name in enumerate(rates)]
    return markdown(["model", "full", "GFLOP a token", *hours], rows)
