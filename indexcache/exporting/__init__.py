"""Hand a pattern to the engines: a checkpoint for transformers, a flag for vLLM and one for SGLang."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from indexcache.checkpoint import read_config
from indexcache.exporting import sglang, transformers, vllm
from indexcache.exporting.checks import ENGINES, check_engines, check_export
from indexcache.pattern import Pattern
from indexcache.records import atomic_folder

__all__ = ["ENGINES", "check_export", "export"]

SMALL_FILES = 1 << 20  # bytes set aside for flags, config and index


def export(
    checkpoint: str | Path,
    pattern: Pattern | str,
    out: str | Path,
    *,
    engines: Sequence[str] = ENGINES,
    stages: int = 1,
    prune: bool = True,
) -> dict[str, Any]:
    """Check `pattern` against `checkpoint` and write, into the new folder `out`, what each engine needs to run it.

    `out` gets pattern.json; for "transformers" the folder `transformers/`, a complete checkpoint (also what
    TensorRT-LLM reads); for "vllm" and "sglang" `<engine>.txt`, a flag ready for the shell, and `<engine>.json`, its
    value. Everything is written beside `out` and renamed at the end: `out` is whole or absent. Weight files that do
    not change are hard links to the checkpoint's where the disk allows it.

    Args:
        checkpoint: a local folder with config.json and safetensors; never changed.
        pattern: F and S for every decoder layer.
        out: a folder that does not exist or is empty.
        engines: some of `ENGINES`.
        stages: pipeline stages that will serve it; each must begin with F.
        prune: leave the indexers of S layers out of the transformers checkpoint.

    Returns:
        {"files": {engine: [paths]}, "warnings": [sentences], "pattern": the string}; the path of "transformers" is
        its folder.

    Raises:
        ValueError: as `check_export`; `out` is in use or not empty; or the disk is too small, full or not writable.
    """
    checkpoint, out = Path(checkpoint), Path(out).resolve()
    engines, pattern = check_engines(engines), Pattern.of(pattern)
    _check_free(out)
    warnings = check_export(checkpoint, pattern, engines, stages)
    config = read_config(checkpoint)
    files: dict[str, list[str]] = {}
    try:
        with atomic_folder(out) as part:
            pattern.to_file(part / "pattern.json")
            if "transformers" in engines:
                shards = transformers.plan_shards(checkpoint, pattern, prune=prune)
                _check_space(out, transformers.bytes_needed(checkpoint, shards, part) + SMALL_FILES)
                links = transformers.write(
                    checkpoint, config, pattern, shards, part / "transformers"
                )
                files["transformers"] = [str(out / "transformers")]
                if links:
                    warnings.append(
                        f"{links} of the exported weight files did not change and are hard links to the "
                        "checkpoint's: replace them if you must, but do not edit them in place."
                    )
            for name, engine in (("vllm", vllm), ("sglang", sglang)):
                if name in engines:
                    files[name] = [
                        str(out / path.name) for path in engine.write(config, pattern, part)
                    ]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space" if full else f"{error.strerror or error}"
        raise ValueError(
            f"{out}: the export could not be written ({why}); nothing was left behind."
        ) from error
    return {"files": files, "warnings": warnings, "pattern": str(pattern)}


def _check_free(out: Path) -> None:
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ValueError(f"{out}: cannot be read ({error.strerror or error}).") from None
    if taken:
        raise ValueError(
            f"{out}: this exists and is not an empty folder; nothing is overwritten, so choose another one."
        )


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(
            f"{out}: the export needs {_size(needed)}, but the disk has {_size(free)} free; choose another disk "
            "or free some space."
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
