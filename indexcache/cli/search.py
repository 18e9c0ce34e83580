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
    check_folder,
    check_text,
    open_model,
    origin_of,
)
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
    check_folder(out)
    loaded, batches = open_model(model, text, running)
    identity = {"model": fingerprint(loaded.path), "seed": text.seed}
    origin = origin_of(model, text)
    result = run_search(
        loaded, batches, out, settings, identity=identity, origin=origin, progress=True
    )
    print(result.table())
    print("\n" + "\n".join([*result.notes, str(result.conditions)]))
    print(
        f"\n{out}: pattern.json, result.json, journal.jsonl. Calibration losses flatter a searched "
        "pattern: evaluate it on held-out text next."
    )
    output.emit(result.to_json())
