"""Compute prefill scores on Hopper, in Gluon: the same output as `scores.scores_tiles`.

A program is one warpgroup. Its 256 columns, queries x heads, stay in shared memory in two halves,
and it walks the keys in tiles of 128 that the copy engine (TMA) fetches ahead. The keys are the
rows of a product, so relu, the weights and most of the sum over heads stay in a thread's
registers, and the next product runs while a thread sums one up. The four lanes that share a row
leave their partial sums in shared memory. From there a warp takes queries, and its lanes take
consecutive keys: a ballot gives every lane its place in the list, in order and without atomics.

An optional pointer is None where it is not needed; Triton compiles a kernel for each case.
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

from indexcache.ops.barrier import thread_barrier
from indexcache.ops.primitives import NONE

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
    """Describe keys in e4m3 to the copy engine, in tiles of 128."""
    dim = keys_TD.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([128, dim], gl.float8e4nv)
    return TensorDescriptor.from_tensor(keys_TD, [128, dim], layout)


@gluon.jit
def _relu(x):
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def lane_ranks(keep):
    """Count the lanes that keep a register's value: (those below this lane, those of the warp)."""
    return gl.inline_asm_elementwise(
        BALLOT, "=r,=r,r", [keep.to(gl.int32)], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _fetch(keys, k_smem, ready, tile, tiles, start, STAGES: gl.constexpr):
    """Start to copy a tile of keys into its slot of shared memory, if there is such a tile."""
    slot = tile % STAGES
    exists = tile < tiles
    mbarrier.expect(ready.index(slot), keys.block_type.nbytes, pred=exists)
    tma.async_copy_global_to_shared(
        keys, [start + tile * 128, 0], ready.index(slot), k_smem.index(slot), pred=exists
    )


@gluon.jit
def _start_product(k_smem, q_half, slot, u: gl.constexpr, zero):
    """Start the product of half a tile of keys with half the queries."""
    return warpgroup_mma(
        k_smem.index(slot).slice(u * 64, 64),
        q_half.permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def partial_sums(product, weight, H: gl.constexpr):
    """Apply relu and weights, and sum over the heads that a thread holds.

    Returns [half of the keys, query and lane, key]: the four lanes that share a row have a sum
    each.
    """
    queries: gl.constexpr = 128 // H
    sums = gl.reshape(_relu(product) * weight[None, :], [2, 32, queries, H // 8, 4, 2])
    sums = gl.reshape(gl.permute(sums, (0, 2, 4, 1, 3, 5)), [2, queries * 4, 32, H // 4])
    return gl.sum(sums, 3)


@gluon.jit
def three_dims(smem):
    """Return shared memory for partial sums with the layout of all of its three dims."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])
    return smem._reinterpret(gl.float32, smem.shape, layout)


@gluon.jit
def _fold(product, weight, smem, i: gl.constexpr, H: gl.constexpr):
    """Store the partial sums of one half of the queries: their rows begin at i * (128 / H) * 4."""
    rows: gl.constexpr = 128 // H * 4
    three_dims(smem).slice(i * rows, rows, dim=1).store(partial_sums(product, weight, H))


@gluon.jit
def row_sums(smem, half: gl.constexpr, queries: gl.constexpr):
    """Add up the four partial sums of each row of half the keys.

    Returns [queries, 32]: a warp owns queries, and its lanes own consecutive keys.
    """
    quad: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    sums = gl.sum(gl.reshape(smem.index(half).load(quad), [queries, 4, 32]), 1)
    return gl.convert_layout(sums, flat)


@gluon.jit
def key_score(min_key):
    """Turn a threshold from a sort key into a score."""
    bits = min_key ^ ((min_key >> 31) & 0x7FFFFFFF)
    return gl.where(min_key == NONE, float("-inf"), bits.to(gl.float32, bitcast=True))[:, None]


@gluon.jit
def _leave(
    smem,
    o_n,
    scales,
    visible,
    min_score,
    count,
    p_score,
    p_id,
    queries: gl.constexpr,
    CAP: gl.constexpr,
):
    """Add the partial sums of 64 keys up, and append the scores and ids to the lists.

    scales: of the lower and the upper 32 keys, or None. Where p_id is None the scores are stored as
    rows. Returns the new number of entries.
    """
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    for half in gl.static_range(2):
        o_c = (o_n + half * 32)[None, :]
        score = row_sums(smem, half, queries)
        if scales is not None:
            score *= scales[half][None, :]
        keep = o_c < visible[:, None]
        if p_id is not None:
            score = gl.maximum(score, float("-inf"))  # NaN counts as -inf.
            keep = keep & (score >= min_score)
            rank, kept = lane_ranks(keep)
            place = count + rank
            count += kept
            fits = keep & (place < CAP)
            gl.store(p_score + place, score, mask=fits)
            gl.store(p_id + place, o_c + gl.zeros([queries, 32], gl.int32, flat), mask=fits)
        else:
            gl.store(p_score + o_c, score, mask=keep)
    return count


@gluon.jit
def _two_scales(p_scale, o_n, end, STRIDE: gl.constexpr):
    """Load the scales of keys o_n and of the 32 keys after them."""
    low = gl.load(p_scale + o_n * STRIDE, mask=o_n < end, other=0.0)
    high = gl.load(p_scale + (o_n + 32) * STRIDE, mask=o_n + 32 < end, other=0.0)
    return low, high


@gluon.jit
def scores_tiles(
    keys,
    p_q,
    p_w,
    p_scale,
    p_offset,
    p_score,
    p_thr,
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
    STAGES: gl.constexpr,
):
    """Store rows of scores, or append to lists where p_score is None; 4 warps.

    The grid is (segments, blocks of 256 / H queries). Column c is key c * STRIDE. `keys` describes
    [n_columns, D] in tiles of 128 rows.
    """
    columns: gl.constexpr = 128  # number of columns of a product
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
    # The partial sums of each half of a tile are [half of these keys, query and lane, key]. They
    # are swizzled so that neither side has bank conflicts.
    partial: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    sums_0 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], partial)
    sums_1 = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], partial)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)

    i_seg = gl.program_id(0)
    # Late rows see the most keys. They start first, and the short ones fill the tail.
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
    n_left = (n_queries - first) * H  # number of columns that exist
    p_q += first.to(gl.int64) * (H * D)
    for i in gl.static_range(2):
        o_c = o_col + i * columns
        m_c = gl.expand_dims(o_c < n_left, 1)
        q_smem.index(i).store(gl.load(p_q + (o_c * D)[:, None] + o_d[None, :], mask=m_c, other=0.0))
    fence_async_shared()
    q_0 = q_smem.index(0)
    q_1 = q_smem.index(1)
    o_w = gl.arange(0, columns, layout=across)
    p_w += first.to(gl.int64) * H
    weight_0 = gl.load(p_w + o_w, mask=o_w < n_left, other=0.0)
    weight_1 = gl.load(p_w + columns + o_w, mask=o_w + columns < n_left, other=0.0)

    o_key = gl.arange(0, 32, layout=side)
    o_q = first + gl.arange(0, queries, layout=down)
    visible = gl.minimum(gl.maximum(offset + o_q + 1, 0), n_keys).to(gl.int32)
    visible = gl.where(o_q < n_queries, (visible + STRIDE - 1) // STRIDE, 0)
    visible = gl.minimum(visible, end)
    count = gl.zeros([queries, 32], gl.int32, flat)
    if p_score is None:
        min_score = key_score(gl.load(p_thr + o_q, mask=o_q < n_queries, other=NONE))
        at = ((o_q.to(gl.int64) * gl.num_programs(0) + i_seg) * CAP)[:, None]
        p_out = p_key + at
        p_out_id = p_id + at
    else:
        min_score = count
        p_out = p_score + (o_q.to(gl.int64) * s_row)[:, None]
        p_out_id = None

    for i in gl.static_range(STAGES):
        _fetch(keys, k_smem, ready, i, tiles, start, STAGES)
    zero = gl.zeros([64, columns], gl.float32, acc)
    mbarrier.wait(ready.index(0), 0, pred=tiles > 0)
    flying = _start_product(k_smem, q_0, 0, 0, zero)
    for tile in range(tiles):
        slot = tile % STAGES
        o_0 = start + tile * 128 + o_key
        o_1 = o_0 + 64
        scales_0 = None
        scales_1 = None
        if p_scale is not None:
            scales_0 = _two_scales(p_scale, o_0, end, STRIDE)
            scales_1 = _two_scales(p_scale, o_1, end, STRIDE)
        # A product runs beside each sum but the first one. If two products crossed the loop's edge,
        # ptxas would serialise all of them (warning C7514).
        product = warpgroup_mma_wait(0, deps=[flying])
        after = _start_product(k_smem, q_1, slot, 0, zero)
        _fold(product, weight_0, sums_0, 0, H)
        flying = _start_product(k_smem, q_0, slot, 1, zero)
        _fold(warpgroup_mma_wait(1, deps=[after]), weight_1, sums_0, 1, H)
        after = _start_product(k_smem, q_1, slot, 1, zero)
        _fold(warpgroup_mma_wait(1, deps=[flying]), weight_0, sums_1, 0, H)
        next_slot = (tile + 1) % STAGES
        phase = ((tile + 1) // STAGES) & 1
        mbarrier.wait(ready.index(next_slot), phase, pred=tile + 1 < tiles)
        # After the last tile this is a product that nobody reads.
        flying = _start_product(k_smem, q_0, next_slot, 0, zero)
        _fold(warpgroup_mma_wait(1, deps=[after]), weight_1, sums_1, 1, H)
        # Now the sums are stored, and every warp is past the products that read this slot.
        thread_barrier()
        _fetch(keys, k_smem, ready, tile + STAGES, tiles, start, STAGES)
        count = _leave(
            sums_0, o_0, scales_0, visible, min_score, count, p_out, p_out_id, queries, CAP
        )
        count = _leave(
            sums_1, o_1, scales_1, visible, min_score, count, p_out, p_out_id, queries, CAP
        )
    warpgroup_mma_wait(0, deps=[flying])
    if p_score is None:
        m_count = (o_key == 0)[None, :] & (o_q < n_queries)[:, None]
        at_count = (o_q * gl.num_programs(0) + i_seg)[:, None]
        p_counts = p_count + at_count + gl.zeros([queries, 32], gl.int32, flat)
        gl.store(p_counts, count, mask=m_count)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
