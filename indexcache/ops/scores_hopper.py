"""Prefill scores on Hopper, in Gluon: what `scores.scores_tiles` computes, with the same lists or rows as output.

A program is one warpgroup with COLS = queries x heads columns of q in shared memory; it walks the keys in tiles of 64 rows,
which the copy engine (TMA) brings STAGES tiles ahead. One product gives a tile's scores of every head; relu, weight and
the sum over heads then stay in a thread's registers but for two shuffles. Two programs share a multiprocessor, so that the
tensor cores work for one while the other sums up. The finished scores cross shared memory once, so that a warp owns
queries and its lanes are consecutive keys: a ballot gives every lane its place in the list.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

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
    """The keys for the copy engine, in tiles of 64."""
    dim = keys_TD.shape[1]
    kind = gl.float8e4nv if keys_TD.element_size() == 1 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([64, dim], kind)
    return TensorDescriptor.from_tensor(keys_TD, [64, dim], layout)


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
    tma.async_copy_global_to_shared(keys, [start + tile * 64, 0], ready.index(slot), k_smem.index(slot), pred=there)


@gluon.jit
def _product(k_smem, q_smem, ready, tile, tiles, zero, STAGES: gl.constexpr):
    """Waits for the tile's keys and starts its product; past the last tile, a product that nobody reads."""
    slot = tile % STAGES
    mbarrier.wait(ready.index(slot), (tile // STAGES) & 1, pred=tile < tiles)
    return warpgroup_mma(k_smem.index(slot), q_smem.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def scores_tiles(
    keys, p_q, p_w, p_scale, p_offset, p_thr, p_score, p_key, p_id, p_count, s_row, n_queries, n_columns, n_keys, segment,
    H: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, STRIDE: gl.constexpr, CAP: gl.constexpr, APPEND: gl.constexpr,
    SCALED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """grid (segments, query blocks). Column c is key c * STRIDE: `keys` describes [n_columns, D] in tiles of 64 rows. 4 warps."""
    queries: gl.constexpr = COLS // H
    depth: gl.constexpr = 256 // p_q.dtype.element_ty.primitive_bitwidth
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, depth])
    across: gl.constexpr = gl.SliceLayout(0, acc)
    vector: gl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    copy: gl.constexpr = gl.BlockedLayout([1, vector], [32 * vector // D, D // vector], [4, 1], [1, 0])
    quad: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, flat)
    side: gl.constexpr = gl.SliceLayout(0, flat)
    q_smem = gl.allocate_shared_memory(
        p_q.dtype.element_ty, [COLS, D], gl.NVMMASharedLayout.get_default_for([COLS, D], p_q.dtype.element_ty)
    )
    k_smem = gl.allocate_shared_memory(keys.dtype, [STAGES, 64, D], keys.layout)
    # the sums of the four lanes that share a row, [half, query and lane, key]; swizzled, so that neither side has bank conflicts
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    even = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], swizzled)
    odd = gl.allocate_shared_memory(gl.float32, [2, queries * 4, 32], swizzled)
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
    tiles = (end - start + 63) // 64

    o_col = gl.arange(0, COLS, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    left = (n_queries - first) * H  # columns that are there
    p_q += first.to(gl.int64) * (H * D)
    q_smem.store(gl.load(p_q + (o_col * D)[:, None] + o_d[None, :], mask=gl.expand_dims(o_col < left, 1), other=0.0))
    fence_async_shared()
    o_w = gl.arange(0, COLS, layout=across)
    weight = gl.load(p_w + first.to(gl.int64) * H + o_w, mask=o_w < left, other=0.0)

    o_key = gl.arange(0, 32, layout=side)
    o_q = first + gl.arange(0, queries, layout=down)
    seen = gl.minimum(gl.maximum(offset + o_q + 1, 0), n_keys).to(gl.int32)
    seen = gl.minimum(gl.where(o_q < n_queries, (seen + STRIDE - 1) // STRIDE, 0), end)
    count = gl.zeros([queries, 32], gl.int32, flat)
    if APPEND:
        least = gl.load(p_thr + o_q, mask=o_q < n_queries, other=0x7FFFFFFF)[:, None]
        at = ((o_q.to(gl.int64) * gl.num_programs(0) + i_seg) * CAP)[:, None]
        p_key_row, p_id_row = p_key + at, p_id + at
    else:
        p_row = p_score + (o_q.to(gl.int64) * s_row)[:, None]

    for i in gl.static_range(STAGES):
        _fetch(keys, k_smem, ready, i, tiles, start, STAGES)
    zero = gl.zeros([64, COLS], gl.float32, acc)
    flying = _product(k_smem, q_smem, ready, 0, tiles, zero, STAGES)
    for pair in range(0, tiles, 2):
        for u in gl.static_range(2):
            tile = pair + u
            o_n = start + tile * 64 + o_key
            if SCALED:
                scale_low = gl.load(p_scale + o_n * STRIDE, mask=o_n < end, other=0.0)
                scale_high = gl.load(p_scale + (o_n + 32) * STRIDE, mask=o_n + 32 < end, other=0.0)
            product = warpgroup_mma_wait(0, deps=[flying])
            part = gl.reshape(_relu(product) * weight[None, :], [2, 32, queries, H // 8, 4, 2])
            part = gl.reshape(gl.permute(part, (0, 2, 4, 1, 3, 5)), [2, queries * 4, 32, H // 4])
            sums = even if u == 0 else odd
            sums._reinterpret(gl.float32, [2, queries * 4, 32], gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])).store(gl.sum(part, 3))
            gl.thread_barrier()  # every warp is past the product that read this tile's slot, and the sums are there
            flying = _product(k_smem, q_smem, ready, tile + 1, tiles, zero, STAGES)  # runs beside all that follows
            _fetch(keys, k_smem, ready, tile + STAGES, tiles, start, STAGES)
            for half in gl.static_range(2):
                o_c = (o_n + half * 32)[None, :]
                score = gl.convert_layout(gl.sum(gl.reshape(sums.index(half).load(quad), [queries, 4, 32]), 1), flat)
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
                    gl.store(p_key_row + place, key, mask=fits)
                    gl.store(p_id_row + place, o_c + gl.zeros([queries, 32], gl.int32, flat), mask=fits)
                else:
                    gl.store(p_row + o_c, key, mask=keep)
    warpgroup_mma_wait(0, deps=[flying])
    if APPEND:
        mine = (o_key == 0)[None, :] & (o_q < n_queries)[:, None]
        gl.store(p_count + (o_q * gl.num_programs(0) + i_seg)[:, None] + gl.zeros([queries, 32], gl.int32, flat), count, mask=mine)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
