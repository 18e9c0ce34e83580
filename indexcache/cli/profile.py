"""The verb `profile`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output, Spec
from indexcache.cli.results import claim_folder, deliver
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

    folder = claim_folder(out, model)
    subject, grid = open_model(model, contexts, pattern, batch, settings)
    result = run_bench(subject, grid, progress=True)
    found = result.to_json()
    files = {folder / "profile.json": found} if folder else None
    deliver(result.report(), found, output, files)
