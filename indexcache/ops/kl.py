"""Compute the distillation loss of one indexer, which learns the dense attention of its layers.

Queries are processed in chunks of R rows against the N keys before the chunk's end. Memory holds
two fp32 matrices [R, N], and the keys of one layer at a time.

  normalise     computes a layer's log-sum-exp of each query and head, where its attention kernel
                did not give it
  teach         adds weight * p to the target, p = mean_h exp(logit - normaliser), and sums p log p
  score         computes the indexer's scores I
  compare       takes a row at a time: log q = I - logsumexp I and the loss; it overwrites I with
                its gradient d = q - target
  grad_queries  computes dq and dw of a head over the keys, with the products again from q and k
  grad_keys     computes dk: a program owns its keys and walks the chunk's queries and some heads.
                Partial results are added up in order; nothing is atomic.

Products are of the inputs' dtype with fp32 sums. Tiles after the diagonal are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from indexcache.ops.primitives import LN2, LOG2E
from indexcache.ops.reference import AttentionTarget, Gradients
from indexcache.ops.tuning import current, power


@triton.jit
def _product(
    p_a,
    p_b,
    o_m,
    o_n,
    m_m,
    m_n,
    s_a,
    s_b,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute a[o_m] @ b[o_n].T, fp32 [BM, BN], of rows of E numbers, BE at a time."""
    total = tl.zeros((BM, BN), tl.float32)
    for e in tl.static_range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        m_a, m_b = m_m[:, None] & (o_e < E)[None, :], m_n[None, :] & (o_e < E)[:, None]
        p_rows = p_a + o_m[:, None].to(tl.int64) * s_a
        p_columns = p_b + o_n[None, :].to(tl.int64) * s_b
        a = tl.load(p_rows + o_e[None, :], mask=m_a, other=0.0)
        b = tl.load(p_columns + o_e[:, None], mask=m_b, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def normalise(
    p_q,
    p_k,
    p_lse,
    scale2,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    start,
    stop,
    n_heads,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute log-sum-exps. grid (blocks of BM queries of start..stop, heads).

    p_q and p_lse, fp32 [queries, heads] in base 2, begin at `start`. scale2 is the scale times
    log2 e.
    """
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = start + o_m < stop
    p_q += i_h * s_qh
    p_k += i_h * s_kh
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for base in range(0, tl.minimum(start + (i_m + 1) * BM, stop), BN):
        o_n = base + tl.arange(0, BN)
        m_n = o_n < stop
        x = _product(p_q, p_k, o_m, o_n, m_m, m_n, s_qt, s_kt, E, BE, BM, BN) * scale2
        x = tl.where(o_n[None, :] <= start + o_m[:, None], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher
    tl.store(p_lse + o_m * n_heads + i_h, top + tl.log2(mass), mask=m_m)


@triton.jit
def teach(
    p_q,
    p_k,
    p_lse,
    p_target,
    p_entropy,
    scale2,
    weight,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_target,
    start,
    stop,
    n_heads,
    ADD: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write weight * p into the target. grid (blocks of BM queries, blocks of BN keys).

    The queries are start..stop. p_q and p_lse begin at `start`. ADD: add to the attention of other
    layers in the target. p_entropy fp32: the sum of p log p of each program, nats.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = start + o_m < stop, o_n < stop
    value = 0.0
    if i_n * BN < start + (i_m + 1) * BM:
        p = tl.zeros((BM, BN), tl.float32)
        seen = (o_n[None, :] <= start + o_m[:, None]) & m_m[:, None]
        for i_h in range(n_heads):
            lse = tl.load(p_lse + o_m * n_heads + i_h, mask=m_m, other=0.0)
            p_a, p_b = p_q + i_h * s_qh, p_k + i_h * s_kh
            x = _product(p_a, p_b, o_m, o_n, m_m, m_n, s_qt, s_kt, E, BE, BM, BN) * scale2
            p += tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)
        p /= n_heads
        value = tl.sum(tl.sum(p * tl.log2(tl.where(p > 0, p, 1.0)), 1), 0) * LN2
        p_at = _tile(p_target, i_m * BM, s_target, o_n, BM)
        p *= weight
        if ADD:
            p += tl.load(p_at)
        tl.store(p_at, p)
    tl.store(p_entropy + i_m * tl.num_programs(1) + i_n, value)


@triton.jit
def _rows(p, first, stop, s, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Load the rows first..first + N of D numbers as [N, DP], zeros after D and from `stop` on."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, DP)
    at = p + tl.cast(first, tl.int64) * s + o_n[:, None] * s + o_d[None, :]
    keep = (first + o_n < stop)[:, None]
    if D < DP:
        keep = keep & (o_d < D)[None, :]
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def _tile(p, first, s, o_n, BM: tl.constexpr):
    """Compute pointers to the rows first..first + BM and the columns o_n of a matrix."""
    return p + tl.cast(first, tl.int64) * s + tl.arange(0, BM)[:, None] * s + o_n[None, :]


@triton.jit
def score(
    p_q,
    p_k,
    p_w,
    p_score,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    start,
    stop,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute index scores. grid as `teach`. p_q and p_w begin at `start`; DP is 2^n >= D."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m = start + o_m < stop
    if i_n * BN < start + (i_m + 1) * BM:
        k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
        total = tl.zeros((BM, BN), tl.float32)
        for i_h in range(n_heads):
            w = tl.load(p_w + o_m * s_w + i_h, mask=m_m, other=0.0)
            q = _rows(p_q + i_h * s_qh, i_m * BM, stop - start, s_qt, BM, D, DP)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            total += tl.maximum(x, 0.0) * w[:, None]
        tl.store(_tile(p_score, i_m * BM, s_score, o_n, BM), total)


@triton.jit
def compare(
    p_score,
    p_target,
    p_value,
    s_score,
    s_target,
    start,
    n_queries,
    margin,
    MULTI: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the loss of each row and overwrite its scores with their gradient d. grid (rows,).

    p_value fp32 [queries]: the loss without the entropies of `teach`, which belong to MULTI. d is
    zero in `margin` columns after the last visible key and in the rows after the last query, so
    that tiles of gradients need no masks. Rows are s_score and s_target long.
    """
    i_m = tl.program_id(0)
    p_score += i_m.to(tl.int64) * s_score
    p_target += i_m.to(tl.int64) * s_target
    end = start + i_m + 1
    if i_m < n_queries:
        top = tl.full((), float("-inf"), tl.float32)
        sums = tl.zeros((BN,), tl.float32)
        mass = tl.zeros((BN,), tl.float32)
        for base in range(0, end, BN):
            o_n = base + tl.arange(0, BN)
            x = tl.where(o_n < end, tl.load(p_score + o_n, mask=o_n < s_score), float("-inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp2((top - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
            mass += tl.where(o_n < end, tl.load(p_target + o_n, mask=o_n < s_target), 0.0)
            top = higher
        norm = top + tl.log2(tl.sum(sums, 0)) * LN2
        total = tl.sum(mass, 0)
        value = tl.zeros((BN,), tl.float32)
        for base in range(0, tl.minimum(end + margin, s_score), BN):
            o_n = base + tl.arange(0, BN)
            log_q = tl.where(
                o_n < end, tl.load(p_score + o_n, mask=o_n < s_score) - norm, float("-inf")
            )
            target = tl.where(o_n < end, tl.load(p_target + o_n, mask=o_n < s_target), 0.0)
            positive = target > 0
            nats = tl.where(positive, -log_q, 0.0)
            if not MULTI:
                nats += tl.log2(tl.where(positive, target, 1.0)) * LN2
            value += target * nats
            tl.store(p_score + o_n, tl.exp2(log_q * LOG2E) * total - target, mask=o_n < s_score)
        tl.store(p_value + i_m, tl.sum(value, 0))
    else:
        for base in range(0, s_score, BN):
            o_n = base + tl.arange(0, BN)
            tl.store(p_score + o_n, tl.zeros((BN,), tl.float32), mask=o_n < s_score)


@triton.jit
def grad_queries(
    p_q,
    p_k,
    p_w,
    p_score,
    p_dq,
    p_dw,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    s_dw,
    start,
    stop,
    n_heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dq and dw of a head. grid (blocks of BM queries, heads).

    p_dq fp32 [queries, heads, D] and p_dw fp32 begin at `start`, as p_q and p_w do.
    """
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, DP)
    m_m = start + o_m < stop
    q = _rows(p_q + i_h * s_qh, i_m * BM, stop - start, s_qt, BM, D, DP)
    w = tl.load(p_w + o_m * s_w + i_h, mask=m_m, other=0.0)
    dq = tl.zeros((BM, DP), tl.float32)
    dw = tl.zeros((BM,), tl.float32)
    for base in range(0, tl.minimum(start + (i_m + 1) * BM, stop), BN):
        o_n = base + tl.arange(0, BN)
        k = _rows(p_k, base, stop, s_kt, BN, D, DP)
        d = tl.load(_tile(p_score, i_m * BM, s_score, o_n, BM))
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        d = tl.where(x > 0, d, 0.0)
        dw += tl.sum(x * d, 1)
        dq = tl.dot((d * w[:, None]).to(k.dtype), k, dq, input_precision="ieee")
    at = (o_m[:, None].to(tl.int64) * n_heads + i_h) * D + o_d[None, :]
    tl.store(p_dq + at, dq, mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(p_dw + o_m * s_dw + i_h, dw, mask=m_m)


@triton.jit
def grad_keys(
    p_q,
    p_k,
    p_w,
    p_score,
    p_dk,
    s_qt,
    s_qh,
    s_kt,
    s_w,
    s_score,
    start,
    stop,
    n_heads,
    n_share,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute partial sums of dk over the queries start..stop. grid (blocks of BN keys, shares).

    A share is n_share heads. p_dk fp32 [shares, stop, D].
    """
    i_n = tl.program_id(0)
    i_first = tl.program_id(1) * n_share
    p_dk += tl.program_id(1).to(tl.int64) * stop * D
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, DP)
    m_n = o_n < stop
    k = _rows(p_k, i_n * BN, stop, s_kt, BN, D, DP)
    dk = tl.zeros((BN, DP), tl.float32)
    first = tl.maximum(i_n * BN - start, 0) // BM * BM
    i_h, base = i_first, first
    for _ in range(tl.minimum(n_share, n_heads - i_first) * tl.cdiv(stop - start - first, BM)):
        o_m = base + tl.arange(0, BM)
        q = _rows(p_q + i_h * s_qh, base, stop - start, s_qt, BM, D, DP)
        d = tl.trans(tl.load(_tile(p_score, base, s_score, o_n, BM)))
        w = tl.load(p_w + o_m * s_w + i_h, mask=start + o_m < stop, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        dk = tl.dot(tl.where(x > 0, d * w[None, :], 0.0).to(q.dtype), q, dk, input_precision="ieee")
        base += BM
        i_h += tl.where(start + base < stop, 0, 1)
        base = tl.where(start + base < stop, base, first)
    p_at = p_dk + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(p_at, dk, mask=m_n[:, None] & (o_d < D)[None, :])


# ---- host side


def refuse(*queries: Tensor) -> str | None:
    """Return why the kernels cannot take queries of the indexer and all layers, or None."""
    dtypes = {q.dtype for q in queries}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"the dtypes are {', '.join(sorted(map(str, dtypes)))}"
    width = max(q.shape[-1] for q in queries)
    return f"rows of {width} numbers are longer than 256" if width > 256 else None


def index_kl(
    q_SJD: Tensor,
    k_TD: Tensor,
    w_SJ: Tensor,
    targets: Sequence[AttentionTarget],
    weights: Sequence[float],
    *,
    kind: str,
    block_bytes: int,
    gradients: bool,
) -> tuple[Tensor, Gradients | None]:
    """Run `ops.index_kl` on the kernels.

    `block_bytes` is the memory of two fp32 matrices [queries of a chunk, T].
    """
    q, k, w = q_SJD.contiguous(), k_TD.contiguous(), w_SJ.float().contiguous()
    length, device = len(q), q.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    grads = None
    if gradients:
        dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=device) for x in (q, k, w))
        grads = dq, dk, dw
    # Kernels read and write complete tiles, so matrices are padded to their largest side.
    side = current().kl.largest()
    rows = min(max(block_bytes // (8 * length) // side, 1) * side, current().kl.rows)
    padded = [triton.cdiv(n, side) * side for n in (min(rows, length), length)]
    scores, target = (torch.empty(padded, dtype=torch.float32, device=device) for _ in range(2))
    for start in range(0, length, rows):
        chunk = _Chunk(start, min(start + rows, length), scores, target)
        for i, (layer, weight) in enumerate(zip(targets, weights, strict=True)):
            entropy = chunk.add_target(layer, weight, add=i > 0)
            if kind == "multi":
                total += weight * entropy
        total += chunk.compare(q, k, w, kind)
        if grads is not None:
            chunk.add_gradients(q, k, w, grads)
    return total, grads


class _Chunk:
    """Launches for the queries start..stop - 1 of a document, against the keys before `stop`."""

    def __init__(self, start: int, stop: int, scores: Tensor, target: Tensor):
        self.start = start
        self.stop = stop
        self.scores = scores
        self.target = target
        self.rows = {"start": start, "stop": stop}

    def add_target(self, layer: AttentionTarget, weight: float, add: bool) -> Tensor:
        """Write one layer's attention times `weight` into the target, or add it.

        Returns its sum of p log p, fp64.
        """
        tuning = current().kl
        q, keys = layer.q_SHn[self.start : self.stop].contiguous(), layer.keys().contiguous()
        heads, width = q.shape[1:]
        scale2 = layer.scale * LOG2E.value
        divisor = _divisor(q)
        s_kh = 0 if keys.shape[1] == 1 else keys.stride(1)
        strides = {"s_qt": q.stride(0), "s_qh": q.stride(1), "s_kt": keys.stride(0), "s_kh": s_kh}
        sizes = {**self.rows, "n_heads": heads, "E": width, "BE": tuning.slice}
        arguments = {"p_q": q, "p_k": keys, "scale2": scale2, **strides, **sizes}
        if layer.lse_SH is None:
            lse = torch.empty(len(q), heads, dtype=torch.float32, device=q.device)
            tile = tuning.normalise.options(tuning.normalise.queries, divisor)
            normalise[(triton.cdiv(len(q), tile["BM"]), heads)](**arguments, p_lse=lse, **tile)
        else:
            lse = (layer.lse_SH[self.start : self.stop] * LOG2E.value).contiguous()
        tile_of = tuning.teach_wide if width > 192 else tuning.teach
        tile = tile_of.options(tile_of.queries, divisor)
        grid = self._tiles(tile)
        entropy = torch.empty(grid, dtype=torch.float32, device=q.device)
        outputs = {"p_target": self.target, "p_entropy": entropy, "s_target": self.target.stride(0)}
        teach[grid](**arguments, p_lse=lse, **outputs, weight=weight, ADD=add, **tile)
        return entropy.sum(dtype=torch.float64)

    def compare(self, q: Tensor, k: Tensor, w: Tensor, kind: str) -> Tensor:
        """Compute the scores and the loss, fp64; overwrite the scores with their gradient."""
        tuning = current().kl
        tile = tuning.score.options(tuning.score.queries, _divisor(q))
        score[self._tiles(tile)](**self._indexer(q, k, w), p_score=self.scores, **tile)
        queries, side = self.stop - self.start, tuning.largest()
        value = torch.empty(queries, dtype=torch.float32, device=q.device)
        matrices = {"p_score": self.scores, "p_target": self.target, "p_value": value}
        strides = {"s_score": self.scores.stride(0), "s_target": self.target.stride(0)}
        margin = max(x["BM"] + x["BN"] for x in _gradient_tiles(q))
        sizes = {"start": self.start, "n_queries": queries, "margin": margin}
        options = {"MULTI": kind == "multi", "BN": 1024, "num_warps": 4}
        compare[(triton.cdiv(queries, side) * side,)](**matrices, **strides, **sizes, **options)
        return value.sum(dtype=torch.float64)

    def add_gradients(self, q: Tensor, k: Tensor, w: Tensor, grads: Gradients) -> None:
        """Write the gradients of the chunk's queries and head weights; add to those of the keys."""
        dq, dk, dw = grads
        heads, dim = q.shape[1:]
        arguments = self._indexer(q, k, w)
        by_queries, by_keys = _gradient_tiles(q)
        outputs = {"p_dq": dq[self.start :], "p_dw": dw[self.start :], "s_dw": dw.stride(0)}
        grid = triton.cdiv(self.stop - self.start, by_queries["BM"]), heads
        grad_queries[grid](**arguments, p_score=self.scores, **outputs, **by_queries)
        blocks = triton.cdiv(self.stop, by_keys["BN"])
        share = min(triton.cdiv(current().kl.programs, blocks), heads)
        heads_of_program = triton.cdiv(heads, share)
        shares = triton.cdiv(heads, heads_of_program)
        partial = torch.empty(shares, self.stop, dim, dtype=torch.float32, device=q.device)
        outputs = {"p_dk": partial, "n_share": heads_of_program}
        grad_keys[(blocks, shares)](**arguments, p_score=self.scores, **outputs, **by_keys)
        dk[: self.stop] += partial.sum(0)

    def _tiles(self, tile: dict[str, int]) -> tuple[int, int]:
        """Return the number of tiles of queries and of keys."""
        queries = self.stop - self.start
        return triton.cdiv(queries, tile["BM"]), triton.cdiv(self.stop, tile["BN"])

    def _indexer(self, q: Tensor, k: Tensor, w: Tensor) -> dict[str, Any]:
        """Return the arguments that the indexer's kernels share."""
        heads, dim = q.shape[1:]
        tensors = {"p_q": q[self.start :], "p_k": k, "p_w": w[self.start :]}
        strides = {"s_qt": q.stride(0), "s_qh": q.stride(1), "s_kt": k.stride(0)}
        strides |= {"s_w": w.stride(0), "s_score": self.scores.stride(0)}
        return {**tensors, **strides, **self.rows, "n_heads": heads, "D": dim, "DP": power(dim, 16)}


def _divisor(q: Tensor) -> int:
    """Return the divisor of tile sides: 2 for fp32, which has twice the bytes, else 1."""
    return 2 if q.dtype == torch.float32 else 1


def _gradient_tiles(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Return the launch options of `grad_queries` and `grad_keys`.

    In fp32 the gradients of larger tiles exceed the registers.
    """
    tuning, divisor = current().kl, 4 if q.dtype == torch.float32 else 1
    keys = tuning.keys_wide if q.shape[-1] > 128 else tuning.keys
    return (
        tuning.queries.options(tuning.queries.queries, divisor),
        keys.options(keys.keys, divisor),
    )
