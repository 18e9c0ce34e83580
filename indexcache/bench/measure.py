"""Measure a prefill, the decoding after it, and the time of each of their parts.

Times are differences of `time.perf_counter` with a synchronisation before the second reading.
Decoding ends when its last token is on the host. Each token is read there while the next step
runs, as when text is streamed.
"""

from __future__ import annotations

import gc
import logging
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from indexcache.bench import CHUNK
from indexcache.bench.floors import decode_floor, prefill_floor
from indexcache.bench.recorded import RecordedSelector, Stretched, stretch
from indexcache.bench.subject import Subject, prompt_ids, synchronize
from indexcache.memory import out_of_memory
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.decode import Decoder, on_host
from indexcache.models.fast.prefill import prefill
from indexcache.models.seam import selector_of, use_pattern
from indexcache.models.timing import PartTimer
from indexcache.pattern import Pattern

WARM_STEPS = 3  # decoding steps before the clock starts; the first one captures the graph
PART_STEPS = 4  # decoding steps that are timed part by part
SPARE = WARM_STEPS + 2 * PART_STEPS + 2  # tokens of cache beside the prompt and the timed steps

# The instrumented pass is never faster than the plain one. Where it takes less than this share of
# the plain one's time, that one was still compiling and is timed again.
COMPILING = 0.98
SHORT = 1.5  # seconds; shorter prefills are repeated and the median is taken
REPEATS = 3  # runs of a short prefill
FILL_RESERVE = 4e9  # bytes left free for activations when the cache is filled

log = logging.getLogger(__name__)


def filling_batch(subject: Subject, capacity: int, pattern: Pattern) -> int:
    """Return how many requests of `capacity` tokens fit beside the weights.

    Raises:
        ValueError: the model is not on a GPU, or not even one request fits.
    """
    if not subject.on_gpu:
        raise ValueError(
            "How many requests fill the memory is known for a GPU only; give --batch a number."
        )
    _release(subject)
    free = torch.cuda.mem_get_info(subject.device)[0] - FILL_RESERVE
    index_layers = len(pattern) - pattern.roles.count("S")
    per_token = subject.shape.cache_bytes(index_layers, index_dtype=subject.index_dtype)
    count = int(free / (per_token * capacity))
    if count < 1:
        raise ValueError(
            f"Not one request of {capacity} tokens fits beside the weights "
            f"({max(free, 0) / 1e9:.1f} GB free)."
        )
    return count


def compile_pass(subject: Subject, pattern: Pattern, length: int, chunk: int) -> None:
    """Run a prefill and a few steps, so that a measurement need not compile."""
    ids = prompt_ids(subject, length)
    with torch.no_grad(), use_pattern(subject.model, pattern):
        cache = FastCache(subject.model, length + SPARE)
        with _recorded_selections(subject, length, pattern):
            tokens = prefill(subject.model, ids, cache, chunk=chunk).argmax(-1)
        _steps(Decoder(subject.model, cache), tokens, WARM_STEPS)


def measure(
    subject: Subject,
    context: int,
    pattern: Pattern,
    *,
    batch: int = 1,
    decode_tokens: int = 64,
    chunk: int = CHUNK,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a prefill of `context` tokens and `decode_tokens` steps after it under a pattern.

    Args:
        batch: requests that are decoded together: copies of one prompt that continue differently.
        decode_tokens: number of steps that are timed.
        chunk: tokens of the prefill that go through the model at once.
        seed: random seed of the prompt.

    Returns:
        {"context", "pattern", "full", "layers", "batch", "chunk", "ttft_s" (null when batch > 1),
        "ttft_runs_s", "decode_tok_s" (of one request), "decode_total_tok_s" (of the batch),
        "peak_gb", "added_gb" (of the prefill, beyond weights and cache; null on a CPU), "cache_gb",
        "weights_gb", "parts_ms" and "floor_ms" (prefill), "decode_parts_ms" and
        "decode_floor_ms" (a step)}.
    """
    model = subject.model
    ids = prompt_ids(subject, context, seed=seed)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad(), use_pattern(model, pattern):
        _release(subject)
        with _recorded_selections(subject, context, pattern) as recorded_bytes:
            if subject.on_gpu:
                torch.cuda.reset_peak_memory_stats(subject.device)
            cache = FastCache(model, context + decode_tokens + SPARE)
            runs = [_prefill_s(subject, ids, cache, chunk)]
            parts: dict[str, float] = {}
            added = None
            if batch == 1:
                while len(runs) < REPEATS and statistics.median(runs) < SHORT:
                    runs.append(_prefill_s(subject, ids, cache, chunk))
                with PartTimer() as timer:
                    seconds = _prefill_s(subject, ids, cache, chunk)
                parts = timer.milliseconds()
                if seconds < COMPILING * statistics.median(runs):
                    runs = [_prefill_s(subject, ids, cache, chunk)]
                if subject.on_gpu:
                    added = _peak_bytes(subject) - weights - cache.nbytes - recorded_bytes
        if batch > 1:
            runs = []
            _release(subject)
            cache.batch_repeat_interleave(batch)
        tokens = (ids[0, -1:] + torch.arange(batch, device=ids.device)) % subject.shape.vocab
        tokens, step = _time_steps(subject, cache, tokens, decode_tokens)
        decode_parts = _decode_parts(subject, cache, tokens, 1e3 * step)
    return {
        "context": context,
        "pattern": str(pattern),
        "full": len(pattern.full_layers),
        "layers": len(pattern),
        "batch": batch,
        "chunk": chunk,
        "ttft_s": round(statistics.median(runs), 5) if runs else None,
        "ttft_runs_s": [round(r, 5) for r in runs],
        "decode_tok_s": round(1 / step, 3),
        "decode_total_tok_s": round(batch / step, 3),
        "peak_gb": round(_peak_bytes(subject) / 1e9, 3),
        "added_gb": None if added is None else round(added / 1e9, 3),
        "cache_gb": round(cache.nbytes / 1e9, 4),
        "weights_gb": round(weights / 1e9, 4),
        "parts_ms": {p: round(ms, 4) for p, ms in parts.items() if p != "total"},
        "decode_parts_ms": {p: round(ms, 4) for p, ms in decode_parts.items() if p != "total"},
        **_floors(subject, context, pattern, batch),
    }


@contextmanager
def _recorded_selections(subject: Subject, context: int, pattern: Pattern) -> Iterator[int]:
    """Let a prefill of this length read the recorded selections; yield the bytes that they take.

    Decoding is outside of the context, so it reads its own selections.
    """
    selector = selector_of(subject.model)
    assert isinstance(selector, RecordedSelector)
    topk = subject.shape.topk
    n_bytes = 0
    try:
        if subject.selections:
            ids = subject.selections[0].to(subject.device)
            selector.ids = stretch(ids, topk, context)
            n_bytes += selector.ids.nbytes
        if len(subject.selections) > 1 and pattern.pool_factor is not None:
            pools = subject.selections[1].to(subject.device)
            selector.pools = Stretched(pools, topk * pattern.pool_factor, context)
            n_bytes += selector.pools.nbytes
        yield n_bytes
    finally:
        selector.ids = selector.pools = None


def _floors(
    subject: Subject, context: int, pattern: Pattern, batch: int
) -> dict[str, dict[str, float]]:
    """Return the floors of a row, to five digits."""
    floors = {}
    for key, floor in (("floor_ms", prefill_floor), ("decode_floor_ms", decode_floor)):
        parts = floor(
            subject.shape,
            context,
            pattern,
            subject.rates,
            batch=batch,
            index_dtype=subject.index_dtype,
            storage=subject.storage,
        )
        floors[key] = {name: float(f"{ms:.5g}") for name, ms in parts.items()}
    return floors


def _prefill_s(subject: Subject, ids: Tensor, cache: FastCache, chunk: int) -> float:
    """Return the seconds until the first token is on the host, from an empty cache."""
    cache.reset()
    synchronize(subject.device)
    began = time.perf_counter()
    prefill(subject.model, ids, cache, chunk=chunk).argmax(-1).tolist()
    return time.perf_counter() - began


def _release(subject: Subject) -> None:
    """Free the memory that earlier measurements left."""
    gc.collect()
    if subject.on_gpu:
        torch.cuda.empty_cache()


def _time_steps(
    subject: Subject, cache: FastCache, tokens: Tensor, count: int
) -> tuple[Tensor, float]:
    """Return the last tokens, and the mean seconds of `count` steps after the warm-up steps."""
    decoder = Decoder(subject.model, cache)
    tokens = _steps(decoder, tokens, WARM_STEPS)
    began = time.perf_counter()
    tokens = _steps(decoder, tokens, count)
    return tokens, (time.perf_counter() - began) / count


def _steps(decoder: Decoder, tokens: Tensor, count: int) -> Tensor:
    """Decode `count` greedy tokens, and add to each the index of its request.

    Requests with the same tokens would use the same experts.
    """
    shift = torch.arange(len(tokens), device=tokens.device)

    def decoded() -> Iterator[Tensor]:
        nonlocal tokens
        for _ in range(count):
            logits = decoder.step(tokens)
            tokens = (logits.argmax(-1) + shift) % logits.shape[-1]
            yield tokens

    for _ in on_host(decoded()):
        pass
    return tokens


class GraphTimer(PartTimer):
    """A timer of the parts of a step inside its CUDA graph.

    Marks that are made while the graph is captured become nodes of it, and every replay sets them
    anew. What runs outside of a capture is not timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cuda = False  # A plain timer leaves captures alone, and this one must not.

    def _now(self) -> Any:
        if not torch.cuda.is_current_stream_capturing():
            return None
        mark = torch.cuda.Event(enable_timing=True, external=True)
        mark.record()
        return mark

    def replayed(self) -> dict[str, float]:
        """Return the milliseconds of each part in the last replay, which must have ended."""
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            if start is not None and end is not None:
                sums[name] = sums.get(name, 0.0) + start.elapsed_time(end)
        return sums


def _decode_parts(
    subject: Subject, cache: FastCache, tokens: Tensor, step_ms: float
) -> dict[str, float]:
    """Return the milliseconds of each part of one step, or nothing where they cannot be timed."""
    try:
        if subject.on_gpu:
            return _graph_parts(subject, cache, tokens, step_ms)
        decoder = Decoder(subject.model, cache)
        tokens = _steps(decoder, tokens, 1)
        with PartTimer() as timer:
            _steps(decoder, tokens, PART_STEPS)
        return {name: ms / PART_STEPS for name, ms in timer.milliseconds().items()}
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        log.warning("Decoding cannot be timed in parts here (%.200s).", reason)
        return {}


def _graph_parts(
    subject: Subject, cache: FastCache, tokens: Tensor, step_ms: float
) -> dict[str, float]:
    """Time the parts of a step in a separate CUDA graph, whose marks cost 1 to 2 us each.

    "rest" is the time between the sum of the parts and a step without marks.
    """
    with GraphTimer() as timer:
        decoder = Decoder(subject.model, cache)
        tokens = _steps(decoder, tokens, 1)
    sums: dict[str, float] = {}
    for _ in range(PART_STEPS):
        tokens = _steps(decoder, tokens, 1)
        synchronize(subject.device)
        for name, ms in timer.replayed().items():
            sums[name] = sums.get(name, 0.0) + ms / PART_STEPS
    return sums | {"rest": max(step_ms - sum(sums.values()), 0.0)}


def _peak_bytes(subject: Subject) -> int:
    """Return the maximum of bytes allocated on the GPU since the last reset.

    On a CPU it is the largest resident set of the process so far.
    """
    if subject.on_gpu:
        return torch.cuda.max_memory_allocated(subject.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
