"""Runs every Triton and Gluon kernel once, on small inputs, against the torch definition: what compute-sanitizer is given.

    compute-sanitizer --tool memcheck  python benchmarks/sanitize.py index
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py index     # then rows, pools, plain, gluon, distill
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py dispatch  # no kernel of the package: what it says of Triton's own code

Exit code 1: a result is wrong, or a kernel of the task (KERNELS) was not launched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

KERNELS = {
    "index": {
        "scores_hopper.scores_tiles",
        "scores.scores_tiles",
        "select.threshold",
        "select.pick",
        "scores.rescue_fused",
        "quantize.quantize",
    },
    "rows": {
        "scores.scores_rows",
        "select_grid.select_grid",
        "select.compact",
        "select.threshold",
        "select.pick",
        "select.pick_row",
    },
    "pools": {
        "scores_hopper.scores_pools",
        "plan.unite",
        "select.threshold",
        "select.pick",
        "scores.rescue_fused",
        "scores.scores_rows",
        "select.pick_row",
    },
    "plain": {
        "mla.attend",
        "mla.combine",
        "mla_backward.backward",
        "mla_backward.gather_rows",
        "plan.join",
    },
    "gluon": {"mla_hopper.attend", "plan.join"},
    "dispatch": {"dispatch.start"},
    "dispatch-all": {"dispatch.start"},
    "distill": {
        "distill.normalise",
        "distill.teach",
        "distill.score",
        "distill.compare",
        "distill.grad_queries",
        "distill.grad_keys",
    },
}


def need(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"{what} differs from the definition.")


def watched() -> set[str]:
    """The kernels that are launched from here on, module.name."""
    from triton.runtime.jit import JITFunction

    found: set[str] = set()
    run = JITFunction.run

    def watch(self: Any, *args: Any, **options: Any) -> Any:
        found.add(f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}")
        return run(self, *args, **options)

    JITFunction.run = watch
    return found


def index_inputs(
    queries: int, keys: int, heads: int, kind: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small whole numbers: every score is exact, so that both backends select the same ids."""
    q, k = (
        torch.randint(-3, 4, (1, n, *h, 128), device="cuda").float().to(kind)
        for n, h in ((queries, (heads,)), (keys, ()))
    )
    return (
        q,
        k,
        torch.randint(-3, 4, (1, queries, heads), device="cuda").float(),
        torch.randint(1, 3, (1, keys), device="cuda").float(),
    )


def same(inputs: tuple[Tensor, ...], *rest: Any, **options: Any) -> None:
    from indexcache import ops

    got, want = (
        ops.index_topk(*inputs, *rest, backend=way, **options) for way in ("triton", "torch")
    )
    for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        need(torch.equal(a, b), "the selection")


def index() -> None:
    from indexcache import ops
    from indexcache.ops.tuning import SETTINGS

    for heads in (32, 64):
        same(index_inputs(40, 9300, heads), 300, 9000)
    same(index_inputs(40, 9300, 32), 300, 9000, pool=1200)
    same(index_inputs(40, 9300, 32, torch.bfloat16), 300, 9000)
    SETTINGS.deviations = -1.0  # thresholds too high: rows are redone
    same(index_inputs(40, 9300, 32), 300, 9000)
    q, angle = (
        torch.randn(1, 40, 32, 128, device="cuda").bfloat16(),
        torch.randn(1, 40, 32, device="cuda"),
    )
    for interleaved in (False, True):
        ops.quantize_index_queries(
            q,
            torch.ones(1, 40, 32, device="cuda"),
            rotate=True,
            cos_BSr=angle.cos(),
            sin_BSr=angle.sin(),
            interleaved=interleaved,
            backend="triton",
        )


def rows() -> None:
    from indexcache.ops import reference
    from indexcache.ops.index import topk_host as launch_select

    same(index_inputs(1, 9300, 32), 300, torch.tensor([9200], device="cuda"))
    for count in (1, 40):
        x = torch.randn(count, 20000, device="cuda")
        need(
            torch.equal(
                launch_select.topk_rows(x, 2048)[0],
                reference.select(x, torch.ones_like(x, dtype=torch.bool), 2048),
            ),
            "a row",
        )
    for size in (1000, 9100):
        pool = torch.rand(1, 1, 9200, device="cuda").topk(size, -1).indices.sort(-1).values.int()
        same(index_inputs(1, 9300, 32), 200, torch.tensor([9200], device="cuda"), pool)


def pools() -> None:
    from indexcache import ops
    from indexcache.ops.tuning import SETTINGS

    ids = torch.rand(8, 40000, device="cuda").topk(8200, -1).indices.sort(-1).values.int()[None]
    for a, b in zip(
        *(ops.group_queries(ids, 4, backend=way) for way in ("triton", "torch")), strict=True
    ):
        need(not isinstance(a, Tensor) or torch.equal(a, b), "a plan")
    pool = ops.index_topk(*index_inputs(33, 9300, 32), 9000, 9000, backend="torch")
    SETTINGS.listed, SETTINGS.stride = 512, 4
    for grouped, deviations in ((True, 5.0), (True, -1.0), (False, 5.0)):
        SETTINGS.grouped_pools, SETTINGS.deviations = grouped, deviations
        same(index_inputs(33, 9300, 32), 200, 9000, pool[..., :700].contiguous())


def attention(hopper: bool) -> None:
    from indexcache import ops
    from indexcache.ops import reference
    from indexcache.ops.mla import host as launch_mla

    launch_mla.SETTINGS.hopper, launch_mla.SETTINGS.programs = hopper, 1
    for heads, queries in ((20, 7), (64, 3)):
        q = torch.randn(1, queries, heads, 576, device="cuda").bfloat16()
        latent = torch.randn(1, 900, 576, device="cuda").bfloat16()
        ids = torch.rand(1, queries, 900, device="cuda").topk(200, -1).indices.sort(-1).values.int()
        group = launch_mla.best_group(heads)
        plan = ops.group_queries(ids, group, backend="triton") if group > 1 else None
        out, _ = ops.sparse_mla(q, latent, ids, 0.04, plan=plan, backend="triton")
        want = reference.sparse_mla(q.float(), latent.float(), ids, 0.04)[0]
        need(float((out - want).norm() / want.norm()) < 1e-2, "attention")
    if hopper:
        return
    launch_mla.SETTINGS.programs = 132
    for cache in (latent, ops.quantize_latent(latent)):
        ops.sparse_mla(
            q[:, :1].contiguous(), cache, ids[:, :1].contiguous(), 0.04, backend="triton"
        )
    for deterministic in (False, True):
        a, b = q.clone().requires_grad_(), latent.clone().requires_grad_()
        ops.sparse_mla(a, b, ids, 0.04, backend="triton", deterministic=deterministic)[
            0
        ].sum().backward()


def distill() -> None:
    from indexcache.distilling import loss
    from indexcache.distilling.loss import Teacher, distill_loss
    from indexcache.ops.index_kl_host import SETTINGS

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda") * 0.1

    teachers = [
        Teacher(some(150, 3, 256), some(150, 448), some(3, 64, 256), 0.06) for _ in range(2)
    ]
    inputs = some(150, 4, 256), some(150, 256), some(150, 4)
    SETTINGS.rows = 128  # a second chunk, which is not whole
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        teachers = [
            Teacher(*(x.to(dtype) if isinstance(x, Tensor) else x for x in t)) for t in teachers
        ]
        found = []
        for loss.BACKEND in ("triton", "torch"):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            found.append(torch.autograd.grad(distill_loss(*leaves, teachers), leaves))
        need(
            all(float((a - b).norm() / b.norm()) < limit for a, b in zip(*found, strict=True)),
            f"a gradient in {dtype}",
        )


def dispatch(every: bool) -> None:
    import dispatch as control

    need(control.run(every), "the control kernel")


TASKS: dict[str, Callable[[], None]] = {
    "index": index,
    "rows": rows,
    "pools": pools,
    "plain": lambda: attention(False),
    "gluon": lambda: attention(True),
    "distill": distill,
    "dispatch": lambda: dispatch(False),
    "dispatch-all": lambda: dispatch(True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    task = parser.parse_args().task
    torch.manual_seed(0)
    launched = watched()
    TASKS[task]()
    torch.cuda.synchronize()
    missing = KERNELS[task] - launched
    print(
        f"{task}: {', '.join(sorted(launched))}"
        + (f"; not launched: {', '.join(sorted(missing))}" if missing else "")
    )
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
