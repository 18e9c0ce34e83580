"""Check every kernel, then time it beside its floor and a peer's kernel; write the rows as JSON.

    python -m benchmarks.ops [--peers DIR] [--out FILE] [--only NAME]

--peers names a folder with the peer's README.md and setup.sh. Source setup.sh first, so that
PYTHONPATH has the peer's packages. Attention and pools are timed on selections of `tiny`, a trained
DSA model, tiled to long contexts (benchmarks/selections.py). A row is written only if its kernel
passed its check in this run. Floors divide by the rates that products and copies reach on an H100
(docs/kernels.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import one_token, selections
from benchmarks.timing import (
    Calls,
    Peer,
    Report,
    check_selection,
    milliseconds,
    need,
    relative,
    side_by_side,
)
from indexcache import ops
from indexcache.bench import recorded
from indexcache.ops import reference
from indexcache.ops.index import scores_host, topk_host
from indexcache.ops.mla import host as mla_host
from indexcache.shapes import rates_named

ROOT = Path(__file__).resolve().parent.parent
RATES = rates_named("H100")

HEADS = 32  # heads of the indexer
DIM = 128
TOPK = 2048
POOL = 16384
LONG = 200_000
KEYS = 131_072
CHUNK = 8192
# In this layer of `tiny` three neighbouring queries read 1.83 times as many ids as one. The mean of
# the 12 layers is 1.76.
LAYER = 10
LATENT = 576  # dims of a latent
VALUE = 512


def index_inputs(
    queries: int, keys: int, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make fp8 inputs in which neighbouring keys score alike, as in text."""
    k = torch.randn(1, keys, DIM, device="cuda")
    k[:, 1:] += k[:, :-1].clone()
    q = torch.randn(1, queries, heads, DIM, device="cuda")
    w = torch.randn(1, queries, heads, device="cuda") * (heads * DIM) ** -0.5
    q8, w8 = ops.quantize_index_queries(q, w)
    k8, scale = ops.quantize_index_keys(k)
    return q8, k8, w8, scale


def fp32_scores(q: Tensor, k: Tensor, w: Tensor, scale: Tensor, at: Any) -> Tensor:
    """Return the scores of some queries, fp32 [queries, T]."""
    return reference.index_scores(q[:, at].float(), k.float(), w[:, at])[0] * scale


def chunks() -> list[slice]:
    """Split a prefill of LONG tokens."""
    return [slice(n, min(n + CHUNK, LONG)) for n in range(0, LONG, CHUNK)]


def attention_ids(queries: int, keys: int, layer: int = LAYER) -> tuple[Tensor, str]:
    """Make int32 ids [1, queries, TOPK] of a trained model, tiled, and describe them."""
    ids = selections.tile(selections.load(f"topk.{layer}").cuda(), TOPK, keys, queries)
    return ids[None], f"ids of tiny's layer {layer}, tiled"


def bf16_normal(*shape: int) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.125)


# ---- sections


def quantize(report: Report) -> None:
    k = torch.randn(1, KEYS, DIM, device="cuda").bfloat16()
    angle = torch.randn(1, KEYS, 32, device="cuda")
    options: dict[str, Any] = {"interleaved": True, "rotate": True}
    options |= {"cos_BTr": angle.cos(), "sin_BTr": angle.sin()}
    result, scale = ops.quantize_index_keys(k, backend="triton", **options)
    expected, expected_scale = ops.quantize_index_keys(k, backend="torch", **options)
    error = relative(
        result.float() * scale[..., None], expected.float() * expected_scale[..., None]
    )
    need(error < 1e-2, "quantisation differs")
    ms = milliseconds(lambda: ops.quantize_index_keys(k, backend="triton", **options))
    floor = KEYS * (256 + 128 + 4 + 256) * 1e3 / RATES.hbm
    report.row("quantize keys", "131072 x 128 rope+hadamard", ms, floor_ms=floor)


def scores(report: Report) -> None:
    for heads in (32, 64):
        _scores(report, heads)


def _scores(report: Report, heads: int) -> None:
    queries = 2048
    q, k, w, scale = index_inputs(queries, KEYS, heads)
    rows = torch.empty((queries, KEYS), device="cuda")
    x = scores_host.Inputs(q, k, w, scale, KEYS)
    sample = torch.tensor([0, 1, 63, 64, queries - 1], device="cuda")
    expected = fp32_scores(q, k, w, scale, sample)

    def run(hopper: bool) -> None:
        with ops.tuned(index={"hopper": hopper}):
            scores_host.score_tiles(x, out=rows)

    calls: Calls = {"gluon": lambda: run(True), "triton": lambda: run(False)}
    for name, call in calls.items():
        rows.fill_(torch.nan)
        call()
        error = relative(rows[sample], expected)
        need(error < 5e-3, f"{name}: scores are off by {error}")
    if report.peer.available:
        first = torch.zeros(queries, device="cuda", dtype=torch.int32)
        last = torch.full_like(first, KEYS)
        inputs = (q[0], None), (k[0], scale[0]), w[0], first, last
        calls["DeepGEMM"] = lambda: report.peer.logits(*inputs, clean_logits=False)
    times = side_by_side(calls, 21)
    flop = 2.0 * queries * KEYS * heads * DIM
    for name in ("gluon", "triton"):
        report.row(
            f"scores fp8 {name}",
            f"2048 x 131072 H={heads}",
            times[name],
            flop=flop,
            floor_ms=flop / RATES.fp8 * 1e3,
            peer="DeepGEMM",
            peer_ms=times.get("DeepGEMM"),
        )


def tune(report: Report) -> None:
    """Time the settings of the score kernels; this prints and writes no rows."""
    queries = 2048
    x = scores_host.Inputs(*index_inputs(queries, KEYS), KEYS)
    rows = torch.empty(queries, KEYS, device="cuda")
    settings: list[dict[str, Any]] = [{"hopper": True, "hopper_stages": n} for n in (3, 4, 6)]
    settings += [{"hopper": False, "keys": n} for n in (64, 128)]
    for setting in settings:
        try:
            with ops.tuned(index=setting):
                ms = milliseconds(lambda: scores_host.score_tiles(x, out=rows), 5)
            rate = 2e-9 * queries * KEYS * HEADS * DIM / ms
            print(f"tune {setting}: {ms:.4f} ms, {rate:.0f} TFLOP/s", flush=True)
        except Exception as error:
            print(f"tune {setting}: {type(error).__name__} {str(error)[:200]}", flush=True)


def selection(report: Report) -> None:
    for queries, keys, grid in ((2048, KEYS, False), (1, LONG, False), (1, LONG, True)):
        with ops.tuned(index={"grid": grid}):
            _selection(report, queries, keys, grid)


def _selection(report: Report, queries: int, keys: int, grid: bool) -> None:
    x = torch.randn(queries, keys, device="cuda")
    expected = reference.select(x, torch.ones_like(x, dtype=torch.bool), TOPK)
    need(torch.equal(topk_host.topk_rows(x, TOPK)[0], expected), "the selection differs")
    calls: Calls = {"ours": lambda: topk_host.topk_rows(x, TOPK)}
    if report.peer.available:
        out = torch.full((queries, TOPK), -1, device="cuda", dtype=torch.int32)
        first = torch.zeros(queries, device="cuda", dtype=torch.int32)
        last = torch.full_like(first, keys)
        work = torch.zeros(2**20, device="cuda", dtype=torch.uint8)
        many = x, first, last, out, queries, x.stride(0), x.stride(1), TOPK
        if queries > 1:
            calls["peer"] = lambda: report.peer.custom.top_k_per_row_prefill(*many)
        else:
            one = x, last[:, None], out, work, TOPK, keys
            calls["peer"] = lambda: torch.ops._C.cooperative_topk(*one)
    if queries > 1:
        times = side_by_side(calls)
    else:
        times = {name: milliseconds(call, graph=True) for name, call in calls.items()}
    report.row(
        f"selection{' in one launch' if grid else ''}",
        f"[{queries}, {keys}] fp32 k={TOPK}",
        times["ours"],
        floor_ms=4e3 * queries * keys / RATES.hbm,
        peer="vLLM top-k",
        peer_ms=times.get("peer"),
    )


def decode(report: Report) -> None:
    q, k, w, scale = index_inputs(1, LONG)
    offset = torch.tensor([LONG - 1], device="cuda")
    expected = fp32_scores(q, k, w, scale, slice(None))

    def select() -> Tensor:
        return ops.index_topk(q, k, w, scale, TOPK, offset, backend="triton").ids

    for grid in (False, True):
        with ops.tuned(index={"grid": grid}):
            check_selection(select()[0], expected, offset + 1)
            ms = milliseconds(select, graph=True)
        name = f"index_topk decode{', selection in one launch' if grid else ''}"
        floor = LONG * 132e3 / RATES.hbm
        report.row(name, f"1 x 200000 H={HEADS} k={TOPK}", ms, floor_ms=floor)


def prefill(report: Report) -> None:
    """Time a causal prefill, chunk by chunk, scores and selection; then also with a pool."""
    for heads in (32, 64):
        _prefill(report, heads)


def _prefill(report: Report, heads: int) -> None:
    q, k, w, scale = index_inputs(LONG, LONG, heads)

    def select(pool: int = 0) -> list[Tensor]:
        ids = []
        for c in chunks():
            inputs = q[:, c], k[:, : c.stop], w[:, c], scale[:, : c.stop], TOPK, c.start
            ids.append(ops.index_topk(*inputs, pool=pool, backend="triton").ids)
        return ids

    ids = torch.cat(select(), dim=1)[0]
    sample = [0, 1, 5000, LONG // 2, LONG - 1]
    expected = fp32_scores(q, k, w, scale, sample)
    check_selection(ids[sample], expected, torch.tensor(sample, device="cuda") + 1)
    need(torch.equal(ids, torch.cat(select(), dim=1)[0]), "two runs differ")
    flop = float(LONG) * LONG * heads * DIM
    shape = f"200000 causal H={heads} k={TOPK}"
    floor = flop / RATES.fp8 * 1e3
    ms = milliseconds(select, 3)
    report.row("index_topk prefill", shape, ms, flop=flop, floor_ms=floor)
    if heads == HEADS:
        ms = milliseconds(lambda: select(POOL), 3)
        report.row("index_topk F with pool", shape, ms, flop=flop, floor_ms=floor)


def pools(report: Report) -> None:
    """Time a causal prefill, chunk by chunk, where each query selects inside its pool.

    The groups are timed separately, because all layers that share the pools share them.
    """
    inputs = index_inputs(LONG, LONG)
    pool = recorded.stretch(selections.load(f"pool.{LAYER}").int().cuda(), POOL, LONG)[None]
    for grouped in (False, True):
        with ops.tuned(index={"grouped_pools": grouped}):
            _pools(report, inputs, pool, grouped)


def _pools(report: Report, inputs: tuple[Tensor, ...], pool: Tensor, grouped: bool) -> None:
    q, k, w, scale = inputs
    group = ops.pool_group(q, k)

    def unite() -> list[ops.QueryGroups | None]:
        if group == 1:
            return [None for _ in chunks()]
        return [ops.group_queries(pool[:, c], group, backend="triton") for c in chunks()]

    groups = unite()

    def select() -> list[Tensor]:
        ids = []
        for c, united in zip(chunks(), groups, strict=True):
            chunk = q[:, c], k[:, : c.stop], w[:, c], scale[:, : c.stop], TOPK, c.start, pool[:, c]
            ids.append(ops.index_topk(*chunk, groups=united, backend="triton").ids)
        return ids

    ids = torch.cat(select(), dim=1)[0]
    need(torch.equal(ids, torch.cat(select(), dim=1)[0]), "two runs differ")
    sample = torch.tensor([0, 5000, POOL, LONG // 2, LONG - 1], device="cuda")
    expected = fp32_scores(q, k, w, scale, sample)
    outside = torch.ones_like(expected, dtype=torch.bool)
    for row, t in zip(outside, sample, strict=True):
        row[pool[0, t][pool[0, t] >= 0].long()] = False
    unpooled = outside.gather(1, ids[sample].clamp(min=0).long())[ids[sample] >= 0]
    need(not bool(unpooled.any()), "ids outside of the pool")
    check_selection(ids[sample], expected.masked_fill(outside, -torch.inf), sample + 1)
    pairs = POOL * (LONG - POOL / 2)
    # `slots` keys are gathered.
    slots = pairs if group == 1 else sum(int(u.count_BG.sum()) for u in groups if u is not None)
    kind = f"pools of tiny's layer {LAYER}, stretched"
    report.row(
        f"index_topk pool {POOL}{f', {group} neighbours together' if grouped else ''}",
        f"200000 causal H={HEADS} k={TOPK} {kind}",
        milliseconds(select, 3),
        floor_ms=slots * 132 / RATES.l2 * 1e3,
    )
    if group > 1:
        shape = f"200000 causal k={POOL} group {group} U={slots * group / pairs:.2f} {kind}"
        floor = pairs * 9e3 / RATES.hbm
        report.row("group_queries", shape, milliseconds(unite, 3), floor_ms=floor)


def mla(report: Report) -> None:
    latent = bf16_normal(1, LONG, LATENT)
    for heads, layer in ((20, 8), (20, LAYER), (20, 4), (64, LAYER), (128, LAYER)):
        _mla_chunk(report, latent, heads, layer)
    _mla_prefill(report, latent)
    for heads in (20, 64):
        _mla_decode(report, latent[:, :KEYS], heads)


def attention_flop(queries: int, heads: int) -> float:
    return 2.0 * queries * heads * TOPK * (LATENT + VALUE)


def _mla_chunk(report: Report, latent: Tensor, heads: int, layer: int) -> None:
    queries = CHUNK
    ids, kind = attention_ids(queries, KEYS, layer)
    q = bf16_normal(1, queries, heads, LATENT)
    group = mla_host.best_group(heads)
    groups = ops.group_queries(ids, group, backend="triton") if group > 1 else None
    size = 1.0 if groups is None else float(groups.count_BG.float().mean()) / TOPK

    def attend() -> Tensor:
        return ops.sparse_mla(q, latent, ids, 0.06, groups=groups, backend="triton")[0]

    few = slice(0, 65)
    expected = reference.sparse_mla(q[:, few].float(), latent.float(), ids[:, few], 0.06)[0]
    error = relative(attend()[:, few], expected)
    need(error < 1e-2, f"H={heads}: off by {error}")
    calls: Calls = {"ours": attend}
    if report.peer.available:
        calls["FlashMLA"] = report.peer.attention(q, latent, ids, 0.06)
    times = side_by_side(calls, 7)
    flop = attention_flop(queries, heads)
    report.row(
        "sparse_mla prefill",
        f"8192 of 131072 H={heads} U={size:.2f} {kind}",
        times["ours"],
        flop=flop,
        floor_ms=flop / RATES.bf16 * 1e3,
        peer="FlashMLA",
        peer_ms=times.get("FlashMLA"),
    )
    if groups is not None and layer == LAYER:
        ms = milliseconds(lambda: ops.group_queries(ids, group, backend="triton"), 5)
        floor = queries * TOPK * 9e3 / RATES.hbm
        report.row("group_queries", f"8192 k={TOPK} group {group} {kind}", ms, floor_ms=floor)


def _mla_prefill(report: Report, latent: Tensor) -> None:
    heads = 20
    ids, kind = attention_ids(LONG, LONG)
    q = bf16_normal(1, LONG, heads, LATENT)
    groups = ops.group_queries(ids, mla_host.best_group(heads), backend="triton")
    options: dict[str, Any] = {"groups": groups, "backend": "triton"}
    ms = milliseconds(lambda: ops.sparse_mla(q, latent, ids, 0.06, **options), 5)
    flop = attention_flop(LONG, heads)
    floor = flop / RATES.bf16 * 1e3
    shape = f"200000 of 200000 H={heads} {kind}"
    report.row("sparse_mla prefill", shape, ms, flop=flop, floor_ms=floor)


def _mla_decode(report: Report, latent: Tensor, heads: int) -> None:
    ids = attention_ids(1, LONG)[0]
    q = bf16_normal(1, 1, heads, LATENT)

    def attend() -> Tensor:
        return ops.sparse_mla(q, latent, ids, 0.06, backend="triton")[0]

    expected = reference.sparse_mla(q.float(), latent.float(), ids, 0.06)[0]
    need(relative(attend(), expected) < 1e-2, "decoding is off")
    with torch.no_grad():
        ms = milliseconds(attend, graph=True)
    peer_ms = None
    if report.peer.available:
        peer_ms = milliseconds(report.peer.attention(q, latent, ids, 0.06), graph=True)
    report.row(
        "sparse_mla decode bf16",
        f"1 query H={heads}",
        ms,
        floor_ms=TOPK * 2 * LATENT * 1e3 / RATES.hbm,
        peer="FlashMLA",
        peer_ms=peer_ms,
    )


def backward(report: Report) -> None:
    queries = 2048
    heads = 20
    ids, kind = attention_ids(queries, KEYS)
    q = bf16_normal(1, queries, heads, LATENT)
    latent = bf16_normal(1, KEYS, LATENT)
    grad = torch.randn(1, queries, heads, VALUE, device="cuda").bfloat16()
    groups = ops.group_queries(ids, mla_host.best_group(heads), backend="triton")
    few = slice(0, 96)
    gradients = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q[:, few], latent)]
        out, _ = ops.sparse_mla(*leaves, ids[:, few].contiguous(), 0.06, backend=backend)
        gradients.append(torch.autograd.grad(out, leaves, grad[:, few].to(dtype)))
    for result, expected in zip(*gradients, strict=True):
        error = relative(result, expected)
        need(error < 2e-2, f"a gradient is off by {error}")
    out, lse = mla_host.launch_forward(q, latent, ids, 0.06, VALUE, groups)
    inputs = q, latent, ids, out, lse, grad, 0.06, groups
    flop = 2.0 * queries * heads * TOPK * (LATENT * 3 + VALUE * 2)
    for deterministic in (False, True):
        ms = milliseconds(lambda d=deterministic: mla_host.launch_backward(*inputs, d), 5)
        name = "sparse_mla backward" + (" deterministic" if deterministic else "")
        shape = f"2048 of 131072 H={heads} {kind}"
        report.row(name, shape, ms, flop=flop, floor_ms=flop / RATES.bf16 * 1e3)


def step(report: Report) -> None:
    one_token.one_token(report, RATES)


SECTIONS = (quantize, scores, selection, decode, prefill, pools, mla, backward, step, tune)


def main() -> int:
    names = ", ".join(s.__name__ for s in SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder of the peer, whose setup.sh was sourced")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/ops_h100.json", help="file to write"
    )
    parser.add_argument(
        "--only", default="", help=f"run sections whose name contains this: {names}"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    report = Report(arguments.only, Peer(arguments.peers))
    for section in SECTIONS:
        report.section(section)
    result = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "rows": report.rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(report.rows)} rows, {report.failed} sections failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
