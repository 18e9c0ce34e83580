"""Train the indexers of a pattern to serve all their layers (multi-layer distillation), alone or with the whole model.

The run folder holds settings.json, journal.jsonl (one line a step), state-STEP, best-STEP, result.json, and the result: with
the backbone frozen (always so in the warm-up) delta.safetensors, megabytes that `indexcache.distilling.apply_delta` puts into the model;
otherwise checkpoint/transformers, which stock transformers loads. A killed run goes on with the same command. On several
GPUs: torchrun --nproc-per-node 8 -m indexcache distill .. --device cuda
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from indexcache.cli.common import keep_freed_memory
from indexcache.cli.flags import emit, flag, required
from indexcache.spec import SYNTAX

if TYPE_CHECKING:
    from indexcache.data import Batch, Document
    from indexcache.models.loading import Model

EPILOG = f"SPEC is {SYNTAX}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    verb: ClassVar[str] = "distill"
    model: str = required("checkpoint folder, or tiny", positional=True)
    pattern: str = required("the pattern to train for; the forms of SPEC are below", metavar="SPEC")
    out: str = required("run folder; an interrupted run in it is continued", metavar="DIR")
    data: str | None = flag(
        None,
        "training text: a .jsonl, .txt, .md or .npy file or a folder of them (tiny: the shipped text)",
    )
    held_out: str | None = flag(
        None,
        "text to evaluate on (default: the held-out half of the documents of --data)",
        metavar="DATA",
    )
    delta: str | None = flag(
        None, "begin with the indexers of this delta, e.g. the warm-up's", metavar="FILE"
    )
    stage: str = flag(
        "warmup",
        "warmup: dense attention, only indexers train; sparse: over the selection",
        choices=("warmup", "sparse"),
    )
    freeze_backbone: bool = flag(False, "train nothing but the indexers in the sparse stage too")
    loss: str = flag(
        "multi",
        "multi, avg: an indexer learns all layers it serves (the same gradient); own: its own layer alone",
        choices=("multi", "avg", "own"),
    )
    layer_weights: str | None = flag(
        None,
        "how much each layer counts in what its indexer learns: numbers with commas, or the folder of a "
        "finished search, for what sharing that layer alone cost there (default: all the same)",
        metavar="LIST|DIR",
    )
    keep_zeros: bool = flag(
        False,
        "rows of the indexers' matrices that are all zero stay so, and take no room in a packed delta",
    )
    steps: int = flag(1000, "optimizer steps")
    lr: float = flag(
        2e-3, "peak learning rate of the indexers; it rises linearly, then falls as a cosine"
    )
    backbone_lr: float = flag(1e-5, "peak learning rate of the rest")
    batch_tokens: int | None = flag(
        None, "tokens of a step, all processes together (default: four rows)"
    )
    length: int | None = flag(
        None,
        "tokens of a row, into which documents are packed (default: 4 k, at least 1024, at most the context)",
    )
    seed: int = flag(0, "of the packing and the order of the rows")
    eval_every: int = flag(
        100, "steps between evaluations on held-out text; 0: none, the last indexers are the result"
    )
    eval_sequences: int = flag(16, "held-out sequences, spread over the domains")
    save_every: int = flag(50, "steps between checkpoints to go on from")
    resume: bool = flag(
        True, "continue what is in --out; --no-resume refuses a folder that has a run"
    )
    whole: bool = flag(False, "write the whole checkpoint beside the delta")
    dtype: str = flag(
        "float32", "to compute in; masters are float32", choices=("float32", "bfloat16")
    )
    device: str = flag(
        "cpu",
        "where the model runs, e.g. cpu or cuda:0; under torchrun cuda is each process's own GPU",
    )
    trust_remote_code: bool = flag(False, "run Python code that lies in the checkpoint")
    json: bool = flag(False, "print one JSON object as the last line")


def run(s: Settings) -> int:
    import os
    import sys
    from pathlib import Path

    from indexcache.checkpoint import resolve
    from indexcache.data import check_context, make_batches
    from indexcache.distilling import DistillSettings, apply_delta, distill, pack_rows
    from indexcache.distilling.layer_weights import layer_weights
    from indexcache.distilling.parallel import local_device
    from indexcache.models.family import indexers
    from indexcache.models.loading import check_device, fingerprint, load
    from indexcache.spec import parse_pattern

    out, device, first = Path(s.out), local_device(s.device), os.environ.get("RANK", "0") == "0"
    if not s.resume and (out / "settings.json").exists():
        raise ValueError(
            f"{out}: there is a run in this folder already; leave out --no-resume to continue it, or choose another --out."
        )
    if s.device == "cpu":
        keep_freed_memory()
    resolve(s.model)
    check_device(device)  # in full mode the model itself is loaded on the host
    frozen = s.freeze_backbone or s.stage == "warmup"
    loaded = load(
        s.model,
        dtype=s.dtype if frozen else "float32",
        device=device if frozen else "cpu",
        trust_remote_code=s.trust_remote_code,
    )
    pattern = parse_pattern(s.pattern, len(indexers(loaded.module))).pattern
    if s.delta is not None:
        begun = apply_delta(loaded.module, s.delta, base=loaded.path)
        new = [str(i) for i, role in enumerate(pattern.roles) if role != "S" and begun[i] == "S"]
        if new and first:
            print(
                f"indexcache: note: {s.delta} has no indexer of the layers {', '.join(new)}; they begin with the checkpoint's.",
                file=sys.stderr,
            )
    context = int(loaded.config.max_position_embeddings)
    length = min(max(4 * loaded.topk, 1024), context) if s.length is None else s.length
    check_context(length, loaded.topk)
    if length > context:
        raise ValueError(
            f"Rows of {length} tokens are longer than the model's context of {context}; give a smaller --length."
        )
    tokens = 4 * length if s.batch_tokens is None else s.batch_tokens
    if tokens < length or tokens % length:
        raise ValueError(
            f"A step has a whole number of rows: --batch-tokens must be a multiple of the {length} tokens of a row, not {tokens}."
        )
    digest = fingerprint(loaded.path)
    weights = (
        None
        if s.layer_weights is None
        else tuple(layer_weights(s.layer_weights, len(pattern), digest))
    )
    settings = DistillSettings(
        stage=cast(Any, s.stage),
        freeze_backbone=s.freeze_backbone,
        objective=cast(Any, s.loss),
        layer_weights=weights,
        keep_zeros=s.keep_zeros,
        steps=s.steps,
        rows=tokens // length,
        lr=s.lr,
        backbone_lr=s.backbone_lr,
        compute_dtype=s.dtype,
        eval_every=s.eval_every,
        save_every=s.save_every,
        seed=s.seed,
    )
    settings.check()
    training, held = _documents(s, loaded)
    rows = pack_rows(training, length, s.seed)
    batches: list[Batch] = []
    if s.eval_every:
        batches = make_batches(held, length=length, sequences=s.eval_sequences, seed=s.seed)
    base = {"base": loaded.path.name, "base_digest": digest}
    result = distill(
        loaded.module,
        pattern,
        rows,
        out,
        settings,
        held_out=batches,
        base=base,
        device=device,
        progress=True,
    )
    if not first:
        return 0
    document = result.to_json()
    files = [result.delta] if result.delta else []
    if s.whole or not frozen:
        document["checkpoint"] = _write_whole(s, loaded, pattern, result.weights)
        files.append("checkpoint")
    print(result.table())
    print(f"{s.out}: {', '.join([*files, 'journal.jsonl'])}")
    emit(s.json, document)
    return 0


def _documents(s: Settings, loaded: Model) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents), which share none."""
    from indexcache.data import load_documents, shipped_text, split_documents, text_for

    vocabulary = int(loaded.config.vocab_size)
    source, split = text_for(s.model, s.data, "calibration")
    other = (
        s.held_out
        if s.held_out is not None or s.data is not None or s.model != "tiny"
        else str(shipped_text("heldout"))
    )
    found = load_documents(source, loaded.encode, vocabulary)
    if other is None:
        return split_documents(found, split), split_documents(
            found, "heldout"
        ) if s.eval_every else []
    held = load_documents(other, loaded.encode, vocabulary) if s.eval_every else []
    shared = {d.digest for d in found} & {d.digest for d in held}
    if shared:
        raise ValueError(
            f"{len(shared)} of the held-out documents are training text too, so the evaluation would be no evidence; give "
            "other text with --held-out, or none."
        )
    return found, held


def _write_whole(s: Settings, loaded: Model, pattern: Any, weights: dict[str, Any] | None) -> str:
    """The whole checkpoint: for stock transformers with the pattern in its config where it can express that."""
    import shutil
    import sys
    from pathlib import Path

    import torch

    from indexcache.distilling.delta import save_checkpoint
    from indexcache.exporting import export
    from indexcache.models.family import family_of

    target, part = Path(s.out) / "checkpoint", Path(s.out) / "checkpoint.part"
    if target.exists():  # a finished run, started again
        return str(target)
    shutil.rmtree(part, ignore_errors=True)
    if weights is None:
        weights = dict(loaded.module.state_dict())
    elif s.dtype == "bfloat16":
        keep = ("weights_proj.weight", "e_score_correction_bias")
        weights = {
            k: v if k.endswith(keep) or not v.is_floating_point() else v.to(torch.bfloat16)
            for k, v in weights.items()
        }
    save_checkpoint(loaded.module, weights, part, loaded.path)
    if "R" in pattern.roles or not family_of(loaded.module).native_sharing:
        why = (
            "stock transformers has no R layers"
            if "R" in pattern.roles
            else "stock transformers has no sharing for this family"
        )
        print(
            f"indexcache: note: {why}, so the checkpoint keeps all indexers and its config no pattern; run it with use_pattern.",
            file=sys.stderr,
        )
        part.rename(target)
    else:
        export(part, pattern, target, engines=("transformers",))
        shutil.rmtree(part)
    return str(target)
