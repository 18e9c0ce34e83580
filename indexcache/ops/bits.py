"""Triton helpers that several kernels share: scores as integers whose order is the contract's order."""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-(2**31))  # the key of what is no candidate at all; below every key of a score


@triton.jit
def sort_key(score):
    """fp32 -> int32 with the same order; -0 as +0, NaN as -inf (the contract of `index_topk`). Never NONE."""
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_key(keys, low, k, slack):
    """A t >= low with k <= count(keys >= t) <= k + slack if one exists, else the largest t with count(keys >= t) >= k.

    Requires count(keys >= low) >= k. With slack 0, and keys distinct around it, t separates the k best exactly; with ties
    t is the k-th best key itself. Bisection over the values between low and the largest key: 32 steps at most, about half
    of that on real scores, because it stops at the first separating value.
    """
    lo = low.to(tl.int64)
    hi = tl.maximum(tl.max(keys, 0).to(tl.int64), lo)
    while lo < hi:
        mid = lo + (hi - lo + 1) // 2
        count = tl.sum((keys >= mid.to(tl.int32)).to(tl.int32), 0)
        enough = count >= k
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, tl.where(count <= k + slack, mid, hi), mid - 1)
    return lo.to(tl.int32)


@triton.jit
def rows_visible(offset, o_row, keys):
    """How many of `keys` keys the queries at o_row of a batch entry that starts at `offset` see (ops/reference.py)."""
    return tl.minimum(tl.maximum(offset + o_row + 1, 0), keys)
