"""Correctness, then time, share of the floor and the peer's time in the same run, for every kernel; writes a JSON of rows.

    python benchmarks/ops.py [--peers DIR] [--out FILE] [--only NAME] [--selections FILE]

--peers: a folder with the peer's README.md and setup.sh; it must have been sourced already (PYTHONPATH has its packages).
--selections: a .pt with int32 ids [queries, k] of a trained DSA model, tiled to the size needed; without it attention is timed on
synthetic ids whose neighbours share most entries, and the row says which.
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
sys.path.insert(0, str(ROOT))

from indexcache import ops  # noqa: E402
from indexcache.ops import launch_mla, launch_scores, launch_select, reference  # noqa: E402
from indexcache.ops.settings import SETTINGS  # noqa: E402

HEADS, DIM, TOPK, LONG = 32, 128, 2048, 200_000
FP8_PEAK, BF16_PEAK, COPY = 1450e12, 790e12, 3.02e12  # floors of docs/kernels.md: what tensor cores and memory can give


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


class Report:
    def __init__(self, only: str):
        self.rows: list[dict[str, Any]] = []
        self.only, self.failed = only, 0

    def row(
        self, op: str, shape: str, ms: float, *, flop: float = 0, floor_ms: float, peer: str | None = None, peer_ms: float | None = None
    ):
        row = {"op": op, "shape": shape, "ms": round(ms, 4), "tflops": round(flop / ms / 1e9, 1) if flop else None}
        row |= {"floor_ms": round(floor_ms, 4), "peer": peer, "peer_ms": None if peer_ms is None else round(peer_ms, 4)}
        self.rows.append(row)
        ratio = "" if peer_ms is None else f"  {peer} {peer_ms:.4f} ms, {peer_ms / ms:.2f} x"
        print(f"{op:22} {shape:44} {ms:9.4f} ms {row['tflops'] or '':>7} floor {floor_ms / ms:5.2f}{ratio}", flush=True)

    def section(self, call: Callable[[Report], None]) -> None:
        if self.only not in call.__name__:
            return
        try:
            call(self)
        except Exception as error:  # the other sections' figures are worth having
            self.failed += 1
            print(f"FAILED {call.__name__}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        torch.cuda.empty_cache()


def need(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def index_inputs(queries: int, keys: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp8, with keys that random walks correlate: neighbouring keys score alike, as in text."""
    k = torch.randn(1, keys, DIM, device="cuda")
    k[:, 1:] += k[:, :-1].clone()
    q, w = torch.randn(1, queries, heads, DIM, device="cuda"), torch.randn(1, queries, heads, device="cuda") * (heads * DIM) ** -0.5
    (q8, w8), (k8, scale) = ops.quantize_index_queries(q, w), ops.quantize_index_keys(k)
    return q8, k8, w8, scale


def check_selection(ids: Tensor, scores_RT: Tensor, visible: Tensor, margin: float = 1e-2) -> float:
    """Ids against fp32 scores: ascending, right in number, and the share whose score is at least the k-th less a margin."""
    want = visible.clamp(max=ids.shape[-1])
    need(bool(((ids >= 0).sum(-1) == want).all()), "the number of ids is wrong")
    need(bool(((ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] < 0)).all()), "ids are not ascending")
    columns = torch.arange(scores_RT.shape[1], device=ids.device)
    scores = scores_RT.masked_fill(columns >= visible[:, None], -torch.inf)
    kth = scores.topk(min(ids.shape[-1], scores.shape[1]), dim=-1).values.gather(-1, (want - 1).clamp(min=0)[:, None])
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

            self.custom, self.logits, self.attend, self.ok = custom, fp8_fp4_mqa_logits, flash_mla_sparse_fwd, True
        except Exception as error:
            print(f"no peer: {type(error).__name__}: {error}", flush=True)


PEER: Peer
SELECTIONS: Tensor | None = None


def scores(report: Report) -> None:
    for heads in (32, 64):
        queries, keys = 2048, 131072
        q, k, w, scale = index_inputs(queries, keys, heads)
        rows = torch.full((queries, keys), 2**31 - 1, dtype=torch.int32, device="cuda")
        flop = 2.0 * queries * keys * heads * DIM
        peer_ms = None
        if PEER.ok:
            z, full = torch.zeros(queries, device="cuda", dtype=torch.int32), torch.full((queries,), keys, device="cuda", dtype=torch.int32)
            peer_ms = milliseconds(
                lambda q=q, k=k, w=w, s=scale, z=z, f=full: PEER.logits((q[0], None), (k[0], s[0]), w[0], z, f, clean_logits=False)
            )
        for name, hopper in (("gluon", True), ("triton", False)):
            SETTINGS.hopper = hopper
            x = launch_scores.Inputs(q, k, w, scale, keys)
            rows.fill_(2**31 - 1)
            launch_scores.score_tiles(x, out=rows)
            sample = torch.tensor([0, 1, 63, 64, queries - 1], device="cuda")
            got = rows[sample]
            got = (got ^ ((got >> 31) & 0x7FFFFFFF)).view(torch.float32)
            want = reference.index_scores(q[:, sample].float(), k.float(), w[:, sample])[0] * scale
            need(relative(got, want) < 5e-3, f"{name}: scores are off by {relative(got, want)}")
            ms = milliseconds(lambda x=x: launch_scores.score_tiles(x, out=rows))
            report.row(
                f"scores fp8 {name}",
                f"2048 x 131072 H={heads}",
                ms,
                flop=flop,
                floor_ms=flop / FP8_PEAK * 1e3,
                peer="DeepGEMM",
                peer_ms=peer_ms,
            )
        SETTINGS.hopper = False


def tune(report: Report) -> None:
    """Settings of the score kernels side by side; prints only."""
    queries, keys = 2048, 131072
    q, k, w, scale = index_inputs(queries, keys)
    rows = torch.empty(queries, keys, dtype=torch.int32, device="cuda")
    s = SETTINGS
    before = dict(vars(s))
    options = [{"hopper": True, "hopper_unroll": u, "hopper_stages": n} for u in (4, 8, 16) for n in (4, 8)]
    options += [{"hopper": False, "registers": r, "keys": n} for r in (0, 168, 232) for n in (64, 128)]
    for option in options:
        vars(s).update(before | option)
        try:
            ms = milliseconds(lambda: launch_scores.score_tiles(launch_scores.Inputs(q, k, w, scale, keys), out=rows), 5)
            print(f"tune {option}: {ms:.4f} ms, {2e-9 * queries * keys * HEADS * DIM / ms:.0f} TFLOP/s", flush=True)
        except Exception as error:
            print(f"tune {option}: {type(error).__name__} {str(error)[:200]}", flush=True)
    vars(s).update(before)


def selection(report: Report) -> None:
    for queries, keys in ((2048, 131072), (1, 200_000)):
        x = torch.randn(queries, keys, device="cuda")
        got, _ = launch_select.topk_rows(x, TOPK)
        need(torch.equal(got, reference.select(x, torch.ones_like(x, dtype=torch.bool), TOPK)), "selection differs")
        ms = milliseconds(lambda x=x: launch_select.topk_rows(x, TOPK), graph=queries == 1)
        peer_ms = None
        if PEER.ok:
            out, z = (
                torch.full((queries, TOPK), -1, device="cuda", dtype=torch.int32),
                torch.zeros(queries, device="cuda", dtype=torch.int32),
            )
            full, work = torch.full_like(z, keys), torch.zeros(2**20, device="cuda", dtype=torch.uint8)
            if queries > 1:
                peer = lambda x=x, z=z, f=full, o=out: PEER.custom.top_k_per_row_prefill(x, z, f, o, len(x), x.stride(0), x.stride(1), TOPK)  # noqa: E731
            else:
                peer = lambda x=x, f=full, o=out, wk=work: torch.ops._C.cooperative_topk(x, f[:, None], o, wk, TOPK, x.shape[1])  # noqa: E731
            peer_ms = milliseconds(peer, graph=queries == 1)
        report.row(
            "selection", f"[{queries}, {keys}] fp32 k={TOPK}", ms, floor_ms=4e3 * queries * keys / COPY, peer="vLLM top-k", peer_ms=peer_ms
        )


def prefill(report: Report) -> None:
    """A whole causal prefill, chunk by chunk, scores and selection; then the same inside a pool."""
    for heads in (32, 64):
        q, k, w, scale = index_inputs(LONG, LONG, heads)
        picked = [0, 1, 5000, 100_000, LONG - 1]
        chunk = 8192

        def run(pool: int = 0, q=q, k=k, w=w, scale=scale) -> list[Any]:
            parts = [slice(n, min(n + chunk, LONG)) for n in range(0, LONG, chunk)]
            return [
                ops.index_topk(q[:, p], k[:, : p.stop], w[:, p], scale[:, : p.stop], TOPK, p.start, pool=pool, backend="triton")
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
        report.row("index_topk prefill", f"200000 causal H={heads} k={TOPK}", ms, flop=flop, floor_ms=flop / FP8_PEAK * 1e3)
        if heads == HEADS:
            pool = torch.cat([p for _, p in run(16384)], dim=1)
            part = slice(LONG - 8192, LONG)
            inside = ops.index_topk(q[:, part], k, w[:, part], scale, TOPK, part.start, pool[:, part], backend="triton")
            few = range(0, 8192, 997)
            common = sum(int(torch.isin(inside[0, i], ids[part][i]).sum()) for i in few) / (len(few) * TOPK)
            need(common > 0.999, f"inside the pool {common} of the selection is found")
            each = milliseconds(
                lambda: ops.index_topk(q[:, part], k, w[:, part], scale, TOPK, part.start, pool[:, part], backend="triton"), 3
            )
            ms_pool = each * (LONG - 8192) / 8192  # rows below the pool's size see less; the last chunk is the dearest
            report.row(
                "index_topk pool 16384",
                f"200000 H={heads} k={TOPK} (last chunk x {LONG / 8192:.1f})",
                ms_pool,
                floor_ms=16384.0 * LONG * 132 / 5.5e12 * 1e3,
            )
            with_pool = milliseconds(lambda: run(16384), 3)
            report.row("index_topk F with pool", f"200000 causal H={heads} k={TOPK}", with_pool, flop=flop, floor_ms=flop / FP8_PEAK * 1e3)


def decode(report: Report) -> None:
    q, k, w, scale = index_inputs(1, LONG)
    offset = torch.tensor([LONG - 1], device="cuda")
    got = ops.index_topk(q, k, w, scale, TOPK, offset, backend="triton")
    want = reference.index_scores(q.float(), k.float(), w)[0] * scale
    share = check_selection(got[0], want, offset + 1)
    need(share >= 0.995, f"only {share} of the selection is within the margin")
    ms = milliseconds(lambda: ops.index_topk(q, k, w, scale, TOPK, offset, backend="triton"), graph=True)
    report.row("index_topk decode", f"1 x 200000 H={HEADS} k={TOPK}", ms, floor_ms=LONG * 132e3 / COPY)


def make_ids(queries: int, keys: int, k: int = TOPK) -> tuple[Tensor, str]:
    if SELECTIONS is not None:
        times = -(-queries // len(SELECTIONS))
        return SELECTIONS.repeat(times, 1)[:queries].contiguous()[None].cuda(), "trained selections, tiled"
    base = 48  # distinct groups of neighbours: U of 3 neighbours about 1.4, as measured on a trained model
    noise = torch.rand(base, 1, keys, device="cuda") + 0.006 * torch.rand(base, 6, keys, device="cuda")
    ids = noise.flatten(0, 1).topk(k, dim=-1).indices.sort(dim=-1).values.int()
    return ids.repeat(-(-queries // len(ids)), 1)[:queries].contiguous()[None], "synthetic neighbours"


def mla(report: Report) -> None:
    keys, queries = 131072, 8192
    ids, kind = make_ids(queries, keys)
    latent = (torch.randn(1, keys, 576, device="cuda") / 8).bfloat16()
    scale = 0.06
    for heads in (20, 64, 128):
        q = (torch.randn(1, queries, heads, 576, device="cuda") / 8).bfloat16()
        group = launch_mla.best_group(heads)
        plan = ops.group_queries(ids, group, backend="triton")
        union = float(plan.count_BG.float().mean()) / TOPK
        got, _ = ops.sparse_mla(q, latent, ids, scale, plan=plan if group > 1 else None, backend="triton")
        part = slice(0, 65)
        want = reference.sparse_mla(q[:, part].float(), latent.float(), ids[:, part], scale)[0]
        need(relative(got[:, part], want) < 1e-2, f"H={heads}: off by {relative(got[:, part], want)}")
        ms = milliseconds(
            lambda q=q, p=plan, g=group: ops.sparse_mla(q, latent, ids, scale, plan=p if g > 1 else None, backend="triton"), 5
        )
        flop, peer_ms = 2.0 * queries * heads * TOPK * 1088, None
        if PEER.ok:
            padded = torch.nn.functional.pad(q[0], (0, 0, 0, max(64 - heads, 0))).contiguous()
            every = torch.full((queries,), TOPK, device="cuda", dtype=torch.int32)
            peer_ms = milliseconds(
                lambda p=padded, e=every: PEER.attend(p, latent[0, :, None], ids[0, :, None].contiguous(), scale, topk_length=e), 5
            )
        shape = f"8192 of 131072 H={heads} U={union:.2f} {kind}"
        report.row("sparse_mla prefill", shape, ms, flop=flop, floor_ms=flop / BF16_PEAK * 1e3, peer="FlashMLA", peer_ms=peer_ms)
        if group > 1:
            ms = milliseconds(lambda g=group: ops.group_queries(ids, g, backend="triton"), 5)
            report.row("group_queries", f"8192 k={TOPK} group {group} {kind}", ms, floor_ms=8192 * TOPK * 9e3 / COPY)
    for heads in (20, 64):
        for fp8 in (False, True):
            q = (torch.randn(1, 1, heads, 576, device="cuda") / 8).bfloat16()
            cache = ops.quantize_latent(latent) if fp8 else latent
            got, _ = ops.sparse_mla(q, cache, ids[:, :1], scale, backend="triton")
            need(
                relative(got, reference.sparse_mla(q.float(), cache if fp8 else cache.float(), ids[:, :1], scale)[0]) < 1e-2,
                "decode is off",
            )
            with torch.no_grad():
                ms = milliseconds(lambda q=q, c=cache: ops.sparse_mla(q, c, ids[:, :1].contiguous(), scale, backend="triton"), graph=True)
            peer_ms = None
            if PEER.ok and not fp8:
                padded, one = (
                    torch.nn.functional.pad(q[0], (0, 0, 0, 64 - heads)).contiguous(),
                    torch.full((1,), TOPK, device="cuda", dtype=torch.int32),
                )
                single = ids[0, :1, None].contiguous()
                peer_ms = milliseconds(
                    lambda p=padded, o=one, i=single: PEER.attend(p, latent[0, :, None], i, scale, topk_length=o), graph=True
                )
            width = 656 if fp8 else 1152
            report.row(
                f"sparse_mla decode {'fp8' if fp8 else 'bf16'}",
                f"1 query H={heads}",
                ms,
                floor_ms=TOPK * width * 1e3 / COPY,
                peer="FlashMLA",
                peer_ms=peer_ms,
            )


def backward(report: Report) -> None:
    queries, keys, heads = 2048, 32768, 20
    ids, kind = make_ids(queries, keys)
    q, latent = (
        (torch.randn(1, queries, heads, 576, device="cuda") / 8).bfloat16(),
        (torch.randn(1, keys, 576, device="cuda") / 8).bfloat16(),
    )
    grad = torch.randn(1, queries, heads, 512, device="cuda").bfloat16()
    plan = ops.group_queries(ids, launch_mla.best_group(heads), backend="triton")
    few, grads = 96, []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        a, b = q[:, :few].detach().clone().to(dtype).requires_grad_(), latent.detach().clone().to(dtype).requires_grad_()
        ops.sparse_mla(a, b, ids[:, :few].contiguous(), 0.06, backend=backend)[0].backward(grad[:, :few].to(dtype))
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        need(relative(got, want) < 2e-2, f"gradient off by {relative(got, want)}")
    out, lse = launch_mla.forward(q, latent, ids, 0.06, 512, plan)
    flop = 2.0 * queries * heads * TOPK * (576 * 3 + 512 * 2)
    for exact in (False, True):
        ms = milliseconds(lambda e=exact: launch_mla.backward(q, latent, ids, out, lse, grad, 0.06, plan, e), 5)
        name = "sparse_mla backward" + (" deterministic" if exact else "")
        report.row(name, f"2048 of 32768 H={heads} {kind}", ms, flop=flop, floor_ms=flop / BF16_PEAK * 1e3)


def quantize(report: Report) -> None:
    k, angle = torch.randn(1, 131072, DIM, device="cuda").bfloat16(), torch.randn(1, 131072, 32, device="cuda")
    turn = {"cos_BTr": angle.cos(), "sin_BTr": angle.sin(), "interleaved": True, "rotate": True}
    (got, scale), (want, wanted) = (ops.quantize_index_keys(k, backend=b, **turn) for b in ("triton", "torch"))
    need(relative(got.float() * scale[..., None], want.float() * wanted[..., None]) < 1e-2, "quantisation differs")
    ms = milliseconds(lambda: ops.quantize_index_keys(k, backend="triton", **turn))
    report.row("quantize keys", "131072 x 128 rope+hadamard", ms, floor_ms=131072 * (256 + 128 + 4 + 256) * 1e3 / COPY)


SECTIONS = (quantize, scores, selection, decode, prefill, mla, backward, tune)


def main() -> int:
    global PEER, SELECTIONS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="the peer's folder, already sourced")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops_h100.json")
    parser.add_argument("--only", default="", help=f"sections whose name contains this: {', '.join(s.__name__ for s in SECTIONS)}")
    parser.add_argument("--selections", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a GPU is needed", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    PEER = Peer(arguments.peers)
    SELECTIONS = torch.load(arguments.selections) if arguments.selections else None
    report = Report(arguments.only)
    for section in SECTIONS:
        report.section(section)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "date": date, "rows": report.rows}, indent=1) + "\n")
    print(f"{len(report.rows)} rows, {report.failed} sections failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
