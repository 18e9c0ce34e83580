"""Compute prefill scores of 16-bit queries and keys on Hopper, in Gluon, as rows of scores.

A program is two warpgroups. The queries of all heads stay in shared memory, and a tile of 128 keys
goes from there to registers, where it serves the products of every head. A product is small, so the
next head's runs while relu and the weight are applied to the last one's, and the sum over heads
stays in registers. The copy engine (TMA) fetches the next tile meanwhile.
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

KEYS = 128  # keys of a tile


def describe(keys_TD: Tensor) -> TensorDescriptor:
    """Describe 16-bit keys to the copy engine, in tiles of 128."""
    dtype = gl.bfloat16 if str(keys_TD.dtype) == "torch.bfloat16" else gl.float16
    block = [KEYS, keys_TD.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(keys_TD, block, layout)


@gluon.jit
def _relu(x):
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fetch(keys, k_smem, ready, tile, tiles, start):
    """Start to copy a tile of keys to shared memory, if there is such a tile."""
    exists = tile < tiles
    mbarrier.expect(ready, keys.block_type.nbytes, pred=exists)
    tma.async_copy_global_to_shared(keys, [start + tile * 128, 0], ready, k_smem, pred=exists)


@gluon.jit
def scores_rows_of_tiles(
    keys,
    p_q,
    p_w,
    p_offset,
    p_score,
    s_row,
    n_queries,
    n_keys,
    segment,
    H: gl.constexpr,
    D: gl.constexpr,
    Q: gl.constexpr,
):
    """Store rows of scores of what each query sees; 8 warps, grid (segments, blocks of Q queries).

    `keys` describes [n_keys, D] in tiles of 128 rows.
    """
    dtype: gl.constexpr = p_q.dtype.element_ty
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, Q, 16]
    )
    down: gl.constexpr = gl.SliceLayout(1, acc)
    across: gl.constexpr = gl.SliceLayout(0, acc)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc, k_width=2)
    q_smem = gl.allocate_shared_memory(
        dtype, [H, Q, D], gl.NVMMASharedLayout.get_default_for([Q, D], dtype)
    )
    w_smem = gl.allocate_shared_memory(gl.float32, [H, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_smem = gl.allocate_shared_memory(dtype, [128, D], keys.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)

    # Late rows see the most keys. They start first, and the short ones fill the tail.
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * Q
    offset = gl.load(p_offset)
    last = gl.minimum(gl.maximum(offset + gl.minimum(first + Q, n_queries), 0), n_keys)
    start = gl.program_id(0) * segment
    end = gl.minimum(start + segment, last.to(gl.int32))
    tiles = (end - start + 127) // 128
    _fetch(keys, k_smem, ready, 0, tiles, start)

    o_copy = first + gl.arange(0, Q, layout=gl.SliceLayout(1, copy))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    o_q = first + gl.arange(0, Q, layout=across)
    p_copy = p_q + (o_copy.to(gl.int64) * (H * D))[:, None] + o_d[None, :]
    p_weight = p_w + o_q.to(gl.int64) * H
    for h in gl.static_range(H):
        q_smem.index(h).store(
            gl.load(p_copy + h * D, mask=(o_copy < n_queries)[:, None], other=0.0)
        )
        w_smem.index(h).store(gl.load(p_weight + h, mask=o_q < n_queries, other=0.0))
    fence_async_shared()
    thread_barrier()

    visible = gl.minimum(gl.maximum(offset + o_q + 1, 0), n_keys).to(gl.int32)
    visible = gl.minimum(gl.where(o_q < n_queries, visible, 0), end)
    o_key = start + gl.arange(0, 128, layout=down)
    p_out = p_score + (o_q.to(gl.int64) * s_row)[None, :]
    zero = gl.zeros([128, Q], gl.float32, acc)
    for tile in range(tiles):
        mbarrier.wait(ready, tile & 1)
        k = k_smem.load(operand)
        thread_barrier()
        _fetch(keys, k_smem, ready, tile + 1, tiles, start)
        score = zero
        flying = warpgroup_mma(
            k, q_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        for h in gl.static_range(H):
            if h + 1 < H:
                after = warpgroup_mma(
                    k, q_smem.index(h + 1).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                product = warpgroup_mma_wait(1, deps=[flying])
                flying = after
            else:
                product = warpgroup_mma_wait(0, deps=[flying])
            score += _relu(product) * w_smem.index(h).load(across)[None, :]
        o_n = o_key + tile * 128
        gl.store(p_out + o_n[:, None], score, mask=o_n[:, None] < visible[None, :])
    mbarrier.invalidate(ready)
