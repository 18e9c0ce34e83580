"""Say what a checkpoint is: shape, indexers, the pattern it ships with, what a search would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from indexcache.cli.flags import emit, flag, required


@dataclass(frozen=True, kw_only=True)
class Settings:
    verb: ClassVar[str] = "inspect"
    model: str = required("checkpoint folder, or tiny", positional=True)
    json: bool = flag(False, "print one JSON object as the last line")


def run(s: Settings) -> int:
    from indexcache.models.loading import describe
    from indexcache.pattern import Pattern, full_count
    from indexcache.searching.greedy import evaluations

    facts = describe(s.model)
    native = Pattern(facts["native_pattern"])
    layers, k, context = len(native), facts["index_topk"], facts["max_position_embeddings"]
    shown = {
        "checkpoint": facts["path"],
        "model type": facts["model_type"],
        "layers": f"{layers}, hidden {facts['hidden_size']}, {facts['num_attention_heads']} heads",
        "indexer": f"{facts['index_n_heads']} heads of {facts['index_head_dim']}, k = {k} of a context of {context}",
        "pattern of its config": f"{native} ({len(native.full_layers)} of {layers} full)",
        "stock transformers": "reads F/S patterns"
        if facts["native_sharing"]
        else "has no sharing (use_pattern adds it)",
    }
    if facts["next_token_layers"]:
        shown["next-token layers"] = (
            f"{facts['next_token_layers']}, outside the pattern, always their own indexer"
        )
    if facts["layers_without_indexer"]:
        shown["search"] = (
            "pointless: trained with sharing, layers without indexer weights can never be full"
        )
    else:
        budgets = {f"1/{n}": evaluations(layers, full_count(layers, 1 / n)) for n in (2, 4, 8)}
        shown["search"] = ", ".join(f"{v} evaluations to keep {b}" for b, v in budgets.items())
        facts["search_evaluations"] = budgets
    width = max(map(len, shown))
    print("\n".join(f"{k.ljust(width)}  {v}" for k, v in shown.items()))
    emit(s.json, facts)
    return 0
