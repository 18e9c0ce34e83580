"""The verb `evaluate`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    HeldOutText,
    ModelSettings,
    Output,
    Spec,
    check_text,
    open_model,
    origin_of,
    parse_patterns,
)
from indexcache.cli.results import claim_folder, deliver


def evaluate(
    model: Checkpoint,
    *,
    pattern: Annotated[tuple[Spec, ...], Parameter(help="One or more patterns.")],
    against: Annotated[
        Spec | None,
        Parameter(help="Baseline of all differences. The default is the model itself, all full."),
    ] = None,
    out: Annotated[str | None, Parameter(metavar="DIR", help="Folder for evidence.json.")] = None,
    most: Annotated[
        float | None,
        Parameter(
            help="Gate, in nats: exit with 1 if the interval of a pattern's loss difference ends "
            "above this."
        ),
    ] = None,
    text: Annotated[HeldOutText, FLAT] = HeldOutText(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> int:
    """Prove a pattern safe on held-out text, against the full model or another pattern.

    The verb prints the difference in loss with its interval, the KL divergence, and how often the
    two agree on the next token.
    """
    from indexcache.data import check_unseen
    from indexcache.evals.evaluate import evaluate as run_evaluation
    from indexcache.models.loading import describe

    facts = describe(model)
    patterns = parse_patterns(facts, pattern)
    baseline = parse_patterns(facts, [against])[0] if against else None
    measured = (*patterns, *([baseline] if baseline else []))
    check_text(facts, model, text, [p.pattern for p in measured])
    folder = claim_folder(out, model)
    loaded, batches = open_model(model, text, running, [p.pattern for p in measured])
    for named in measured:
        check_unseen(batches, named.seen)
    result = run_evaluation(
        loaded,
        {p.name: p.pattern for p in patterns},
        batches,
        against=baseline.pattern if baseline else None,
        seed=text.seed,
        origin=origin_of(model, text),
        progress=True,
    )
    base = baseline.name if baseline else "full"
    lines = [result.table(base), "", str(result.conditions)]
    if not baseline and "S" in result.baseline.roles:
        note = "The model has layers without an indexer; 'full' below is what it does by itself: "
        lines = [f"{note}{result.baseline}", "", *lines]
    found = result.to_json()
    files = {folder / "evidence.json": found} if folder else None
    deliver("\n".join(lines), found, output, files)
    if most is None:
        return 0
    return int(any(row.ci_high is None or row.ci_high > most for row in result.overall))
