"""Whether a verb streams a model, and the forecast of that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from indexcache.cli.results import deliver

if TYPE_CHECKING:
    from indexcache.cli.common import ModelSettings, Output
    from indexcache.data import Batch
    from indexcache.models.stream.forecast import Round
    from indexcache.models.stream.settings import StreamSettings


def streams(facts: dict[str, Any], running: ModelSettings, stream: StreamSettings) -> bool:
    """Return whether the layers are read one at a time, and say why where nobody asked for it.

    Raises:
        ValueError: a setting makes no sense, or one of streaming was given without streaming.
    """
    from indexcache.models.loading import DTYPES, check_device, open_weights
    from indexcache.models.stream.loading import too_large

    stream.limit()
    check_device(running.device)
    if stream.stream is not None:
        wanted = stream.stream
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
    from indexcache.models.loading import DTYPES
    from indexcache.models.stream.forecast import forecast
    from indexcache.models.stream.loading import check_streamed
    from indexcache.models.world import first_process, world_size

    if not first_process():
        return
    check_streamed(facts, DTYPES[running.dtype], running.trust_remote_code)
    found = forecast(
        facts,
        rounds,
        batches,
        dtype=running.dtype,
        device=running.device,
        host_memory=stream.limit(),
        read_rate=None if stream.read_rate is None else stream.read_rate * 1e9,
        compute_rate=None if stream.compute_rate is None else stream.compute_rate * 1e12,
        processes=world_size(),
    )
    deliver(found.table(), found.to_json(), output)
