"""The verb `export`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from indexcache.cli.common import FLAT, DeltaFile, Output, Spec
from indexcache.cli.results import deliver, named_folder

Engine = Literal["transformers", "vllm", "sglang", "tensorrt-llm"]


def export(
    model: Annotated[
        str,
        Parameter(
            help="Checkpoint folder, or tiny for the packaged model; for flags alone, a "
            "config.json is enough."
        ),
    ],
    *,
    pattern: Annotated[Spec, Parameter(help="The pattern to write.")],
    out: Annotated[
        str, Parameter(metavar="DIR", help="Folder to write. It must not hold anything yet.")
    ],
    engine: Annotated[
        tuple[Engine, ...] | None,
        Parameter(
            metavar="ENGINE",
            help="Engines to write for. The default is every one that can share on this model.",
        ),
    ] = None,
    stages: Annotated[
        int,
        Parameter(
            help="Number of pipeline stages of the engine. The first layer of each must be full."
        ),
    ] = 1,
    prune: Annotated[
        bool | None,
        Parameter(
            help="Write a checkpoint without the indexer tensors of the shared layers. By default "
            "there is one unless --engine names only engines that take flags."
        ),
    ] = None,
    link: Annotated[
        bool,
        Parameter(
            help="Make hard links to weight files that stay as they are, and copy them only where "
            "the disk does not allow it."
        ),
    ] = True,
    delta: DeltaFile = None,
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Write the files that engines accept.

    They are a pruned checkpoint, and strings for vLLM and SGLang that override its config.
    """
    from indexcache.checkpoint import read_config, resolve_config
    from indexcache.configs import text_section
    from indexcache.exporting import export as write_export
    from indexcache.exporting.checks import check_model_type
    from indexcache.spec import parse_pattern

    path = resolve_config(model)
    named_folder(out, str(path))
    config = read_config(path)
    check_model_type(config, path)
    named = parse_pattern(pattern, text_section(config)["num_hidden_layers"])
    result = write_export(
        path,
        named.pattern,
        out,
        engines=engine,
        stages=stages,
        prune=prune,
        delta=delta,
        link=link,
        progress=True,
    )
    for warning in result.warnings:
        print(f"indexcache: note: {warning}", file=sys.stderr)
    deliver(result.table(), result.to_json(), output)
