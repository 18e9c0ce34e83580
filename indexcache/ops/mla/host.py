"""Host side of sparse MLA: which group, which split, launches of ops/plan.py, ops/mla.py and ops/mla_backward.py, and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from indexcache.ops import tuning as settings
from indexcache.ops.groups_host import group_queries
from indexcache.ops.mla import backward as mla_backward
from indexcache.ops.mla import forward as mla
from indexcache.ops.reference import FP8_GROUP, Fp8Latent, Plan
from indexcache.ops.tuning import power

LOG2E = 1.4426950408889634
MOST = 640  # dims of a latent, rotary ones as a power of two; more than 576 are gathered a tile at a time


@dataclass
class Settings:
    """What the kernels' speed depends on and their result does not (but for rounding)."""

    rows: int = 64  # of one program in prefill
    keys: int = 64  # of one tile
    stages: int = 2
    warps: int = 8
    decode_warps: int = 8
    programs: int = 132  # fewer queries than would fill these split their ids
    hopper: bool = True  # the Gluon kernel of prefill where it fits
    hopper_registers: int = 224  # of a computing thread
    backward_keys: int = 32
    backward_part: int = 128  # value dims of the latents' gradient at a time
    rows_fp32: int = 32  # of what takes twice the shared memory, at most
    keys_fp32: int = 16


SETTINGS = Settings()


def refuse(q: Tensor, latent: Tensor | Fp8Latent, value_dim: int) -> str | None:
    rope_dim = q.shape[-1] - value_dim
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the queries' dtype is {q.dtype}"
    if isinstance(latent, Tensor) and latent.dtype != q.dtype:
        return f"the latents are {latent.dtype}, the queries {q.dtype}"
    if value_dim & (value_dim - 1) or not 16 <= value_dim <= 512:
        return f"value_dim {value_dim} is not a power of two from 16 to 512"
    if not 1 <= rope_dim <= 256 or value_dim + power(rope_dim) > MOST:
        return f"{value_dim} + {rope_dim} dims are more than a program's shared memory holds"
    if q.shape[2] > 128:
        return f"{q.shape[2]} heads are more than 128"
    return None


def best_group(heads: int, rows: int | None = None) -> int:
    """How many neighbouring queries fill the rows of a program (default: those of bf16)."""
    return min(max((rows or SETTINGS.rows) // heads, 1), 8)


def tile(dtype: torch.dtype, keys: int) -> tuple[int, int]:
    """(rows of a program, keys of a tile) at most, for queries of dtype; keys: what fits in bf16."""
    return (
        (min(SETTINGS.rows, SETTINGS.rows_fp32), min(keys, SETTINGS.keys_fp32))
        if dtype == torch.float32
        else (SETTINGS.rows, keys)
    )


@dataclass
class Latent:
    """A latent cache as the kernel takes it: three tensors with their strides."""

    value: Tensor
    scale: Tensor
    rope: Tensor
    fp8: bool
    parts: int

    @classmethod
    def of(cls, latent: Tensor | Fp8Latent, value_dim: int) -> Latent:
        if isinstance(latent, Fp8Latent):
            assert (
                latent.value_BTV.stride(-1)
                == latent.rope_BTR.stride(-1)
                == latent.scale_BTC.stride(-1)
                == 1
            )
            return cls(
                latent.value_BTV,
                latent.scale_BTC,
                latent.rope_BTR,
                True,
                latent.scale_BTC.shape[-1],
            )
        latent = latent if latent.stride(-1) == 1 else latent.contiguous()
        return cls(
            latent[..., :value_dim],
            latent,
            latent[..., value_dim:],
            False,
            max(value_dim // FP8_GROUP, 1),
        )


def _hopper(q: Tensor, x: Latent, scale: float, value_dim: int) -> bool:
    """The kernel of ops/mla_hopper.py fits."""
    fits = q.dtype == torch.bfloat16 and not x.fp8 and value_dim == 512 and q.shape[-1] == 576
    strides = [x.value.stride(1), x.rope.stride(1), x.value.stride(0), x.rope.stride(0)][
        : 4 if q.shape[0] > 1 else 2
    ]
    aligned = all(n % 16 == 0 for n in strides) and all(
        t.data_ptr() % 16 == 0 for t in (q, x.value, x.rope)
    )
    return SETTINGS.hopper and fits and scale > 0 and aligned and settings.gluon_runs(q.device)


def forward(
    q: Tensor,
    latent: Tensor | Fp8Latent,
    ids: Tensor,
    scale: float,
    value_dim: int,
    plan_: Plan | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = q.shape
    q, x = q.contiguous(), Latent.of(latent, value_dim)
    out = q.new_empty(batch, queries, heads, value_dim)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    if not out.numel() or not ids.shape[-1] or not x.value.shape[1]:
        return out.zero_(), lse.fill_(-torch.inf)
    group = plan_.group if plan_ is not None else 1
    most, keys = tile(q.dtype, SETTINGS.keys)
    rows = min(most, max(triton.next_power_of_2(group * heads), 16))
    groups = -(-queries // group)
    blocks = -(-group * heads // rows)
    source = ids.contiguous() if plan_ is None else plan_.union_BGU
    slots = source.shape[-1]
    programs = groups * blocks * batch
    # half a device of whole rows beats a full one of halves, which must be combined
    splits = (
        max(1, min(-(-SETTINGS.programs // programs), -(-slots // keys), 64))
        if 2 * programs < SETTINGS.programs
        else 1
    )
    part = triton.cdiv(triton.cdiv(slots, splits), keys) * keys
    splits = -(-slots // part)
    partial, plse = out, lse
    if splits > 1:
        partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        plse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    rope_dim = dim - value_dim
    if splits == 1 and _hopper(q, x, scale, value_dim):
        from indexcache.ops.mla import forward_hopper as mla_hopper

        mla_hopper.attend[(groups * -(-group * heads // 64), batch)](
            q,
            x.value,
            x.rope,
            source,
            source if plan_ is None else plan_.mask_BGU,
            source if plan_ is None else plan_.count_BG,
            out,
            lse,
            x.value.stride(0) if batch > 1 else 0,
            x.value.stride(1),
            x.rope.stride(0) if batch > 1 else 0,
            x.rope.stride(1),
            scale * LOG2E,
            queries,
            groups,
            slots,
            H=heads,
            GROUP=group,
            V=value_dim,
            R=rope_dim,
            PLANNED=plan_ is not None,
            CONSUMER_REGS=SETTINGS.hopper_registers,
            num_warps=4,
            maxnreg=168,  # what three warpgroups can have each; they share them out anew between gather and products
        )
        return out, lse
    mla.attend[(groups * blocks, splits, batch)](
        q,
        x.value,
        x.scale,
        x.rope,
        source,
        source if plan_ is None else plan_.mask_BGU,
        source if plan_ is None else plan_.count_BG,
        partial,
        plse,
        x.value.stride(0),
        x.value.stride(1),
        x.rope.stride(0),
        x.rope.stride(1),
        x.scale.stride(0),
        x.scale.stride(1),
        scale * LOG2E,
        queries,
        groups,
        slots,
        part,
        H=heads,
        GROUP=group,
        M=rows,
        N=keys,
        V=value_dim,
        R=rope_dim,
        RP=power(rope_dim, 16),
        C=x.parts,
        FP8=x.fp8,
        PLANNED=plan_ is not None,
        SPLIT=splits > 1,
        STAGES=SETTINGS.stages
        if rows == SETTINGS.rows
        and splits == 1
        and not x.fp8
        and value_dim + power(rope_dim) <= 576
        else 1,
        num_warps=SETTINGS.decode_warps if splits > 1 else SETTINGS.warps,
    )
    if splits > 1:
        block = min(value_dim, 128)
        mla.combine[(batch * queries * heads, value_dim // block)](
            partial,
            plse,
            out,
            lse,
            batch * queries * heads,
            SPLITS=splits,
            SP=triton.next_power_of_2(splits),
            V=value_dim,
            BLOCK=block,
            num_warps=1,
        )
    return out, lse


def backward(
    q: Tensor,
    latent: Tensor,
    ids: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: float,
    plan_: Plan | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = q.shape
    keys, value_dim = latent.shape[1], out.shape[-1]
    rows, tile_keys = tile(q.dtype, SETTINGS.backward_keys)
    if heads > rows:  # a program holds one block of rows: take the heads in turn
        parts = [slice(h, h + rows) for h in range(0, heads, rows)]
        each = [
            backward(
                q[:, :, p],
                latent,
                ids,
                out[:, :, p],
                lse[:, :, p],
                grad[:, :, p],
                scale,
                None,
                deterministic,
            )
            for p in parts
        ]
        return torch.cat([dq for dq, _ in each], dim=2), sum(dl for _, dl in each)  # type: ignore[return-value]
    if plan_ is None or plan_.group * heads > rows:
        plan_ = group_queries(_ascending(ids), best_group(heads, rows))
    q, out, lse, grad, latent = (t.contiguous() for t in (q, out, lse, grad, latent))
    dq = torch.empty_like(q)
    groups, slots = plan_.union_BGU.shape[1:]
    dlatent = torch.zeros(batch, keys, dim, dtype=torch.float32, device=q.device)
    if not q.numel() or not slots or not keys:
        return dq.zero_(), dlatent
    work = (
        torch.empty(batch, groups, slots, dim, dtype=torch.float32, device=q.device)
        if deterministic
        else dlatent
    )
    rope_dim = dim - value_dim
    mla_backward.backward[(groups, batch)](
        q,
        latent,
        plan_.union_BGU,
        plan_.mask_BGU,
        plan_.count_BG,
        out,
        lse,
        grad,
        dq,
        work,
        latent.stride(0),
        latent.stride(1),
        scale,
        queries,
        groups,
        slots,
        keys,
        H=heads,
        GROUP=plan_.group,
        M=max(triton.next_power_of_2(plan_.group * heads), 16),
        N=tile_keys,
        V=value_dim,
        R=rope_dim,
        RP=max(triton.next_power_of_2(rope_dim), 16),
        PART=min(value_dim, SETTINGS.backward_part),
        PLANNED=True,
        ATOMIC=not deterministic,
        num_warps=SETTINGS.warps,
    )
    if deterministic:
        union = plan_.union_BGU.long()
        flat = torch.where(
            union < 0,
            batch * keys,
            union + torch.arange(batch, device=q.device)[:, None, None] * keys,
        ).flatten()
        order = flat.argsort(stable=True)
        start = torch.searchsorted(flat[order], torch.arange(batch * keys + 1, device=q.device))
        mla_backward.gather_rows[(batch * keys,)](
            work, order, start, dlatent, E=dim, EP=triton.next_power_of_2(dim), num_warps=4
        )
    return dq, dlatent


def _ascending(ids: Tensor) -> Tensor:
    """Ids with -1 anywhere as `group_queries` wants them."""
    last = torch.iinfo(torch.int32).max
    ids = torch.where(ids < 0, last, ids).sort(dim=-1).values
    return torch.where(ids == last, -1, ids)


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, latent, ids, scale, value_dim, plan_, deterministic):
        out, lse = forward(q, latent, ids, scale, value_dim, plan_)
        ctx.save_for_backward(q, latent, ids, out, lse, *(plan_[:3] if plan_ is not None else ()))
        ctx.rest = scale, plan_.group if plan_ is not None else 0, deterministic
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, latent, ids, out, lse, *tensors = ctx.saved_tensors
        scale, group, deterministic = ctx.rest
        plan_ = Plan(tensors[0], tensors[1], tensors[2], group) if tensors else None
        dq, dlatent = backward(q, latent, ids, out, lse, grad, scale, plan_, deterministic)
        return dq, dlatent.to(latent.dtype), None, None, None, None, None


def sparse_mla(
    q: Tensor,
    latent: Tensor | Fp8Latent,
    ids: Tensor,
    scale: float,
    *,
    value_dim: int,
    plan: Plan | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    group = best_group(q.shape[2])
    if plan is None and 1 < group <= q.shape[1] and q.shape[0] * q.shape[1] >= SETTINGS.programs:
        plan = group_queries(_ascending(ids), group)
    if isinstance(latent, Fp8Latent):
        if torch.is_grad_enabled() and q.requires_grad:
            raise ValueError(
                "sparse_mla: fp8 latents have no backward; give them in bf16 or use torch.no_grad()."
            )
        return forward(q, latent, ids, scale, value_dim, plan)
    return _SparseMla.apply(q, latent, ids, scale, value_dim, plan, deterministic)
