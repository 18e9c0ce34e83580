"""Continue a prompt file of any length on the fast path; the text is streamed to stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from indexcache.cli.flags import emit, flag, required
from indexcache.spec import SYNTAX

EPILOG = f"SPEC is {SYNTAX}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    verb: ClassVar[str] = "generate"
    model: str = required("checkpoint folder, or tiny", positional=True)
    prompt_file: str = required("UTF-8 text, given to the model as it is", metavar="FILE")
    max_new_tokens: int = flag(256, "most tokens to generate")
    pattern: str | None = flag(
        None, "pattern to run under (default: the model itself)", metavar="SPEC"
    )
    temperature: float = flag(
        0.0,
        "0 takes the best token each time, else tokens are drawn from softmax(logits / temperature)",
    )
    seed: int = flag(0, "of the drawing")
    chunk: int = flag(8192, "tokens of the prompt that go through the model at once")
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    index_dtype: str = flag(
        "auto",
        "of the indexer's keys and queries; auto: as the weights",
        choices=("auto", "bf16", "fp8"),
    )
    device: str = flag("cpu", "where the model runs, e.g. cpu or cuda:0")
    trust_remote_code: bool = flag(False, "run Python code that lies in the checkpoint")
    json: bool = flag(False, "print one JSON object as the last line")


def run(s: Settings) -> int:
    from indexcache.models.family import indexers
    from indexcache.models.fast.accelerate import accelerate
    from indexcache.models.fast.generate import end_tokens, stream_text, stream_tokens
    from indexcache.models.loading import load
    from indexcache.models.seam import use_pattern
    from indexcache.spec import parse_pattern

    if not s.temperature >= 0:
        raise ValueError(f"--temperature must be at least 0, not {s.temperature}.")
    if s.chunk < 1:
        raise ValueError(f"--chunk must be at least 1, not {s.chunk}.")
    prompt = _read(Path(s.prompt_file))
    loaded = load(s.model, dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code)
    accelerate(loaded.module, index_dtype=s.index_dtype)
    chosen = parse_pattern(s.pattern, len(indexers(loaded.module))).pattern if s.pattern else None
    ids, tokens, text = loaded.encode(prompt), list[int](), list[str]()
    began = time.perf_counter()
    first = began
    with use_pattern(loaded.module, chosen) if chosen else contextlib.nullcontext():
        made = stream_tokens(
            loaded.module,
            ids,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            seed=s.seed,
            chunk=s.chunk,
            ends=end_tokens(loaded.module),
        )

        def noted():
            nonlocal first
            for token in made:
                first = first if tokens else time.perf_counter()
                tokens.append(token)
                yield token

        for piece in stream_text(loaded.tokenizer, noted()):
            text.append(piece)
            print(piece, end="", flush=True)
    print()
    ended = time.perf_counter()
    rate = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 else None
    print(
        f"{len(ids)} tokens of prompt in {first - began:.2f} s, {len(tokens)} generated"
        + (f", {rate:.1f} a second" if rate else ""),
        file=sys.stderr,
    )
    emit(
        s.json,
        {
            "prompt_tokens": len(ids),
            "tokens": tokens,
            "text": "".join(text),
            "ttft_s": first - began,
            "decode_tok_s": rate,
            "pattern": str(chosen) if chosen else None,
        },
    )
    return 0


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if not text:
        raise ValueError(f"{path}: is empty; a prompt needs at least one character.")
    return text
