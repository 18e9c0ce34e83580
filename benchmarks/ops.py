"""Correctness, then time, share of the floor and the peer's time in the same run, for every kernel; writes a JSON of rows.

    python benchmarks/ops.py [--peers DIR] [--out FILE] [--only NAME]

--peers: a folder with the peer's README.md and setup.sh; it must have been sourced already (PYTHONPATH has its packages).
Attention and pools are timed on selections of a trained DSA model, `tiny`, tiled up (benchmarks/selections.py).
A row is written only when its correctness check passed in this run.
"""

# ruff: noqa: B023 - closures here are timed within the turn of the loop that made them
from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import selections  # noqa: E402

from indexcache import ops  # noqa: E402
from indexcache.bench import recorded  # noqa: E402
from indexcache.ops import reference  # noqa: E402
from indexcache.ops.index import scores_host as launch_scores  # noqa: E402
from indexcache.ops.index import topk_host as launch_select  # noqa: E402
from indexcache.ops.mla import host as launch_mla  # noqa: E402
from indexcache.shapes import rates_named  # noqa: E402

HEADS, DIM, TOPK, LONG = 32, 128, 2048, 200_000
LAYER = 10  # of tiny: its union of three neighbours, 1.83, is a little over the mean of the 12 layers, 1.76
RATES = rates_named("H100")  # floors of docs/kernels.md divide by what an H100 reaches


def milliseconds(call: Callable[[], Any], repeats: int = 11, graph: bool = False) -> float:
    """Median over CUDA events. graph: replays of a CUDA graph, for calls that are mostly launches."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call, repeats = captured.replay, 101
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def side_by_side(calls: dict[str, Callable[[], Any]], repeats: int = 11) -> dict[str, float]:
    """Medians of calls that take turns, so that each finds the clock and the heat that the others leave.

    The device sleeps for about half a millisecond before each, so that the host's share of a launch is timed for none of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


class Report:
    def __init__(self, only: str):
        self.rows: list[dict[str, Any]] = []
        self.only, self.failed = only, 0

    def row(
        self,
        op: str,
        shape: str,
        ms: float,
        *,
        flop: float = 0,
        floor_ms: float,
        peer: str | None = None,
        peer_ms: float | None = None,
    ):
        row = {
            "op": op,
            "shape": shape,
            "ms": round(ms, 4),
            "tflops": round(flop / ms / 1e9, 1) if flop else None,
        }
        row |= {
            "floor_ms": round(floor_ms, 4),
            "peer": peer,
            "peer_ms": None if peer_ms is None else round(peer_ms, 4),
        }
        self.rows.append(row)
        ratio = "" if peer_ms is None else f"  {peer} {peer_ms:.4f} ms, {peer_ms / ms:.2f} x"
        print(
            f"{op:22} {shape:44} {ms:9.4f} ms {row['tflops'] or '':>7} floor {floor_ms / ms:5.2f}{ratio}",
            flush=True,
        )

    def section(self, call: Callable[[Report], None]) -> None:
        if self.only not in call.__name__ or (call is tune and self.only != "tune"):
            return
        try:
            call(self)
        except Exception as error:  # the other sections' figures are worth having
            self.failed += 1
            print(
                f"FAILED {call.__name__}: {type(error).__name__}: {str(error)[:1500]}", flush=True
            )
        torch.cuda.empty_cache()


def need(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def index_inputs(
    queries: int, keys: int, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp8, with keys that random walks correlate: neighbouring keys score alike, as in text."""
    k = torch.randn(1, keys, DIM, device="cuda")
    k[:, 1:] += k[:, :-1].clone()
    q, w = (
        torch.randn(1, queries, heads, DIM, device="cuda"),
        torch.randn(1, queries, heads, device="cuda") * (heads * DIM) ** -0.5,
    )
    (q8, w8), (k8, scale) = ops.quantize_index_queries(q, w), ops.quantize_index_keys(k)
    return q8, k8, w8, scale


def check_selection(ids: Tensor, scores_RT: Tensor, visible: Tensor, margin: float = 1e-2) -> float:
    """Ids against fp32 scores: ascending, right in number, and the share whose score is at least the k-th less a margin."""
    want = visible.clamp(max=ids.shape[-1])
    need(bool(((ids >= 0).sum(-1) == want).all()), "the number of ids is wrong")
    need(bool(((ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] < 0)).all()), "ids are not ascending")
    columns = torch.arange(scores_RT.shape[1], device=ids.device)
    scores = scores_RT.masked_fill(columns >= visible[:, None], -torch.inf)
    kth = scores.topk(min(ids.shape[-1], scores.shape[1]), dim=-1).values.gather(
        -1, (want - 1).clamp(min=0)[:, None]
    )
    picked = scores.gather(-1, ids.clamp(min=0).long())
    good = (picked >= kth - margin * kth.abs()) | (ids < 0)
    return float(good.float().mean())


# ---- the peer, found by import once its setup was sourced


class Peer:
    def __init__(self, folder: Path | None):
        self.ok = False
        if folder is None:
            return
        try:
            import vllm._custom_ops as custom
            import vllm.platforms as platforms

            if hasattr(platforms.current_platform, "import_kernels"):
                platforms.current_platform.import_kernels()
            from vllm.utils.deep_gemm import fp8_fp4_mqa_logits
            from vllm.v1.attention.ops.flashmla import flash_mla_sparse_fwd

            self.custom, self.logits, self.attend, self.ok = (
                custom,
                fp8_fp4_mqa_logits,
                flash_mla_sparse_fwd,
                True,
            )
        except Exception as error:
            print(f"no peer: {type(error).__name__}: {error}", flush=True)


PEER: Peer


def scores(report: Report) -> None:
    for heads in (32, 64):
        queries, keys = 2048, 131072
        q, k, w, scale = index_inputs(queries, keys, heads)
        rows = torch.empty((queries, keys), device="cuda")
        flop = 2.0 * queries * keys * heads * DIM
        x = launch_scores.Inputs(q, k, w, scale, keys)
        sample = torch.tensor([0, 1, 63, 64, queries - 1], device="cuda")
        want = reference.index_scores(q[:, sample].float(), k.float(), w[:, sample])[0] * scale

        def run(hopper: bool) -> None:
            with ops.tuned(index={"hopper": hopper}):
                launch_scores.score_tiles(x, out=rows)

        calls: dict[str, Callable[[], Any]] = {
            "gluon": lambda: run(True),
            "triton": lambda: run(False),
        }
        for name, call in calls.items():
            rows.fill_(torch.nan)
            call()
            got = rows[sample]
            need(relative(got, want) < 5e-3, f"{name}: scores are off by {relative(got, want)}")
        if PEER.ok:
            z, full = (
                torch.zeros(queries, device="cuda", dtype=torch.int32),
                torch.full((queries,), keys, device="cuda", dtype=torch.int32),
            )
            calls["DeepGEMM"] = lambda: PEER.logits(
                (q[0], None), (k[0], scale[0]), w[0], z, full, clean_logits=False
            )
        times = side_by_side(calls, 21)
        for name in ("gluon", "triton"):
            floor = flop / RATES.fp8 * 1e3
            report.row(
                f"scores fp8 {name}",
                f"2048 x 131072 H={heads}",
                times[name],
                flop=flop,
                floor_ms=floor,
                peer="DeepGEMM",
                peer_ms=times.get("DeepGEMM"),
            )


def tune(report: Report) -> None:
    """Settings of the score kernels side by side; prints only."""
    queries, keys = 2048, 131072
    q, k, w, scale = index_inputs(queries, keys)
    rows = torch.empty(queries, keys, device="cuda")
    options: list[dict[str, Any]] = [{"hopper": True, "hopper_stages": n} for n in (3, 4, 6)]
    options += [{"hopper": False, "keys": n} for n in (64, 128)]
    for option in options:
        x = launch_scores.Inputs(q, k, w, scale, keys)
        try:
            with ops.tuned(index=option):
                ms = milliseconds(lambda x=x: launch_scores.score_tiles(x, out=rows), 5)
            print(
                f"tune {option}: {ms:.4f} ms, {2e-9 * queries * keys * HEADS * DIM / ms:.0f} TFLOP/s",
                flush=True,
            )
        except Exception as error:
            print(f"tune {option}: {type(error).__name__} {str(error)[:200]}", flush=True)


def selection(report: Report) -> None:
    for queries, keys, grid in ((2048, 131072, False), (1, 200_000, False), (1, 200_000, True)):
        x = torch.randn(queries, keys, device="cuda")

        def ours(x=x, grid=grid) -> Any:
            with ops.tuned(index={"grid": grid}):
                return launch_select.topk_rows(x, TOPK)

        need(
            torch.equal(ours()[0], reference.select(x, torch.ones_like(x, dtype=torch.bool), TOPK)),
            "selection differs",
        )
        calls: dict[str, Callable[[], Any]] = {"ours": ours}
        if PEER.ok:
            out = torch.full((queries, TOPK), -1, device="cuda", dtype=torch.int32)
            z = torch.zeros(queries, device="cuda", dtype=torch.int32)
            full, work = (
                torch.full_like(z, keys),
                torch.zeros(2**20, device="cuda", dtype=torch.uint8),
            )

            def many(x=x, z=z, full=full, out=out) -> None:
                PEER.custom.top_k_per_row_prefill(
                    x, z, full, out, len(x), x.stride(0), x.stride(1), TOPK
                )

            def one(x=x, full=full, out=out, work=work) -> None:
                torch.ops._C.cooperative_topk(x, full[:, None], out, work, TOPK, x.shape[1])

            calls["peer"] = many if queries > 1 else one
        times = (
            side_by_side(calls)
            if queries > 1
            else {name: milliseconds(call, graph=True) for name, call in calls.items()}
        )
        name, shape = (
            f"selection{' in one launch' if grid else ''}",
            f"[{queries}, {keys}] fp32 k={TOPK}",
        )
        floor = 4e3 * queries * keys / RATES.hbm
        report.row(
            name, shape, times["ours"], floor_ms=floor, peer="vLLM top-k", peer_ms=times.get("peer")
        )


def prefill(report: Report) -> None:
    """A whole causal prefill, chunk by chunk, scores and selection; then the same with a pool published."""
    for heads in (32, 64):
        q, k, w, scale = index_inputs(LONG, LONG, heads)
        picked = [0, 1, 5000, 100_000, LONG - 1]
        chunk = 8192

        def run(pool: int = 0, q=q, k=k, w=w, scale=scale) -> list[Any]:
            parts = [slice(n, min(n + chunk, LONG)) for n in range(0, LONG, chunk)]
            return [
                ops.index_topk(
                    q[:, p],
                    k[:, : p.stop],
                    w[:, p],
                    scale[:, : p.stop],
                    TOPK,
                    p.start,
                    pool=pool,
                    backend="triton",
                ).ids
                for p in parts
            ]

        ids = torch.cat(run(), dim=1)[0]
        seen = torch.tensor(picked, device="cuda") + 1
        want = reference.index_scores(q[:, picked].float(), k.float(), w[:, picked])[0] * scale
        share = check_selection(ids[picked], want, seen)
        need(share >= 0.995, f"only {share} of the selection is within the margin")
        need(torch.equal(ids, torch.cat(run(), dim=1)[0]), "two runs differ")
        flop = float(LONG) * LONG * heads * DIM
        ms = milliseconds(run, 3)
        report.row(
            "index_topk prefill",
            f"200000 causal H={heads} k={TOPK}",
            ms,
            flop=flop,
            floor_ms=flop / RATES.fp8 * 1e3,
        )
        if heads == HEADS:
            with_pool = milliseconds(lambda: run(16384), 3)
            report.row(
                "index_topk F with pool",
                f"200000 causal H={heads} k={TOPK}",
                with_pool,
                flop=flop,
                floor_ms=flop / RATES.fp8 * 1e3,
            )


def pools(report: Report) -> None:
    """A whole causal prefill, chunk by chunk, each query inside its pool; groups apart: they serve all layers that share the pools."""
    q, k, w, scale = index_inputs(LONG, LONG)
    wide = 16384
    pool = recorded.stretch(selections.load(f"pool.{LAYER}").int().cuda(), wide, LONG)[None]
    kind = f"pools of tiny's layer {LAYER}, stretched"
    parts = [slice(n, min(n + 8192, LONG)) for n in range(0, LONG, 8192)]
    few = torch.tensor([0, 5000, wide, 100_000, LONG - 1], device="cuda")
    scored = reference.index_scores(q[:, few].float(), k.float(), w[:, few])[0] * scale
    outside = torch.ones_like(scored, dtype=torch.bool)
    for row, t in zip(outside, few, strict=True):
        row[pool[0, t][pool[0, t] >= 0].long()] = False
    pairs = wide * (LONG - wide / 2)
    for grouped in (False, True):
        tuning = {"grouped_pools": grouped}
        with ops.tuned(index=tuning):
            group = ops.pool_group(q, k)

        def unite(group=group) -> list[Any]:
            return [
                ops.group_queries(pool[:, p], group, backend="triton") if group > 1 else None
                for p in parts
            ]

        def inside(groups=unite(), tuning=tuning) -> list[Any]:
            with ops.tuned(index=tuning):
                return [
                    ops.index_topk(
                        q[:, p],
                        k[:, : p.stop],
                        w[:, p],
                        scale[:, : p.stop],
                        TOPK,
                        p.start,
                        pool[:, p],
                        groups=united,
                        backend="triton",
                    ).ids
                    for p, united in zip(parts, groups, strict=True)
                ]

        found = torch.cat(inside(), dim=1)[0]
        need(
            not bool(outside.gather(1, found[few].clamp(min=0).long())[found[few] >= 0].any()),
            "ids outside of the pool",
        )
        share = check_selection(found[few], scored.masked_fill(outside, -torch.inf), few + 1)
        need(share >= 0.995, f"only {share} of the pool's selection is within the margin")
        need(torch.equal(found, torch.cat(inside(), dim=1)[0]), "two runs differ")
        slots = (
            pairs if group == 1 else sum(int(united.count_BG.sum()) for united in unite())
        )  # keys that are gathered
        name = f"index_topk pool {wide}{f', {group} neighbours together' if grouped else ''}"
        report.row(
            name,
            f"200000 causal H={HEADS} k={TOPK} {kind}",
            milliseconds(inside, 3),
            floor_ms=slots * 132 / 5.5e12 * 1e3,
        )
        if group > 1:
            shape = f"200000 causal k={wide} group {group} U={slots * group / pairs:.2f} {kind}"
            report.row(
                "group_queries", shape, milliseconds(unite, 3), floor_ms=pairs * 9e3 / RATES.hbm
            )


def decode(report: Report) -> None:
    q, k, w, scale = index_inputs(1, LONG)
    offset = torch.tensor([LONG - 1], device="cuda")
    want = reference.index_scores(q.float(), k.float(), w)[0] * scale
    for grid in (False, True):
        with ops.tuned(index={"grid": grid}):
            got = ops.index_topk(q, k, w, scale, TOPK, offset, backend="triton").ids
            share = check_selection(got[0], want, offset + 1)
            need(share >= 0.995, f"only {share} of the selection is within the margin")
            ms = milliseconds(
                lambda: ops.index_topk(q, k, w, scale, TOPK, offset, backend="triton"), graph=True
            )
        name = f"index_topk decode{', selection in one launch' if grid else ''}"
        report.row(name, f"1 x 200000 H={HEADS} k={TOPK}", ms, floor_ms=LONG * 132e3 / RATES.hbm)


def make_ids(queries: int, keys: int, layer: int = LAYER) -> tuple[Tensor, str]:
    """int32 ids [1, queries, 2048] of a trained model (benchmarks/selections.py), tiled."""
    return selections.tile(selections.load(f"topk.{layer}").cuda(), TOPK, keys, queries)[
        None
    ], f"ids of tiny's layer {layer}, tiled"


def mla(report: Report) -> None:
    keys, queries = 131072, 8192
    latent = (torch.randn(1, LONG, 576, device="cuda") / 8).bfloat16()
    scale = 0.06
    for heads, layer in ((20, 8), (20, LAYER), (20, 4), (64, LAYER), (128, LAYER)):
        ids, kind = make_ids(queries, keys, layer)
        q = (torch.randn(1, queries, heads, 576, device="cuda") / 8).bfloat16()
        group = launch_mla.best_group(heads)
        groups = ops.group_queries(ids, group, backend="triton") if group > 1 else None
        size = 1.0 if groups is None else float(groups.count_BG.float().mean()) / TOPK
        got, _ = ops.sparse_mla(q, latent, ids, scale, groups=groups, backend="triton")
        part = slice(0, 65)
        want = reference.sparse_mla(q[:, part].float(), latent.float(), ids[:, part], scale)[0]
        need(
            relative(got[:, part], want) < 1e-2, f"H={heads}: off by {relative(got[:, part], want)}"
        )
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: ops.sparse_mla(q, latent, ids, scale, groups=groups, backend="triton")
        }
        if PEER.ok:
            padded = torch.nn.functional.pad(q[0], (0, 0, 0, max(64 - heads, 0))).contiguous()
            every, lists = (
                torch.full((queries,), TOPK, device="cuda", dtype=torch.int32),
                ids[0, :, None].contiguous(),
            )
            calls["FlashMLA"] = lambda: PEER.attend(
                padded, latent[0, :, None], lists, scale, topk_length=every
            )
        times = side_by_side(calls, 7)
        flop = 2.0 * queries * heads * TOPK * 1088
        shape = f"8192 of 131072 H={heads} U={size:.2f} {kind}"
        floor = flop / RATES.bf16 * 1e3
        report.row(
            "sparse_mla prefill",
            shape,
            times["ours"],
            flop=flop,
            floor_ms=floor,
            peer="FlashMLA",
            peer_ms=times.get("FlashMLA"),
        )
        if groups is not None and layer == LAYER:
            ms = milliseconds(lambda: ops.group_queries(ids, group, backend="triton"), 5)
            report.row(
                "group_queries",
                f"8192 k={TOPK} group {group} {kind}",
                ms,
                floor_ms=8192 * TOPK * 9e3 / RATES.hbm,
            )
    ids, kind = make_ids(LONG, LONG)
    q = torch.empty(1, LONG, 20, 576, device="cuda", dtype=torch.bfloat16).normal_(std=0.125)
    groups = ops.group_queries(ids, launch_mla.best_group(20), backend="triton")
    flop = 2.0 * LONG * 20 * TOPK * 1088
    ms = milliseconds(
        lambda: ops.sparse_mla(q, latent, ids, scale, groups=groups, backend="triton"), 5
    )
    report.row(
        "sparse_mla prefill",
        f"200000 of 200000 H=20 {kind}",
        ms,
        flop=flop,
        floor_ms=flop / RATES.bf16 * 1e3,
    )
    ids, latent = ids[:, :1].contiguous(), latent[:, :keys]
    for heads in (20, 64):
        q = (torch.randn(1, 1, heads, 576, device="cuda") / 8).bfloat16()
        got, _ = ops.sparse_mla(q, latent, ids, scale, backend="triton")
        want = reference.sparse_mla(q.float(), latent.float(), ids, scale)[0]
        need(relative(got, want) < 1e-2, "decode is off")
        with torch.no_grad():
            ms = milliseconds(
                lambda q=q: ops.sparse_mla(q, latent, ids, scale, backend="triton"), graph=True
            )
        peer_ms = None
        if PEER.ok:
            padded = torch.nn.functional.pad(q[0], (0, 0, 0, 64 - heads)).contiguous()
            one = torch.full((1,), TOPK, device="cuda", dtype=torch.int32)
            single = ids[0, :1, None].contiguous()
            peer_ms = milliseconds(
                lambda p=padded, o=one, i=single: PEER.attend(
                    p, latent[0, :, None], i, scale, topk_length=o
                ),
                graph=True,
            )
        floor = TOPK * 1152 * 1e3 / RATES.hbm
        report.row(
            "sparse_mla decode bf16",
            f"1 query H={heads}",
            ms,
            floor_ms=floor,
            peer="FlashMLA",
            peer_ms=peer_ms,
        )


def backward(report: Report) -> None:
    queries, keys, heads = 2048, 131072, 20
    ids, kind = make_ids(queries, keys)
    q, latent = (
        (torch.randn(1, queries, heads, 576, device="cuda") / 8).bfloat16(),
        (torch.randn(1, keys, 576, device="cuda") / 8).bfloat16(),
    )
    grad = torch.randn(1, queries, heads, 512, device="cuda").bfloat16()
    groups = ops.group_queries(ids, launch_mla.best_group(heads), backend="triton")
    few, grads = 96, []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        a, b = (
            q[:, :few].detach().clone().to(dtype).requires_grad_(),
            latent.detach().clone().to(dtype).requires_grad_(),
        )
        ops.sparse_mla(a, b, ids[:, :few].contiguous(), 0.06, backend=backend)[0].backward(
            grad[:, :few].to(dtype)
        )
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        need(relative(got, want) < 2e-2, f"gradient off by {relative(got, want)}")
    out, lse = launch_mla.launch_forward(q, latent, ids, 0.06, 512, groups)
    flop = 2.0 * queries * heads * TOPK * (576 * 3 + 512 * 2)
    inputs = q, latent, ids, out, lse, grad, 0.06, groups
    for exact in (False, True):
        ms = milliseconds(lambda e=exact: launch_mla.launch_backward(*inputs, e), 5)
        name = "sparse_mla backward" + (" deterministic" if exact else "")
        report.row(
            name,
            f"2048 of 131072 H={heads} {kind}",
            ms,
            flop=flop,
            floor_ms=flop / RATES.bf16 * 1e3,
        )


def quantize(report: Report) -> None:
    k, angle = (
        torch.randn(1, 131072, DIM, device="cuda").bfloat16(),
        torch.randn(1, 131072, 32, device="cuda"),
    )
    turn = {"cos_BTr": angle.cos(), "sin_BTr": angle.sin(), "interleaved": True, "rotate": True}
    (got, scale), (want, wanted) = (
        ops.quantize_index_keys(k, backend=b, **turn) for b in ("triton", "torch")
    )
    need(
        relative(got.float() * scale[..., None], want.float() * wanted[..., None]) < 1e-2,
        "quantisation differs",
    )
    ms = milliseconds(lambda: ops.quantize_index_keys(k, backend="triton", **turn))
    report.row(
        "quantize keys",
        "131072 x 128 rope+hadamard",
        ms,
        floor_ms=131072 * (256 + 128 + 4 + 256) * 1e3 / RATES.hbm,
    )


SECTIONS = (quantize, scores, selection, decode, prefill, pools, mla, backward, tune)


def main() -> int:
    global PEER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="the peer's folder, already sourced")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops_h100.json"
    )
    parser.add_argument(
        "--only",
        default="",
        help=f"sections whose name contains this: {', '.join(s.__name__ for s in SECTIONS)}",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a GPU is needed", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    PEER = Peer(arguments.peers)
    report = Report(arguments.only)
    for section in SECTIONS:
        report.section(section)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    arguments.out.write_text(
        json.dumps(
            {"device": torch.cuda.get_device_name(), "date": date, "rows": report.rows}, indent=1
        )
        + "\n"
    )
    print(f"{len(report.rows)} rows, {report.failed} sections failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
