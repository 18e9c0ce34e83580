"""Test the kernels of sparse MLA, query groups and quantisation against the definition."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.ops import groups as group_kernels  # noqa: E402
from indexcache.ops import pages as page_kernels  # noqa: E402
from indexcache.ops.mla import host  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # The interpreter's bf16 products are wrong.


def random_ids(batch, queries, keys, k, empty=()):
    """Draw ascending ids, -1 padded, of which neighbouring rows share most."""
    noise = torch.rand(batch, 1, keys, device=DEVICE) + 0.2 * torch.rand(
        batch, queries, keys, device=DEVICE
    )
    n = min(k, keys)
    ids = noise.topk(n, dim=-1).indices.sort(dim=-1).values.int()
    ids = torch.nn.functional.pad(ids, (0, k - n), value=-1)
    for s in empty:
        ids[:, s] = -1
    for s in range(1, queries, 5):
        ids[:, s, max(n // 2, 1) :] = -1
    return ids


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize(
    ("queries", "k", "group"), [(1, 1, 3), (63, 16, 3), (25, 33, 4), (10, 8, 8), (7, 5, 1)]
)
@pytest.mark.parametrize("words", [None, 1, 2])
def test_groups(queries, k, group, words, monkeypatch):
    """words: number of words in a window of bitmaps; None uses binary searches."""
    if words:
        for name, value in {"LONG": 1, "WORDS": words, "BLOCK": 64}.items():
            monkeypatch.setattr(group_kernels, name, value)
    ids = random_ids(2, queries, 40, k, empty=(0,))
    got, want = (
        ops.group_queries(ids, group, backend="triton"),
        ops.group_queries(ids, group, backend="torch"),
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize(("queries", "k", "group"), [(9, 33, 4), (10, 8, 8), (1, 1, 3)])
def test_groups_by_atomics(queries, k, group, monkeypatch):
    """The tuning sends short lists through bitmaps, here in windows of two words."""
    monkeypatch.setattr(page_kernels, "SLICE", 4)
    monkeypatch.setattr(page_kernels, "WORDS", 2)
    ids = random_ids(2, queries, 140, k, empty=(0,))
    with ops.tuned(index={"bitmaps_from": 3}):
        got = ops.group_queries(ids, group, backend="triton")
    want = ops.group_queries(ids, group, backend="torch")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize(
    ("k", "group"),
    [(512, 4), (2048, 3), (2048, 8), (1024, 1), (3000, 2), (4095, 5), (4096, 3), (16384, 4)],
)
def test_groups_large(k, group):
    """Rows of a power of two, at least 512, are searched in assembly."""
    ids = random_ids(2, 31, 20000, k, empty=(0, 7))
    want = ops.group_queries(ids, group, backend="torch")
    for bitmaps_from in (1, 9):
        with ops.tuned(index={"bitmaps_from": bitmaps_from}):
            got = ops.group_queries(ids, group, backend="triton")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("heads", [8, 20, 64])
@pytest.mark.parametrize("grouped", [False, True])
def test_forward(heads, grouped):
    q = torch.randn(2, 9, heads, 48, device=DEVICE).to(HALF)
    latent = torch.randn(2, 63, 48, device=DEVICE).to(HALF)
    ids = random_ids(2, 9, 60, 40, empty=(0, 4))
    latent[:, 60:] = torch.nan  # No id selects these.
    # 64 programs share the ids of a query, and two of them its 20 heads.
    rows = 16 if heads == 20 else 64
    with ops.tuned(mla={"programs": 1 if grouped else 64, "keys": 16, "decode_rows": rows}):
        got, lse = ops.sparse_mla(q, latent, ids, 0.2, value_dim=32, backend="triton")
    want, want_lse = ops.sparse_mla(
        q.float(), latent.float(), ids, 0.2, value_dim=32, backend="torch"
    )
    assert relative(got, want) < 1e-2
    torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2)
    assert got[:, 0].eq(0).all()


def test_forward_ids_in_any_order():
    q, latent = (
        torch.randn(1, 2, 4, 48, device=DEVICE).to(HALF),
        torch.randn(1, 63, 48, device=DEVICE).to(HALF),
    )
    ids = random_ids(1, 2, 63, 20).flip(-1)
    got, _ = ops.sparse_mla(q, latent, ids, 0.2, value_dim=32, backend="triton")
    assert (
        relative(
            got,
            ops.sparse_mla(q.float(), latent.float(), ids, 0.2, value_dim=32, backend="torch")[0],
        )
        < 1e-2
    )


@pytest.mark.parametrize(("queries", "k", "keys"), [(1, 1, 1), (0, 4, 9), (3, 4, 2)])
@pytest.mark.parametrize("rotary", [16, 40])
def test_forward_small(queries, k, keys, rotary):
    q, latent = (
        torch.randn(1, *s, 32 + rotary, device=DEVICE).to(HALF) for s in ((queries, 4), (keys,))
    )
    ids = random_ids(1, queries, keys, k)
    got, _ = ops.sparse_mla(q, latent, ids, 0.2, value_dim=32, backend="triton")
    want, _ = ops.sparse_mla(q.float(), latent.float(), ids, 0.2, value_dim=32, backend="torch")
    assert got.shape == want.shape
    assert relative(got, want) < 1e-2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [3, 20])
def test_backward(heads, deterministic):
    ids = random_ids(2, 7, 30, 12, empty=(0, 5))
    q, latent = (
        torch.randn(2, 7, heads, 48, device=DEVICE).to(HALF),
        torch.randn(2, 31, 48, device=DEVICE).to(HALF),
    )
    weight = torch.randn(2, 7, heads, 32, device=DEVICE)
    grads = []
    for backend, dtype in (("triton", HALF), ("torch", torch.float32)):
        a, b = (t.detach().clone().to(dtype).requires_grad_() for t in (q, latent))
        options = {"value_dim": 32, "deterministic": deterministic, "backend": backend}
        with ops.tuned(mla={"backward_keys": 16}):
            out, _ = ops.sparse_mla(a, b, ids, 0.2, **options)
            (out.float() * weight).sum().backward()
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        assert relative(got, want) < 2e-2
    assert grads[0][1][:, 30].eq(0).all()


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize(rotate, interleaved, dtype):
    k, angle = torch.randn(2, 9, 32, device=DEVICE), torch.randn(2, 9, 8, device=DEVICE)
    k[0, 3], k[1, 4, 5] = 0, torch.nan
    k[0, :3] *= torch.tensor([1e-33, 1e30, 3e4], device=DEVICE)[:, None]
    k = k.to(dtype)
    rope = {}
    if interleaved is not None:
        rope = {"cos_BTr": angle.cos(), "sin_BTr": angle.sin(), "interleaved": interleaved}
    got, scale = ops.quantize_index_keys(k, rotate=rotate, backend="triton", **rope)
    want, want_scale = ops.quantize_index_keys(k, rotate=rotate, backend="torch", **rope)
    # RoPE rounds to bf16, and the two paths may round differently.
    rounded = dtype == torch.bfloat16 and interleaved is not None
    torch.testing.assert_close(
        scale, want_scale, rtol=8e-3 if rounded else 1e-3, atol=0, equal_nan=True
    )
    got, want = got.float(), want.float()
    got[1, 4] = want[1, 4] = 0
    if not GPU:
        # The interpreter loses the carry when a mantissa rounds up to the next power of two.
        carried = want.abs() == 2 * got.abs()
        assert (carried & (want != 0)).float().mean() < 0.1
        got = torch.where(carried, want, got)
    # The interpreter truncates to bf16.
    assert relative(got, want) < (5e-2 if rounded and not GPU else 2e-2)


def test_refusals():
    q, latent = torch.randn(1, 2, 1, 48, device=DEVICE), torch.randn(1, 9, 48, device=DEVICE)
    with pytest.raises(ValueError, match="24 is not a power of two"):
        ops.sparse_mla(
            q,
            latent,
            torch.zeros(1, 2, 1, dtype=torch.int32, device=DEVICE),
            1.0,
            value_dim=24,
            backend="triton",
        )
    q, latent = torch.randn(1, 2, 1, 704, device=DEVICE), torch.randn(1, 9, 704, device=DEVICE)
    with pytest.raises(ValueError, match="512 \\+ 192 dims"):
        ops.sparse_mla(
            q,
            latent,
            torch.zeros(1, 2, 1, dtype=torch.int32, device=DEVICE),
            1.0,
            value_dim=512,
            backend="triton",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("heads", [8, 20, 64, 128])
@pytest.mark.parametrize("queries", [1, 63, 257, 2049])
def test_large(heads, queries):
    q, latent = (
        torch.randn(1, *shape, device=DEVICE).bfloat16()
        for shape in ((queries, heads, 576), (8193, 576))
    )
    ids = torch.cat([random_ids(1, min(64, queries), 8193, 2048)] * -(-queries // 64), dim=1)[
        :, :queries
    ].contiguous()
    got = [ops.sparse_mla(q, latent, ids, 576**-0.5, backend="triton")[0] for _ in range(2)]
    assert torch.equal(*got)
    want = ops.sparse_mla(q.float(), latent.float(), ids, 576**-0.5, backend="torch")[0]
    assert relative(got[0], want) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(
    not GPU or torch.cuda.get_device_capability()[0] != 9,
    reason="the Gluon kernel needs a Hopper GPU",
)
@pytest.mark.parametrize(
    ("heads", "grouped"), [(20, True), (64, False), (128, False), (20, False), (8, True)]
)
@pytest.mark.parametrize("queries", [1, 63, 257, 2049])
def test_hopper(heads, grouped, queries):
    """The Gluon kernel agrees with the plain one and the definition."""
    q, latent = (
        torch.randn(2, *shape, device=DEVICE).bfloat16()
        for shape in ((queries, heads, 576), (2055, 576))
    )
    latent[:, 2048:] = torch.nan  # No id selects these.
    q[:, 1::2] *= 8  # Their maxima grow so much that the kernel must rescale.
    distinct = min(64, queries)
    empty = [s for s in (0, *range(6, 15)) if s < distinct]
    ids = random_ids(2, distinct, 2048, 777, empty=empty)
    ids = torch.cat([ids] * -(-queries // 64), dim=1)[:, :queries]
    # Only groups need ascending ids.
    ids = ids.contiguous() if grouped else ids.flip(-1).contiguous()
    groups = ops.group_queries(ids, host.best_group(heads)) if grouped else None
    results = []
    for hopper in (True, True, False):
        with ops.tuned(mla={"hopper": hopper, "programs": 1}):  # One program never splits the ids.
            results.append(host.launch_forward(q, latent, ids, 576**-0.5, 512, groups))
    (got, lse), again, (plain, plain_lse) = results
    assert torch.equal(got, again[0])
    assert torch.equal(lse, again[1])
    assert relative(got, plain) < 5e-3
    torch.testing.assert_close(lse, plain_lse, rtol=1e-4, atol=1e-4)
    want, want_lse = ops.sparse_mla(q.float(), latent.float(), ids, 576**-0.5, backend="torch")
    assert relative(got, want) < 1e-2
    assert torch.equal(lse.isinf(), want_lse.isinf())
    assert got[:, 0].eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(
    not GPU or torch.cuda.get_device_capability()[0] != 9,
    reason="the Gluon kernel needs a Hopper GPU",
)
@pytest.mark.parametrize("heads", [20, 16, 8])
def test_queries_in_two_parts(heads):
    """Queries as an engine's product leaves them give the bits of queries in one tensor.

    The queries are many enough that no program splits its ids, which rounds otherwise.
    """
    values = torch.randn(heads, 1025, 512, device=DEVICE).bfloat16().transpose(0, 1)
    rope = torch.randn(1025, heads, 64, device=DEVICE).bfloat16()
    latent = torch.randn(2048, 576, device=DEVICE).bfloat16()
    ids = random_ids(1, 1025, 2048, 512)
    groups = ops.group_queries(ids, host.best_group(heads))
    assert host.takes_parts((values, rope), latent, 0.04, 512)
    assert not host.takes_parts((values, rope[:, :, ::2]), latent, 0.04, 512)
    got = host.attend_parts((values, rope), latent, 0.04, groups)
    both = torch.cat([values, rope], -1)[None]
    want, _ = host.launch_forward(both, latent[None], ids, 0.04, 512, groups)
    assert torch.equal(got, want[0])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("heads", [20, 128])
def test_backward_large(heads):
    ids = random_ids(1, 63, 4096, 512)
    q, latent = (
        torch.randn(1, 63, heads, 576, device=DEVICE).bfloat16(),
        torch.randn(1, 4096, 576, device=DEVICE).bfloat16(),
    )
    weight, grads = torch.randn(1, 63, heads, 512, device=DEVICE), []
    for backend, dtype, exact in (
        ("triton", torch.bfloat16, True),
        ("triton", torch.bfloat16, True),
        ("triton", torch.bfloat16, False),
        ("torch", torch.float32, False),
    ):
        a, b = (t.detach().clone().to(dtype).requires_grad_() for t in (q, latent))
        out, _ = ops.sparse_mla(a, b, ids, 576**-0.5, deterministic=exact, backend=backend)
        (out.float() * weight).sum().backward()
        grads.append((a.grad, b.grad))
    for first, second, atomic, want in zip(*grads, strict=True):
        assert torch.equal(first, second)
        assert relative(first, want) < 2e-2
        assert relative(atomic, want) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("heads", [20, 128])
@pytest.mark.parametrize("queries", [1, 200])
def test_fp32_fits_shared_memory(heads, queries):
    ids = torch.cat([random_ids(1, min(queries, 50), 4096, 512)] * -(-queries // 50), dim=1)
    q, latent = (
        torch.randn(1, queries, heads, 576, device=DEVICE),
        torch.randn(1, 4096, 576, device=DEVICE),
    )
    weight = torch.randn(1, queries, heads, 512, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):
        a, b = (t.clone().requires_grad_() for t in (q, latent))
        out, _ = ops.sparse_mla(a, b, ids, 576**-0.5, backend=backend)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), (a, b))))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-4
