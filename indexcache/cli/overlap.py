"""The verb `overlap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    ModelSettings,
    Output,
    OverlapText,
    Spec,
    check_folder,
    check_text,
    open_model,
    origin_of,
    parse_patterns,
)


def overlap(
    model: Checkpoint,
    *,
    out: Annotated[str, Parameter(metavar="DIR", help="Folder for overlap.json and overlap.png.")],
    pattern: Annotated[
        Spec | None, Parameter(help="Pattern whose blocks are drawn into the heat map.")
    ] = None,
    text: Annotated[OverlapText, FLAT] = OverlapText(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Measure how much the selections of the layers have in common.

    The verb writes overlap.json and a heat map.
    """
    from indexcache.evals.overlap import overlap as measure_overlap
    from indexcache.models.loading import describe
    from indexcache.records import write_json
    from indexcache.report.plots import draw_overlap

    facts = describe(model)
    shown = parse_patterns(facts, [pattern])[0].pattern if pattern else None
    check_text(facts, model, text)
    check_folder(out)
    loaded, batches = open_model(model, text, running)
    result = measure_overlap(loaded, batches, origin=origin_of(model, text), progress=True)
    measured = result.to_json()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "overlap.json", measured | {"pattern": str(shown) if shown else None})
    draw_overlap(measured, folder / "overlap.png", shown)
    print(result.table())
    print(f"\n{result.conditions}")
    print(
        f"\nchance {result.chance:.3f}, {result.queries} queries with more than "
        f"k = {result.topk} tokens; {folder / 'overlap.json'}, {folder / 'overlap.png'}"
    )
    output.emit(measured)
