"""The settings that the verbs which run a model have in common."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from indexcache.cli.flags import flag, required
from indexcache.data import SPLITS, check_context

if TYPE_CHECKING:
    from indexcache.data import Batch
    from indexcache.models.loading import Model


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    model: str = required("checkpoint folder, or tiny", positional=True)
    data: str | None = flag(
        None, "text: a .jsonl, .txt, .md or .npy file or a folder of them (tiny: the shipped text)"
    )
    length: int | None = flag(
        None, "tokens of a sequence (default: 4 k, at least 1024, at most the model's context)"
    )
    batch: int = flag(1, "sequences that go through the model at once")
    seed: int = flag(0, "which sequences are taken, and the bootstrap's resamples")
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    device: str = flag("cpu", "where the model runs, e.g. cpu or cuda:0")
    fast: bool = flag(
        True,
        "run the fast path: a fraction of the time and memory of stock transformers, equal up to rounding",
    )
    trust_remote_code: bool = flag(False, "run Python code that lies in the checkpoint")
    json: bool = flag(False, "print one JSON object as the last line")


def load(s: ModelSettings, split: str, sequences: int) -> tuple[Model, list[Batch]]:
    """The model and the batches of one split of its text."""
    from indexcache.data import batches, text_for
    from indexcache.models import loading
    from indexcache.models.fast.accelerate import accelerate

    if s.device == "cpu":
        keep_freed_memory()
    source, part = text_for(s.model, s.data, split)
    loaded = loading.load(
        s.model, dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code
    )
    if s.fast:
        try:
            accelerate(loaded.module)
        except ValueError as error:
            print(f"indexcache: note: stock transformers runs this model. {error}", file=sys.stderr)
    text = batches(
        source,
        loaded.encode,
        loaded.config,
        split=part,
        length=s.length,
        sequences=sequences,
        batch=s.batch,
        seed=s.seed,
    )
    length, domains = text[0].ids.shape[1], ", ".join(sorted({b.domain for b in text}))
    print(
        f"{sequences} sequences of {length} tokens ({domains}); {check_context(length, loaded.topk):.0%} of the queries see more than "
        f"k = {loaded.topk} tokens",
        file=sys.stderr,
    )
    return loaded, text


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees instead of returning it to the kernel at once. A CPU forward pass allocates and
    frees the same few large tensors hundreds of times, and each time the kernel would map them anew."""
    mmap_max, trim_threshold = -4, -1  # names of mallopt's parameters in malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return  # not glibc: slower, nothing else


def split_flag(default: str, use: str):
    return flag(
        default, f"which documents of --data to {use}; the halves never share one", choices=SPLITS
    )
