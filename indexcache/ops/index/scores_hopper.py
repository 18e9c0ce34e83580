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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
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
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _rank(keep):
    """(how many lower lanes keep theirs, how many lanes do), of each register of a warp."""
    return gl.inline_asm_elementwise(
        BALLOT, "=r,=r,r", [keep.to(gl.int32)], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _fetch(keys, k_smem, ready, tile, tiles, start, STAGES: gl.constexpr):
    slot = tile % STAGES
    there = tile < tiles
    mbarrier.expect(ready.index(slot), keys.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(
        keys, [start + tile * 128, 0], ready.index(slot), k_smem.index(slot), pred=there
    )


@gluon.jit
def _product(k_smem, q_half, slot, u: gl.constexpr, zero):
    """Starts the product of half a tile of keys and half the queries."""
    return warpgroup_mma(
        k_smem.index(slot).slice(u * 64, 64),
        q_half.permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


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
    return gl.convert_layout(
        gl.sum(gl.reshape(sums.index(half).load(quad), [queries, 4, 32]), 1), flat
    )


@gluon.jit
def _leave(
    sums,
    o_n,
    scale_low,
    scale_high,
    seen,
    least,
    count,
    p_first,
    p_second,
    queries: gl.constexpr,
    CAP: gl.constexpr,
    APPEND: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Adds the parts up and appends (p_first scores, p_second ids), or stores the row (p_first). Returns the new count."""
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    for half in gl.static_range(2):
        o_c = (o_n + half * 32)[None, :]
        score = _whole(sums, half, queries)
        if SCALED:
            if half == 0:
                score *= scale_low[None, :]
            else:
                score *= scale_high[None, :]
        keep = o_c < seen[:, None]
        if APPEND:
            score = gl.maximum(score, float("-inf"))  # NaN counts as -inf
            keep = keep & (score >= least)
            rank, kept = _rank(keep)
            place = count + rank
            count += kept
            fits = keep & (place < CAP)
            gl.store(p_first + place, score, mask=fits)
            gl.store(p_second + place, o_c + gl.zeros([queries, 32], gl.int32, flat), mask=fits)
        else:
            gl.store(p_first + o_c, score, mask=keep)
    return count


@gluon.jit
def scores_tiles(
    keys,
    p_q,
    p_w,
    p_scale,
    p_offset,
    p_thr,
    p_score,
    p_key,
    p_id,
    p_count,
    s_row,
    n_queries,
    n_columns,
    n_keys,
    segment,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE: gl.constexpr,
    CAP: gl.constexpr,
    APPEND: gl.constexpr,
    SCALED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """grid (segments, query blocks). Column c is key c * STRIDE: `keys` describes [n_columns, D] in tiles of 128 rows. 4 warps."""
    columns: gl.constexpr = 128  # of a product
    queries: gl.constexpr = 2 * columns // H
    depth: gl.constexpr = 256 // p_q.dtype.element_ty.primitive_bitwidth
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth]
    )
    across: gl.constexpr = gl.SliceLayout(0, acc)
    vector: gl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    copy: gl.constexpr = gl.BlockedLayout(
        [1, vector], [32 * vector // D, D // vector], [4, 1], [1, 0]
    )
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, flat)
    side: gl.constexpr = gl.SliceLayout(0, flat)
    q_smem = gl.allocate_shared_memory(
        p_q.dtype.element_ty,
        [2, columns, D],
        gl.NVMMASharedLayout.get_default_for([columns, D], p_q.dtype.element_ty),
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
    last = gl.minimum(gl.maximum(offset + gl.minimum(first + queries, n_queries), 0), n_keys).to(
        gl.int32
    )
    start = i_seg * segment
    end = gl.minimum(gl.minimum(start + segment, n_columns), (last + STRIDE - 1) // STRIDE)
    tiles = (end - start + 127) // 128

    o_col = gl.arange(0, columns, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    left = (n_queries - first) * H  # columns that are there
    p_q += first.to(gl.int64) * (H * D)
    for i in gl.static_range(2):
        o_c = o_col + i * columns
        q_smem.index(i).store(
            gl.load(
                p_q + (o_c * D)[:, None] + o_d[None, :],
                mask=gl.expand_dims(o_c < left, 1),
                other=0.0,
            )
        )
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
        least = gl.load(p_thr + o_q, mask=o_q < n_queries, other=NONE)
        bits = least ^ ((least >> 31) & 0x7FFFFFFF)
        least = gl.where(least == NONE, float("-inf"), bits.to(gl.float32, bitcast=True))[:, None]
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
        mbarrier.wait(
            ready.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1, pred=tile + 1 < tiles
        )
        flying = _product(
            k_smem, q_0, (tile + 1) % STAGES, 0, zero
        )  # past the last tile: one that nobody reads
        _fold(warpgroup_mma_wait(1, deps=[after]), weight_1, sums_1, 1, H)
        gl.thread_barrier()  # the sums are there, and every warp is past the products that read this slot
        _fetch(keys, k_smem, ready, tile + STAGES, tiles, start, STAGES)
        count = _leave(
            sums_0,
            o_0,
            low_0,
            high_0,
            seen,
            least,
            count,
            p_first,
            p_second,
            queries,
            CAP,
            APPEND,
            SCALED,
        )
        count = _leave(
            sums_1,
            o_1,
            low_1,
            high_1,
            seen,
            least,
            count,
            p_first,
            p_second,
            queries,
            CAP,
            APPEND,
            SCALED,
        )
    warpgroup_mma_wait(0, deps=[flying])
    if APPEND:
        mine = (o_key == 0)[None, :] & (o_q < n_queries)[:, None]
        gl.store(
            p_count
            + (o_q * gl.num_programs(0) + i_seg)[:, None]
            + gl.zeros([queries, 32], gl.int32, flat),
            count,
            mask=mine,
        )
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))


@gluon.jit
def _turned(words, D: gl.constexpr):
    """[rows, D / 4] words of four bytes, in the order in which a product from registers takes what a lane holds in pieces of 16."""
    rows: gl.constexpr = words.shape[0]
    words = gl.permute(gl.reshape(words, [rows, D // 64, 4, 2, 2]), (0, 1, 3, 4, 2))
    return gl.reshape(words, [rows, D // 4])


@gluon.jit
def _bytes(words):
    """Words as four times as many e4m3. (In bytes they would be taken apart wherever a loop carries them.)"""
    pairs = gl.join(words, words)
    each = gl.reshape(gl.join(pairs, pairs), [words.shape[0], words.shape[1] * 4])
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [each], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def _keys_of(p_k, ids, s_kt, D: gl.constexpr, held: gl.constexpr):
    """The keys of 64 ids, as words in registers."""
    o_w = gl.arange(0, D // 4, layout=gl.SliceLayout(0, held))
    return gl.load((p_k + o_w)[None, :] + (ids * s_kt)[:, None])


@gluon.jit
def _quarters(pointer, o_key, left, STRIDE: gl.constexpr):
    """What 128 slots hold, 32 at a time: a lane a key."""
    first = gl.load(pointer + o_key * STRIDE, mask=o_key < left, other=0)
    second = gl.load(pointer + (o_key + 32) * STRIDE, mask=o_key < left - 32, other=0)
    third = gl.load(pointer + (o_key + 64) * STRIDE, mask=o_key < left - 64, other=0)
    fourth = gl.load(pointer + (o_key + 96) * STRIDE, mask=o_key < left - 96, other=0)
    return first, second, third, fourth


@gluon.jit
def _product_of(words, q, zero, D: gl.constexpr):
    acc: gl.constexpr = zero.type.layout
    keys = _bytes(_turned(words, D))
    keys = gl.convert_layout(
        keys, gl.DotOperandLayout(operand_index=0, parent=acc, k_width=4), assert_trivial=True
    )
    return warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _fold_scaled(product, weight, scale, sums, H: gl.constexpr, SCALED: gl.constexpr):
    """As `_fold`, for keys whose scales lie as the product's rows."""
    queries: gl.constexpr = 128 // H
    part = gl.reshape(_relu(product) * weight[None, :], [2, 32, queries, H // 8, 4, 2])
    part = gl.reshape(gl.permute(part, (0, 2, 4, 1, 3, 5)), [2, queries * 4, 32, H // 4])
    part = gl.sum(part, 3)
    if SCALED:
        rows = gl.convert_layout(
            gl.reshape(scale, [2, 32]), gl.SliceLayout(1, part.type.layout), assert_trivial=True
        )
        part *= gl.expand_dims(rows, 1)
    whole = sums._reinterpret(gl.float32, sums.shape, gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0]))
    whole.store(part)


@gluon.jit
def scores_pools(
    p_q,
    p_k,
    p_w,
    p_scale,
    p_offset,
    p_union,
    p_bits,
    p_slots,
    p_thr,
    p_first,
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
    APPEND: gl.constexpr,
    SCALED: gl.constexpr,
):
    """grid (groups,). Scores of 128 / H neighbouring queries, 8 at most, inside their pools: every STRIDE-th of the union of the pools
    (a plan).

    p_q and p_k are words of four e4m3. A score whose query has its bit, that is visible and (APPEND) reaches the query's threshold
    goes to the query's list: scores and ids, as `scores_tiles` lists them. Without APPEND: int32 keys alone, NONE after the last.

    Keys go from memory to the registers of the threads whose product reads them, so nothing is fenced or waited for by all: the
    four lanes of a row hold 16 bytes of it in turn, and q lies in shared memory in that order. When half a tile's product is done,
    the keys of the next tile's half are asked for, and the ids of the one after it. 4 warps; at 168 registers three programs fit.
    """
    columns: gl.constexpr = 128
    queries: gl.constexpr = columns // H
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32]
    )
    copy: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 16 // D, D // 16], [4, 1], [1, 0])
    held: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] if D == 64 else [[0, 1], [0, 2], [0, 16], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, D // 4],
    )
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    q_smem = gl.allocate_shared_memory(
        gl.float8e4nv,
        [columns, D],
        gl.NVMMASharedLayout.get_default_for([columns, D], gl.float8e4nv),
    )
    parts: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])  # as in `scores_tiles`
    sums_0 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)
    sums_1 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], parts)

    i_group = gl.program_id(0)
    first = i_group * queries
    total = (gl.load(p_slots + i_group) + STRIDE - 1) // STRIDE
    p_union += i_group.to(gl.int64) * n_slots
    p_bits += i_group.to(gl.int64) * n_slots
    o_col = gl.arange(0, columns, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D // 4, layout=gl.SliceLayout(0, copy))
    left = (n_queries - first) * H
    p_q += first.to(gl.int64) * (H * D // 4)
    q = gl.load(
        p_q + (o_col * (D // 4))[:, None] + o_d[None, :],
        mask=gl.expand_dims(o_col < left, 1),
        other=0,
    )
    q_smem.store(_bytes(_turned(q, D)))
    o_w = gl.arange(0, columns, layout=gl.SliceLayout(0, acc))
    p_w += first.to(gl.int64) * H
    weight = gl.load(p_w + o_w, mask=o_w < left, other=0.0)
    o_key = gl.arange(0, 32, layout=gl.SliceLayout(0, flat))
    o_i = gl.arange(0, queries, layout=gl.SliceLayout(1, flat))
    here = first + o_i < n_queries
    seen = gl.minimum(gl.maximum(gl.load(p_offset) + first + o_i + 1, 0), n_keys).to(gl.int32)[
        :, None
    ]
    mine = (1 << o_i)[:, None]
    at = ((first + o_i).to(gl.int64) * CAP)[:, None]
    p_first += at
    p_id += at
    count = gl.zeros([queries, 32], gl.int32, flat)
    if APPEND:
        least = gl.load(p_thr + first + o_i, mask=here, other=NONE)
        edge = least ^ ((least >> 31) & 0x7FFFFFFF)
        edge = gl.where(least == NONE, float("-inf"), edge.to(gl.float32, bitcast=True))[:, None]
    fence_async_shared()
    gl.thread_barrier()
    zero = gl.zeros([64, columns], gl.float32, acc)

    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, held))
    ids_0 = gl.load(p_union + o_m * STRIDE, mask=o_m < total, other=0)
    ids_1 = gl.load(p_union + (64 + o_m) * STRIDE, mask=o_m < total - 64, other=0)
    keys_0 = _keys_of(p_k, ids_0, s_kt, D, held)
    keys_1 = _keys_of(p_k, ids_1, s_kt, D, held)
    scale_0 = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, held))
    scale_1 = scale_0
    if SCALED:
        scale_0 = gl.load(p_scale + ids_0)
        scale_1 = gl.load(p_scale + ids_1)
    ids_0 = gl.load(p_union + (128 + o_m) * STRIDE, mask=o_m < total - 128, other=0)
    ids_1 = gl.load(p_union + (192 + o_m) * STRIDE, mask=o_m < total - 192, other=0)
    for base in range(0, total, 128):
        left = total - base
        p_at = p_union + base * STRIDE
        p_bit = p_bits + base * STRIDE
        # the ids once more, as the end of the tile has them
        ids, bits = _quarters(p_at, o_key, left, STRIDE), _quarters(p_bit, o_key, left, STRIDE)
        done = warpgroup_mma_wait(0, deps=[_product_of(keys_0, q_smem, zero, D)])
        keys_0 = _keys_of(p_k, ids_0, s_kt, D, held)
        _fold_scaled(done, weight, scale_0, sums_0, H, SCALED)
        if SCALED:
            scale_0 = gl.load(p_scale + ids_0)
        ids_0 = gl.load(p_at + (256 + o_m) * STRIDE, mask=o_m < left - 256, other=0)
        done = warpgroup_mma_wait(0, deps=[_product_of(keys_1, q_smem, zero, D)])
        keys_1 = _keys_of(p_k, ids_1, s_kt, D, held)
        _fold_scaled(done, weight, scale_1, sums_1, H, SCALED)
        if SCALED:
            scale_1 = gl.load(p_scale + ids_1)
        ids_1 = gl.load(p_at + (320 + o_m) * STRIDE, mask=o_m < left - 320, other=0)
        gl.thread_barrier()
        for quarter in gl.static_range(4):
            ids_here, bits_here = ids[quarter], bits[quarter]
            score = _whole(sums_0 if quarter < 2 else sums_1, quarter % 2, queries)
            keep = ((bits_here.to(gl.int32)[None, :] & mine) != 0) & (ids_here[None, :] < seen)
            if APPEND:
                score = gl.maximum(score, float("-inf"))  # NaN counts as -inf
                keep = keep & (score >= edge)
            else:
                score = _sort_key(score)
            rank, kept = _rank(keep)
            place = count + rank
            count += kept
            fits = keep & (place < CAP)
            gl.store(p_first + place, score, mask=fits)
            if APPEND:
                gl.store(
                    p_id + place,
                    ids_here[None, :] + gl.zeros([queries, 32], gl.int32, flat),
                    mask=fits,
                )
    if APPEND:
        p_end = p_count + (first + o_i)[:, None] + gl.zeros([queries, 32], gl.int32, flat)
        gl.store(p_end, count, mask=here[:, None] & (o_key == 0)[None, :])
    else:
        nothing = gl.full([queries, 32], NONE, gl.int32, flat)
        for base in range(0, CAP, 32):
            o_c = (base + o_key)[None, :]
            gl.store(p_first + o_c, nothing, mask=(o_c >= count) & here[:, None])
