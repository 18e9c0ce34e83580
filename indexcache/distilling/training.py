"""Train the indexers of a pattern in a loaded model: check, open the run folder, train, finish.

`distill` is the way in for a model in memory; `run.distill_checkpoint` loads one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from indexcache.data import Batch
from indexcache.distilling.checks import check_entry, check_run
from indexcache.distilling.parallel import open_world, world_size
from indexcache.distilling.result import DistillResult
from indexcache.distilling.rows import Row, digest_of_rows
from indexcache.distilling.settings import DistillSettings
from indexcache.distilling.streamed import StreamTrainer
from indexcache.distilling.trainer import Trainer
from indexcache.models.family import AnyModel, module_of
from indexcache.models.identity import library_versions, weights_digest
from indexcache.models.stream.loading import stream_of
from indexcache.models.world import first_process
from indexcache.pattern import Pattern
from indexcache.records import open_run
from indexcache.seen import Seen


def distill(
    model: AnyModel,
    pattern: Pattern | str,
    rows: Sequence[Row],
    out: str | Path,
    settings: DistillSettings = DistillSettings(),
    *,
    held_out: Sequence[Batch] = (),
    base: dict[str, str] | None = None,
    seen: Seen = Seen(),
    device: str | None = None,
    progress: bool = False,
    from_first: bool = False,
) -> DistillResult:
    """Train the indexers of `pattern` on the model's own attention, resumable in `out`.

    Every F and R layer's indexer learns the attention of itself and of the S layers that read its
    selection; S layers get none (L_multi of https://arxiv.org/abs/2603.12201). In the sparse stage
    without `freeze_backbone` the language-modelling loss trains all other weights at the same
    time.

    Args:
        model: a loaded model of a known family. Frozen, it has the trained (best) indexers
            afterwards and no other tensor is touched; in full mode it has been sharded: go on with
            the written weights.
        rows: training text from `pack_rows`, all of one length.
        out: run folder. Frozen, it gets `delta.safetensors` for `apply_delta`.
        held_out: batches for the evaluation at intervals, which is the mean next-token loss under
            the pattern with sparse attention. The result is the indexers with the lowest loss
            there; without batches, the last ones. Of retrieval sequences
            (`indexcache.data.retrieval_batches`) the answers found are counted instead.
        base: {"base", "base_digest"}: which checkpoint a delta belongs to; part of what a resumed
            run must share.
        seen: the text that the rows are made of and that chose the pattern, which the delta and
            the result carry along.
        device: where full mode runs; only its shards go there (default: the model's device).
        progress: show a progress bar on stderr.
        from_first: the first process alone has all weights, the others have the indexers
            (`models.hollow.load_hollow`) and get their shards from it. Full mode only.

    Raises:
        ValueError: `check_run` refuses; the folder has another run; or a loss is not finite, where
            the last good checkpoint stays.
    """
    module = module_of(model)
    pattern = Pattern.of(pattern)
    beyond = check_run(module, pattern, rows, settings, held_out, world_size())
    weight = module.get_input_embeddings().weight
    identity = {
        "pattern": str(pattern),
        **settings.to_json(),
        "data": digest_of_rows(rows),
        "weights": weights_digest(module) if first_process() else None,
        "held_out": [b.digests for b in held_out],
        "dtype": str(weight.dtype),
        **(base or {}),
        **library_versions(),
    }
    target = torch.device(device) if device else weight.device
    with open_world(target, sharded=settings.sharded) as world, ExitStack() as stack:
        run = None
        refusal = None
        if world.rank == 0:
            try:
                check = partial(check_entry, pattern=pattern)
                run = stack.enter_context(open_run(Path(out), identity, check))
            except (ValueError, OSError) as error:
                refusal = error
        world.agree(refusal)
        kind: type[Trainer] = Trainer
        if stream_of(module) is not None:
            kind = StreamTrainer
        trainer = kind(module, pattern, rows, Path(out), settings, held_out, world, run, from_first)
        trainer.resume()
        trainer.fit(progress)
        return trainer.finish(base or {}, beyond, seen)
