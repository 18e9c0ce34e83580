"""One measurement: a prefill of a given length, the decoding after it, and where the time went.

Clocks: `time.perf_counter` around work that a synchronisation closes; decoding ends when its last token is on the host, and each
token is read there while the next step runs, as it is streamed.
"""

from __future__ import annotations

import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.bench.floors import decode_floor, prefill_floor
from indexcache.bench.recorded import RecordedSelector, Stretched, record_selections, stretch
from indexcache.data import Encode
from indexcache.models.fast.accelerate import accelerate
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder, on_host
from indexcache.models.fast.prefill import prefill
from indexcache.models.loading import DTYPES, fingerprint, load
from indexcache.models.random import random_model
from indexcache.models.seam import selector_of, use_pattern
from indexcache.models.timing import PartTimer
from indexcache.pattern import Pattern
from indexcache.shapes import SHAPES, Rates, Shape, reachable_of, shape_config, shape_of

WARM_STEPS = 3  # of decoding, before the clock starts: the first captures the graph
PART_STEPS = 4  # of decoding, timed in parts
SPARE = (
    WARM_STEPS + 2 * PART_STEPS + 2
)  # tokens of cache that a measurement needs beside the prompt and what it decodes
COMPILED = 0.98  # of a first run's time, which the same pass timed in parts, if anything slower, does not fall below otherwise
SHORT = 1.5  # seconds; shorter prefills are repeated and the median taken
FILL_RESERVE = 4e9  # bytes left free for activations when the cache is filled
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Subject:
    """An accelerated model and what a result says of it. `identity` changes with the weights."""

    model: nn.Module
    name: str
    shape: Shape
    random: bool
    dtype: str
    index_dtype: str
    device: Rates
    device_name: str
    identity: str
    encode: Encode | None = None
    compiled: bool = False
    selections: list[Tensor] | None = (
        None  # recorded ones (analysis/recorded.py) that a prefill reads: the ids, the pools
    )

    @property
    def cuda(self) -> bool:
        return self.where.type == "cuda"

    @property
    def where(self) -> torch.device:
        return next(self.model.parameters()).device


def open_subject(
    model: str,
    *,
    layers: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    index_dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    compile: bool = False,
    selections: list[Tensor] | None = None,
) -> Subject:
    """A named shape with random weights (cut to `layers`), a checkpoint folder, or `tiny`; accelerated, with `compile` on a GPU.

    Raises:
        ValueError: what `shape_of`, `random_model`, `load` and `accelerate` refuse.
    """
    shape_of(model, layers)
    encode = None
    if model in SHAPES:
        config = shape_config(model, layers)
        made = random_model(config, dtype=dtype, device=device, seed=seed)
        identity = f"random, seed {seed}, {config['num_hidden_layers']} layers"
    else:
        loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        made, identity, encode = loaded.module, fingerprint(loaded.path), loaded.encode
    on_gpu = torch.device(device).type == "cuda"
    accelerate(made, index_dtype=index_dtype, compile=compile and on_gpu)
    record_selections(made)
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    )
    return Subject(
        made,
        model,
        Shape.of(made.config),
        model in SHAPES,
        dtype,
        index_dtype,
        ceilings(device, dtype),
        name,
        identity,
        encode,
        compile and on_gpu,
        selections,
    )


def ceilings(device: str, dtype: str) -> Rates:
    """The rates of a known GPU (`shapes.DEVICES`); of any other device those of one matrix product and one copy, measured now."""
    where = torch.device(device)
    if where.type == "cuda":
        known = reachable_of(torch.cuda.get_device_name(where))
        if known is not None:
            return known
    size, copied = (8192, 1 << 28) if where.type == "cuda" else (1024, 1 << 25)
    a = torch.ones(size, size, dtype=DTYPES[dtype], device=where)
    b = torch.ones(copied, dtype=torch.uint8, device=where)
    target = torch.empty_like(b)
    product = min(_timed(where, lambda: a @ a) for _ in range(4))
    copy = min(_timed(where, lambda: target.copy_(b)) for _ in range(4))
    rate, bandwidth = 2 * size**3 / product, 2 * copied / copy
    return Rates("measured here", rate, rate, bandwidth, bandwidth, 0.0)


def prompt_ids(
    subject: Subject, length: int, *, text: list[int] | None = None, seed: int = 0
) -> Tensor:
    """int64 [1, length] on the model's device: random ids, or the ids of a text, repeated to the length."""
    if text:
        ids = torch.tensor((text * (-(-length // len(text))))[:length])[None]
    else:
        ids = torch.randint(
            0, subject.shape.vocab, (1, length), generator=torch.Generator().manual_seed(seed)
        )
    return ids.to(subject.where)


def filling_batch(subject: Subject, capacity: int, pattern: Pattern) -> int:
    """How many requests of `capacity` tokens fit beside the weights.

    Raises:
        ValueError: not on a GPU; not even one fits.
    """
    if not subject.cuda:
        raise ValueError(
            "How many requests fill the memory is known for a GPU only; give --batch a number."
        )
    _release(subject)
    free = torch.cuda.mem_get_info(subject.where)[0] - FILL_RESERVE
    per_token = subject.shape.cache_bytes(
        len(pattern) - pattern.roles.count("S"), index_dtype=subject.index_dtype
    )
    count = int(free / (per_token * capacity))
    if count < 1:
        raise ValueError(
            f"Not one request of {capacity} tokens fits beside the weights ({max(free, 0) / 1e9:.1f} GB free)."
        )
    return count


def warm_up(subject: Subject, pattern: Pattern, length: int, chunk: int) -> None:
    """Compile what a measurement would compile."""
    ids = prompt_ids(subject, length)
    with torch.no_grad(), use_pattern(subject.model, pattern):
        cache = FastCache(subject.model, length + SPARE)
        with _lent(subject, length, pattern):
            tokens = prefill(subject.model, ids, cache, chunk=chunk).argmax(-1)
        _steps(Decoder(subject.model, cache), tokens, WARM_STEPS)


def measure(
    subject: Subject,
    context: int,
    pattern: Pattern,
    *,
    batch: int = 1,
    decode_tokens: int = 64,
    chunk: int = 8192,
    text: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a prefill of `context` tokens and `decode_tokens` steps after it under a pattern.

    Returns:
        {"context", "pattern", "full", "layers", "batch", "chunk", "ttft_s" (null when batch > 1), "ttft_runs_s", "decode_tok_s" (of one
        request), "decode_total_tok_s" (of the batch), "peak_gb", "added_gb" (of the prefill, beyond weights and cache; null on a
        CPU), "cache_gb", "weights_gb", "parts_ms", "floor_ms" (prefill), "decode_parts_ms", "decode_floor_ms" (a step)}.
    """
    s, capacity = subject, context + decode_tokens + SPARE
    ids = prompt_ids(s, context, text=text, seed=seed)
    row: dict[str, Any] = {
        "context": context,
        "pattern": str(pattern),
        "full": len(pattern.full_layers),
        "layers": len(pattern),
        "batch": batch,
        "chunk": chunk,
    }
    weights = sum(p.numel() * p.element_size() for p in s.model.parameters())
    with torch.no_grad(), use_pattern(s.model, pattern):
        _release(s)
        with _lent(s, context, pattern) as lent:  # decoding reads what it selects
            if s.cuda:
                torch.cuda.reset_peak_memory_stats(s.where)
            cache = FastCache(s.model, capacity)
            runs, parts, added = [_prefill_s(s, ids, cache, chunk)], {}, None
            while batch == 1 and len(runs) < 3 and statistics.median(runs) < SHORT:
                runs.append(_prefill_s(s, ids, cache, chunk))
            if batch == 1:
                with PartTimer() as timer:
                    seconds = _prefill_s(s, ids, cache, chunk)
                parts = timer.milliseconds()
                if seconds < COMPILED * statistics.median(
                    runs
                ):  # what was measured first was compiling
                    runs = [_prefill_s(s, ids, cache, chunk)]
                added = _peak(s) - weights - cache.nbytes - lent if s.cuda else None
        if batch > 1:
            runs = []
            _release(s)
            cache.batch_repeat_interleave(
                batch
            )  # copies of one prompt, which go on with different tokens
        tokens = (ids[0, -1:] + torch.arange(batch, device=ids.device)) % s.shape.vocab
        decoder = Decoder(s.model, cache)
        tokens = _steps(decoder, tokens, WARM_STEPS)
        began = time.perf_counter()
        tokens = _steps(decoder, tokens, decode_tokens)
        step = (time.perf_counter() - began) / decode_tokens
        del decoder  # and its graph
        try:
            decode_parts = _decode_parts(s, cache, tokens, 1e3 * step)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            print(
                f"indexcache: note: decoding cannot be timed in parts here ({str(error).splitlines()[0]:.200}).",
                file=sys.stderr,
            )
            decode_parts = {}
        row |= {
            "ttft_s": round(statistics.median(runs), 5) if runs else None,
            "ttft_runs_s": [round(r, 5) for r in runs],
            "decode_tok_s": round(1 / step, 3),
            "decode_total_tok_s": round(batch / step, 3),
            "peak_gb": round(_peak(s) / 1e9, 3),
            "added_gb": None if added is None else round(added / 1e9, 3),
            "cache_gb": round(cache.nbytes / 1e9, 4),
            "weights_gb": round(weights / 1e9, 4),
            "parts_ms": {p: round(ms, 4) for p, ms in parts.items() if p != "total"},
            "decode_parts_ms": {p: round(ms, 4) for p, ms in decode_parts.items() if p != "total"},
        }
    return row | floors_of(s, context, pattern, batch)


@contextmanager
def _lent(s: Subject, context: int, pattern: Pattern) -> Iterator[int]:
    """Lay the recorded selections out for a prefill of this length; yields the bytes they take."""
    selector = selector_of(s.model)
    assert isinstance(selector, RecordedSelector)
    ids, pools = [*(s.selections or ()), None, None][:2]
    taken = 0
    try:
        if ids is not None:
            selector.ids = stretch(ids.to(s.where), s.shape.topk, context)
            taken += selector.ids.nbytes
        if pools is not None and pattern.pool_factor is not None:
            selector.pools = Stretched(
                pools.to(s.where), s.shape.topk * pattern.pool_factor, context
            )
            taken += selector.pools.nbytes
        yield taken
    finally:
        selector.ids = selector.pools = None


def floors_of(
    subject: Subject, context: int, pattern: Pattern, batch: int
) -> dict[str, dict[str, float]]:
    floors = {"floor_ms": prefill_floor, "decode_floor_ms": decode_floor}
    found = {
        key: f(
            subject.shape,
            context,
            pattern,
            subject.device,
            batch=batch,
            index_dtype=subject.index_dtype,
        )
        for key, f in floors.items()
    }
    return {key: {p: float(f"{ms:.5g}") for p, ms in parts.items()} for key, parts in found.items()}


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in OUT_OF_MEMORY)
    )


def _prefill_s(s: Subject, ids: Tensor, cache: FastCache, chunk: int) -> float:
    """Seconds until the first token is on the host, from an empty cache."""
    cache.reset()
    _wait(s.where)
    began = time.perf_counter()
    prefill(s.model, ids, cache, chunk=chunk).argmax(-1).tolist()
    return time.perf_counter() - began


def _release(s: Subject) -> None:
    """Give back what earlier measurements left."""
    gc.collect()
    if s.cuda:
        torch.cuda.empty_cache()


def _steps(decoder: Decoder, tokens: Tensor, count: int) -> Tensor:
    """Greedy tokens, one request's shifted against the next one's: requests that say the same would meet the same experts."""
    shift = torch.arange(len(tokens), device=tokens.device)

    def drawn() -> Iterator[Tensor]:
        nonlocal tokens
        for _ in range(count):
            logits = decoder.step(tokens)
            tokens = (logits.argmax(-1) + shift) % logits.shape[-1]
            yield tokens

    for _ in on_host(drawn()):
        pass
    return tokens


class GraphTimer(PartTimer):
    """Times the parts of a step inside its CUDA graph: marks made while the graph is captured become nodes of it, and every replay
    sets them anew. What runs outside of a capture is not timed."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda = False  # a plain timer leaves captures alone

    def _now(self) -> Any:
        if not torch.cuda.is_current_stream_capturing():
            return None
        mark = torch.cuda.Event(enable_timing=True, external=True)
        mark.record()
        return mark

    def replayed(self) -> dict[str, float]:
        """Milliseconds of each part in the last replay, which must have ended."""
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            if start is not None and end is not None:
                sums[name] = sums.get(name, 0.0) + start.elapsed_time(end)
        return sums


def _decode_parts(s: Subject, cache: FastCache, tokens: Tensor, step_ms: float) -> dict[str, float]:
    """Milliseconds of each part of one step. On a GPU they are timed in a graph of their own, whose marks cost a microsecond
    or two each; rest is what they leave of the step without marks."""
    if not s.cuda:
        decoder = Decoder(s.model, cache)
        tokens = _steps(decoder, tokens, 1)
        with PartTimer() as plain:
            _steps(decoder, tokens, PART_STEPS)
        return {p: ms / PART_STEPS for p, ms in plain.milliseconds().items()}
    timer = GraphTimer()
    with timer:
        decoder = Decoder(s.model, cache)
        tokens = _steps(decoder, tokens, 1)
    sums: dict[str, float] = {}
    for _ in range(PART_STEPS):
        tokens = _steps(decoder, tokens, 1)
        _wait(s.where)
        for name, ms in timer.replayed().items():
            sums[name] = sums.get(name, 0.0) + ms / PART_STEPS
    return sums | {"rest": max(step_ms - sum(sums.values()), 0.0)}


def _timed(where: torch.device, work: Any) -> float:
    _wait(where)
    began = time.perf_counter()
    work()
    _wait(where)
    return time.perf_counter() - began


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _peak(s: Subject) -> int:
    """Most bytes allocated on the GPU since the last reset; of a process on a CPU, its largest resident set so far."""
    if s.cuda:
        return torch.cuda.max_memory_allocated(s.where)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
