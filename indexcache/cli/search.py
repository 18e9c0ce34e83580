"""The verb `search`."""

from __future__ import annotations

from typing import Annotated

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    ModelSettings,
    Output,
    RunFolder,
    TextSettings,
    check_text,
    open_model,
    origin_of,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.searching.settings import SearchSettings


def search(
    model: Checkpoint,
    *,
    out: RunFolder,
    settings: Annotated[SearchSettings, FLAT] = SearchSettings(),
    text: Annotated[TextSettings, FLAT] = TextSettings(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Find a sharing pattern by the paper's greedy search, for every budget down to --keep.

    Nothing is trained. The run folder holds settings.json, journal.jsonl (one line per evaluation),
    result.json and pattern.json. A killed run goes on with the same command.
    """
    from indexcache.models.loading import describe, fingerprint
    from indexcache.searching.run import search as run_search

    facts = describe(model)
    settings.full_layers(facts["num_hidden_layers"])
    check_text(facts, model, text)
    claim_folder(out, model)
    loaded, batches = open_model(model, text, running)
    identity = {"model": fingerprint(loaded.path), "seed": text.seed}
    origin = origin_of(model, text)
    result = run_search(
        loaded, batches, out, settings, identity=identity, origin=origin, progress=True
    )
    lines = [
        result.table(),
        "",
        *result.notes,
        str(result.conditions),
        "",
        f"{out}: pattern.json, result.json, journal.jsonl. Calibration losses flatter a searched "
        "pattern: evaluate it on held-out text next.",
    ]
    deliver("\n".join(lines), result.to_json(), output)
