"""Hand a pattern to the engines: a checkpoint for transformers, a flag each for vLLM and SGLang."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from indexcache.checkpoint import has_weights, read_config, resolve_config
from indexcache.delta import check_delta, untrained
from indexcache.exporting import transformers
from indexcache.exporting.checks import (
    ENGINES,
    check_engines,
    check_export,
    check_model_type,
    has_surplus,
)
from indexcache.exporting.commands import Command, commands, table_of
from indexcache.exporting.engines import FLAGS, write_flag
from indexcache.pattern import Pattern
from indexcache.records import atomic_folder, check_folder
from indexcache.seen import Seen

__all__ = ["ENGINES", "ExportResult", "check_export", "export"]

SMALL_FILES = 1 << 20
"""Bytes set aside for flags, config and index."""


@dataclass(frozen=True)
class ExportResult:
    """The files that an export wrote.

    Attributes:
        files: the paths for each engine; that of "transformers" is its folder.
        warnings: true things to know that do not make the export wrong, one sentence each.
        pattern: the pattern as a string.
        commands: how to serve it, for each engine that is started by a command.
    """

    files: dict[str, list[str]]
    warnings: list[str]
    pattern: str
    commands: tuple[Command, ...] = ()

    def table(self) -> str:
        """Return one line for each file, and the commands below them."""
        files = "\n".join(
            f"{engine:<14}{path}" for engine, paths in self.files.items() for path in paths
        )
        return f"{files}\n\n{table_of(self.commands)}" if self.commands else files

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def export(
    checkpoint: str | Path,
    pattern: Pattern | str,
    out: str | Path,
    *,
    engines: Sequence[str] | None = ENGINES,
    stages: int = 1,
    prune: bool | None = None,
    delta: str | Path | None = None,
    link: bool = True,
    progress: bool = False,
) -> ExportResult:
    """Check `pattern` against `checkpoint`, and write what each engine needs into a new folder.

    `out` gets pattern.json, which also says what text a search chose the pattern on, as the
    config of the checkpoint does. For "transformers" it gets the folder `transformers/`, a complete
    checkpoint that every engine reads; for "vllm" and "sglang" `<engine>.txt`, a flag ready for
    the shell, and `<engine>.json`, its value. With `prune` or "tensorrt-llm" and no "transformers"
    it gets `checkpoint/`, the same for engines other than transformers. Everything is written
    beside `out`, a block of a file at a time, and renamed at the end, so `out` is complete or
    absent.

    Args:
        checkpoint: a local folder with config.json and safetensors, which is never changed, or
            `tiny`. For flags alone, a config.json is enough.
        pattern: F and S for every decoder layer.
        out: a folder that does not exist or is empty.
        engines: some of `ENGINES`; None is all that can serve the pattern.
        stages: number of pipeline stages that will serve it; each must begin with F.
        prune: leave the indexers of S layers out of a checkpoint, and write one also for vLLM and
            SGLang alone. None writes one where `engines` has "transformers" or is None.
        delta: the file of a delta that was trained for this checkpoint; a checkpoint with its
            indexers is written then, also for vLLM and SGLang alone.
        link: make hard links to the checkpoint's weight files that do not change, and copy them
            only where the disk does not allow it, which a warning says. False always copies.
        progress: show on stderr how many bytes are done.

    Raises:
        ValueError: see `check_export`; or `out` is in use or not empty; or there are no weights to
            prune; or the disk is too small, full or not writable.
    """
    _check_free(Path(out))
    out = Path(out).resolve()
    pattern = Pattern.of(pattern)
    checkpoint = resolve_config(checkpoint)
    config = read_config(checkpoint)
    pattern = pattern.chosen_on(Seen.from_json(config))
    check_model_type(config, checkpoint)
    names = check_engines(engines, config, pattern, checkpoint)
    warnings = check_export(checkpoint, pattern, names, stages)
    if delta is not None:
        warnings += _delta_warnings(Path(delta), checkpoint, pattern)
        pattern = pattern.chosen_on(check_delta(delta, None, len(pattern)).seen)
    target = _checkpoint_name(
        checkpoint, pattern, names, engines, prune, warnings, delta is not None
    )
    files: dict[str, list[str]] = {}
    try:
        with atomic_folder(out) as tmp:
            pattern.to_file(tmp / "pattern.json")
            if target is not None:
                shards = transformers.shard_layout(
                    checkpoint,
                    pattern,
                    prune=prune is not False,
                    delta=None if delta is None else Path(delta),
                )
                needed = transformers.bytes_needed(checkpoint, shards, tmp, link)
                _check_space(out, needed + SMALL_FILES)
                written = transformers.write(
                    checkpoint, config, pattern, shards, tmp / target, link, progress
                )
                files[target] = [str(out / target)]
                warnings += _link_warnings(written)
            for name in FLAGS:
                if name in names:
                    paths = write_flag(name, config, pattern, tmp)
                    files[name] = [str(out / path.name) for path in paths]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space" if full else f"{error.strerror or error}"
        raise ValueError(
            f"{out}: the export could not be written ({why}); nothing was left behind."
        ) from error
    surplus = has_surplus(checkpoint, pattern)
    found = commands(
        names,
        config,
        pattern,
        model=str(checkpoint) if has_weights(checkpoint) else "MODEL",
        exported=None if target is None else str(out / target),
        surplus=(surplus, surplus and prune is False),
    )
    return ExportResult(files, warnings, str(pattern), found)


def _checkpoint_name(
    checkpoint: Path,
    pattern: Pattern,
    names: tuple[str, ...],
    engines: Sequence[str] | None,
    prune: bool | None,
    warnings: list[str],
    trained: bool,
) -> str | None:
    """Return the folder of the checkpoint to write; None where flags are enough."""
    if "transformers" in names:
        return "transformers"
    if engines is None:
        why = (
            "it has no sharing for this family"
            if has_weights(checkpoint)
            else "without weights no checkpoint can be written"
        )
        warnings.append(f"Nothing was written for transformers: {why}.")
    needed = trained or (engines is not None and "tensorrt-llm" in names)
    wanted = has_weights(checkpoint) if prune is None and engines is None else bool(prune)
    if not (wanted or needed):
        return None
    if not has_weights(checkpoint):
        raise ValueError(
            f"{checkpoint}: there are no weights to prune or to replace; leave --prune and --delta "
            "out, and give the engine a checkpoint that is ready."
        )
    if "S" not in pattern.roles and wanted:
        warnings.append("The pattern shares nothing, so there was nothing to prune.")
    if "S" not in pattern.roles or prune is False:
        return "checkpoint" if needed else None
    warnings.append(
        "checkpoint/ is for vLLM, SGLang and TensorRT-LLM: stock transformers would make up the "
        "indexers that were pruned."
    )
    return "checkpoint"


def _link_warnings(written: transformers.Written) -> list[str]:
    warnings = []
    if written.links:
        warnings.append(
            f"{written.links} of the exported weight files did not change and are hard links to "
            "the checkpoint's: replace them if you must, but do not edit them in place."
        )
    if written.why:
        warnings.append(
            f"{written.copies} of the exported weight files did not change, but could not be "
            f"linked to the checkpoint's and were copied: {written.why}."
        )
    return warnings


def _delta_warnings(delta: Path, checkpoint: Path, pattern: Pattern) -> list[str]:
    """Check that the delta belongs to the checkpoint; say which indexers it lacks.

    Raises:
        ValueError: see `delta.check_delta`.
    """
    base = checkpoint if has_weights(checkpoint) else None
    missing = untrained(check_delta(delta, base, len(pattern)), pattern)
    if not missing:
        return []
    layers = ", ".join(map(str, missing))
    return [f"{delta} has no indexer for the layers {layers}, which keep the checkpoint's."]


def _check_free(out: Path) -> None:
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ValueError(f"{out}: cannot be read ({error.strerror or error}).") from None
    if taken:
        raise ValueError(
            f"{out}: this exists and is not an empty folder; nothing is overwritten, so choose "
            "another one."
        )
    check_folder(out)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(
            f"{out}: the export needs {_size(needed)}, but the disk has {_size(free)} free; choose "
            "another disk or free some space."
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
