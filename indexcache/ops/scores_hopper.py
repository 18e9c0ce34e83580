"""Prefill scores on Hopper, in Gluon: what `scores.scores_tiles` computes, with the same lists or rows as output.

The plain kernel moves a tile of q from L2 for every head and tile of 128 keys: D bytes (fp8) for each 128 D products, which at
its measured 922 TFLOP/s is 20 bytes a clock and multiprocessor, about what L2 gives. Here a program holds 256 keys (half
that traffic) in two warpgroups of 128, and every product is issued before the epilogue of the one before it, so that the
tensor cores work while relu, weight and sum run. Registers: two products in turn (64 each) and the sum (64).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

NONE = gl.constexpr(-(2**31))


@gluon.jit
def _plus(a, b):
    return a + b


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
def _fetch_q(p_q, smem, slot, i_head, H: gl.constexpr, D: gl.constexpr, at_row, m_row, o_d):
    pointer = p_q + i_head * D + (at_row * (H * D))[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(smem.index(slot), pointer, mask=gl.expand_dims(m_row, 1))
    async_copy.commit_group()


@gluon.jit
def _fetch_k(p_k, smem, slot, base, n_columns, s_kt, STRIDE: gl.constexpr, o_n, o_d):
    pointer = p_k + base.to(gl.int64) * STRIDE * s_kt + (o_n * (STRIDE * s_kt))[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(smem.index(slot), pointer, mask=gl.expand_dims(base + o_n < n_columns, 1))


@gluon.jit
def scores_tiles(
    p_q, p_k, p_w, p_scale, p_offset, p_thr, p_score, p_key, p_id, p_count,
    s_kb, s_kt, s_scale, s_row, n_queries, n_columns, n_keys, segment,
    H: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STRIDE: gl.constexpr, CAP: gl.constexpr,
    APPEND: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
):  # fmt: skip
    """Arguments and grid of `scores.scores_tiles`. BM 64, BN 256, 8 warps; STAGES slots
    for tiles of q, a power of two from 4 to H; UNROLL >= 3 divides H."""
    fp8: gl.constexpr = p_q.dtype.element_ty.primitive_bitwidth == 8
    depth: gl.constexpr = 32 if fp8 else 16
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, BN // 2, depth])
    rows: gl.constexpr = gl.SliceLayout(1, acc)
    vector: gl.constexpr = 16 if fp8 else 8
    across: gl.constexpr = D // vector
    copy: gl.constexpr = gl.BlockedLayout([1, vector], [32 // across, across], [8, 1], [1, 0])
    q_smem = gl.allocate_shared_memory(
        p_q.dtype.element_ty, [STAGES, BM, D], gl.NVMMASharedLayout.get_default_for([BM, D], p_q.dtype.element_ty)
    )
    k_smem = gl.allocate_shared_memory(
        p_k.dtype.element_ty, [2, BN, D], gl.NVMMASharedLayout.get_default_for([BN, D], p_k.dtype.element_ty)
    )

    i_seg = gl.program_id(0)
    i_b = gl.program_id(2).to(gl.int64)
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * BM
    offset = gl.load(p_offset + i_b)
    p_k += i_b * s_kb
    p_scale += i_b * s_scale
    # how the copies see it
    o_row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, copy))
    m_row = o_row < n_queries
    p_q += (i_b * n_queries + first) * H * D
    at_row = gl.arange(0, BM, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    o_copy = gl.arange(0, BN, layout=gl.SliceLayout(1, copy))
    # how the products see it
    o_m = first + gl.arange(0, BM, layout=rows)
    m_m = o_m < n_queries
    p_weight = p_w + (i_b * n_queries + o_m) * H
    last = gl.minimum(gl.maximum(offset + gl.minimum(first + BM, n_queries), 0), n_keys).to(gl.int32)
    start = i_seg * segment
    end = gl.minimum(gl.minimum(start + segment, n_columns), (last + STRIDE - 1) // STRIDE)
    tiles = (end - start + BN - 1) // BN
    # how the end of a tile sees it: a warp has a row, 8 rows at a time, so that little is held in registers beside the products
    flat: gl.constexpr = gl.BlockedLayout([1, BN // 32], [1, 32], [8, 1], [1, 0])
    line: gl.constexpr = gl.SliceLayout(1, flat)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    out_smem = gl.allocate_shared_memory(gl.float32, [BM // 8, 8, BN], plain)
    count_smem = gl.allocate_shared_memory(gl.int32, [BM // 8, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    whole = out_smem._reinterpret(gl.float32, [BM, BN], plain)
    o_8 = gl.arange(0, 8, layout=line)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, flat))
    for i in gl.static_range(BM // 8):
        count_smem.index(i).store(gl.zeros([8], gl.int32, line))

    if tiles > 0:
        _fetch_k(p_k, k_smem, 0, start, n_columns, s_kt, STRIDE, o_copy, o_d)
        for i in gl.static_range(STAGES - 2):
            _fetch_q(p_q, q_smem, i, i % H, H, D, at_row, m_row, o_d)
        zero = gl.zeros([BM, BN], gl.float32, acc)
        no_weight = gl.zeros([BM], gl.float32, rows)
        for i_tile in range(tiles):
            base = start + i_tile * BN
            k_tile = k_smem.index(i_tile % 2).permute((1, 0))
            total = gl.zeros([BM, BN], gl.float32, acc)
            for first_head in range(0, H, UNROLL):
                # A product in flight must not cross a loop's edge: ptxas would then wait for each one (C7514)
                flying, w_flying = zero, no_weight
                for u in gl.static_range(UNROLL):
                    h = first_head + u
                    step = i_tile * H + h
                    async_copy.wait_group(STAGES - 3)
                    fence_async_shared()
                    # all warps are past the product before the last one, so its slot is free for the tile STAGES - 2 ahead
                    issued = warpgroup_mma(q_smem.index(step % STAGES), k_tile, zero, use_acc=False, is_async=True)
                    w_issued = gl.load(p_weight + h, mask=m_m, other=0.0)
                    if u == 2 and first_head == 0:  # the other K tile is free since the barriers of this one's first products
                        _fetch_k(p_k, k_smem, (i_tile + 1) % 2, base + BN, n_columns, s_kt, STRIDE, o_copy, o_d)
                    _fetch_q(p_q, q_smem, (step + STAGES - 2) % STAGES, (h + STAGES - 2) % H, H, D, at_row, m_row, o_d)
                    if u > 0:
                        done = warpgroup_mma_wait(1, deps=[flying])
                        total += _relu(done) * w_flying[:, None]
                    flying = issued
                    w_flying = w_issued
                done = warpgroup_mma_wait(0, deps=[flying])
                total += _relu(done) * w_flying[:, None]
            whole.store(total)
            gl.thread_barrier()  # the two views are one buffer; said here rather than left to alias analysis
            o_c = base + o_n
            if SCALED:
                scale = gl.load(p_scale + o_c * STRIDE, mask=o_c < n_columns, other=0.0)
            for i_8 in range(BM // 8):
                o_r = first + i_8 * 8 + o_8
                m_r = o_r < n_queries
                i_r = i_b * n_queries + o_r
                seen = gl.minimum(gl.maximum(offset + o_r + 1, 0), n_keys).to(gl.int32)
                seen = gl.minimum(gl.where(m_r, (seen + STRIDE - 1) // STRIDE, 0), end)
                score = out_smem.index(i_8).load(flat)
                if SCALED:
                    score *= scale[None, :]
                key = _sort_key(score)
                keep = o_c[None, :] < seen[:, None]
                if APPEND:
                    least = gl.load(p_thr + i_r, mask=m_r, other=0x7FFFFFFF)
                    count = count_smem.index(i_8).load(line)
                    keep = keep & (key >= least[:, None])
                    slot = gl.associative_scan(keep.to(gl.int32), 1, _plus) + (count - 1)[:, None]
                    fits = keep & (slot < CAP)
                    p_list = ((i_r * gl.num_programs(0) + i_seg) * CAP)[:, None]
                    gl.store(p_key + p_list + slot, key, mask=fits)
                    gl.store(p_id + p_list + slot, o_c[None, :] + gl.zeros([8, BN], gl.int32, flat), mask=fits)
                    count_smem.index(i_8).store(count + gl.sum(keep.to(gl.int32), 1))
                else:
                    gl.store(p_score + (i_r * s_row)[:, None] + o_c[None, :], key, mask=keep)
            gl.thread_barrier()
        async_copy.wait_group(0)
    if APPEND:
        for i in gl.static_range(BM // 8):
            o_r = first + i * 8 + o_8
            i_list = (i_b * n_queries + o_r) * gl.num_programs(0) + i_seg
            gl.store(p_count + i_list, count_smem.index(i).load(line), mask=o_r < n_queries)
