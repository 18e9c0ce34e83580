"""Test the products of one token against their definition, in the interpreter."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.ops import step  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # The interpreter rounds to bf16 wrongly.
BOTH = ("triton", "torch")


def randn(*shape, seed=0, dtype=HALF):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(a, b, tolerance=4e-3):
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert a.dtype == b.dtype and a.shape == b.shape
    assert error < tolerance, float(error)


@pytest.mark.parametrize(
    ("width", "rows", "options"),
    [
        (96, (24,), {}),
        (128, (16, 8), {"norm": True, "normed": True}),
        (80, (6, 4, 2, 14), {"norm": True, "normed": True, "dtype": torch.float32}),
        (640, (32,), {"add": True}),
        (50, (7, 3), {"norm": True}),  # one row a program
    ],
)
def test_products(width, rows, options):
    """Widths that are no powers of two, and rows of several weights."""
    x = randn(width)
    weights = [randn(n, width, seed=i) for i, n in enumerate(rows)]
    options = dict(options)
    if options.pop("norm", False):
        options["norm"] = (randn(width, seed=9), 1e-5)
    if options.pop("add", False):
        options["add"] = randn(sum(rows), seed=8)
    with ops.tuned(step={"tile": 512, "columns": 64}):
        got, want = (step.products(x, weights, **options, backend=b) for b in BOTH)
    close(got[0], want[0])
    assert (got[1] is None) == (want[1] is None) == (not options.get("normed"))
    if want[1] is not None:
        close(got[1], want[1])


def test_products_of_heads():
    """Each head has a vector of its own, and its weights lie apart in memory."""
    whole = randn(3, 24, 48)
    got, want = (step.products(randn(3, 48), [whole[:, 8:]], backend=b)[0] for b in BOTH)
    close(got, want)


def test_absorb():
    heads, nope, rotary, width = 3, 24, 8, 64
    whole = randn(heads, nope + 16, width)
    inputs = randn(heads, nope + rotary), whole[:, :nope], randn(width + rotary)
    angle = randn(rotary // 2, dtype=torch.float32).repeat(2)
    rope = angle.cos().to(HALF), angle.sin().to(HALF)
    results = []
    for backend in BOTH:
        latents = torch.full((5, width + rotary), 7.0, device=DEVICE, dtype=HALF)
        norm = randn(width), 1e-6
        position = torch.tensor([3], device=DEVICE)
        results.append(step.absorb(*inputs, norm, rope, position, latents, backend=backend))
        results.append(latents)
        assert bool((latents[[0, 1, 2, 4]] == 7).all())
    close(results[0], results[2])
    close(results[1], results[3])


@pytest.mark.parametrize(("count", "splits"), [(40, 64), (40, 2), (16, 64), (7, 64)])
def test_attend(count, splits):
    """Lists that do not fill their splits, with ids that are none, some splits without any."""
    heads, width, rotary, inner = 5, 32, 16, 24
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:count].int()
    ids[count // 2 :: 3] = -1
    if count == 40:
        ids[16:32] = -1
    ids = ids.to(DEVICE)
    w = randn(heads, 8 + inner, width)[:, 8:]
    inputs = randn(heads, width + rotary), randn(60, width + rotary), ids, 0.2, w
    with ops.tuned(mla={"decode_keys": 16, "splits": splits}, step={"value_rows": 16}):
        got, want = (step.attend(*inputs, backend=b) for b in BOTH)
        close(got, want)
        nothing = torch.full_like(ids, -1)
        assert not step.attend(*inputs[:2], nothing, 0.2, w, backend="triton").any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_index_rows(interleaved):
    """Bytes are those of the two operations that this one replaces, up to rounding of a scale."""
    heads, dim, rotary = 3, 32, 16
    q, k, x = randn(heads, dim), randn(dim), randn(40)
    weights = randn(heads, 40, dtype=torch.float32)
    w = weights @ x.float()
    norm = randn(dim, seed=1), randn(dim, seed=2), 1e-6
    angle = randn(rotary // 2, dtype=torch.float32).repeat(2)
    rope = angle.cos().to(HALF), angle.sin().to(HALF)
    results = []
    for backend in BOTH:
        keys = torch.zeros(6, dim, device=DEVICE).to(torch.float8_e4m3fn)
        scales = torch.zeros(6, device=DEVICE)
        where = torch.tensor([4], device=DEVICE), keys, scales
        out = step.index_rows(
            q, k, x, weights, norm, rope, 0.25, interleaved, *where, backend=backend
        )
        results.append([*out, keys, scales])
        assert bool((scales[[0, 1, 2, 3, 5]] == 0).all()) and float(scales[4]) > 0
    (q1, w1, keys1, scales1), (q2, w2, keys2, scales2) = results
    close(w1, w2, 1e-5)
    close(scales1, scales2, 1e-5)
    close(q1.float() * w1[:, None], q2.float() * w2[:, None], 4e-2)
    close(keys1.float(), keys2.float(), 4e-2)
    cos, sin = (t[None, None, : rotary // 2].float() for t in rope)
    options = {"rotate": True, "cos_BSr": cos, "sin_BSr": sin, "interleaved": interleaved}
    q3, w3 = ops.quantize_index_queries(q[None, None], w[None, None] * 0.25, **options)
    close(w2, w3[0, 0], 5e-3)
    close(q2.float() * w2[:, None], q3[0, 0].float() * w3[0, 0, :, None], 4e-2)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_experts(normalise, ties):
    """Shared experts of another width, and logits that tie: the first of equal ones is chosen."""
    count, hidden, inner, shared, topk = 6, 48, 24, 40, 3
    logits = randn(count, dtype=torch.float32)
    if ties:
        logits = torch.tensor([0.5, -1.0, 2.0, 0.5, 0.5, -1.0], device=DEVICE)
    bias = torch.zeros(count, device=DEVICE) if ties else randn(count, seed=3, dtype=torch.float32)
    weights = randn(count, 2 * inner, hidden), randn(count, hidden, inner)
    others = tuple(
        randn(*s, seed=4) for s in ((shared, hidden), (shared, hidden), (hidden, shared))
    )
    inputs = randn(hidden, seed=5), randn(hidden, seed=6), logits, bias, *weights, others
    with ops.tuned(step={"tile": 256, "down_tile": 128, "columns": 64}):
        got, want = (step.experts(*inputs, topk, normalise, 1.8, backend=b) for b in BOTH)
    close(got, want)
    nothing = torch.full((count,), torch.nan, device=DEVICE)
    assert (
        step.experts(*inputs[:2], nothing, *inputs[3:], topk, True, 1.0, backend="triton")
        .isnan()
        .all()
    )
