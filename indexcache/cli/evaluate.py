"""The verb `evaluate`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    EngineSettings,
    EvaluationText,
    HeldOutRetrieval,
    ModelSettings,
    Output,
    Spec,
    check_delta,
    check_text,
    native_pattern,
    open_model,
    open_retrieval,
    open_text,
    origin_of,
    parse_patterns,
    unknown_origins,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.cli.streaming import deliver_forecast, streams
from indexcache.models.stream.settings import StreamSettings
from indexcache.records import write_text
from indexcache.seen import Seen

JOURNAL = "evaluation"
"""The folder in --out of what a run has measured; it is gone when evidence.json is there."""


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
            help="Gate, in nats: exit with 1 unless the interval of every pattern's loss "
            "difference ends at or below this, on all text and on every domain."
        ),
    ] = None,
    recall_most: Annotated[
        float | None,
        Parameter(
            help="Gate of recall, a share of the answers of --retrieval: it fails unless every "
            "pattern loses no more of each kind. With --most and --retrieval the default is 0.1."
        ),
    ] = None,
    certificate: Annotated[
        bool,
        Parameter(
            help="Write certificate.json and certificate.md too, for the one who signs. It takes "
            "one pattern, --out and --most."
        ),
    ] = False,
    allow_blind: Annotated[
        bool,
        Parameter(
            help="Let the gate judge a model whose own loss is no better than a blind guess, "
            "e.g. random weights."
        ),
    ] = False,
    text: Annotated[EvaluationText, FLAT] = EvaluationText(),
    retrieval: Annotated[HeldOutRetrieval, FLAT] = HeldOutRetrieval(),
    running: Annotated[ModelSettings, FLAT] = ModelSettings(),
    engine: Annotated[EngineSettings, FLAT] = EngineSettings(),
    stream: Annotated[StreamSettings, FLAT] = StreamSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> int:
    """Prove a pattern safe on held-out text, against the full model or another pattern.

    The verb prints the difference in loss with its interval, the KL divergence, and how often the
    two agree on the next token; with --retrieval also how many answers are found. Each length is
    measured by itself. With --out a killed run goes on with the same command.
    """
    from indexcache.engines.vllm.engine import VllmEngine, start
    from indexcache.evals.certificate import make_certificate, model_facts
    from indexcache.evals.certificate_page import page
    from indexcache.evals.evaluate import evaluate as run_evaluation
    from indexcache.evals.gate import check_gate, check_margin, judge, little_text
    from indexcache.models.loading import Model, describe
    from indexcache.models.stream.forecast import Round
    from indexcache.models.stream.loading import spill_to
    from indexcache.models.world import first_process, local_device

    engine.check(running, stream)
    running = replace(running, device=local_device(running.device))
    if most is not None:
        check_margin(most)
    _check_recall_gate(recall_most, most, retrieval)
    facts = describe(model)
    patterns = parse_patterns(facts, pattern)
    baseline = parse_patterns(facts, [against])[0] if against is not None else None
    named = {p.name: p.pattern for p in patterns}
    base_pattern = baseline.pattern if baseline else native_pattern(facts)
    topk = int(facts["index_topk"])
    if most is not None:
        context = int(facts["max_position_embeddings"])
        longest = max(context if n is None else n for n in text.lengths)
        check_gate(most, named, base_pattern, topk=topk, longest=longest)
    measured = (*patterns, *([baseline] if baseline else []))
    engine.check_patterns(measured, facts["num_hidden_layers"])
    check_text(facts, model, text, [p.pattern for p in measured])
    check_delta(facts, running.delta, patterns)
    if certificate:
        _check_certificate(len(patterns), out, most, running.delta)
    streamed = not engine.engine and streams(facts, running, stream)
    asked = open_retrieval(model, text, retrieval, [p.pattern for p in measured])
    if stream.dry_run:
        rounds = [Round.of_patterns([base_pattern, *named.values()])]
        batches = open_text(model, text, [p.pattern for p in measured]) + asked
        deliver_forecast(facts, rounds, batches, running, stream, output)
        return 0
    folder = claim_folder(out, model)
    certified = model_facts(Path(facts["path"])) if certificate else {}
    subject: Model | VllmEngine
    if engine.engine:
        batches = open_text(model, text, [p.pattern for p in measured])
    else:
        how = stream if streamed else None
        subject, batches = open_model(model, text, running, [p.pattern for p in measured], how)
        spill_to(subject, folder)
    for line in unknown_origins(measured):
        print(f"indexcache: note: {line}", file=sys.stderr)
    if most is not None:
        longest = max(int(batch.own_context.max()) for batch in batches)
        check_gate(most, named, base_pattern, topk=topk, longest=longest)
        for problem in little_text([*batches, *asked], recall_most):
            print(f"indexcache: note: the gate will be inconclusive: {problem}", file=sys.stderr)
    batches += asked
    if engine.engine:
        length = max(batch.ids.shape[1] for batch in batches)
        subject = start(model, engine, length=length, comparing=True)
        subject.report()
    result = run_evaluation(
        subject,
        named,
        batches,
        against=baseline.pattern if baseline else None,
        seed=text.seed,
        origin=origin_of(model, text),
        out=None if folder is None else folder / JOURNAL,
        progress=True,
    )
    gate = None
    if most is not None:
        gate = judge(result, most, recall_most=recall_most, allow_blind=allow_blind)
    if streamed and not first_process():
        return int(gate is not None and not gate.passed)
    base = baseline.name if baseline else "full"
    lines = [result.table(base), "", str(result.conditions)]
    if running.delta:
        lines.append(f"The baseline is the checkpoint without {running.delta}.")
    if not baseline and "S" in result.baseline.roles:
        note = "The model has layers without an indexer; 'full' below is what it does by itself: "
        lines = [f"{note}{result.baseline}", "", *lines]
    found = result.to_json()
    if gate is not None:
        found["gate"] = gate.to_json()
        lines += ["", gate.table()]
    seen = Seen()
    for one in measured:
        seen |= one.pattern.seen
    if seen:  # evidence.json names a pattern too, so what chose it goes along.
        found["calibration"] = seen.to_json()
    files: dict[Path, Any] = {folder / "evidence.json": found} if folder else {}
    if certificate and folder and gate:
        made = {"filler": retrieval.retrieval_filler}
        value = make_certificate(result, gate, certified, settings=made)
        files[folder / "certificate.json"] = value
        files[folder / "certificate.md"] = lambda path: write_text(path, page(value))
        lines += ["", f"{folder}: certificate.json and certificate.md, the page to sign."]
    deliver("\n".join(lines), found, output, files)
    if folder is not None:
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
    return int(gate is not None and not gate.passed)


def _check_recall_gate(
    recall_most: float | None, most: float | None, retrieval: HeldOutRetrieval
) -> None:
    """Refuse a gate of recall that would judge nothing.

    Raises:
        ValueError: it is no share, there is no --most, or no --retrieval.
    """
    from indexcache.evals.gate import check_recall_margin

    if recall_most is None:
        return
    check_recall_margin(recall_most)
    if most is None:
        raise ValueError(
            "--recall-most is a part of the gate; give --most too, the margin of loss."
        )
    if not retrieval.retrieval:
        raise ValueError(
            "--recall-most judges the answers of retrieval; name its kinds with --retrieval."
        )


def _check_certificate(patterns: int, out: str | None, most: float | None, delta: Any) -> None:
    """Refuse a certificate that nobody could check.

    Raises:
        ValueError: several patterns, no --out, no --most, or a delta.
    """
    if patterns != 1:
        raise ValueError(
            f"A certificate is for one pattern, not {patterns}; certify each by itself."
        )
    if out is None or most is None:
        flag = "--out, the folder for it" if out is None else "--most, the margin"
        raise ValueError(f"--certificate needs {flag}.")
    if delta is not None:
        raise ValueError(
            "A certificate is for a checkpoint as it is served; write one with the trained "
            "indexers by `export --delta`, and certify that."
        )
