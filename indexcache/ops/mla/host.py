"""Launch the kernels of sparse MLA: group queries, split ids over programs, autograd."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from indexcache.ops import tuning
from indexcache.ops.groups import group_queries
from indexcache.ops.mla import backward as backward_kernels
from indexcache.ops.mla import forward as forward_kernels
from indexcache.ops.primitives import INTERPRETED, LOG2E
from indexcache.ops.reference import QueryGroups, ascending
from indexcache.ops.tuning import current, power

MAX_DIM = 640  # dims of a latent, the rotary ones rounded up to a power of two
MAX_PIPELINED = 576  # dims of a latent of which two tiles fit into shared memory
MAX_NARROW = 512  # dims of a latent of which two programs fit on a multiprocessor
MAX_GROUP = 8  # bits of a group's masks


def refuse(q: Tensor, latent: Tensor, value_dim: int) -> str | None:
    """Return why the kernels cannot take these tensors; None: they can."""
    rope_dim = q.shape[-1] - value_dim
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the queries' dtype is {q.dtype}"
    if latent.dtype != q.dtype:
        return f"the latents are {latent.dtype}, the queries {q.dtype}"
    if value_dim & (value_dim - 1) or not 16 <= value_dim <= 512:
        return f"value_dim {value_dim} is not a power of two from 16 to 512"
    if not 1 <= rope_dim <= 256 or value_dim + power(rope_dim) > MAX_DIM:
        return f"{value_dim} + {rope_dim} dims are more than a program's shared memory holds"
    if q.shape[2] > 128:
        return f"{q.shape[2]} heads are more than 128"
    return None


def best_group(heads: int, rows: int | None = None) -> int:
    """Return how many neighbouring queries fill the rows of a program, by default those of bf16."""
    return min(max((rows or current().mla.rows) // heads, 1), MAX_GROUP)


def query_group(ids: Tensor, heads: int) -> int:
    """Return how many neighbouring queries share a program: 1 in decoding and with many heads."""
    batch, queries, _ = ids.shape
    group = best_group(heads)
    return group if queries >= group and batch * queries >= current().mla.programs else 1


def sparse_mla(
    q: Tensor,
    latent: Tensor,
    ids: Tensor,
    scale: float,
    *,
    value_dim: int,
    groups: QueryGroups | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Run `ops.sparse_mla` on the kernels."""
    if groups is None and (group := query_group(ids, q.shape[2])) > 1:
        groups = group_queries(ascending(ids), group)
    return _SparseMla.apply(q, latent, ids, scale, value_dim, groups, deterministic)


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, latent, ids, scale, value_dim, groups, deterministic):
        out, lse = launch_forward(q, latent, ids, scale, value_dim, groups)
        ctx.save_for_backward(q, latent, ids, out, lse, *(groups[:3] if groups is not None else ()))
        ctx.scale, ctx.deterministic = scale, deterministic
        ctx.group = 0 if groups is None else groups.group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, latent, ids, out, lse, *lists = ctx.saved_tensors
        groups = QueryGroups(lists[0], lists[1], lists[2], ctx.group) if lists else None
        dq, dlatent = launch_backward(
            q, latent, ids, out, lse, grad, ctx.scale, groups, ctx.deterministic
        )
        return dq, dlatent.to(latent.dtype), None, None, None, None, None


def launch_forward(
    q: Tensor, latent: Tensor, ids: Tensor, scale: float, value_dim: int, groups: QueryGroups | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels: (out [B, S, H, V], lse fp32 [B, S, H])."""
    settings = current().mla
    batch, queries, heads, dim = q.shape
    q = q.contiguous()
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    out = q.new_empty(batch, queries, heads, value_dim)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    if not out.numel() or not ids.shape[-1] or not latent.shape[1]:
        return out.zero_(), lse.fill_(-torch.inf)

    lists: dict[str, Any] = {"p_ids": ids.contiguous(), "p_bits": None, "p_count": None}
    group = 1
    if groups is not None:
        lists = dict(zip(lists, groups[:3], strict=True))
        group = groups.group
    max_rows, keys = _tile(q.dtype, settings.keys)
    rows = min(max_rows, max(triton.next_power_of_2(group * heads), 16))
    n_groups = -(-queries // group)
    blocks = -(-group * heads // rows)
    slots = lists["p_ids"].shape[-1]
    programs = n_groups * blocks * batch
    if 2 * programs < settings.programs:
        keys, rows = min(keys, settings.decode_keys), min(rows, settings.decode_rows)
        blocks = -(-group * heads // rows)
        programs = n_groups * blocks * batch
    splits, per_split = _split(programs, slots, keys)

    strides = {"s_lb": latent.stride(0) if batch > 1 else 0, "s_lt": latent.stride(1)}
    sizes = {"n_queries": queries, "n_groups": n_groups, "n_slots": slots}
    shape = {"H": heads, "GROUP": group, "V": value_dim, "R": dim - value_dim}
    arguments = {"p_q": q, "p_latent": latent, **lists, **strides, **sizes, **shape}
    arguments["scale2"] = scale * LOG2E.value
    if splits == 1 and _fits_hopper(q, latent, scale, value_dim):
        from indexcache.ops.mla import forward_hopper

        # Each of three warpgroups starts with 168 registers; the kernel then redistributes them.
        options = {"CONSUMER_REGS": settings.hopper_registers, "num_warps": 4, "maxnreg": 168}
        programs = n_groups * -(-group * heads // 64)
        parts = {"p_rope": None, "s_qs": 0, "s_qh": 0, "s_rs": 0, "s_rh": 0}
        forward_hopper.attend[(programs, batch)](
            **arguments, **parts, p_out=out, p_lse=lse, **options
        )
        return out, lse

    rope_width = power(dim - value_dim, 16)
    width = value_dim + rope_width
    narrow = splits == 1 and q.dtype != torch.float32 and value_dim <= 256 and width <= MAX_NARROW
    pipelined = rows == settings.rows and splits == 1 and width <= MAX_PIPELINED and not narrow
    if narrow:
        keys = min(keys, settings.narrow_keys)
    tile = {"M": rows, "N": keys, "RP": rope_width, "STAGES": settings.stages if pipelined else 1}
    tile |= {"per_split": per_split, "SPLIT": splits > 1}
    pdl = splits > 1 and settings.pdl and not INTERPRETED.value
    launch: dict[str, Any] = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    tile["num_warps"] = settings.decode_warps if splits > 1 else 4 if narrow else settings.warps
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    forward_kernels.attend[(n_groups * blocks, splits, batch)](
        **arguments, p_out=partial, p_lse=partial_lse, **tile, **launch
    )
    if splits > 1:
        block, n_rows = min(value_dim, 128), batch * queries * heads
        constants = {"SPLITS": splits, "SP": power(splits), "V": value_dim, "BLOCK": block}
        launch["num_warps"] = max(power(splits) // 32, 1)
        forward_kernels.combine[(n_rows, value_dim // block)](
            partial, partial_lse, out, lse, n_rows, **constants, **launch
        )
    return out, lse


def takes_parts(q: tuple[Tensor, Tensor], latent: Tensor, scale: float, slots: int) -> bool:
    """Return whether `attend_parts` can run."""
    values, rope = q
    aligned = all(
        part.data_ptr() % 16 == 0
        and part.stride(-1) == 1
        and all(n % 16 == 0 for n in part.stride()[:2])
        for part in q
    )
    whole = values.new_empty(0, 0, 0, values.shape[-1] + rope.shape[-1])
    fits = _fits_hopper(whole, latent[None], scale, values.shape[-1])
    return aligned and fits and latent.stride(-1) == 1 and min(len(values), slots, len(latent)) > 0


def attend_parts(
    q: tuple[Tensor, Tensor], latent: Tensor, scale: float, groups: QueryGroups
) -> Tensor:
    """Attend as `ops.sparse_mla` does where queries lie in two parts, as engines leave them.

    Args:
        q: (absorbed queries [S, H, 512], rotary dims [S, H, 64]), bf16; see `takes_parts`.
        latent: bf16 [T, 576].
        scale: factor of the logits.
        groups: the groups of these queries.

    Returns:
        bf16 [S, H, 512].
    """
    from indexcache.ops.mla import forward_hopper

    values, rope = q
    queries, heads, value_dim = values.shape
    out = values.new_empty(queries, heads, value_dim)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=out.device)
    union, bits, count, group = groups
    n_groups = -(-queries // group)
    parts = dict(zip(("s_qs", "s_qh"), values.stride(), strict=False))
    parts |= dict(zip(("s_rs", "s_rh"), rope.stride(), strict=False))
    settings = current().mla
    forward_hopper.attend[(n_groups * -(-group * heads // 64), 1)](
        p_q=values,
        p_rope=rope,
        **parts,
        p_latent=latent,
        p_ids=union,
        p_bits=bits,
        p_count=count,
        p_out=out,
        p_lse=lse,
        s_lb=0,
        s_lt=latent.stride(0),
        scale2=scale * LOG2E.value,
        n_queries=queries,
        n_groups=n_groups,
        n_slots=union.shape[-1],
        H=heads,
        GROUP=group,
        V=value_dim,
        R=rope.shape[-1],
        CONSUMER_REGS=settings.hopper_registers,
        num_warps=4,
        maxnreg=168,
    )
    return out


def launch_backward(
    q: Tensor,
    latent: Tensor,
    ids: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: float,
    groups: QueryGroups | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels: (gradient of q in its dtype, of the latents in fp32)."""
    settings = current().mla
    batch, queries, heads, dim = q.shape
    keys, value_dim = latent.shape[1], out.shape[-1]
    max_rows, tile_keys = _tile(q.dtype, settings.backward_keys)
    if heads > max_rows:  # A program has at most max_rows rows, so heads are processed in blocks.
        blocks: list[Tensor] = []
        dlatent = torch.zeros(latent.shape, dtype=torch.float32, device=q.device)
        for h in range(0, heads, max_rows):
            q_, out_, lse_, grad_ = (t[:, :, h : h + max_rows] for t in (q, out, lse, grad))
            block = launch_backward(q_, latent, ids, out_, lse_, grad_, scale, None, deterministic)
            blocks.append(block[0])
            dlatent += block[1]
        return torch.cat(blocks, dim=2), dlatent
    if groups is None or groups.group * heads > max_rows:
        groups = group_queries(ascending(ids), best_group(heads, max_rows))
    q, out, lse, grad, latent = (t.contiguous() for t in (q, out, lse, grad, latent))
    dq = torch.empty_like(q)
    dlatent = torch.zeros(batch, keys, dim, dtype=torch.float32, device=q.device)
    n_groups, slots = groups.union_BGU.shape[1:]
    if not q.numel() or not slots or not keys:
        return dq.zero_(), dlatent
    work = dlatent  # Atomics add to it. The deterministic form writes one row for each slot.
    if deterministic:
        work = torch.empty(batch, n_groups, slots, dim, dtype=torch.float32, device=q.device)

    rope_dim = dim - value_dim
    lists = {"p_ids": groups.union_BGU, "p_bits": groups.mask_BGU, "p_count": groups.count_BG}
    tensors = {"p_q": q, "p_latent": latent, "p_out": out, "p_lse": lse, "p_grad": grad}
    strides = {"s_lb": latent.stride(0), "s_lt": latent.stride(1)}
    sizes = {"n_queries": queries, "n_groups": n_groups, "n_slots": slots, "n_keys": keys}
    shape = {"H": heads, "GROUP": groups.group, "V": value_dim, "R": rope_dim}
    tile = {"M": power(groups.group * heads, 16), "N": tile_keys, "RP": power(rope_dim, 16)}
    tile |= {"SLICE": min(value_dim, settings.backward_slice), "num_warps": settings.warps}
    arguments = {**tensors, **lists, **strides, **sizes, **shape, **tile}
    backward_kernels.backward[(n_groups, batch)](
        **arguments, p_dq=dq, p_dlatent=work, scale=scale, ATOMIC=not deterministic
    )
    if deterministic:
        _gather_rows(work, groups.union_BGU, dlatent)
    return dq, dlatent


def _gather_rows(work: Tensor, union: Tensor, dlatent: Tensor) -> None:
    """Add the rows of all slots up for each latent, in the order of the groups."""
    batch, keys, dim = dlatent.shape
    first_key = torch.arange(batch, device=work.device)[:, None, None] * keys
    latent_of_slot = torch.where(union < 0, batch * keys, union.long() + first_key).flatten()
    order = latent_of_slot.argsort(stable=True)
    start = torch.searchsorted(
        latent_of_slot[order], torch.arange(batch * keys + 1, device=work.device)
    )
    backward_kernels.gather_rows[(batch * keys,)](
        work, order, start, dlatent, E=dim, EP=power(dim), num_warps=4
    )


def _tile(dtype: torch.dtype, keys: int) -> tuple[int, int]:
    """Return (max rows of a program, max keys of a tile) for dtype; `keys` fit in bf16."""
    settings = current().mla
    if dtype == torch.float32:
        return min(settings.rows, settings.rows_fp32), min(keys, settings.keys_fp32)
    return settings.rows, keys


def _split(programs: int, slots: int, keys: int) -> tuple[int, int]:
    """Return (number of programs that share a row's slots, slots of each, a multiple of `keys`).

    Programs that fill half of the device are faster without a split, whose results must be
    combined.
    """
    filling = current().mla.programs
    splits = 1
    if 2 * programs < filling:
        splits = max(1, min(-(-filling // programs), -(-slots // keys), current().mla.splits))
    per_split = triton.cdiv(triton.cdiv(slots, splits), keys) * keys
    return -(-slots // per_split), per_split


def _fits_hopper(q: Tensor, latent: Tensor, scale: float, value_dim: int) -> bool:
    """Return whether the kernel of ops/mla/forward_hopper.py can run."""
    fits = q.dtype == torch.bfloat16 and value_dim == 512 and q.shape[-1] == 576
    strides = [latent.stride(1), latent.stride(0)][: 2 if q.shape[0] > 1 else 1]
    aligned = all(n % 16 == 0 for n in strides) and all(t.data_ptr() % 16 == 0 for t in (q, latent))
    runs = current().mla.hopper and tuning.gluon_runs(q.device)
    return runs and fits and scale > 0 and aligned
