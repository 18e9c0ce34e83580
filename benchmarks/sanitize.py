"""Run every Triton and Gluon kernel once, on small inputs, against the torch definition.

    compute-sanitizer --tool memcheck  python -m benchmarks.sanitize index
    compute-sanitizer --tool racecheck python -m benchmarks.sanitize index
    compute-sanitizer --tool racecheck python -m benchmarks.sanitize dispatch

The tasks index, rows, pools, plain, gluon, paged, step, linear and distill run the kernels of the
package. The tasks dispatch and dispatch-all run none of them: they show what the tool reports for
code that Triton generates. The exit code is 1 if a result is wrong or a kernel of the task
(KERNELS) was not launched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import dispatch
from indexcache import ops
from indexcache.distilling.loss import distill_loss
from indexcache.ops import pages as pages_host
from indexcache.ops import reference, rotary
from indexcache.ops import step as step_ops
from indexcache.ops.index import topk_host
from indexcache.ops.mla import host as mla_host

# The kernels that each task must launch, by their module in indexcache.ops and their name.
KERNELS = {
    "index": {
        "index.scores_hopper.scores_tiles",
        "index.scores.scores_tiles",
        "index.topk.threshold",
        "index.topk.pick",
        "index.scores.rescue_fused",
        "quantize.quantize_rows",
    },
    "short": {
        "index.scores_half.scores_rows_of_tiles",
        "index.scores.scores_tiles",
        "index.topk.pick_row",
    },
    "rows": {
        "index.scores.scores_rows",
        "index.topk_grid.select_grid",
        "index.topk.compact",
        "index.topk.threshold",
        "index.topk.pick",
        "index.topk.pick_row",
    },
    "pools": {
        "index.pools_hopper.scores_pools",
        "groups.unite",
        "index.topk.threshold",
        "index.topk.pick",
        "index.scores.rescue_fused",
        "index.scores.scores_rows",
        "index.topk.pick_row",
    },
    "plain": {
        "mla.forward.attend",
        "mla.forward.combine",
        "mla.backward.backward",
        "mla.backward.gather_rows",
        "groups.join",
    },
    "gluon": {"mla.forward_hopper.attend", "groups.join"},
    "paged": {"pages.unite_pages", "rotary.turn_rows", "rotary.turn_pairs"},
    "linear": {
        "linear.kernels.products",
        "linear.kernels.products_of_few",
        "linear.kernels.quantize_groups",
    },
    "distill": {
        "kl.kernels.normalise",
        "kl.kernels.teach",
        "kl.kernels.score",
        "kl.kernels.compare",
        "kl.kernels.grad_queries",
        "kl.kernels.grad_keys",
    },
    "step": {
        "step.kernels.products",
        "step.kernels.absorb",
        "step.kernels.values",
        "step.kernels.index_rows",
        "step.kernels.experts_up",
        "step.kernels.experts_down",
    },
    "dispatch": {"benchmarks.dispatch.start"},
    "dispatch-all": {"benchmarks.dispatch.start"},
}


def need(condition: bool, name: str) -> None:
    """Stop unless the condition holds."""
    if not condition:
        raise SystemExit(f"{name} differs from the definition.")


def relative(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected result."""
    return float((result - expected).norm() / expected.norm())


def watch_launches() -> set[str]:
    """Return a set to which every launch from here on adds its kernel's module and name."""
    from triton.runtime.jit import JITFunction

    launched: set[str] = set()
    run = JITFunction.run

    def watch(self: Any, *args: Any, **options: Any) -> Any:
        module = self.fn.__module__.removeprefix("indexcache.ops.")
        launched.add(f"{module}.{self.fn.__name__}")
        return run(self, *args, **options)

    JITFunction.run = watch
    return launched


def random_integers(*shape: int, low: int = -3, high: int = 4) -> Tensor:
    return torch.randint(low, high, shape, device="cuda").float()


def index_inputs(
    queries: int, keys: int, heads: int, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make small integers: every score is exact, so that both backends select the same ids."""
    q = random_integers(1, queries, heads, 128).to(dtype)
    k = random_integers(1, keys, 128).to(dtype)
    return q, k, random_integers(1, queries, heads), random_integers(1, keys, low=1, high=3)


def random_ids(*shape: int, keys: int) -> Tensor:
    """Make int32 ids [..., k], ascending and distinct."""
    *rows, k = shape
    return torch.rand(*rows, keys, device="cuda").topk(k, -1).indices.sort(-1).values.int()


def compare_selections(
    inputs: tuple[Tensor, ...], *arguments: Any, pool: int | Fraction = 0
) -> None:
    """Compare `index_topk` of both backends."""
    result = ops.index_topk(*inputs, *arguments, pool=pool, backend="triton")
    expected = ops.index_topk(*inputs, *arguments, pool=pool, backend="torch")
    need(torch.equal(result.ids, expected.ids), "the selection")
    if result.pool is not None and expected.pool is not None:
        need(torch.equal(result.pool, expected.pool), "the pool")


def index() -> None:
    for heads in (32, 64):
        compare_selections(index_inputs(40, 9300, heads), 300, 9000)
    compare_selections(index_inputs(40, 9300, 32), 300, 9000, pool=1200)
    compare_selections(index_inputs(40, 9300, 32, torch.bfloat16), 300, 9000)
    # Thresholds are too high, so rows are selected again.
    with ops.tuned(index={"deviations": -1.0}):
        compare_selections(index_inputs(40, 9300, 32), 300, 9000)
    q = torch.randn(1, 40, 32, 128, device="cuda").bfloat16()
    w = torch.ones(1, 40, 32, device="cuda")
    angle = torch.randn(1, 40, 32, device="cuda")
    options: dict[str, Any] = {"rotate": True, "cos_BSr": angle.cos(), "sin_BSr": angle.sin()}
    for interleaved in (False, True):
        ops.quantize_index_queries(q, w, interleaved=interleaved, backend="triton", **options)


def short() -> None:
    pool = ops.index_topk(*index_inputs(40, 900, 9), 200, 860, backend="torch").ids
    for heads in (9, 32):
        inputs = index_inputs(40, 900, heads, torch.bfloat16)
        compare_selections(inputs, 100, 860, pool=Fraction(1, 4))
        compare_selections(inputs, 100, 860, pool)


def rows() -> None:
    offset = torch.tensor([9200], device="cuda")
    compare_selections(index_inputs(1, 9300, 32), 300, offset)
    for count in (1, 40):
        x = torch.randn(count, 20000, device="cuda")
        expected = reference.select(x, torch.ones_like(x, dtype=torch.bool), 2048)
        need(torch.equal(topk_host.topk_rows(x, 2048)[0], expected), "a row")
    for size in (1000, 9100):
        pool = random_ids(1, 1, size, keys=9200)
        compare_selections(index_inputs(1, 9300, 32), 200, offset, pool)


def pools() -> None:
    ids = random_ids(1, 8, 8200, keys=40000)
    result = ops.group_queries(ids, 4, backend="triton")
    expected = ops.group_queries(ids, 4, backend="torch")
    for a, b in zip(result, expected, strict=True):
        need(not isinstance(a, Tensor) or torch.equal(a, b), "the groups")
    pool = ops.index_topk(*index_inputs(33, 9300, 32), 9000, 9000, backend="torch").ids
    for grouped, deviations in ((True, 5.0), (True, -1.0), (False, 5.0)):
        changes = {"listed": 512, "stride": 4, "grouped_pools": grouped, "deviations": deviations}
        with ops.tuned(index=changes):
            inputs = index_inputs(33, 9300, 32)
            compare_selections(inputs, 200, 9000, pool[..., :700].contiguous())


def attention(hopper: bool) -> None:
    for heads, queries in ((20, 7), (64, 3)):
        q = torch.randn(1, queries, heads, 576, device="cuda").bfloat16()
        latent = torch.randn(1, 900, 576, device="cuda").bfloat16()
        ids = random_ids(1, queries, 200, keys=900)
        group = mla_host.best_group(heads)
        groups = ops.group_queries(ids, group, backend="triton") if group > 1 else None
        with ops.tuned(mla={"hopper": hopper, "programs": 1}):
            out, _ = ops.sparse_mla(q, latent, ids, 0.04, groups=groups, backend="triton")
        expected = reference.sparse_mla(q.float(), latent.float(), ids, 0.04)[0]
        need(relative(out, expected) < 1e-2, "attention")
    if hopper:
        return
    with ops.tuned(mla={"hopper": False}):
        one = q[:, :1].contiguous(), latent, ids[:, :1].contiguous()
        ops.sparse_mla(*one, 0.04, backend="triton")
        for deterministic in (False, True):
            leaves = [x.clone().requires_grad_() for x in (q, latent)]
            options: dict[str, Any] = {"backend": "triton", "deterministic": deterministic}
            ops.sparse_mla(*leaves, ids, 0.04, **options)[0].sum().backward()


def paged() -> None:
    for group, words in ((3, 8192), (8, 64)):
        ids = random_ids(33, 200, keys=9000).flip(-1)
        requests = torch.tensor([0] * 20 + [1] * 2 + [2] * 11, device="cuda").int()
        table = torch.randperm(500, device="cuda")[:423].view(3, 141).int()
        with mock.patch.object(pages_host, "WORDS", words):
            result = ops.group_pages(ids, requests, table, group, page_rows=128, backend="triton")
        expected = ops.group_pages(ids, requests, table, group, page_rows=128, backend="torch")
        for a, b in zip(result, expected, strict=True):
            need(not isinstance(a, Tensor) or torch.equal(a, b), "the paged groups")
    q, positions = torch.randn(33, 5, 80, device="cuda"), torch.arange(33, device="cuda")
    table = torch.randn(40, 32, device="cuda")
    rotary.rotate_pairs(q[None, ..., :64], *(q[None, :, 0, :64],) * 2, interleaved=True)
    turned = rotary.rotate_queries(q[..., :64], positions, table, interleaved=False)
    cos, sin = table[:33, None].chunk(2, -1)
    close = torch.allclose(turned, reference.rope(q[..., :64], cos, sin, interleaved=False))
    need(close, "the turned queries")


def step() -> None:
    def half(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16() * 0.1

    def compare(name: str, *arguments: Any, **options: Any) -> None:
        call = getattr(step_ops, name)
        got, want = (call(*arguments, **options, backend=b) for b in ("triton", "torch"))
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for a, b in pairs:
            need(a is b is None or relative(a.float(), b.float()) < 2e-2, name)

    x, key_value = half(300), half(5, 72, 64)
    position = torch.tensor([7], device="cuda")
    norm = half(300), 1e-5
    weights = [half(24, 300), half(8, 300), half(16, 300), half(8, 300)]
    for pdl in (True, False):
        with ops.tuned(step={"pdl": pdl}):
            compare("products", x, weights, norm=norm, normed=True)
            compare("products", x, weights[:1], add=half(24), dtype=torch.float32)
            compare("products", half(5, 64), [key_value[:, 40:]])
            rope = half(16), half(16)
            latent = half(72 + 8), (half(64), 1e-5), rope, position, half(9, 80)
            compare("absorb", half(5, 56), key_value[:, :40], *latent)
            ids = torch.arange(9, device="cuda").int()
            compare("attend", half(5, 80), half(9, 80), ids, 0.1, key_value[:, 40:])
            keys = torch.zeros(9, 64, device="cuda").to(torch.float8_e4m3fn)
            index = half(8, 64), half(64), x, torch.randn(8, 300, device="cuda")
            norms = half(64), half(64), 1e-6
            where = position, keys, torch.zeros(9, device="cuda")
            compare("index_rows", *index, norms, rope, 0.5, True, *where)
            logits = torch.randn(12, device="cuda"), torch.randn(12, device="cuda")
            experts = half(12, 80, 300), half(12, 300, 40)
            shared = half(48, 300), half(48, 300), half(300, 48)
            compare("experts", x, half(300), *logits, *experts, shared, 4, True, 1.8)


def linear() -> None:
    def blocks(*shape: int) -> tuple[Tensor, Tensor]:
        *leading, n, k = shape
        scale = torch.rand(*leading, -(-n // 128), -(-k // 128), device="cuda") * 0.1
        return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn), scale

    for tokens, width in ((1, 256), (3, 200), (300, 136), (40, 256)):
        x = torch.randn(tokens, width, device="cuda").bfloat16()
        matrix = blocks(130, width)
        weights = blocks(5, 2, 160, width) + blocks(5, width, 160)
        liked = torch.rand(tokens, 5, device="cuda").topk(2)
        chosen = liked.indices, liked.values
        for quantized in (False, True):
            products: list[list[Tensor]] = []
            for backend in ("triton", "torch"):
                to: dict[str, Any] = {"quantized_inputs": quantized, "backend": backend}
                one = ops.block_linear(x, *matrix, **to)
                products.append([one, ops.gated_experts(x, *weights, *chosen, **to)])
            for result, expected in zip(*products, strict=True):
                need(relative(result.float(), expected.float()) < 3e-2, "a product")


def distill() -> None:
    def small(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda") * 0.1

    shapes = (150, 3, 256), (150, 448), (3, 64, 256)
    tensors = [[small(*shape) for shape in shapes] for _ in range(2)]
    inputs = small(150, 4, 256), small(150, 256), small(150, 4)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        targets = [ops.AttentionTarget(*(x.to(dtype) for x in t), 0.06) for t in tensors]
        gradients = []
        for backend in ("triton", "torch"):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            # A chunk has 128 rows, so that there is a second chunk, which is not full.
            with ops.tuned(backend=backend, kl={"rows": 128}):
                loss = distill_loss(*leaves, targets)
            gradients.append(torch.autograd.grad(loss, leaves))
        for result, expected in zip(*gradients, strict=True):
            need(relative(result, expected) < limit, f"a gradient in {dtype}")


def control(all_arrive: bool) -> None:
    need(dispatch.run(all_arrive), "the control kernel")


TASKS: dict[str, Callable[[], None]] = {
    "index": index,
    "short": short,
    "rows": rows,
    "pools": pools,
    "plain": partial(attention, hopper=False),
    "gluon": partial(attention, hopper=True),
    "paged": paged,
    "step": step,
    "linear": linear,
    "distill": distill,
    "dispatch": partial(control, all_arrive=False),
    "dispatch-all": partial(control, all_arrive=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    task = parser.parse_args().task
    torch.manual_seed(0)
    launched = watch_launches()
    TASKS[task]()
    torch.cuda.synchronize()
    print(f"{task}: {', '.join(sorted(launched))}")
    missing = KERNELS[task] - launched
    if missing:
        print(f"not launched: {', '.join(sorted(missing))}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
