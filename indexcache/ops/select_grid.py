"""Exact top-k of one or few rows by the whole device in one launch: decoding.

Each program holds a segment of a row's keys in registers. Four rounds of a radix select find the k-th key: a histogram of 8
bits of the keys that are still in question is added up over the programs, all meet, and each reads off the bin of the k-th.
A last meeting tells every program how many ids the programs before it write. Integers only, so deterministic.
With SCORES a program first scores its segment (ops/scores.py): then this is the whole indexer step of a decoding layer.

The programs wait for each other, so all of a launch must fit on the device at once; the host launches no more than that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.bits import NONE, rows_visible, sort_key
from indexcache.ops.scores import row_tile

BINS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)


@triton.jit
def _meet(p_sync, arrivals):
    """Returns when `arrivals` calls have been made by the programs of a row; what they wrote before is then visible."""
    tl.debug_barrier()
    tl.atomic_add(p_sync, 1, sem="release")
    while tl.atomic_add(p_sync, 0, sem="acquire") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _narrow(p_hist, p_sync, order, alive, wanted, edge, n_seg, ROUND: tl.constexpr):
    """One round, 8 bits: (the keys in question that share the bits of the wanted-th best, how many of them are wanted, how many are
    wanted in all: less than asked for where fewer are in question, the bits found so far)."""
    o_bin = tl.arange(0, BINS)
    digit = (order >> (24 - 8 * ROUND)) & (BINS - 1)
    count = tl.histogram(tl.where(alive, digit, 0), BINS, mask=alive)
    p_hist += ROUND * BINS
    tl.atomic_add(p_hist + o_bin, count, mask=count > 0, sem="relaxed")
    _meet(p_sync, (ROUND + 1) * n_seg)
    count = tl.load(p_hist + o_bin, cache_modifier=".cg")
    wanted = tl.minimum(wanted, tl.sum(count, 0))
    at = tl.max(tl.where(tl.cumsum(count, 0, reverse=True) >= wanted, o_bin, 0), 0)
    missing = wanted - tl.sum(tl.where(o_bin > at, count, 0), 0)
    return alive & (digit == at), missing, wanted, edge | (at << (24 - 8 * ROUND))


@triton.jit
def select_grid(
    p_q, p_k, p_w, p_scale, p_score, p_offset, p_work, p_count, p_out,
    s_kb, s_kt, s_scale, s_row, n_queries, n_keys,
    TOPK: tl.constexpr, FILL: tl.constexpr, SEGMENT: tl.constexpr, PROGRAMS: tl.constexpr, FLOAT: tl.constexpr, CAUSAL: tl.constexpr,
    SCORES: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """grid (segments, rows). p_work [rows, ROUNDS x BINS + 1] holds zeros; p_count [rows, segments, 2]. SCORES: p_score
    is written first, as int32 keys; else rows of fp32 or int32 keys. PROGRAMS: a power of two, at least the segments."""
    i_seg, n_seg = tl.program_id(0), tl.num_programs(0)
    i_row = tl.program_id(1).to(tl.int64)
    i_b = i_row // n_queries
    seen = n_keys
    if CAUSAL:
        seen = rows_visible(tl.load(p_offset + i_b), i_row % n_queries, n_keys).to(tl.int32)
    p_row = p_score + i_row * s_row
    start = i_seg * SEGMENT
    if SCORES:
        for base in range(start, tl.minimum(start + SEGMENT, seen), BN):
            o_n = base + tl.arange(0, BN)
            p_keys, p_at = p_k + i_b * s_kb, p_scale + i_b * s_scale
            score = row_tile(p_q + i_row * H * D, p_keys, p_w + i_row * H, p_at, o_n, o_n < seen, H, HP, D, s_kt, SCALED)
            tl.store(p_row + o_n, sort_key(score), mask=o_n < seen)
        tl.debug_barrier()  # other threads of this program read what these wrote
    o = start + tl.arange(0, SEGMENT)
    x = tl.load(p_row + o, mask=o < seen, other=0)
    key = x
    if FLOAT:
        key = sort_key(x)
    alive = (o < seen) & (key != NONE)
    valid = alive
    order = key ^ (-(2**31))  # the same order, of unsigned integers
    p_hist = p_work + i_row * (ROUNDS * BINS + 1)
    p_sync = p_hist + ROUNDS * BINS
    alive, missing, wanted, edge = _narrow(p_hist, p_sync, order, alive, TOPK, 0, n_seg, 0)
    alive, missing, _, edge = _narrow(p_hist, p_sync, order, alive, missing, edge, n_seg, 1)
    alive, missing, _, edge = _narrow(p_hist, p_sync, order, alive, missing, edge, n_seg, 2)
    alive, missing, _, edge = _narrow(p_hist, p_sync, order, alive, missing, edge, n_seg, 3)
    edge = edge ^ (-(2**31))
    better = valid & (key > edge)
    equal = valid & (key == edge)
    p_count += i_row * n_seg * 2
    tl.store(p_count + i_seg * 2, tl.sum(better.to(tl.int32), 0))
    tl.store(p_count + i_seg * 2 + 1, tl.sum(equal.to(tl.int32), 0))
    _meet(p_sync, (ROUNDS + 1) * n_seg)
    o_seg = tl.arange(0, PROGRAMS)
    before = o_seg < i_seg
    better_before = tl.sum(tl.load(p_count + o_seg * 2, mask=before, other=0, cache_modifier=".cg"), 0)
    equal_before = tl.sum(tl.load(p_count + o_seg * 2 + 1, mask=before, other=0, cache_modifier=".cg"), 0)
    taken = better | (equal & (equal_before + tl.cumsum(equal.to(tl.int32), 0) <= missing))
    slot = better_before + tl.minimum(equal_before, missing) + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(p_out + i_row * TOPK + slot, o, mask=taken)
    if i_seg == 0:
        o_fill = tl.arange(0, FILL)
        tl.store(p_out + i_row * TOPK + o_fill, tl.full((FILL,), -1, tl.int32), mask=(o_fill >= wanted) & (o_fill < TOPK))
