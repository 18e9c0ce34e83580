"""Prefill scores on Hopper, in Gluon: what `scores.scores_tiles` computes, with the same lists or rows as output.

A program is one warpgroup; its 256 columns, queries x heads, stay in shared memory in two halves, and it walks the keys in
tiles of 128 that the copy engine (TMA) brings ahead. Keys are the rows of a product, so relu, weight and most of the sum
over heads stay in a thread's registers, and while a thread sums one product up the next one runs. The four lanes that
share a row leave their parts in shared memory; from there a warp takes queries and its lanes consecutive keys: a ballot
gives every lane its place in the list, in order and without atomics.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NONE = gl.constexpr(-(2**31))
BALLOT = gl.constexpr("""{
    .reg .pred p;
    .reg .b32 m, l;
    setp.ne.s32 p, $2, 0;
    vote.sync.ballot.b32 m, p, 0xffffffff;
    mov.u32 l, %lanemask_lt;
    popc.b32 $1, m;
    and.b32 m, m, l;
    popc.b32 $0, m;
}""")


def describe(keys_TD: Tensor) -> TensorDescriptor:
    """Keys in e4m3 for the copy engine, in tiles of 128."""
    dim = keys_TD.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([128, dim], gl.float8e4nv)
    return TensorDescriptor.from_tensor(keys_TD, [128, dim], layout)


@gluon.jit
def _sort_key(score):
    """As `bits.sort_key`."""
    score = gl.where(score != score, float("-inf"), score)
    score = gl.where(score == 0.0, 0.0, score)
    bits = score.to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _relu(x):
    return gl.inline_asm_elementwise("max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rank(keep):
    """(how many lower lanes keep theirs, how many lanes do), of each register of a warp."""
    return gl.inline_asm_elementwise(BALLOT, "=r,=r,r", [keep.to(gl.int32)], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def _fetch(keys, k_smem, ready, tile, tiles, start, STAGES: gl.constexpr):
    slot = tile % STAGES
    there = tile < tiles
    mbarrier.expect(ready.index(slot), keys.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(keys, [start + tile * 128, 0], ready.index(slot), k_smem.index(slot), pred=there)


@gluon.jit
def _product(k_smem, q_half, slot, u: gl.constexpr, zero):
    """Starts the product of half a tile of keys and half the queries."""
    return warpgroup_mma(k_smem.index(slot).slice(u * 64, 64), q_half.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _fold(product, weight, sums, i: gl.constexpr, H: gl.constexpr):
    """relu, weight, and the sum over the heads that a thread holds: a part for each of the four lanes that share a row.

    sums: [half of the keys, query and lane, key]; these queries' rows begin at i * (128 / H) * 4.
    """
    queries: gl.constexpr = 128 // H
    part = gl.reshape(_relu(product) * weight[None, :], [2, 32, queries, H // 8, 4, 2])
    part = gl.reshape(gl.permute(part, (0, 2, 4, 1, 3, 5)), [2, queries * 4, 32, H // 4])
    whole = sums._reinterpret(gl.float32, sums.shape, gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0]))
    whole.slice(i * queries * 4, queries * 4, dim=1).store(gl.sum(part, 3))


@gluon.jit
def _whole(sums, half: gl.constexpr, queries: gl.constexpr):
    """The sums [queries, 32] of half the keys: a warp owns queries, its lanes are consecutive keys."""
    quad: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    return gl.convert_layout(gl.sum(gl.reshape(sums.index(half).load(quad), [queries, 4, 32]), 1), flat)


@gluon.jit
def _leave(
    sums, o_n, scale_low, scale_high, seen, least, count, p_first, p_second,
    queries: gl.constexpr, CAP: gl.constexpr, APPEND: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Adds the parts up and appends (p_first keys, p_second ids), or stores the row (p_first). Returns the new count."""
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    for half in gl.static_range(2):
        o_c = (o_n + half * 32)[None, :]
        score = _whole(sums, half, queries)
        if SCALED:
            if half == 0:
                score *= scale_low[None, :]
            else:
                score *= scale_high[None, :]
        key = _sort_key(score)
        keep = o_c < seen[:, None]
        if APPEND:
            keep = keep & (key >= least)
            rank, kept = _rank(keep)
            place = count + rank
            count += kept
            fits = keep & (place < CAP)
            gl.store(p_first + place, key, mask=fits)
            gl.store(p_second + place, o_c + gl.zeros([queries, 32], gl.int32, flat), mask=fits)
        else:
            gl.store(p_first + o_c, key, mask=keep)
    return count


@gluon.jit
def scores_tiles(
    keys, p_q, p_w, p_scale, p_offset, p_thr, p_score, p_key, p_id, p_count, s_row, n_queries, n_columns, n_keys, segment,
    H: gl.constexpr, D: gl.constexpr, STRIDE: gl.constexpr, CAP: gl.constexpr, APPEND: gl.constexpr,
    SCALED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """grid (segments, query blocks). Column c is key c * STRIDE: `keys` describes [n_columns, D] in tiles of 128 rows. 4 warps."""
    columns: gl.constexpr = 128  # of a product
    queries: gl.constexpr = 2 * columns // H
    depth: gl.constexpr = 256 // p_q.dtype.element_ty.primitive_bitwidth
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth])
    across: gl.constexpr = gl.SliceLayout(0, acc)
    vector: gl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    copy: gl.constexpr = gl.BlockedLayout([1, vector], [32 * vector // D, D // vector], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, flat)
    side: gl.constexpr = gl.SliceLayout(0, flat)
    q_smem = gl.allocate_shared_memory(
        p_q.dtype.element_ty, [2, columns, D], gl.NVMMASharedLayout.get_default_for([columns, D], p_q.dtype.element_ty)
    )
    k_smem = gl.allocate_shared_memory(keys.dtype, [STAGES, 128, D], keys.layout)
    # of each half of the tile: [half of these keys, query and lane, key], swizzled so that neither side has bank conflicts
    parts: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    sums_0 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)
    sums_1 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)

    i_seg = gl.program_id(0)
    # late rows see most: start them first, the short ones fill the tail
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * queries
    offset = gl.load(p_offset)
    last = gl.minimum(gl.maximum(offset + gl.minimum(first + queries, n_queries), 0), n_keys).to(gl.int32)
    start = i_seg * segment
    end = gl.minimum(gl.minimum(start + segment, n_columns), (last + STRIDE - 1) // STRIDE)
    tiles = (end - start + 127) // 128

    o_col = gl.arange(0, columns, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    left = (n_queries - first) * H  # columns that are there
    p_q += first.to(gl.int64) * (H * D)
    for i in gl.static_range(2):
        o_c = o_col + i * columns
        q_smem.index(i).store(gl.load(p_q + (o_c * D)[:, None] + o_d[None, :], mask=gl.expand_dims(o_c < left, 1), other=0.0))
    fence_async_shared()
    q_0, q_1 = q_smem.index(0), q_smem.index(1)
    o_w = gl.arange(0, columns, layout=across)
    p_w += first.to(gl.int64) * H
    weight_0 = gl.load(p_w + o_w, mask=o_w < left, other=0.0)
    weight_1 = gl.load(p_w + columns + o_w, mask=o_w + columns < left, other=0.0)

    o_key = gl.arange(0, 32, layout=side)
    o_q = first + gl.arange(0, queries, layout=down)
    seen = gl.minimum(gl.maximum(offset + o_q + 1, 0), n_keys).to(gl.int32)
    seen = gl.minimum(gl.where(o_q < n_queries, (seen + STRIDE - 1) // STRIDE, 0), end)
    count = gl.zeros([queries, 32], gl.int32, flat)
    if APPEND:
        least = gl.load(p_thr + o_q, mask=o_q < n_queries, other=0x7FFFFFFF)[:, None]
        at = ((o_q.to(gl.int64) * gl.num_programs(0) + i_seg) * CAP)[:, None]
        p_first, p_second = p_key + at, p_id + at
    else:
        least = count
        p_first = p_score + (o_q.to(gl.int64) * s_row)[:, None]
        p_second = p_first

    for i in gl.static_range(STAGES):
        _fetch(keys, k_smem, ready, i, tiles, start, STAGES)
    zero = gl.zeros([64, columns], gl.float32, acc)
    mbarrier.wait(ready.index(0), 0, pred=tiles > 0)
    flying = _product(k_smem, q_0, 0, 0, zero)
    for tile in range(tiles):
        slot = tile % STAGES
        o_0 = start + tile * 128 + o_key
        o_1 = o_0 + 64
        low_0, high_0, low_1, high_1 = 1.0, 1.0, 1.0, 1.0
        if SCALED:
            low_0 = gl.load(p_scale + o_0 * STRIDE, mask=o_0 < end, other=0.0)
            high_0 = gl.load(p_scale + (o_0 + 32) * STRIDE, mask=o_0 + 32 < end, other=0.0)
            low_1 = gl.load(p_scale + o_1 * STRIDE, mask=o_1 < end, other=0.0)
            high_1 = gl.load(p_scale + (o_1 + 32) * STRIDE, mask=o_1 + 32 < end, other=0.0)
        # A product is under way beside each sum but the first: ptxas serialises them all if two cross the loop's edge (C7514)
        product = warpgroup_mma_wait(0, deps=[flying])
        after = _product(k_smem, q_1, slot, 0, zero)
        _fold(product, weight_0, sums_0, 0, H)
        flying = _product(k_smem, q_0, slot, 1, zero)
        _fold(warpgroup_mma_wait(1, deps=[after]), weight_1, sums_0, 1, H)
        after = _product(k_smem, q_1, slot, 1, zero)
        _fold(warpgroup_mma_wait(1, deps=[flying]), weight_0, sums_1, 0, H)
        mbarrier.wait(ready.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1, pred=tile + 1 < tiles)
        flying = _product(k_smem, q_0, (tile + 1) % STAGES, 0, zero)  # past the last tile: one that nobody reads
        _fold(warpgroup_mma_wait(1, deps=[after]), weight_1, sums_1, 1, H)
        gl.thread_barrier()  # the sums are there, and every warp is past the products that read this slot
        _fetch(keys, k_smem, ready, tile + STAGES, tiles, start, STAGES)
        count = _leave(sums_0, o_0, low_0, high_0, seen, least, count, p_first, p_second, queries, CAP, APPEND, SCALED)
        count = _leave(sums_1, o_1, low_1, high_1, seen, least, count, p_first, p_second, queries, CAP, APPEND, SCALED)
    warpgroup_mma_wait(0, deps=[flying])
    if APPEND:
        mine = (o_key == 0)[None, :] & (o_q < n_queries)[:, None]
        gl.store(p_count + (o_q * gl.num_programs(0) + i_seg)[:, None] + gl.zeros([queries, 32], gl.int32, flat), count, mask=mine)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))


@gluon.jit
def _gather(p_k, p_union, k_smem, slot, base, total, s_kt, D: gl.constexpr, o_row, o_d):
    ids = gl.load(p_union + base + o_row, mask=base + o_row < total, other=-1)
    at = (gl.maximum(ids, 0).to(gl.int64) * s_kt)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(k_smem.index(slot), p_k + at, mask=gl.expand_dims(ids >= 0, 1))
    async_copy.commit_group()


@gluon.jit
def scores_pools(
    p_q, p_k, p_w, p_scale, p_offset, p_union, p_bits, p_count, p_score, s_kt, s_row, n_queries, n_keys, n_slots, n_columns,
    H: gl.constexpr, D: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """grid (groups,). Scores of 128 / H neighbouring queries inside their pools, as int32 keys in the order of each pool.

    The union of a group's pools (a plan) is gathered and scored once; a query's scores go to its row in the order in which its bit
    is met, which is the order of its pool. What is not visible, and columns after the pool's end, hold NONE. 4 warps.
    """
    columns: gl.constexpr = 128
    queries: gl.constexpr = columns // H
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])
    across: gl.constexpr = gl.SliceLayout(0, acc)
    copy: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // D, D // 16], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, flat)
    side: gl.constexpr = gl.SliceLayout(0, flat)
    kind: gl.constexpr = p_q.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([columns, D], kind)
    q_smem = gl.allocate_shared_memory(kind, [columns, D], layout)
    k_smem = gl.allocate_shared_memory(kind, [2, 128, D], layout)
    parts: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    sums_0 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)
    sums_1 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)

    i_group = gl.program_id(0)
    first = i_group * queries
    total = gl.load(p_count + i_group)
    p_union += i_group.to(gl.int64) * n_slots
    p_bits += i_group.to(gl.int64) * n_slots
    o_row = gl.arange(0, 128, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    left = (n_queries - first) * H
    p_q += first.to(gl.int64) * (H * D)
    q_smem.store(gl.load(p_q + (o_row * D)[:, None] + o_d[None, :], mask=gl.expand_dims(o_row < left, 1), other=0.0))
    o_w = gl.arange(0, columns, layout=across)
    weight = gl.load(p_w + first.to(gl.int64) * H + o_w, mask=o_w < left, other=0.0)
    o_key = gl.arange(0, 32, layout=side)
    o_i = gl.arange(0, queries, layout=down)
    here = (first + o_i < n_queries)[:, None]
    seen = gl.minimum(gl.maximum(gl.load(p_offset) + first + o_i + 1, 0), n_keys).to(gl.int32)[:, None]
    p_row = p_score + ((first + o_i).to(gl.int64) * s_row)[:, None]
    count = gl.zeros([queries, 32], gl.int32, flat)
    zero = gl.zeros([64, columns], gl.float32, acc)

    _gather(p_k, p_union, k_smem, 0, 0, total, s_kt, D, o_row, o_d)
    for tile in range((total + 127) // 128):
        base = tile * 128
        k_tile = k_smem.index(tile % 2)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()  # the tile is there for all, and all are past the products that read the other slot
        product_0 = warpgroup_mma(k_tile.slice(0, 64), q_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
        product_1 = warpgroup_mma(k_tile.slice(64, 64), q_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
        _gather(p_k, p_union, k_smem, (tile + 1) % 2, base + 128, total, s_kt, D, o_row, o_d)
        _fold(warpgroup_mma_wait(1, deps=[product_0]), weight, sums_0, 0, H)
        _fold(warpgroup_mma_wait(0, deps=[product_1]), weight, sums_1, 0, H)
        gl.thread_barrier()
        for quarter in gl.static_range(4):
            o_n = base + quarter * 32 + o_key
            ids = gl.load(p_union + o_n, mask=o_n < total, other=-1)[None, :]
            bits = gl.load(p_bits + o_n, mask=o_n < total, other=0).to(gl.int32)[None, :]
            score = _whole(sums_0 if quarter < 2 else sums_1, quarter % 2, queries)
            if SCALED:
                score *= gl.load(p_scale + ids, mask=ids >= 0, other=0.0)
            key = gl.where((ids >= 0) & (ids < seen), _sort_key(score), NONE)
            keep = (((bits >> o_i[:, None]) & 1) != 0) & here
            rank, kept = _rank(keep)
            gl.store(p_row + count + rank, key, mask=keep)
            count += kept
    async_copy.wait_group(0)
    nothing = gl.full([queries, 32], NONE, gl.int32, flat)
    for base in range(0, n_columns, 32):
        o_c = (base + o_key)[None, :]
        gl.store(p_row + o_c, nothing, mask=(o_c >= count) & (o_c < n_columns) & here)
