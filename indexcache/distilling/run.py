"""Distil a checkpoint: from files to a run folder with a delta, or with a whole checkpoint."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from indexcache.checkpoint import read_config
from indexcache.data import (
    Batch,
    Document,
    check_unseen,
    close_documents,
    make_batches,
    seen_in_documents,
    split_documents,
)
from indexcache.delta import check_delta, untrained
from indexcache.distilling.adapters import check_peft
from indexcache.distilling.carried import carry_over
from indexcache.distilling.checks import check_streamed
from indexcache.distilling.delta import apply_delta, save_checkpoint
from indexcache.distilling.layer_weights import layer_weights
from indexcache.distilling.result import DistillResult
from indexcache.distilling.retrieval import check_retrieval, held_out_retrieval, mixed_rows, sources
from indexcache.distilling.rows import pack_rows
from indexcache.distilling.settings import DistillSettings, RunSettings
from indexcache.distilling.training import distill
from indexcache.exporting import export
from indexcache.models.family import family_of
from indexcache.models.hollow import load_hollow
from indexcache.models.loading import (
    DTYPES,
    Model,
    check_device,
    describe,
    fingerprint,
    load,
    open_weights,
)
from indexcache.models.reader import Reader
from indexcache.models.stream.loading import stream_of, too_large
from indexcache.models.stream.settings import StreamSettings
from indexcache.models.world import first_process, local_device, world_size
from indexcache.pattern import Pattern
from indexcache.records import publish
from indexcache.seen import Seen
from indexcache.vacuity import check_length

FP32_WEIGHTS = ("weights_proj.weight", "e_score_correction_bias")
"""Weights that stay fp32 in a checkpoint that is written in bfloat16."""

log = logging.getLogger("indexcache")


def distill_checkpoint(
    model: str,
    pattern: Pattern,
    out: str | Path,
    settings: DistillSettings = DistillSettings(),
    run: RunSettings = RunSettings(),
    *,
    progress: bool = False,
) -> tuple[DistillResult, Path | None]:
    """Train the indexers of a checkpoint on a text, resumable in `out`; see `training.distill`.

    Under torchrun every process calls this, and the first one writes.

    Args:
        model: checkpoint folder, or `tiny`.
        pattern: what the indexers are trained for.
        out: run folder.
        settings: `rows` and `layer_weights` are replaced by what `run` says about them.
        run: what is read and written, and where the model runs.
        progress: show a progress bar on stderr.

    Returns:
        The result, and the folder of the whole checkpoint where one was asked for or the backbone
        was trained.

    Raises:
        ValueError: the checkpoint, the text, the delta or the settings cannot be used. What can be
            said without the model is said before it is loaded.
    """
    folder = Path(out)
    if not run.resume and (folder / "settings.json").exists():
        raise ValueError(
            f"{folder}: there is a run in this folder already; leave out --no-resume to continue "
            "it, or choose another --out."
        )
    facts = describe(model)
    if run.delta is not None:
        check_delta(run.delta, facts["path"], len(pattern))
    device = local_device(run.device)
    check_device(device)  # In full mode the model itself is loaded on the host.
    context = facts["max_position_embeddings"]
    length = check_length(run.length, facts["index_topk"], context, [pattern])
    settings = replace(settings, rows=_rows(run.batch_tokens, length))
    digest = fingerprint(Path(facts["path"]))
    if run.layer_weights is not None:
        weights = layer_weights(run.layer_weights, len(pattern), digest)
        settings = replace(settings, layer_weights=tuple(weights))
    settings.check()
    if settings.lora:
        check_peft()
    check_retrieval(run, settings)
    how = _streaming(facts, settings, run, device)
    # What is wrong with the text is said before the model is loaded.
    reader = Reader(Path(facts["path"]))
    vocabulary = int(facts["vocab_size"])
    training, evaluation = _documents(
        model, run, reader, vocabulary, evaluate=settings.eval_every > 0
    )
    rows = pack_rows(training, length, settings.seed)
    held_out: list[Batch] = []
    if settings.eval_every:
        held_out = _held_out(evaluation, training, length, run.eval_sequences, settings.seed)
    if run.retrieval_share:
        rows = mixed_rows(model, run, settings, reader, facts, rows)
    if run.retrieval and settings.eval_every:
        held_out += held_out_retrieval(model, run, settings, reader, facts, length)
    pattern = pattern.chosen_on(Seen.from_json(read_config(facts["path"])))
    check_unseen(held_out, pattern.seen)

    # With shards of all weights on every process, one of them reads the checkpoint.
    from_first = not settings.frozen and world_size() > 1
    if from_first and not first_process():
        loaded = load_hollow(model, dtype="float32", trust_remote_code=run.trust_remote_code)
    else:
        loaded = load(
            model,
            dtype=settings.compute_dtype if settings.frozen else "float32",
            device=device if settings.frozen else "cpu",
            trust_remote_code=run.trust_remote_code,
            stream=how or False,
        )
    if (stream := stream_of(loaded.module)) is not None:
        stream.layers.load_indexers()
    if run.delta is not None:
        pattern = pattern.chosen_on(_begin_with(loaded, run.delta, pattern))
    check_unseen(held_out, pattern.seen)
    seen = seen_in_documents(training)
    result = distill(
        loaded.module,
        pattern,
        rows,
        folder,
        settings,
        held_out=held_out,
        base={"base": loaded.path.name, "base_digest": digest},
        seen=pattern.seen | seen,
        device=device,
        progress=progress,
        from_first=from_first,
    )
    if not first_process() or (settings.frozen and not run.whole):
        return result, None
    checkpoint = write_checkpoint(
        folder / "checkpoint",
        loaded,
        pattern.chosen_on(seen),
        result.weights,
        settings.compute_dtype,
    )
    return result, checkpoint


def _streaming(
    facts: dict[str, Any], settings: DistillSettings, run: RunSettings, device: str
) -> StreamSettings | None:
    """Return how the layers are read one at a time; None where the model is loaded whole.

    Raises:
        ValueError: streaming cannot do what is asked for.
    """
    how = StreamSettings(host_memory=run.host_memory)
    how.limit()
    wanted = run.stream
    if wanted is None and settings.stage == "warmup" and not run.whole:
        dtype = DTYPES[settings.compute_dtype]
        why = too_large(open_weights(facts), dtype, device)
        wanted = why is not None
        if why is not None and first_process():
            log.warning(
                "%s, so the layers are read one at a time (--stream); --no-stream loads them all.",
                why,
            )
    if not wanted:
        if run.host_memory is not None:
            raise ValueError("--host-memory is a setting of streaming; add --stream.")
        return None
    check_streamed(settings, world_size(), retrieval=bool(run.retrieval and settings.eval_every))
    if run.whole:
        raise ValueError(
            "--whole writes all weights, which are never together where layers are streamed; "
            "write the checkpoint with `export --delta`."
        )
    return how


def _rows(batch_tokens: int | None, length: int) -> int:
    """Return the number of rows of a step."""
    tokens = 4 * length if batch_tokens is None else batch_tokens
    if tokens < length or tokens % length:
        raise ValueError(
            "A step has a whole number of rows: --batch-tokens must be a multiple of the "
            f"{length} tokens of a row, not {tokens}."
        )
    return tokens // length


def _begin_with(loaded: Model, delta: str, pattern: Pattern) -> Seen:
    """Put the indexers of a delta into the model, and note those that it lacks.

    Returns:
        The text that the delta was trained on.
    """
    trained_for = apply_delta(loaded.module, delta, base=loaded.path)
    missing = untrained(trained_for, pattern)
    if missing and first_process():
        log.warning(
            "%s has no indexer of the layers %s; they begin with the checkpoint's.",
            delta,
            ", ".join(map(str, missing)),
        )
    return trained_for.seen


def _documents(
    model: str, run: RunSettings, reader: Reader, vocabulary: int, *, evaluate: bool
) -> tuple[list[Document], list[Document]]:
    """Return the training documents and the held-out documents, which share none."""
    source, split, held_out_source = sources(model, run)
    shown = first_process()
    documents = reader.documents(source, vocabulary, progress=shown)
    if held_out_source is None:
        training = split_documents(documents, split)
        if not evaluate:
            return training, []
        return training, split_documents(documents, "heldout")
    if not evaluate:
        return documents, []
    held_out = reader.documents(held_out_source, vocabulary, progress=shown)
    known = {d for one in documents for d in (one.digest, one.text_digest) if d}
    shared = sum(d.digest in known or d.text_digest in known for d in held_out)
    if shared:
        raise ValueError(
            f"{shared} of the held-out documents are training text too, so the evaluation "
            "would be no evidence; give other text with --held-out, or none."
        )
    return documents, held_out


def _held_out(
    documents: list[Document], training: list[Document], length: int, sequences: int, seed: int
) -> list[Batch]:
    """Make held-out batches without documents that share long passages with training ones.

    Raises:
        ValueError: too little text is left.
    """
    left_out: list[Document] = []
    while True:
        kept = [d for d in documents if d not in left_out]
        if left_out and not kept:
            raise ValueError(
                "All held-out documents share long passages with training text, so the evaluation "
                "would be no evidence; give other text with --held-out."
            )
        batches = make_batches(kept, length=length, sequences=sequences, seed=seed)
        used = {digest for b in batches for digest in b.digests}
        close = close_documents([d for d in kept if d.digest in used], training)
        left_out += close
        if close:
            continue
        if left_out and first_process():
            log.warning(
                "%d of the held-out documents share long passages with training text, and were "
                "left out of the evaluation: %s.",
                len(left_out),
                ", ".join(d.name for d in left_out[:3]) + (", .." if len(left_out) > 3 else ""),
            )
        return batches


def write_checkpoint(
    target: Path, loaded: Model, pattern: Pattern, weights: dict[str, Any] | None, dtype: str
) -> Path:
    """Write the whole checkpoint for stock transformers, and return its folder.

    Its config has the pattern where transformers can express that.
    """
    if target.exists():  # A finished run was started again.
        return target
    temporary = target.with_name(f"{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    if weights is None:
        weights = dict(loaded.module.state_dict())
    elif dtype == "bfloat16":
        weights = {
            name: weight
            if name.endswith(FP32_WEIGHTS) or not weight.is_floating_point()
            else weight.to(torch.bfloat16)
            for name, weight in weights.items()
        }
    save_checkpoint(loaded.module, weights, temporary, loaded.path, pattern.seen)
    for line in carry_over(describe(loaded.path), temporary):
        log.warning("%s", line)
    if "R" not in pattern.roles and family_of(loaded.module).native_sharing:
        export(temporary, pattern, target, engines=("transformers",))
        shutil.rmtree(temporary)
        return target
    lacks = "no R layers" if "R" in pattern.roles else "no sharing for this family"
    log.warning(
        "stock transformers has %s, so the checkpoint keeps all indexers and its config no "
        "pattern; run it with use_pattern.",
        lacks,
    )
    publish(temporary, target)
    return target
