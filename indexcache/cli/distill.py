"""The verb `distill`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter, default_name_transform

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    Output,
    RunFolder,
    Spec,
    keep_freed_memory,
    parse_patterns,
)
from indexcache.cli.results import claim_folder, deliver
from indexcache.distilling.settings import DistillSettings, RunSettings

NO_FLAGS = ("rows", "layer_weights", "weight_decay", "clip", "lr_warmup")
"""Settings without a flag; --batch-tokens and --layer-weights stand for two of them."""

FLAG_NAMES = {"objective": "loss", "compute_dtype": "dtype"}
"""Settings whose flag has another name."""


def flag_name(setting: str) -> str:
    """Return the flag of a setting, without its dashes."""
    return FLAG_NAMES.get(setting, default_name_transform(setting))


Settings = Annotated[
    DistillSettings,
    Parameter(name="*", parse=f"^(?!({'|'.join(NO_FLAGS)})$)", name_transform=flag_name),
]


def distill(
    model: Checkpoint,
    *,
    pattern: Annotated[Spec, Parameter(help="The pattern to train for.")],
    out: RunFolder,
    settings: Settings = DistillSettings(),
    run: Annotated[RunSettings, FLAT] = RunSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Train the indexers of a pattern to serve all their layers, alone or with the whole model.

    The run folder holds settings.json, journal.jsonl (one line per step), state-STEP, best-STEP,
    result.json, and the result. With a frozen backbone, as always in the warmup stage, that is
    delta.safetensors, a few megabytes that indexcache.apply_delta puts into the model. Otherwise
    it is checkpoint/transformers, which stock transformers loads. A killed run goes on with the
    same command. On several GPUs:
    torchrun --nproc-per-node 8 -m indexcache distill .. --device cuda
    """
    from indexcache.models.loading import describe

    named = parse_patterns(describe(model), [pattern])[0]
    claim_folder(out, model)
    if run.device == "cpu":
        keep_freed_memory()

    from indexcache.distilling.run import distill_checkpoint, first_process

    result, checkpoint = distill_checkpoint(model, named.pattern, out, settings, run, progress=True)
    if not first_process():
        return
    adapter = "adapter" if settings.lora else None
    files = [result.delta, "checkpoint" if checkpoint else None, adapter, "journal.jsonl"]
    text = f"{result.table()}\n{out}: {', '.join(file for file in files if file)}"
    written = {"checkpoint": str(checkpoint)} if checkpoint else {}
    deliver(text, result.to_json() | written, output)
