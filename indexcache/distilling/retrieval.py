"""Retrieval beside the text of a distillation: rows to train on, and held-out questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from indexcache.data import Batch, named_source, parse_kinds, shipped_text, text_for
from indexcache.distilling.rows import Row, retrieval_rows
from indexcache.distilling.settings import DistillSettings, RunSettings
from indexcache.models.reader import Reader

MAX_SEQUENCES = 4096
"""So many different sequences are made to train on, at most; where more rows are to have some, they
come again."""
TRAINING_SEED = 1 << 20
"""Added to the random seed of training sequences, so that held-out ones ask for other facts."""


def sources(model: str, run: RunSettings) -> tuple[Path, str, Path | None]:
    """Return the training text, its split, and the held-out text if it is another one."""
    source, split = text_for(model, run.data, "calibration")
    held_out = None if run.held_out is None else named_source(run.held_out)
    if held_out is None and run.data is None:
        held_out = shipped_text("heldout")
    return source, split, held_out


def check_retrieval(run: RunSettings, settings: DistillSettings) -> None:
    """Refuse settings of retrieval that do not fit together.

    Raises:
        ValueError: an unknown kind, a share outside of 0..1, too few sequences, or a setting that
            does nothing without another.
    """
    parse_kinds(run.retrieval)
    if not 0 <= run.retrieval_share < 1:
        raise ValueError(f"--retrieval-share is at least 0 and below 1, not {run.retrieval_share}.")
    if run.retrieval_sequences < 1:
        raise ValueError(
            f"--retrieval-sequences must be at least 1, not {run.retrieval_sequences}."
        )
    if run.retrieval_share and not run.retrieval:
        raise ValueError("--retrieval-share says how much retrieval is mixed in; add --retrieval.")
    if run.retrieval and not settings.eval_every and not run.retrieval_share:
        raise ValueError(
            "--retrieval counts answers at every evaluation, and --eval-every 0 leaves none; train "
            "on some (--retrieval-share), or leave it out."
        )
    if settings.answer_weight and not run.retrieval_share:
        raise ValueError(
            "--answer-weight counts the queries of training rows that must find an answer; mix "
            "some in with --retrieval and --retrieval-share."
        )


def mixed_rows(
    model: str,
    run: RunSettings,
    settings: DistillSettings,
    reader: Reader,
    facts: dict[str, Any],
    rows: Sequence[Row],
) -> list[Row]:
    """Return the rows with a share of retrieval sequences among them.

    Where the run does not take all rows of the text, only so many of them are kept as it takes.

    Args:
        facts: what `describe` says of the checkpoint.
    """
    source, split, other = sources(model, run)
    share = run.retrieval_share
    taken = math.ceil((1 - share) * settings.steps * settings.rows)
    kept = list(rows)[:taken]
    number = max(round(share / (1 - share) * len(kept)), 1)
    batches = reader.retrieval(
        run.retrieval,
        facts,
        source=source,
        split="all" if other is not None else split,
        length=len(rows[0].ids),
        sequences=math.ceil(min(number, MAX_SEQUENCES) / len(parse_kinds(run.retrieval))),
        seed=settings.seed + TRAINING_SEED,
    )
    made = retrieval_rows(batches)
    return kept + (made * math.ceil(number / len(made)))[:number]


def held_out_retrieval(
    model: str,
    run: RunSettings,
    settings: DistillSettings,
    reader: Reader,
    facts: dict[str, Any],
    length: int,
) -> list[Batch]:
    """Return retrieval sequences of every kind in held-out text."""
    source, _, other = sources(model, run)
    return reader.retrieval(
        run.retrieval,
        facts,
        source=other or source,
        split="heldout" if other is None else "all",
        length=length,
        sequences=run.retrieval_sequences,
        seed=settings.seed,
    )
