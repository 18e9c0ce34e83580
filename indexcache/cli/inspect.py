"""The verb `inspect`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output
from indexcache.cli.results import deliver


def inspect(
    model: Annotated[
        str, Parameter(help="Checkpoint folder, tiny, or a config.json without its weights.")
    ],
    *,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Say what a checkpoint is: shape, indexers, pattern, and what a search would cost."""
    from indexcache.checkpoint import is_bare_config
    from indexcache.models.description import describe, describe_config
    from indexcache.models.loading import refusal
    from indexcache.pattern import Pattern, full_count
    from indexcache.searching.greedy import evaluations
    from indexcache.vacuity import lengths_needed

    bare = is_bare_config(model)
    facts = describe_config(model) if bare else describe(model)
    native = Pattern(facts["native_pattern"])
    layers = len(native)
    shown = {
        "checkpoint": facts["path"],
        "model type": facts["model_type"],
        "layers": f"{layers}, hidden {facts['hidden_size']}, {facts['num_attention_heads']} heads",
        "indexer": f"{facts['index_n_heads']} heads of {facts['index_head_dim']}, "
        f"k = {facts['index_topk']} of a context of {facts['max_position_embeddings']}",
        "pattern of its config": f"{native} ({len(native.full_layers)} of {layers} full)",
        "stock transformers": "reads F/S patterns"
        if facts["native_sharing"]
        else "has no sharing (use_pattern adds it)",
    }
    if facts["quantization"]:
        shown["quantisation"] = str(facts["quantization"])
    if facts["next_token_layers"]:
        shown["next-token layers"] = (
            f"{facts['next_token_layers']} outside the pattern, which keep their own indexer"
        )
    problem = None if bare else refusal(facts)
    if problem:
        shown["loading"] = f"refused: {problem}"
    if bare:
        shown["weights"] = "none here, so what the config says of them is unchecked"
    if facts["layers_without_indexer"]:
        shown["search"] = "pointless, because layers without indexer weights can never be full"
    else:
        budgets = {f"1/{n}": evaluations(layers, full_count(layers, 1 / n)) for n in (2, 4, 8)}
        shown["search"] = ", ".join(f"{n} evaluations to keep {b}" for b, n in budgets.items())
        facts["search_evaluations"] = budgets
    shown["text"] = lengths_needed(facts["index_topk"], facts["max_position_embeddings"])
    width = max(map(len, shown))
    text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in shown.items())
    quantization = facts["quantization"]
    found = facts | {"quantization": quantization.to_json() if quantization else None}
    found["refusal"] = problem
    deliver(text, found, output)
