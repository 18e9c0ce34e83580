"""The verb `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    HeldOutText,
    ModelSettings,
    Output,
    Spec,
    check_folder,
    check_text,
    open_model,
    origin_of,
    parse_patterns,
)


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
    from indexcache.records import write_json

    facts = describe(model)
    patterns = parse_patterns(facts, pattern)
    baseline = parse_patterns(facts, [against])[0] if against else None
    measured = (*patterns, *([baseline] if baseline else []))
    check_text(facts, model, text, [p.pattern for p in measured])
    check_folder(out)
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
    if not baseline and "S" in result.baseline.roles:
        print(
            "The model has layers without an indexer; 'full' below is what it does by itself: "
            f"{result.baseline}\n"
        )
    print(result.table(base))
    print(f"\n{result.conditions}")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "evidence.json", result.to_json())
    output.emit(result.to_json())
    if most is None:
        return 0
    return int(any(row.ci_high is None or row.ci_high > most for row in result.overall))
