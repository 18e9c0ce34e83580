"""Time kernels beside their peers, and write a row only after its check."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Calls = dict[str, Callable[[], Any]]


# ---- timing


def event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def milliseconds(call: Callable[[], Any], repeats: int = 11, graph: bool = False) -> float:
    """Return the median time of a call.

    graph: time replays of a CUDA graph, for calls that are mostly launches.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
        repeats = 101
    times = []
    for _ in range(repeats):
        start, end = event_pair()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def side_by_side(calls: Calls, repeats: int = 11) -> dict[str, float]:
    """Return the median times of calls that alternate, so that all have the same clock and heat.

    The device sleeps for about half a millisecond before each call, so that the host's time for a
    launch is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            start, end = event_pair()
            torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


# ---- the peer and the report


class Peer:
    """vLLM's kernels, where they can be imported."""

    def __init__(self, folder: Path | None):
        self.available = False
        if folder is None:
            return
        try:
            import vllm._custom_ops as custom
            import vllm.platforms as platforms

            if hasattr(platforms.current_platform, "import_kernels"):
                platforms.current_platform.import_kernels()
            from vllm.utils.deep_gemm import fp8_fp4_mqa_logits
            from vllm.v1.attention.ops.flashmla import flash_mla_sparse_fwd

            self.custom = custom
            self.logits = fp8_fp4_mqa_logits
            self.attend = flash_mla_sparse_fwd
            self.available = True
        except Exception as error:
            print(f"no peer: {type(error).__name__}: {error}", flush=True)

    def attention(self, q: Tensor, latent: Tensor, ids: Tensor, scale: float) -> Callable[[], Any]:
        """Return a call of FlashMLA, which takes at least 64 heads."""
        padding = max(64 - q.shape[2], 0)
        q = torch.nn.functional.pad(q[0], (0, 0, 0, padding)).contiguous()
        lengths = torch.full((len(q),), ids.shape[-1], device="cuda", dtype=torch.int32)
        ids = ids[0, :, None].contiguous()
        return lambda: self.attend(q, latent[0, :, None], ids, scale, topk_length=lengths)


class Report:
    """The rows of a run, the sections that it runs and the peer."""

    def __init__(self, only: str, peer: Peer):
        self.rows: list[dict[str, Any]] = []
        self.only = only
        self.peer = peer
        self.failed = 0

    def row(
        self,
        op: str,
        shape: str,
        ms: float,
        *,
        floor_ms: float,
        flop: float = 0,
        peer: str | None = None,
        peer_ms: float | None = None,
    ) -> None:
        """Add a row and print it."""
        tflops = round(flop / ms / 1e9, 1) if flop else None
        row = {"op": op, "shape": shape, "ms": round(ms, 4), "tflops": tflops}
        row |= {"floor_ms": round(floor_ms, 4), "peer": peer}
        row |= {"peer_ms": None if peer_ms is None else round(peer_ms, 4)}
        self.rows.append(row)
        line = f"{op:22} {shape:44} {ms:9.4f} ms {tflops or '':>7} floor {floor_ms / ms:5.2f}"
        if peer_ms is not None:
            line += f"  {peer} {peer_ms:.4f} ms, {peer_ms / ms:.2f} x"
        print(line, flush=True)

    def section(self, call: Callable[[Report], None]) -> None:
        """Run a section if it was asked for; `tune` runs only by its full name."""
        name = call.__name__
        if self.only not in name or (name == "tune" and self.only != "tune"):
            return
        try:
            call(self)
        except Exception as error:  # One failure must not lose the other sections' figures.
            self.failed += 1
            message = str(error)[:1500]
            print(f"FAILED {name}: {type(error).__name__}: {message}", flush=True)
        torch.cuda.empty_cache()


# ---- checks and inputs


def need(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def relative(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected result."""
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm())


def check_selection(ids: Tensor, scores_RT: Tensor, visible: Tensor, margin: float = 1e-2) -> None:
    """Compare ids with fp32 scores.

    Ids must be ascending and of the right number, and 99.5 % of them must score at least as much as
    the k-th best key less a margin.
    """
    counts = visible.clamp(max=ids.shape[-1])
    need(bool(((ids >= 0).sum(-1) == counts).all()), "the number of ids is wrong")
    ascending = (ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] < 0)
    need(bool(ascending.all()), "ids are not ascending")
    columns = torch.arange(scores_RT.shape[1], device=ids.device)
    scores = scores_RT.masked_fill(columns >= visible[:, None], -torch.inf)
    best = scores.topk(min(ids.shape[-1], scores.shape[1]), dim=-1).values
    kth = best.gather(-1, (counts - 1).clamp(min=0)[:, None])
    selected = scores.gather(-1, ids.clamp(min=0).long())
    good = (selected >= kth - margin * kth.abs()) | (ids < 0)
    share = float(good.float().mean())
    need(share >= 0.995, f"only {share} of the selection is within the margin")
