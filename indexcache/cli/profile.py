"""The verb `profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output, Spec
from indexcache.cli.timing import Timed, TimingSettings, open_model


def profile(
    model: Timed,
    *,
    contexts: Annotated[
        tuple[str, ...],
        Parameter(
            show_default=" ".join,
            metavar="N",
            help="Lengths of the prompt in tokens; 60K is 60000.",
        ),
    ],
    pattern: Annotated[
        tuple[Spec, ...],
        Parameter(show_default=" ".join, metavar="SPEC", help="Pattern to run under, or several."),
    ] = ("all",),
    batch: Annotated[
        str, Parameter(metavar="N", help="Number of requests that are decoded together.")
    ] = "1",
    out: Annotated[str | None, Parameter(metavar="DIR", help="Folder for profile.json.")] = None,
    settings: Annotated[TimingSettings, FLAT] = TimingSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Say where the time of a model goes at given lengths.

    Each part of prefill and decoding is shown beside its floor.
    """
    from indexcache.bench.run import run_bench
    from indexcache.records import write_json

    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    subject, grid = open_model(model, contexts, pattern, batch, settings)
    result = run_bench(subject, grid, progress=True)
    print(result.report())
    if out is not None:
        write_json(Path(out) / "profile.json", result.to_json())
    output.emit(result.to_json())
