"""The verb `export`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Checkpoint, Output, Spec, parse_patterns
from indexcache.cli.results import deliver, named_folder

Engine = Literal["transformers", "vllm", "sglang"]


def export(
    model: Checkpoint,
    *,
    pattern: Annotated[Spec, Parameter(help="The pattern to write.")],
    out: Annotated[
        str, Parameter(metavar="DIR", help="Folder to write. It must not hold anything yet.")
    ],
    engine: Annotated[
        tuple[Engine, ...],
        Parameter(show_default=" ".join, metavar="ENGINE", help="Engines to write for."),
    ] = ("transformers", "vllm", "sglang"),
    stages: Annotated[
        int,
        Parameter(
            help="Number of pipeline stages of the engine. The first layer of each must be full."
        ),
    ] = 1,
    prune: Annotated[
        bool, Parameter(help="Leave out the indexer tensors of the shared layers.")
    ] = True,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Write the files that engines accept.

    They are a pruned checkpoint for transformers, and strings for vLLM and SGLang that override its
    config.
    """
    from indexcache.exporting import export as write_export
    from indexcache.models.loading import describe

    facts = describe(model)
    named_folder(out, facts["path"])
    named = parse_patterns(facts, [pattern])[0]
    result = write_export(
        facts["path"], named.pattern, out, engines=engine, stages=stages, prune=prune
    )
    for warning in result.warnings:
        print(f"indexcache: note: {warning}", file=sys.stderr)
    deliver(result.table(), result.to_json(), output)
