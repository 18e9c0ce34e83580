"""Compute sparse attention over selected latents on Hopper, in Gluon, for prefill.

It computes what `attend` in ops/mla/forward.py does, with the work divided among the warps. One
warpgroup gathers latents by cp.async into two buffers; two compute. Warpgroup W owns the tiles
W, W + 2, .., which are gathered into buffer W: it alone computes their logits and weights. It
shares the running maximum and the weights through shared memory; the weights overwrite the tile's
rotary dims, which are not read again. Then both warpgroups add the tile to their half of the value
dims. So no product is computed twice, and each half of a tile is gathered anew as soon as its last
reader is done. Barriers:

    full[2 b]         half b of the value dims of the tile in buffer b is loaded
    full[2 b + 1]     its other half, rotary dims and bits are loaded
    free[2 b + h]     half h in buffer b may be overwritten, and with half 1 - b the weights too
    ready[b]          the weights of the tile in buffer b are stored, and the maximum so far
    both[0], both[1]  q is loaded; the last tile is done
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from indexcache.ops.barrier import thread_barrier
from indexcache.ops.primitives import LN2

ROWS = gl.constexpr(64)  # rows of a program
KEYS = gl.constexpr(64)  # keys of a tile
# Powers of two by which a row's logits may exceed the maximum that its weights are relative to.
GROWTH = gl.constexpr(8.0)


def _rescale(n: int) -> tuple[str, str]:
    """Write PTX, and its operands, that multiplies a thread's n accumulators with n factors.

    The warp skips the products if all its factors are 1.
    """
    factor = [f"${2 * n + i}" for i in range(n)]  # a thread has two rows: elements 0 and 2
    moved = (
        f"setp.neu.f32 p, {factor[0]}, 0f3F800000; "
        f"setp.neu.or.f32 p, {factor[2]}, 0f3F800000, p; "
        "vote.sync.any.pred p, p, 0xffffffff;"
    )
    products = " ".join(f"mul.f32 ${i}, ${i}, {factor[i]};" for i in range(n))
    return f"{{ .reg .pred p; {moved} @!p bra same; {products} same: }}", ",".join(
        ["=f"] * n + [str(i) for i in range(n)] + ["f"] * n
    )


RESCALE, RESCALE_OPERANDS = (gl.constexpr(text) for text in _rescale(128))


@gluon.jit
def _pairs_of_tiles(p_count, n_slots):
    """Return the number of pairs of tiles.

    Each partition reads it by itself, so that the first copies need not wait for it.
    """
    total = n_slots
    if p_count is not None:
        total = gl.load(p_count)
    return gl.maximum((total + 2 * KEYS - 1) // (2 * KEYS), 1)


@gluon.jit
def _arrive(bar):
    """Arrive once, when every warp of the partition is here."""
    thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _publish(bar):
    """Arrive as `_arrive`, and once per thread.

    racecheck needs the arrivals per thread to see that readers wait for the stores.
    """
    async_copy.mbarrier_arrive(bar, increment_count=False)
    _arrive(bar)


@gluon.jit
def _gather(lists, tiles, n_slots, s_lt, V: gl.constexpr, R: gl.constexpr):
    """Gather tiles in order, into the buffers in turn; rows without an id become zeros."""
    p_latent, p_ids, p_bits, p_count = lists
    v_smem, r_smem, bits_smem, full, free = tiles
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    at = gl.arange(0, KEYS, layout=gl.SliceLayout(1, copy))
    o_v = gl.arange(0, V // 2, layout=gl.SliceLayout(0, copy))
    o_r = gl.arange(0, R, layout=gl.SliceLayout(0, copy))
    ids = gl.load(p_ids + at, mask=at < n_slots, other=-1)
    if p_bits is not None:
        bits = gl.load(p_bits + at, mask=at < n_slots, other=0).to(gl.int32)
    pairs = _pairs_of_tiles(p_count, n_slots)
    for pair in range(pairs):
        for b in gl.static_range(2):
            m_n = gl.expand_dims(ids >= 0, 1)
            row = gl.maximum(ids, 0).to(gl.int64)
            p_row = p_latent + row * s_lt
            mbarrier.wait(free.index(3 * b), (pair & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                v_smem.index(3 * b),
                gl.expand_dims(p_row + b * (V // 2), 1) + o_v[None, :],
                mask=m_n,
            )
            async_copy.mbarrier_arrive(full.index(2 * b), increment_count=False)
            if p_bits is not None:
                bits_smem.index(b).store(bits)
            else:
                bits_smem.index(b).store((ids >= 0).to(gl.int32))
            _arrive(full.index(2 * b + 1))
            at += KEYS
            ids = gl.load(p_ids + at, mask=at < n_slots, other=-1)
            if p_bits is not None:
                bits = gl.load(p_bits + at, mask=at < n_slots, other=0).to(gl.int32)
            mbarrier.wait(free.index(1 + b), (pair & 1) ^ 1)
            p_rest = p_row + (1 - b) * (V // 2)
            async_copy.async_copy_global_to_shared(
                v_smem.index(1 + b), gl.expand_dims(p_rest, 1) + o_v[None, :], mask=m_n
            )
            async_copy.async_copy_global_to_shared(
                r_smem.index(b), gl.expand_dims(p_row + V, 1) + o_r[None, :], mask=m_n
            )
            async_copy.mbarrier_arrive(full.index(2 * b + 1), increment_count=False)


@gluon.jit
def _spread(x, y):
    """Lay x [ROWS] out as a column beside y."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, y.type.layout)), 1)


@gluon.jit
def _fade(out, fade):
    """Multiply out [ROWS, 256] with fade [ROWS], which is 1 in most rows of most tiles."""
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [out, _spread(fade, out)], gl.float32, is_pure=True, pack=128
    )


@gluon.jit
def _meet(out, top, mass, top_smem, ready, phase, W: gl.constexpr):
    """Wait for the weights of the other warpgroup's tile and take over its running maximum."""
    mbarrier.wait(ready.index(1 - W), phase)
    higher = top_smem.index(1 - W).load(top.type.layout)
    fade = gl.where(higher > top, gl.exp2(top - higher), 1.0)
    return _fade(out, fade), higher, mass * fade


@gluon.jit
def _other_tile(out, top, mass, v_smem, r_smem, top_smem, free, ready, phase, W: gl.constexpr):
    """Add a tile that the other warpgroup owns to W's half of the result."""
    out, top, mass = _meet(out, top, mass, top_smem, ready, phase, W)
    flying = warpgroup_mma(r_smem.index(1 - W), v_smem.index(2 - W), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[flying])
    _arrive(free.index(2 - W))
    return out, top, mass


@gluon.jit
def _own_tile(
    out,
    top,
    mass,
    smem,
    bars,
    scale2,
    member,
    other,
    phase,
    w,
    OTHER: gl.constexpr,
    W: gl.constexpr,
):
    """Process a tile in buffer W by the warpgroup that owns it: logits, weights, half the result.

    OTHER: between the halves of the logits, it adds its half of the other warpgroup's tile before
    this one. `other` and `phase` are the phases of the barriers of that tile and of this one.
    """
    q_smem, qr_smem, v_smem, r_smem, bits_smem, top_smem = smem
    full, free, ready = bars
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16]
    )
    logits = gl.zeros([ROWS, KEYS], gl.float32, acc)
    mbarrier.wait(full.index(2 * W), phase)
    fence_async_shared()  # This makes the writes of cp.async visible.
    flying = warpgroup_mma(
        q_smem.index(w), v_smem.index(3 * w).permute((1, 0)), logits, use_acc=False, is_async=True
    )
    if OTHER:
        out, top, mass = _meet(out, top, mass, top_smem, ready, other, W)
        flying_out = warpgroup_mma(r_smem.index(1 - W), v_smem.index(2 - W), out, is_async=True)
    mbarrier.wait(full.index(2 * W + 1), phase)
    fence_async_shared()
    flying = warpgroup_mma(
        q_smem.index(1 - w), v_smem.index(1 + w).permute((1, 0)), flying, is_async=True
    )
    if OTHER:
        out = warpgroup_mma_wait(1, deps=[flying_out])
        _arrive(free.index(2 - W))
    flying = warpgroup_mma(qr_smem, r_smem.index(w).permute((1, 0)), flying, is_async=True)
    bits = bits_smem.index(W).load(gl.SliceLayout(0, acc))
    logits = warpgroup_mma_wait(0, deps=[flying])
    logits = gl.where((bits[None, :] & member[:, None]) != 0, logits, float("-inf"))
    now = gl.max(logits, 1) * scale2
    grown = now > top + GROWTH  # a smaller maximum does as well: it cancels out in the end
    higher = gl.where(grown, now, top)
    weight = gl.exp2(logits * scale2 - gl.where(higher == float("-inf"), 0.0, higher)[:, None])
    fade = gl.where(grown, gl.exp2(top - now), 1.0)
    half = weight.to(q_smem.dtype)
    thread_barrier()  # every warp's product is past the rotary dims
    r_smem.index(W).store(half)
    top_smem.index(W).store(higher)
    fence_async_shared()
    _publish(ready.index(w))
    mass = mass * fade + gl.sum(weight, 1)
    out = _fade(out, fade)
    weights = gl.convert_layout(
        half, gl.DotOperandLayout(operand_index=0, parent=out.type.layout, k_width=2)
    )
    flying_out = warpgroup_mma(weights, v_smem.index(3 * W), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[flying_out])
    _arrive(free.index(3 * W))
    return out, higher, mass


@gluon.jit
def _attend(
    p_q,
    q_parts,
    p_count,
    p_out,
    p_lse,
    smem,
    bars,
    rows_at,
    H: gl.constexpr,
    V: gl.constexpr,
    R: gl.constexpr,
    W: gl.constexpr,
):
    """Compute as warpgroup W.

    rows_at holds i_row, the first of the program's rows in q and out, i_first, its place in the
    group, and the number of rows. q_parts holds p_rope and strides; see `attend`.
    """
    q_smem, qr_smem, v_smem, r_smem, bits_smem, top_smem, mass_smem = smem
    full, free, ready, both = bars
    n_slots, scale2, i_row, i_first, rows, one = rows_at
    half: gl.constexpr = V // 2
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_c = gl.arange(0, ROWS, layout=gl.SliceLayout(1, copy))
    m_c = gl.expand_dims(o_c < rows, 1)
    p_rope, s_qs, s_qh, s_rs, s_rh = q_parts
    at = i_row + gl.minimum(o_c, rows - 1)
    if p_rope is None:
        p_row = p_q + at * (V + R)
        p_turned = p_row + V
    else:
        p_row = p_q + at // H * s_qs + at % H * s_qh
        p_turned = p_rope + at // H * s_rs + at % H * s_rh
    o_v = gl.arange(0, half, layout=gl.SliceLayout(0, copy))
    async_copy.async_copy_global_to_shared(
        q_smem.index(W), gl.expand_dims(p_row + W * half, 1) + o_v[None, :], mask=m_c
    )
    if W == 1:
        o_r = gl.arange(0, R, layout=gl.SliceLayout(0, copy))
        async_copy.async_copy_global_to_shared(
            qr_smem, gl.expand_dims(p_turned, 1) + o_r[None, :], mask=m_c
        )
    async_copy.commit_group()
    pairs = _pairs_of_tiles(p_count, n_slots)
    async_copy.wait_group(0)
    fence_async_shared()
    _arrive(both.index(0))
    mbarrier.wait(both.index(0), 0)

    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16]
    )
    wide: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, half, 16]
    )
    row: gl.constexpr = gl.SliceLayout(1, acc)
    o_m = gl.arange(0, ROWS, layout=row)
    member = 1 << (i_first + o_m) // H
    top = gl.full([ROWS], float("-inf"), gl.float32, row)
    mass = gl.zeros([ROWS], gl.float32, row)
    out = gl.zeros([ROWS, half], gl.float32, wide)
    tile_smem = (q_smem, qr_smem, v_smem, r_smem, bits_smem, top_smem)
    tile_bars = (full, free, ready)
    # w is W, but the compiler must not know: it would keep all addresses of a tile in registers.
    w = one * W
    if W == 0:
        out, top, mass = _own_tile(
            out, top, mass, tile_smem, tile_bars, scale2, member, 0, 0, w, False, W
        )
    for pair in range(1 - W, pairs):
        w *= one
        out, top, mass = _own_tile(
            out,
            top,
            mass,
            tile_smem,
            tile_bars,
            scale2,
            member,
            (pair + 1 - W) & 1,
            pair & 1,
            w,
            True,
            W,
        )
    if W == 0:
        out, top, mass = _other_tile(
            out, top, mass, v_smem, r_smem, top_smem, free, ready, (pairs - 1) & 1, W
        )
    mass_smem.index(W).store(mass)
    _publish(both.index(1))
    mbarrier.wait(both.index(1), 0)  # q's place is free too
    mass = mass_smem.index(0).load(row) + mass_smem.index(1).load(row)
    if W == 0:
        lse = gl.where(mass == 0.0, float("-inf"), (top + gl.log2(mass)) * LN2)
        gl.store(p_lse + i_row + o_m, lse, mask=o_m < rows)
    out = out * _spread(1.0 / gl.where(mass == 0.0, 1.0, mass), out)
    q_smem.index(W).store(out.to(q_smem.dtype))
    thread_barrier()
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat))
    o_v = gl.arange(0, half, layout=gl.SliceLayout(0, flat))
    p_at = gl.expand_dims(p_out + (i_row + o_m) * V + W * half, 1) + o_v[None, :]
    gl.store(p_at, q_smem.index(W).load(flat), mask=gl.expand_dims(o_m < rows, 1))


@gluon.jit
def attend(
    p_q,
    p_rope,
    s_qs,
    s_qh,
    s_rs,
    s_rh,
    p_latent,
    p_ids,
    p_bits,
    p_count,
    p_out,
    p_lse,
    s_lb,
    s_lt,
    scale2,
    n_queries,
    n_groups,
    n_slots,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    V: gl.constexpr,
    R: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):
    """Attend to selected latents. grid (groups x row blocks, batch), 4 warps. V = 512, R = 64.

    The arguments are those of `attend` in ops/mla/forward.py, and p_rope: None, or the queries'
    rotary dims, p_q then pointing to the others, with the strides of a query and a head in each.
    """
    blocks: gl.constexpr = (GROUP * H + ROWS - 1) // ROWS
    i_group, i_first = gl.program_id(0) // blocks, gl.program_id(0) % blocks * ROWS
    i_b = gl.program_id(1).to(gl.int64)
    rows = gl.minimum(gl.minimum(GROUP, n_queries - i_group * GROUP) * H - i_first, ROWS)
    i_row = (i_b * n_queries + i_group * GROUP) * H + i_first
    i_list = (i_b * n_groups + i_group) * n_slots
    p_ids += i_list
    p_latent += i_b * s_lb
    if p_bits is not None:
        p_bits += i_list
        p_count += i_b * n_groups + i_group

    kind: gl.constexpr = p_q.dtype.element_ty
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, V // 2], kind)
    small: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, R], kind)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(kind, [2, ROWS, V // 2], half)
    qr_smem = gl.allocate_shared_memory(kind, [ROWS, R], small)
    # Buffer 0 holds halves 0 and 1 of the value dims of a tile, then buffer 1.
    v_smem = gl.allocate_shared_memory(kind, [4, KEYS, V // 2], half)
    r_smem = gl.allocate_shared_memory(kind, [2, KEYS, R], small)
    bits_smem = gl.allocate_shared_memory(gl.int32, [2, KEYS], line)
    top_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line)
    mass_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    both = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(2 * i), count=128)  # the threads of the producer
        mbarrier.init(full.index(2 * i + 1), count=129)
        mbarrier.init(free.index(2 * i), count=1)
        mbarrier.init(free.index(2 * i + 1), count=1)
        mbarrier.init(ready.index(i), count=129)
        mbarrier.init(both.index(i), count=2 + i * 256)
    fence_async_shared()
    smem = (q_smem, qr_smem, v_smem, r_smem, bits_smem, top_smem, mass_smem)
    bars = (full, free, ready, both)
    rows_at = (n_slots, scale2, i_row, i_first, rows, gl.minimum(n_queries, 1))
    lists = (p_latent, p_ids, p_bits, p_count)
    tiles = (v_smem, r_smem, bits_smem, full, free)
    q_parts = (p_rope, s_qs, s_qh, s_rs, s_rh)
    gl.warp_specialize(
        [
            (_gather, (lists, tiles, n_slots, s_lt, V, R)),
            (_attend, (p_q, q_parts, p_count, p_out, p_lse, smem, bars, rows_at, H, V, R, 0)),
            (_attend, (p_q, q_parts, p_count, p_out, p_lse, smem, bars, rows_at, H, V, R, 1)),
        ],
        [4, 4],
        [CONSUMER_REGS, CONSUMER_REGS],
    )
