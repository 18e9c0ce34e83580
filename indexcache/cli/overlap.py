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
    check_delta,
    check_text,
    native_pattern,
    open_model,
    open_text,
    origin_of,
    parse_patterns,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.cli.streaming import deliver_forecast, streams
from indexcache.models.stream.settings import StreamSettings


def overlap(
    model: Checkpoint,
    *,
    out: Annotated[str, Parameter(metavar="DIR", help="Folder for overlap.json and overlap.png.")],
    pattern: Annotated[
        Spec | None, Parameter(help="Pattern whose blocks are drawn into the heat map.")
    ] = None,
    text: Annotated[OverlapText, FLAT] = OverlapText(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    stream: Annotated[StreamSettings, FLAT] = StreamSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Measure how much the selections of the layers have in common.

    The verb writes overlap.json and a heat map. Of several processes the first one does it.
    """
    from indexcache.evals.overlap import overlap as measure_overlap
    from indexcache.models.loading import describe
    from indexcache.models.stream.forecast import Round
    from indexcache.models.stream.loading import spill_to
    from indexcache.models.world import first_process
    from indexcache.report.plots import check_plots, draw_overlap

    facts = describe(model)
    shown = parse_patterns(facts, [pattern])[0].pattern if pattern is not None else None
    check_text(facts, model, text)
    check_delta(facts, running.delta)
    streamed = streams(facts, running, stream)
    if stream.dry_run:
        one = Round.of_patterns([native_pattern(facts)])
        deliver_forecast(facts, [one], open_text(model, text), running, stream, output)
        return
    if not first_process():
        return
    folder = claim_folder(out, model)
    check_plots()
    loaded, batches = open_model(model, text, running, stream=stream if streamed else None)
    spill_to(loaded, folder)
    result = measure_overlap(loaded, batches, origin=origin_of(model, text), progress=True)
    measured = result.to_json()
    table, picture = Path(out) / "overlap.json", Path(out) / "overlap.png"
    lines = (
        f"{result.table()}\n\n{result.conditions}\n\n"
        f"chance {result.chance:.3f}, {result.queries} queries with more than "
        f"k = {result.topk} tokens; {table}, {picture}"
    )
    files = {
        table: measured | {"pattern": str(shown) if shown else None},
        picture: lambda path: draw_overlap(measured, path, shown),
    }
    deliver(lines, measured, output, files)
