"""The verb `search`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    EngineSettings,
    ModelSettings,
    Output,
    RetrievalSettings,
    RunFolder,
    TextSettings,
    check_delta,
    check_text,
    open_model,
    open_retrieval,
    open_text,
    origin_of,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.cli.streaming import deliver_forecast, deliver_range, streams
from indexcache.models.stream.settings import SearchStreamSettings
from indexcache.pattern import stage_starts
from indexcache.searching.settings import SearchSettings

if TYPE_CHECKING:
    from indexcache.data import Batch


def search(
    model: Checkpoint,
    *,
    out: RunFolder,
    settings: Annotated[SearchSettings, FLAT] = SearchSettings(),
    text: Annotated[TextSettings, FLAT] = TextSettings(),
    retrieval: Annotated[RetrievalSettings, FLAT] = RetrievalSettings(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    engine: Annotated[EngineSettings, FLAT] = EngineSettings(),
    stream: Annotated[SearchStreamSettings, FLAT] = SearchStreamSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Find a sharing pattern for every budget down to --keep, by the paper's greedy search.

    With --method fast it measures less.
    Nothing is trained. The run folder holds settings.json, journal.jsonl (one line per evaluation),
    result.json and pattern.json. A killed run goes on with the same command. With --stream several
    GPUs search together: torchrun --nproc-per-node 8 -m indexcache search .. --device cuda
    """
    from indexcache.delta import delta_digest
    from indexcache.engines.vllm.engine import VllmEngine, start
    from indexcache.models.loading import Model, describe, fingerprint
    from indexcache.models.world import first_process, local_device
    from indexcache.searching.run import search as run_search

    facts = describe(model)
    settings.check_method()
    engine.check(running, stream)
    running = replace(running, device=local_device(running.device))
    if engine.engine:
        settings.check_engine()
    stages = engine.pipeline_parallel_size if engine.engine else None
    settings.full_layers(facts["num_hidden_layers"], stages)
    stage_of = stage_starts(facts["num_hidden_layers"], stages or settings.stages)
    full = settings.full_layers(facts["num_hidden_layers"], stages)
    settings.fixed_layers(facts["num_hidden_layers"], stage_of, full)
    check_text(facts, model, text)
    check_delta(facts, running.delta)
    streamed = not engine.engine and streams(facts, running, stream)
    if stream.dry_run and settings.roles == "FRS":
        raise ValueError("--dry-run knows the passes of F and S alone; leave --roles FRS out.")
    if streamed:
        settings.check_streamed()
    asked = open_retrieval(model, text, retrieval)
    if stream.dry_run:
        _foresee(facts, settings, open_text(model, text) + asked, running, stream, output)
        return
    claim_folder(out, model)
    subject: Model | VllmEngine
    if engine.engine:
        batches = open_text(model, text)
        subject = start(model, engine, length=max(b.ids.shape[1] for b in (*batches, *asked)))
        subject.report()
    else:
        opened = partial(open_model, stream=stream) if streamed else open_model
        subject, batches = opened(model, text, running)
    batches += asked
    identity: dict[str, Any] = {"model": fingerprint(subject.path), "seed": text.seed}
    if running.delta is not None:
        identity["delta"] = delta_digest(running.delta)
    origin = origin_of(model, text)
    result = run_search(
        subject, batches, out, settings, identity=identity, origin=origin, progress=True
    )
    if not first_process():
        return
    lines = [
        result.table(),
        "",
        *result.notes,
        f"{result.work}.",
        *([] if result.costs is None else [str(result.costs)]),
        str(result.conditions),
        "",
        f"{out}: pattern.json, result.json, journal.jsonl. Calibration losses flatter a searched "
        "pattern: evaluate it on held-out text next.",
    ]
    deliver("\n".join(lines), result.to_json(), output)


def _foresee(
    facts: dict[str, Any],
    settings: SearchSettings,
    batches: list[Batch],
    running: ModelSettings,
    stream: SearchStreamSettings,
    output: Output,
) -> None:
    """Print what a streamed search would take; of a fast one the least and the most."""
    from indexcache.models.stream.forecast import Round
    from indexcache.searching.foreseen import ASSUMED, Foreseen, foresee
    from indexcache.searching.greedy import rounds
    from indexcache.searching.run import uniform_patterns

    layers = facts["num_hidden_layers"]
    full = settings.full_layers(layers)
    starts = stage_starts(layers, settings.stages)
    fixed = settings.fixed_layers(layers, starts, full)
    counts = rounds(layers, full, starts, fixed)
    passes = [Round.of_search(layers, count, flips) for flips, count in enumerate(counts)]
    if settings.method == "exact":
        deliver_forecast(facts, passes, batches, running, stream, output)
        return
    uniform, _ = uniform_patterns(batches, layers, facts["index_topk"], starts, full, settings)
    found = foresee(batches, layers, settings, full, starts, fixed, uniform)
    found["exact"] = Foreseen(1 + sum(counts) + len(uniform), tuple(passes))
    assumed = ASSUMED | {"exact": "the same text by --method exact"}
    deliver_range(facts, found, assumed, batches, running, stream, output)
