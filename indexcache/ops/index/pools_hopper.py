"""Compute scores inside pools on Hopper, in Gluon: neighbouring queries share a union of pools.

An optional pointer is None where it is not needed; Triton compiles a kernel for each case.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from indexcache.ops.barrier import thread_barrier
from indexcache.ops.index.scores_hopper import (
    key_score,
    lane_ranks,
    partial_sums,
    row_sums,
    three_dims,
)
from indexcache.ops.primitives import NONE


@gluon.jit
def _sort_key(score):
    """Return `primitives.sort_key`, which Gluon cannot call."""
    score = gl.where(score != score, float("-inf"), score)
    score = gl.where(score == 0.0, 0.0, score)
    bits = score.to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _permute_words(words, D: gl.constexpr):
    """Order [rows, D / 4] words of four bytes as a product from registers takes them.

    A lane holds 16 bytes of a row in turn.
    """
    rows: gl.constexpr = words.shape[0]
    words = gl.permute(gl.reshape(words, [rows, D // 64, 4, 2, 2]), (0, 1, 3, 4, 2))
    return gl.reshape(words, [rows, D // 4])


@gluon.jit
def _as_e4m3(words):
    """Turn words into four times as many e4m3.

    Loops carry words, because Triton would split carried bytes.
    """
    pairs = gl.join(words, words)
    copies = gl.reshape(gl.join(pairs, pairs), [words.shape[0], words.shape[1] * 4])
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [copies], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def _load_keys(p_k, ids, s_kt, D: gl.constexpr, layout: gl.constexpr):
    """Load the keys of 64 ids into registers, as words."""
    o_w = gl.arange(0, D // 4, layout=gl.SliceLayout(0, layout))
    return gl.load((p_k + o_w)[None, :] + (ids * s_kt)[:, None])


@gluon.jit
def _load_quarters(pointer, o_key, n_left, STRIDE: gl.constexpr):
    """Load 128 slots, 32 at a time: a lane has a key."""
    first = gl.load(pointer + o_key * STRIDE, mask=o_key < n_left, other=0)
    second = gl.load(pointer + (o_key + 32) * STRIDE, mask=o_key < n_left - 32, other=0)
    third = gl.load(pointer + (o_key + 64) * STRIDE, mask=o_key < n_left - 64, other=0)
    fourth = gl.load(pointer + (o_key + 96) * STRIDE, mask=o_key < n_left - 96, other=0)
    return first, second, third, fourth


@gluon.jit
def _register_product(words, q, zero, D: gl.constexpr):
    """Start the product of 64 keys in registers with all queries."""
    acc: gl.constexpr = zero.type.layout
    keys = _as_e4m3(_permute_words(words, D))
    keys = gl.convert_layout(
        keys, gl.DotOperandLayout(operand_index=0, parent=acc, k_width=4), assert_trivial=True
    )
    return warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _fold_scaled(product, weight, scale, smem, H: gl.constexpr):
    """Store partial sums as `_fold` does, times the scales of the keys unless `scale` is None."""
    sums = partial_sums(product, weight, H)
    if scale is not None:
        rows = gl.convert_layout(
            gl.reshape(scale, [2, 32]), gl.SliceLayout(1, sums.type.layout), assert_trivial=True
        )
        sums *= gl.expand_dims(rows, 1)
    three_dims(smem).store(sums)


@gluon.jit
def scores_pools(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_union,
    p_mask,
    p_slots,
    p_thr,
    p_key,
    p_id,
    p_count,
    s_kt,
    n_queries,
    n_keys,
    n_slots,
    H: gl.constexpr,
    D: gl.constexpr,
    CAP: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """Score 128 / H neighbouring queries, 8 at most, inside their pools; grid (groups,), 4 warps.

    p_union, p_mask and p_slots are `QueryGroups` of the pools; every STRIDE-th slot of a union is
    scored. p_q and p_k are words of four e4m3.

    A score goes to the query's list, as in `scores_tiles`, if the query has its bit, sees the key
    and has a threshold that is not higher. Where p_id is None there is no threshold: int32 sort
    keys alone are stored, then NONE up to CAP.

    Keys go from memory to the registers of the threads whose product reads them, so that nothing
    is fenced and no thread waits for all others. The four lanes of a row hold 16 bytes of it in
    turn, and q lies in shared memory in that order. When the product of half a tile is done, the
    kernel asks for the keys of that half of the next tile, and for the ids of the one after it. At
    168 registers three programs fit on a multiprocessor.
    """
    columns: gl.constexpr = 128
    queries: gl.constexpr = columns // H
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32]
    )
    copy: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 16 // D, D // 16], [4, 1], [1, 0])
    key_layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] if D == 64 else [[0, 1], [0, 2], [0, 16], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, D // 4],
    )
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([columns, D], gl.float8e4nv)
    q_smem = gl.allocate_shared_memory(gl.float8e4nv, [columns, D], q_layout)
    partial: gl.constexpr = gl.SwizzledSharedLayout(
        8, 1, 4, [1, 0]
    )  # This is as in `scores_tiles`.
    sums_0 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], partial)
    sums_1 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], partial)

    i_group = gl.program_id(0)
    first = i_group * queries
    total = (gl.load(p_slots + i_group) + STRIDE - 1) // STRIDE
    p_union += i_group.to(gl.int64) * n_slots
    p_mask += i_group.to(gl.int64) * n_slots
    o_col = gl.arange(0, columns, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D // 4, layout=gl.SliceLayout(0, copy))
    n_left = (n_queries - first) * H
    p_q += first.to(gl.int64) * (H * D // 4)
    m_col = gl.expand_dims(o_col < n_left, 1)
    q = gl.load(p_q + (o_col * (D // 4))[:, None] + o_d[None, :], mask=m_col, other=0)
    q_smem.store(_as_e4m3(_permute_words(q, D)))
    o_w = gl.arange(0, columns, layout=gl.SliceLayout(0, acc))
    p_w += first.to(gl.int64) * H
    weight = gl.load(p_w + o_w, mask=o_w < n_left, other=0.0)
    o_key = gl.arange(0, 32, layout=gl.SliceLayout(0, flat))
    o_i = gl.arange(0, queries, layout=gl.SliceLayout(1, flat))
    m_query = first + o_i < n_queries
    visible = gl.minimum(gl.maximum(gl.load(p_offset) + first + o_i + 1, 0), n_keys)
    visible = visible.to(gl.int32)[:, None]
    bit = (1 << o_i)[:, None]
    at = ((first + o_i).to(gl.int64) * CAP)[:, None]
    p_key += at
    count = gl.zeros([queries, 32], gl.int32, flat)
    if p_id is not None:
        p_id += at
        min_score = key_score(gl.load(p_thr + first + o_i, mask=m_query, other=NONE))
    fence_async_shared()
    thread_barrier()
    zero = gl.zeros([64, columns], gl.float32, acc)

    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, key_layout))
    ids_0 = gl.load(p_union + o_m * STRIDE, mask=o_m < total, other=0)
    ids_1 = gl.load(p_union + (64 + o_m) * STRIDE, mask=o_m < total - 64, other=0)
    keys_0 = _load_keys(p_k, ids_0, s_kt, D, key_layout)
    keys_1 = _load_keys(p_k, ids_1, s_kt, D, key_layout)
    scale_0 = None
    scale_1 = None
    if p_scale is not None:
        scale_0 = gl.load(p_scale + ids_0)
        scale_1 = gl.load(p_scale + ids_1)
    ids_0 = gl.load(p_union + (128 + o_m) * STRIDE, mask=o_m < total - 128, other=0)
    ids_1 = gl.load(p_union + (192 + o_m) * STRIDE, mask=o_m < total - 192, other=0)
    for base in range(0, total, 128):
        n_left = total - base
        p_at = p_union + base * STRIDE
        # The ids are loaded once more in the layout that the end of the tile needs.
        ids = _load_quarters(p_at, o_key, n_left, STRIDE)
        masks = _load_quarters(p_mask + base * STRIDE, o_key, n_left, STRIDE)
        product = warpgroup_mma_wait(0, deps=[_register_product(keys_0, q_smem, zero, D)])
        keys_0 = _load_keys(p_k, ids_0, s_kt, D, key_layout)
        _fold_scaled(product, weight, scale_0, sums_0, H)
        if p_scale is not None:
            scale_0 = gl.load(p_scale + ids_0)
        ids_0 = gl.load(p_at + (256 + o_m) * STRIDE, mask=o_m < n_left - 256, other=0)
        product = warpgroup_mma_wait(0, deps=[_register_product(keys_1, q_smem, zero, D)])
        keys_1 = _load_keys(p_k, ids_1, s_kt, D, key_layout)
        _fold_scaled(product, weight, scale_1, sums_1, H)
        if p_scale is not None:
            scale_1 = gl.load(p_scale + ids_1)
        ids_1 = gl.load(p_at + (320 + o_m) * STRIDE, mask=o_m < n_left - 320, other=0)
        thread_barrier()
        for i in gl.static_range(4):
            score = row_sums(sums_0 if i < 2 else sums_1, i % 2, queries)
            keep = (masks[i].to(gl.int32)[None, :] & bit) != 0
            keep = keep & (ids[i][None, :] < visible)
            if p_id is not None:
                score = gl.maximum(score, float("-inf"))  # NaN counts as -inf.
                keep = keep & (score >= min_score)
            else:
                score = _sort_key(score)
            rank, kept = lane_ranks(keep)
            place = count + rank
            count += kept
            fits = keep & (place < CAP)
            gl.store(p_key + place, score, mask=fits)
            if p_id is not None:
                ids_here = ids[i][None, :] + gl.zeros([queries, 32], gl.int32, flat)
                gl.store(p_id + place, ids_here, mask=fits)
    if p_id is not None:
        p_end = p_count + (first + o_i)[:, None] + gl.zeros([queries, 32], gl.int32, flat)
        gl.store(p_end, count, mask=m_query[:, None] & (o_key == 0)[None, :])
    else:
        none = gl.full([queries, 32], NONE, gl.int32, flat)
        for base in range(0, CAP, 32):
            o_c = (base + o_key)[None, :]
            gl.store(p_key + o_c, none, mask=(o_c >= count) & m_query[:, None])
