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
    need(torch.equal(got.ids, want.ids), "the selection")
    if want.pool is not None:
        need(torch.equal(got.pool, want.pool), "the pool")


def index() -> None:
    from indexcache import ops

    for heads in (32, 64):
        same(index_inputs(40, 9300, heads), 300, 9000)
    same(index_inputs(40, 9300, 32), 300, 9000, pool=1200)
    same(index_inputs(40, 9300, 32, torch.bfloat16), 300, 9000)
    with ops.tuned(index={"deviations": -1.0}):  # thresholds too high: rows are recomputed
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

    ids = torch.rand(8, 40000, device="cuda").topk(8200, -1).indices.sort(-1).values.int()[None]
    for a, b in zip(
        *(ops.group_queries(ids, 4, backend=way) for way in ("triton", "torch")), strict=True
    ):
        need(not isinstance(a, Tensor) or torch.equal(a, b), "the groups")
    pool = ops.index_topk(*index_inputs(33, 9300, 32), 9000, 9000, backend="torch").ids
    for grouped, deviations in ((True, 5.0), (True, -1.0), (False, 5.0)):
        changes = {"listed": 512, "stride": 4, "grouped_pools": grouped, "deviations": deviations}
        with ops.tuned(index=changes):
            same(index_inputs(33, 9300, 32), 200, 9000, pool[..., :700].contiguous())


def attention(hopper: bool) -> None:
    from indexcache import ops
    from indexcache.ops import reference
    from indexcache.ops.mla import host

    for heads, queries in ((20, 7), (64, 3)):
        q = torch.randn(1, queries, heads, 576, device="cuda").bfloat16()
        latent = torch.randn(1, 900, 576, device="cuda").bfloat16()
        ids = torch.rand(1, queries, 900, device="cuda").topk(200, -1).indices.sort(-1).values.int()
        group = host.best_group(heads)
        groups = ops.group_queries(ids, group, backend="triton") if group > 1 else None
        with ops.tuned(mla={"hopper": hopper, "programs": 1}):
            out, _ = ops.sparse_mla(q, latent, ids, 0.04, groups=groups, backend="triton")
        want = reference.sparse_mla(q.float(), latent.float(), ids, 0.04)[0]
        need(float((out - want).norm() / want.norm()) < 1e-2, "attention")
    if hopper:
        return
    with ops.tuned(mla={"hopper": False}):
        first = q[:, :1].contiguous(), latent, ids[:, :1].contiguous()
        ops.sparse_mla(*first, 0.04, backend="triton")
        for deterministic in (False, True):
            a, b = q.clone().requires_grad_(), latent.clone().requires_grad_()
            options = {"backend": "triton", "deterministic": deterministic}
            ops.sparse_mla(a, b, ids, 0.04, **options)[0].sum().backward()


def distill() -> None:
    from indexcache import ops
    from indexcache.distilling.loss import distill_loss

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda") * 0.1

    targets = [
        ops.AttentionTarget(some(150, 3, 256), some(150, 448), some(3, 64, 256), 0.06)
        for _ in range(2)
    ]
    inputs = some(150, 4, 256), some(150, 256), some(150, 4)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        cast = [
            ops.AttentionTarget(*(x.to(dtype) if isinstance(x, Tensor) else x for x in t))
            for t in targets
        ]
        gradients = []
        for backend in ("triton", "torch"):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            # 128 rows: there is a second chunk, which is not whole
            with ops.tuned(backend=backend, kl={"rows": 128}):
                loss = distill_loss(*leaves, cast)
            gradients.append(torch.autograd.grad(loss, leaves))
        need(
            all(float((a - b).norm() / b.norm()) < limit for a, b in zip(*gradients, strict=True)),
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
