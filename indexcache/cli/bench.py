"""The verb `bench`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from indexcache.cli.common import FLAT, Output, Spec
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
    from indexcache.bench.run import RESULT, run_bench
    from indexcache.records import read_json
    from indexcache.report.speed import check_plots

    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if plot:
            check_plots()
    if model.endswith(".json"):
        result = read_json(Path(model))
        if (
            not isinstance(result, dict)
            or not isinstance(result.get("rows"), list)
            or "shape" not in result
        ):
            raise ValueError(f"{model}: is not a {RESULT} of an earlier run.")
    else:
        subject, grid, text = open_model(model, contexts, patterns, batch, settings)
        result = run_bench(subject, grid, folder, fresh=fresh, text=text)
        if folder is not None:
            print(f"{folder / RESULT}\n")
    try:
        show(result)
        if folder is not None and plot:
            draw(result, folder)
    except (TypeError, KeyError, AttributeError):
        if not model.endswith(".json"):
            raise
        raise ValueError(
            f"{model}: a row is not what a bench writes, so the file was changed; measure anew."
        ) from None
    output.emit(result)


def show(result: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    from indexcache.report.speed import parts, speeds

    print(
        f"{result['model']}, {result['shape']['layers']} layers, {result['device']}, {result['date']}\n"
    )
    print(speeds(result["rows"]))
    for which in ("prefill", "decode"):
        print("\n" + parts(result["rows"], which))
    whose = (
        "measured here"
        if result["ceilings"]["memory"] == 0
        else f"of an {result['ceilings']['name']}"
    )
    print(f"\nFloors: rates {whose}. Parts are timed in a pass of their own. {result['note']}")
    if result.get("published"):
        print(f"Published: {result['published']['source']}")


def draw(result: Mapping[str, Any], out: Path) -> None:
    from indexcache.report.speed import draw_share, draw_speedups

    title = f"{result['model']}, {result['shape']['layers']} layers, {result['device']}"
    draw_speedups(result["rows"], out / "speedup.png", title, result.get("published"))
    draw_share(result["rows"], out / "indexer_share.png", title, result.get("published"))
    print(f"\n{out / 'speedup.png'}, {out / 'indexer_share.png'}")
