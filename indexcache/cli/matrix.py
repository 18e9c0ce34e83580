"""The verb `matrix`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    EngineSettings,
    HeldOutText,
    ModelSettings,
    Output,
    RunFolder,
    TextSettings,
    check_delta,
    check_text,
    domains_of,
    open_model,
    open_text,
    origin_of,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.crossing.settings import MatrixSettings


@dataclass(frozen=True, kw_only=True)
class MatrixText:
    """Which text is calibrated on, and which is tested on."""

    data: str | None = None
    """Text of two domains or more, as for a search. Its calibration half chooses patterns, and its
    held-out half tests them. The default for tiny is the shipped text."""
    length: int | None = None
    "Number of tokens of a sequence. The default is 4 k, at least 1024."
    sequences: int = 9
    "Number of calibration sequences of each domain."
    heldout_sequences: int | None = None
    """Number of held-out sequences of each domain. The default is one of each document, 36 at most,
    which is the least number for an interval."""
    batch: int = 1
    "Number of sequences that go through the model at once."
    seed: int = 0
    "Random seed for which sequences are taken."


def matrix(
    model: Checkpoint,
    *,
    out: RunFolder,
    settings: Annotated[MatrixSettings, FLAT] = MatrixSettings(),
    text: Annotated[MatrixText, FLAT] = MatrixText(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    engine: Annotated[EngineSettings, FLAT] = EngineSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Search on each domain and on all of them, and test every pattern on every domain.

    It shows what a pattern loses on text that it was not calibrated on. On all domains two
    objectives are searched: the mean loss, and the most that a domain loses.
    """
    from indexcache.crossing.run import check_domains, check_several
    from indexcache.crossing.run import matrix as run_matrix
    from indexcache.delta import delta_digest
    from indexcache.engines.vllm.engine import VllmEngine, start
    from indexcache.models.loading import Model, describe, fingerprint

    facts = describe(model)
    engine.check(running)
    stages = engine.pipeline_parallel_size if engine.engine else None
    settings.search(0.5).check_method()
    if engine.engine:
        settings.search(0.5, "worst").check_engine()
    settings.budgets(facts["num_hidden_layers"], stages)
    claim_folder(out, model)
    common: dict[str, Any] = {
        "data": text.data,
        "length": text.length,
        "batch": text.batch,
        "seed": text.seed,
    }
    domains = domains_of(model, TextSettings(**common))
    check_several(domains)
    count = len(domains)
    chosen = TextSettings(**common, sequences=text.sequences * count)
    each = text.heldout_sequences
    tested = HeldOutText(**common, sequences=None if each is None else each * count)
    check_text(facts, model, chosen)
    check_delta(facts, running.delta)
    heldout = open_text(model, tested)
    subject: Model | VllmEngine
    if engine.engine:
        calibration = open_text(model, chosen)
        check_domains(calibration, heldout)
        subject = start(model, engine, length=max(b.ids.shape[1] for b in heldout), comparing=True)
        subject.report()
    else:
        subject, calibration = open_model(model, chosen, running)
        check_domains(calibration, heldout)
    identity: dict[str, Any] = {"model": fingerprint(subject.path), "seed": text.seed}
    if running.delta is not None:
        identity["delta"] = delta_digest(running.delta)
    result = run_matrix(
        subject,
        calibration,
        heldout,
        out,
        settings,
        identity=identity,
        origin=origin_of(model, tested),
        progress=True,
    )
    lines = [
        result.table(),
        "",
        "Differences to all full on held-out text, nats per token, with 95 % intervals over "
        "documents.",
        "",
        f"{out}: matrix.json, and searches/ with a run folder of each search.",
    ]
    deliver("\n".join(lines), result.to_json(), output)
