"""Define Triton helpers that several kernels share, among them the sort keys of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from indexcache.ops.tuning import interpreted

NONE = tl.constexpr(-(2**31))  # the key of no candidate, below the keys of all scores
LOWEST = tl.constexpr(-2139095041)  # the key of -inf
INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sort_key(score):
    """Map fp32 to int32 in the same order, with -0 as +0 and NaN as -inf. Never returns NONE."""
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ahead(lo, span, share):
    """Add that share of span (uint32) to lo, at least 1 and at most all of it."""
    step = tl.minimum(tl.maximum(span.to(tl.float32) * share, 1.0), 4294967040.0).to(tl.uint32)
    return lo + tl.minimum(step, span).to(tl.int32, bitcast=True)


@triton.jit
def kth_key(keys, low, high, total, k, slack):
    """Search a threshold t: (t, count(keys >= t), count(keys > t)).

    t >= low is one with k <= count(keys >= t) <= k + slack if there is one, else the k-th best key.
    Requires total = count(keys >= low) >= k, high the largest key, and at most 32768 keys. The
    third result is exact only when the second exceeds k + slack, which happens with ties.

    A step compares two pivots and counts them in the halves of one integer. They lie around where
    the k-th key would be if keys were spread evenly, and in every other step at the thirds, which
    bounds the number of steps: 6 to 9 on continuous scores. Everything is in 32 bits, since a
    program waits for every instruction between two steps.
    """
    lo, above, step = low, 0, 0
    hi = tl.where(total <= k + slack, lo, tl.maximum(high, lo))
    aim = k.to(tl.float32) + 0.5 * slack
    while lo < hi:
        span = (hi - lo).to(tl.uint32, bitcast=True)
        root = tl.rsqrt((total - above).to(tl.float32))
        share = (total.to(tl.float32) - aim) * root * root
        thirds = step % 2 == 1
        a = _ahead(lo, span, tl.where(thirds, 0.33333334, share - 0.2 * root))
        b = tl.maximum(_ahead(lo, span, tl.where(thirds, 0.6666667, share + 0.2 * root)), a)
        both = tl.sum(tl.where(keys >= a, 1, 0) + tl.where(keys >= b, 65536, 0))
        n_a, n_b = both & 0xFFFF, (both >> 16) & 0xFFFF
        # The k-th key is at or above b, between a and b, or below a.
        hi = tl.where(n_b >= k, hi, tl.where(n_a >= k, b, a) - 1)
        above = tl.where(n_b >= k, above, tl.where(n_a >= k, n_b, n_a))
        lo = tl.where(n_b >= k, b, tl.where(n_a >= k, a, lo))
        total = tl.where(n_b >= k, n_b, tl.where(n_a >= k, n_a, total))
        hi = tl.where(total <= k + slack, lo, hi)
        step += 1
    return lo, total, above


PUT = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }"
)
TAKE = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, -1; @p ld.global.b32 $0, [$1]; }"
)
FETCH = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }"
)
PUT_BYTE = tl.constexpr(PUT.value.replace("b32 [", "u8 ["))


@triton.jit
def put(pointer, value, mask):
    """Store 32-bit values, or their lowest bytes, in the layout that they have.

    `tl.store` would move scattered values to another layout through shared memory.
    """
    byte: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth == 8
    if INTERPRETED:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.inline_asm_elementwise(
            PUT_BYTE if byte else PUT,
            "=r,l,r,r",
            [pointer.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def take(pointer, mask):
    """Load 32-bit values, -1 where masked, in the layout that the pointers have.

    Neighbours lie side by side in a warp, where `tl.load` would give each thread four in a row.
    """
    if INTERPRETED:
        return tl.load(pointer, mask=mask, other=-1)
    else:
        return tl.inline_asm_elementwise(
            TAKE,
            "=&r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch(pointer, mask):
    """Bring the lines at these addresses to the L2 cache; no value is read."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            FETCH,
            "=r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def nibble_counts(x):
    """Count the bits set in each group of four bits of a uint32, in the place of the group."""
    n = x - ((x >> 1) & 0x55555555)
    return (n & 0x33333333) + ((n >> 2) & 0x33333333)


@triton.jit
def ones(x):
    """Count the bits that are set in each int32."""
    if INTERPRETED:
        n = nibble_counts(x.to(tl.uint32, bitcast=True))
        return ((((n + (n >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def rows_visible(offset, o_row, keys):
    """Count which of `keys` keys the queries at o_row see.

    The batch entry starts at position `offset`; see ops/reference.py.
    """
    return tl.minimum(tl.maximum(offset + o_row + 1, 0), keys)
