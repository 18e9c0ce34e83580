"""Test the turning and quantising of a step's queries against the definition."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache.ops import rotary  # noqa: E402
from indexcache.ops.reference import FP8, rope  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16


def step(tokens, heads, dim, rotary_dim, *, seed=0):
    """Make queries inside a wider tensor, positions out of order, and a table of cos and sin."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(tokens, heads, dim + 16, generator=generator).to(HALF)
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    angles = torch.rand(50, rotary_dim // 2, generator=generator) * 7
    table = torch.cat([angles.cos(), angles.sin()], 1)
    weights = torch.randn(tokens, heads, generator=generator).to(HALF)
    wide[0], wide[-1, 0] = 0.0, 3e4  # nothing, and values that e4m3 holds by their scale alone
    q = wide.to(DEVICE)[..., 16:]
    return q, positions.to(DEVICE), table.to(DEVICE), weights.to(DEVICE)


def turned(q, positions, table, interleaved):
    cos, sin = table[positions][:, None].chunk(2, -1)
    return rope(q.float(), cos, sin, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(19, 5, 64), (16, 1, 64), (1, 3, 32)])
def test_queries(tokens, heads, dim, interleaved):
    q, positions, table, _ = step(tokens, heads, dim, dim)
    got = rotary.rotate_queries(q, positions, table, interleaved=interleaved)
    assert got.is_contiguous() and got.dtype == HALF
    want = turned(q, positions, table, interleaved)
    torch.testing.assert_close(got.float(), want, rtol=2e-3 if not GPU else 8e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "dim"), [(3, 192), (1, 64), (5, 8)])
def test_pairs_have_the_bits_of_transformers(heads, dim, batch):
    """Both functions, on dims inside of wider tensors, with one set of angles for all sequences."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as stock

    generator = torch.Generator().manual_seed(heads)
    wide = torch.randn(batch, 7, heads, dim + 16, generator=generator).to(HALF).to(DEVICE)
    angles = torch.rand(1, 7, dim // 2, generator=generator) * 7
    angles = torch.cat([angles, angles], -1).to(DEVICE)
    cos, sin = (t.to(HALF).expand(batch, -1, -1) for t in (angles.cos(), angles.sin()))
    x = wide[..., 16:]
    for function, interleaved in (
        (stock.apply_rotary_pos_emb_interleave, True),
        (stock.apply_rotary_pos_emb, False),
    ):
        want, _ = function(x, x[:, :, :1], cos, sin, unsqueeze_dim=2)
        got = rotary.rotate_pairs(x, cos, sin, interleaved=interleaved)
        assert got.is_contiguous() and torch.equal(got, want)
    assert rotary.rotate_pairs(x[:, :0], cos[:, :0], sin[:, :0], interleaved=True).shape[1] == 0


def test_the_fast_path_takes_the_kernel_where_it_gives_the_bits(monkeypatch):
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as stock

    from indexcache.models.fast import rotate

    monkeypatch.setattr(rotate, "has_kernels", lambda x: True)
    launched = []
    pairs = rotary.rotate_pairs
    monkeypatch.setattr(
        rotary, "rotate_pairs", lambda *a, **k: launched.append(a[0].shape) or pairs(*a, **k)
    )
    fused = rotate.fused_rotate(stock.apply_rotary_pos_emb_interleave, True)
    q, k, cos = (torch.randn(1, 5, *n, device=DEVICE).to(HALF) for n in ((3, 16), (1, 16), (16,)))
    cos[..., 8:] = cos[..., :8]
    for dtype, runs in ((HALF, True), (torch.float32, False)):
        launched.clear()
        inputs = tuple(t.to(dtype) for t in (q, k, cos, cos))
        got = fused(*inputs, unsqueeze_dim=2)
        want = stock.apply_rotary_pos_emb_interleave(*inputs, unsqueeze_dim=2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert launched == ([q.shape, k.shape] if runs else [])
    with torch.enable_grad():
        fused(q.clone().requires_grad_(), k, cos, cos, unsqueeze_dim=2)
    assert not launched


@pytest.mark.parametrize("interleaved", [True, False])
def test_index_queries(interleaved):
    q, positions, table, weights = step(21, 5, 128, 64)
    got, scaled = rotary.rotate_index_queries(
        q, weights, positions, table, (0.25, 0.5), interleaved=interleaved
    )
    want = turned(q, positions, table, interleaved)
    scale = (want.abs().amax(-1).clamp_min(1e-4) / 448).log2().ceil().exp2()
    assert got.dtype == FP8
    exact = (want / scale[..., None]).to(FP8).float()
    # The interpreter rounds some values wrongly that go up to the next power of two.
    assert (got.float() == exact).float().mean() > 0.97
    torch.testing.assert_close(got.float(), exact, rtol=0.13 if GPU else 0.51, atol=0.02)
    torch.testing.assert_close(scaled, weights.float() * scale * 0.125)


def test_no_tokens():
    q, positions, table, weights = step(2, 3, 64, 64)
    none = rotary.rotate_index_queries(
        q[:0], weights[:0], positions[:0], table, (1.0, 1.0), interleaved=True
    )
    assert [tuple(x.shape) for x in none] == [(0, 3, 64), (0, 3)]
