"""Test products with FP8 weights, and gated experts, against dequantised copies."""

import os

import pytest
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.models.fp8 import dequantize  # noqa: E402
from indexcache.ops.linear import host  # noqa: E402
from indexcache.ops.linear.reference import dequantized, quantize_inputs  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # The interpreter's bf16 products are wrong.
LIMIT = 8e-3 if GPU else 2e-3  # Weights, inner values and results are rounded.
BLOCK = (128, 128)
quantized_by_kernel = host._quantized


@pytest.fixture(autouse=True)
def few_programs():
    """Let programs be large, which the interpreter runs one after the other."""
    with ops.tuned(linear={} if GPU else {"few_programs": 1, "few_rows": 64}):
        yield


def blocks(*shape, seed=0, zero=False):
    """Make a weight in FP8 and its scales, which differ tenfold from block to block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    *leading, n, k = shape
    scale = torch.rand(*leading, -(-n // 128), -(-k // 128), generator=generator) * 0.09 + 0.01
    if zero:
        scale[..., 0, 0] = 0
    return weight.to(DEVICE), scale.to(DEVICE)


def inputs(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, HALF)


def relative(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [(1, 130, 64), (3, 8, 200), (4, 140, 128), (5, 130, 136), (40, 96, 256), (300, 136, 128)],
)
def test_linear(tokens, n, k):
    """Whole and partial blocks and tiles, by both kernels."""
    weight, scale = blocks(n, k, zero=tokens == 4)
    x = inputs(1, tokens, k)
    expected = F.linear(x.float(), dequantize(weight, scale, BLOCK))
    got = ops.block_linear(x, weight, scale, backend="triton")
    assert got.dtype == HALF and got.shape == (1, tokens, n)
    assert relative(got, expected) < LIMIT
    assert torch.equal(got, ops.block_linear(x, weight, scale, backend="triton"))
    wide = torch.cat([x, x], -1)[..., :k]  # as the projections of attention slice them
    assert torch.equal(got, ops.block_linear(wide, weight, scale, backend="triton"))
    plain = dequantize(weight, scale, BLOCK, HALF)
    for described in (False, True):
        with ops.tuned(linear={"described": described}):
            got = ops.block_linear(x, plain, None, backend="triton")
        assert relative(got, expected) < LIMIT


def experts(x, inner, count, each, tokens, *, unused=()):
    """Make weights of experts, and a choice of some of them for each token."""
    gate_up = blocks(count, 2, inner, x, seed=2)
    down = blocks(count, x, inner, seed=3)
    generator = torch.Generator().manual_seed(4)
    liked = torch.rand(tokens, count, generator=generator)
    liked[:, list(unused)] = -1
    weights, indices = liked.topk(each)
    return (*gate_up, *down, indices.to(DEVICE), weights.to(DEVICE))


def looped(x, gate_up, gate_up_scale, down, down_scale, indices, weights):
    """Run each token by itself, over dequantised weights."""
    gate_up, down = dequantize(gate_up, gate_up_scale, BLOCK), dequantize(down, down_scale, BLOCK)
    rows = []
    for row, chosen, weight in zip(x.float(), indices.tolist(), weights.float(), strict=True):
        each = [down[e] @ (F.silu(gate_up[e, 0] @ row) * (gate_up[e, 1] @ row)) for e in chosen]
        rows.append((torch.stack(each) * weight[:, None]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("tokens", "width", "inner", "count", "each"),
    [(1, 32, 160, 4, 2), (3, 200, 16, 5, 3), (40, 136, 160, 4, 2), (9, 64, 64, 3, 1)],
)
def test_experts(tokens, width, inner, count, each):
    """The halves of gate_up have blocks of their own: 160 rows are one and a quarter."""
    x = inputs(tokens, width)
    given = experts(width, inner, count, each, tokens, unused=(1,))
    expected = looped(x, *given)
    assert relative(ops.gated_experts(x, *given, backend="torch"), expected) < LIMIT
    got = ops.gated_experts(x, *given, backend="triton")
    assert got.dtype == HALF and relative(got, expected) < LIMIT
    assert torch.equal(got, ops.gated_experts(x, *given, backend="triton"))
    gate_up, down = (dequantize(w, s, BLOCK, HALF) for w, s in (given[:2], given[2:4]))
    plain = (gate_up, None, down, None, *given[4:])
    for described in (False, True):
        with ops.tuned(linear={"described": described}):
            got = ops.gated_experts(x, *plain, backend="triton")
        assert relative(got, expected) < LIMIT


def test_quantized_inputs(monkeypatch):
    """Both backends round the inputs; without rounding they would differ by less than this."""
    if not GPU:  # The interpreter's casts to e4m3 lose the carry into the exponent.
        monkeypatch.setattr(host, "_quantized", quantize_inputs)
    x = inputs(5, 200)
    x[1, 128:] = 0
    weight, scale = blocks(130, 200)
    expected = ops.block_linear(x, weight, scale, quantized_inputs=True, backend="torch")
    got = ops.block_linear(x, weight, scale, quantized_inputs=True, backend="triton")
    assert relative(got, expected) < LIMIT
    assert 5e-3 < relative(ops.block_linear(x, weight, scale, backend="torch"), expected) < 0.1
    few = [ops.block_linear(x[:3], weight, scale, quantized_inputs=q) for q in (False, True)]
    assert torch.equal(*few)  # A few tokens are never quantised.
    # Numbers that e4m3 holds, so that a cast without a carry is right.
    exact = (torch.arange(600).view(3, 200) % 8).to(DEVICE, HALF) * torch.tensor(
        [[1], [0], [4]], device=DEVICE
    )
    exact[:, ::50] = 448 * (exact[:, 1:2] > 0)
    for a, b in zip(quantized_by_kernel(exact), quantize_inputs(exact), strict=True):
        assert torch.equal(a.float(), b.float())
    q, scales = quantize_inputs(x)
    assert scales[1, 1] == 1 and q.dtype == torch.float8_e4m3fn
    assert relative(q.float() * scales.repeat_interleave(128, -1)[:, :200], x) < 0.05
    given = experts(136, 160, 4, 2, 9)
    x = inputs(9, 136)
    expected = ops.gated_experts(x, *given, quantized_inputs=True, backend="torch")
    for described in (False, True):
        with ops.tuned(linear={"described": described}):
            got = ops.gated_experts(x, *given, quantized_inputs=True, backend="triton")
        assert relative(got, expected) < 1e-2


def test_the_definition_is_the_loader_s():
    for shape in ((256, 384), (130, 70), (3, 2, 160, 200)):
        weight, scale = blocks(*shape)
        for dtype in (torch.float32, torch.bfloat16):
            expected = (
                dequantize(weight.flatten(0, -3), scale.flatten(0, -3), BLOCK, dtype)
                if (len(shape) > 2)
                else dequantize(weight, scale, BLOCK, dtype)
            )
            assert torch.equal(dequantized(weight, scale, BLOCK, dtype).view_as(expected), expected)


def test_what_the_kernels_refuse():
    weight, scale = blocks(16, 64)
    for x, w, s, block, word in (
        (inputs(2, 64).float(), weight, scale, BLOCK, "float32"),
        (inputs(2, 64), weight, scale, (64, 64), "64 x 64"),
        (inputs(2, 64), weight, None, BLOCK, "without scales"),
        (inputs(2, 64), weight.to(HALF), scale, BLOCK, "with scales"),
        (inputs(2, 16), weight.t(), scale, BLOCK, "contiguous"),
    ):
        with pytest.raises(ValueError, match=word):
            ops.block_linear(x, w, s, block, backend="triton")
