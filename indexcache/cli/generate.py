"""The verb `generate`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from indexcache.cli.common import (
    FLAT,
    Checkpoint,
    DeltaFile,
    Dtype,
    Fp8,
    IndexDtype,
    Output,
    Spec,
    check_delta,
    parse_patterns,
)
from indexcache.cli.results import deliver, rescue
from indexcache.process import drop_stdout, printable
from indexcache.reading import read_text
from indexcache.records import reason


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How a prompt is continued."""

    max_new_tokens: int = 256
    "Max number of tokens to generate."
    temperature: float = 0.0
    """0 takes the best token each time. Otherwise tokens are drawn from
    softmax(logits / temperature)."""
    seed: int = 0
    "Random seed for sampling."
    chunk: int = 8192
    "Number of tokens of the prompt that go through the model at once."
    dtype: Dtype = "float32"
    "Dtype of the weights."
    index_dtype: IndexDtype = "auto"
    "Dtype of the indexers' keys and queries; auto takes that of the weights."
    fp8: Fp8 = "dequantize"
    """How weights in FP8 are read: dequantize them, keep them, or keep them and quantise the
    inputs of products of many tokens too (both)."""
    device: str = "cpu"
    "Where the model runs, e.g. cpu or cuda:0."
    trust_remote_code: bool = False
    "Run Python code that lies in the checkpoint."
    delta: DeltaFile = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be at least 0, not {self.temperature}.")
        if self.chunk < 1:
            raise ValueError(f"--chunk must be at least 1, not {self.chunk}.")


def generate(
    model: Checkpoint,
    *,
    prompt_file: Annotated[
        str, Parameter(metavar="FILE", help="UTF-8 text, given to the model as it is.")
    ],
    pattern: Annotated[
        Spec | None, Parameter(help="Pattern to run under. The default is the model itself.")
    ] = None,
    settings: Annotated[GenerateSettings, FLAT] = GenerateSettings(),
    output: Annotated[Output, FLAT] = Output(),
) -> None:
    """Continue a prompt file of any length on the fast path.

    The text is streamed to stdout.
    """
    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.fast.generate import check_prompt, end_tokens, stream_text, stream_tokens
    from indexcache.models.loading import describe, load
    from indexcache.models.reader import Reader
    from indexcache.models.seam import use_pattern

    prompt = _read(Path(prompt_file))
    facts = describe(model)
    named = parse_patterns(facts, [pattern]) if pattern is not None else ()
    parsed = named[0].pattern if named else None
    check_delta(facts, settings.delta, named)
    reader = Reader(Path(facts["path"]))
    ids = reader.encode(prompt)  # Without a tokenizer the model is not loaded.
    check_prompt(
        ids,
        settings.max_new_tokens,
        settings.temperature,
        context=int(facts["max_position_embeddings"]),
        vocabulary=int(facts["vocab_size"]),
    )
    loaded = load(
        model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        delta=settings.delta,
        fp8=settings.fp8,
    )
    accelerate(loaded.module, index_dtype=settings.index_dtype)
    tokens: list[int] = []
    times = [time.perf_counter()]

    def timed(stream: Iterator[int]) -> Iterator[int]:
        for token in stream:
            times.append(time.perf_counter())
            tokens.append(token)
            yield token

    text = ""
    failed: OSError | None = None
    with use_pattern(loaded.module, parsed) if parsed else contextlib.nullcontext():
        stream = stream_tokens(
            loaded.module,
            ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            chunk=settings.chunk,
            ends=end_tokens(loaded.module),
        )
        for piece in stream_text(reader.tokenizer, timed(stream)):
            text += piece
            failed = _show(piece) or failed
    failed = _show("\n") or failed
    ended = time.perf_counter()
    first = times[1] if tokens else times[0]
    rate = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 else None
    print(
        f"{len(ids)} tokens of prompt in {first - times[0]:.2f} s, {len(tokens)} generated"
        + (f", {rate:.1f} a second" if rate else ""),
        file=sys.stderr,
    )
    found = {
        "prompt_tokens": len(ids),
        "tokens": tokens,
        "text": text,
        "ttft_s": first - times[0],
        "decode_tok_s": rate,
        "pattern": str(parsed) if parsed else None,
    }
    if failed is not None:
        rescue(f"stdout cannot be written ({reason(failed)})", found)
    deliver(None, found, output)


def _show(piece: str) -> OSError | None:
    """Print a piece of text; return the error of a stdout that cannot be written, e.g. a full disk.

    What is generated is kept then. An error is raised where nobody reads stdout any more.
    """
    try:
        print(printable(piece, sys.stdout), end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_stdout()
        return error
    return None


def _read(path: Path) -> str:
    """Read the prompt; raise ValueError where there is none."""
    text = read_text(path)
    if not text:
        raise ValueError(f"{path}: is empty; a prompt needs at least one character.")
    return text
