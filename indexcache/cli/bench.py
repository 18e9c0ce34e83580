"""The verb `bench`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output, Spec
from indexcache.cli.results import claim_folder, deliver
from indexcache.cli.timing import Timed, TimingSettings, open_model


def bench(
    model: Timed,
    *,
    contexts: Annotated[
        tuple[str, ...],
        Parameter(
            show_default=" ".join,
            metavar="N",
            help="Lengths of the prompt in tokens; 60K is 60000.",
        ),
    ] = ("10K", "60K", "120K", "200K"),
    patterns: Annotated[
        tuple[Spec, ...], Parameter(show_default=" ".join, metavar="SPEC", help="Patterns to time.")
    ] = ("all", "1/2", "1/4", "1/8+R"),
    batch: Annotated[
        str,
        Parameter(
            metavar="N",
            help="Number of requests that are decoded together. fill takes as many as fit; "
            "1,fill measures both.",
        ),
    ] = "1",
    out: Annotated[
        str | None, Parameter(metavar="DIR", help="Folder for bench.json and the pictures.")
    ] = None,
    fresh: Annotated[
        bool, Parameter(help="Measure everything anew instead of keeping the rows in --out.")
    ] = False,
    plot: Annotated[bool, Parameter(help="Draw the pictures.")] = True,
    settings: Annotated[TimingSettings, FLAT] = TimingSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Time prefill and decoding at several lengths under several patterns, beside the floors.

    The verb prints tables and draws two pictures. Every row is written down when it is measured, so
    a killed run goes on with the same command. If MODEL is a finished bench.json, the tables and
    pictures are made again.
    """
    from indexcache.bench.results import GAINS, SHARE, BenchResult
    from indexcache.bench.run import RESULT, run_bench
    from indexcache.report.plots import check_plots

    folder = claim_folder(out, model)
    if folder is not None and plot:
        check_plots()
    if model.endswith(".json"):
        result = BenchResult.read(model)
    else:
        subject, grid = open_model(model, contexts, patterns, batch, settings)
        result = run_bench(subject, grid, folder, fresh=fresh, progress=True)
        if folder is not None:
            print(f"{folder / RESULT}\n")
    text = result.report()
    files = {}
    if folder is not None and plot:
        gains, share = folder / GAINS, folder / SHARE
        text += f"\n\n{gains}, {share}"
        files = {gains: lambda _: result.draw(folder)}
    deliver(text, result.to_json(), output, files)
