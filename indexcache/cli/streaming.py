"""Whether a verb streams a model, and the forecast of that."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from indexcache.cli.results import deliver

if TYPE_CHECKING:
    from indexcache.cli.common import ModelSettings, Output
    from indexcache.data import Batch
    from indexcache.models.stream.forecast import Forecast, Round
    from indexcache.models.stream.settings import StreamSettings
    from indexcache.searching.foreseen import Foreseen


def streams(facts: dict[str, Any], running: ModelSettings, stream: StreamSettings) -> bool:
    """Return whether the layers are read one at a time, and say why where nobody asked for it.

    Raises:
        ValueError: a setting makes no sense, or one of streaming was given without streaming.
    """
    from indexcache.models.loading import DTYPES, check_device, open_weights
    from indexcache.models.stream.loading import too_large

    stream.limit()
    check_device(running.device)
    if running.fp8 != "dequantize" and stream.stream:
        raise ValueError(
            f"--fp8 {running.fp8} needs the whole model in memory, because layers that are read "
            "one at a time are dequantised; leave one of the two out."
        )
    if stream.stream is not None:
        wanted = stream.stream
    elif running.fp8 != "dequantize":
        wanted = False
    else:
        why = too_large(open_weights(facts), DTYPES[running.dtype], running.device)
        wanted = why is not None
        if why is not None:
            print(
                f"indexcache: note: {why}, so the layers are read one at a time (--stream); "
                "--no-stream loads them all.",
                file=sys.stderr,
            )
    if not wanted and (given := stream.given()):
        raise ValueError(f"{given} is a setting of streaming; add --stream.")
    return wanted


def deliver_forecast(
    facts: dict[str, Any],
    rounds: Sequence[Round],
    batches: Sequence[Batch],
    running: ModelSettings,
    stream: StreamSettings,
    output: Output,
) -> None:
    """Print what streaming would take.

    Raises:
        ValueError: the checkpoint has not the tensors of its model.
    """
    from indexcache.models.world import first_process

    if first_process():
        found = _forecast(facts, rounds, batches, running, stream)
        deliver(found.table(), found.to_json(), output)


def deliver_range(
    facts: dict[str, Any],
    foreseen: Mapping[str, Foreseen],
    assumed: Mapping[str, str],
    batches: Sequence[Batch],
    running: ModelSettings,
    stream: StreamSettings,
    output: Output,
) -> None:
    """Print what streaming would take in several cases.

    Args:
        foreseen: what runs, by the name of the case.
        assumed: what cases take for granted, by their names.

    Raises:
        ValueError: the checkpoint has not the tensors of its model.
    """
    from indexcache.models.world import first_process
    from indexcache.report.tables import table

    if not first_process():
        return
    found: dict[str, Forecast] = {}
    for name, case in foreseen.items():  # All of them go by the rates that the first one measures.
        found[name] = _forecast(
            facts, case.rounds, batches, running, stream, next(iter(found.values()), None)
        )
    columns = {
        name: {"evaluations": str(case.evaluations), **found[name].rows()}
        for name, case in foreseen.items()
    }
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    shown = table(
        ["forecast", *columns],
        [[row, *(column.get(row, "0") for column in columns.values())] for row in rows],
    )
    lines = [shown, "", *(f"{name}: {said}." for name, said in assumed.items())]
    value = {
        name: {"evaluations": case.evaluations, **found[name].to_json()}
        for name, case in foreseen.items()
    }
    deliver("\n".join(lines), value | {"assumed": dict(assumed)}, output)


def _forecast(
    facts: dict[str, Any],
    rounds: Sequence[Round],
    batches: Sequence[Batch],
    running: ModelSettings,
    stream: StreamSettings,
    rates: Forecast | None = None,
) -> Forecast:
    """Forecast some passes, where it is given at the rates of another forecast."""
    from indexcache.models.loading import DTYPES
    from indexcache.models.stream.forecast import forecast
    from indexcache.models.stream.loading import check_streamed
    from indexcache.models.world import world_size

    check_streamed(facts, DTYPES[running.dtype], running.trust_remote_code)
    read = None if stream.read_rate is None else stream.read_rate * 1e9
    compute = None if stream.compute_rate is None else stream.compute_rate * 1e12
    found = forecast(
        facts,
        rounds,
        batches,
        dtype=running.dtype,
        device=running.device,
        host_memory=stream.limit(),
        read_rate=read if rates is None else rates.read_rate,
        compute_rate=compute if rates is None else rates.compute_rate,
        processes=world_size(),
    )
    return found if rates is None else replace(found, measured=rates.measured)
