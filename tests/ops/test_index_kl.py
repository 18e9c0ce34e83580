"""Test the kernels of `ops.index_kl` against the definition: small on a CPU, large on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.distilling.loss import distill_loss  # noqa: E402
from indexcache.ops import AttentionTarget, tuning  # noqa: E402
from indexcache.ops.kl import host  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def case(
    length, layers, *, heads=3, index_heads=4, dim=16, absorbed=True, dtype=torch.float32, seed=0
):
    g = torch.Generator().manual_seed(seed)

    def some(*shape, by=1.0):
        return (torch.randn(*shape, generator=g) * by).to(DEVICE, dtype)

    q, k, w = (
        some(length, index_heads, dim),
        some(length, dim),
        some(length, index_heads, by=0.3).float(),
    )
    if absorbed:
        targets = [
            AttentionTarget(
                some(length, heads, 10), some(length, 9), some(heads, 6, 5, by=0.4), 0.5
            )
            for _ in range(layers)
        ]
    else:
        targets = [
            AttentionTarget(some(length, heads, 20), some(length, 20), None, 0.2)
            for _ in range(layers)
        ]
    return q, k, w, targets


def both(q, k, w, targets, kind, weights=None, rows=None):
    """Return (loss, gradients) of the definition and of the kernels."""
    results = []
    for backend in ("torch", "triton"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, w)]
        with ops.tuned(backend=backend):
            loss = distill_loss(
                *leaves, targets, weights, objective=kind, block_bytes=rows and 8 * len(q) * rows
            )
        results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    return results


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture
def small(monkeypatch):
    """Make tiles small, and fill new memory with NaN."""
    changes = {
        name: tuning.Tile(value.queries // 4, value.keys // 2)
        for name, value in vars(tuning.current().kl).items()
        if isinstance(value, tuning.Tile)
    }
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    with ops.tuned(kl=changes | {"slice": 16, "rows": 64}):
        yield


@pytest.mark.parametrize("kind", ["multi", "avg"])
@pytest.mark.parametrize(
    ("length", "layers", "absorbed"),
    [(1, 1, True), (15, 2, False), (33, 1, True), (97, 3, True), (100, 2, False)],
)
def test_small(small, length, layers, absorbed, kind):
    q, k, w, targets = case(length, layers, absorbed=absorbed)
    (loss, want), (got_loss, got) = both(q, k, w, targets, kind)
    assert relative(got_loss, loss) < 1e-5 or length == 1
    assert abs(float(got_loss - loss)) < 1e-5 * max(length, 1)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-6


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((64, 32), (32, 64)),
        pytest.param((64, 32), (64, 64), marks=pytest.mark.long),
        pytest.param((32, 64), (64, 32), marks=pytest.mark.long),
    ],
)
def test_tiles_of_gradients_that_are_not_square(small, queries, keys):
    """In half precision tiles keep their sizes; the last chunk is not full."""
    by_keys = tuning.Tile(*keys)
    tiles = {"queries": tuning.Tile(*queries), "keys": by_keys, "keys_wide": by_keys}
    q, k, w, targets = case(131, 2, dtype=torch.bfloat16 if GPU else torch.float16)
    for rows in (64, 128):
        with ops.tuned(kl=tiles | {"rows": rows}):
            (loss, want), (got_loss, got) = both(q, k, w, targets, "multi")
        limit = 2e-2 if GPU else 3e-3
        assert relative(got_loss, loss) < limit
        assert all(relative(a, b) < limit for a, b in zip(got, want, strict=True))


def test_weights_of_layers_and_blocks_of_rows(small):
    q, k, w, targets = case(70, 2, dim=24)
    # Chunks are 32 and 64 rows; programs share the heads of a block of keys, or take several each.
    for rows, programs in ((33, 264), (64, 264), (64, 5)):
        with ops.tuned(kl={"programs": programs}):
            (loss, want), (got_loss, got) = both(q, k, w, targets, "multi", [0.3, 0.7], rows)
        assert relative(got_loss, loss) < 1e-5
        assert all(relative(a, b) < 2e-5 for a, b in zip(got, want, strict=True))


def test_inputs_in_any_order_of_dimensions(small):
    q, k, w, targets = case(40, 1)
    (_, want), (_, got) = both(
        q.transpose(0, 1).contiguous().transpose(0, 1),
        k.T.contiguous().T,
        w.T.contiguous().T,
        targets,
        "multi",
    )
    assert all(relative(a, b) < 2e-5 for a, b in zip(got, want, strict=True))


def test_what_the_kernels_do_not_know_is_refused():
    q, k, w, targets = case(8, 1, dim=512)
    with ops.tuned(backend="triton"), pytest.raises(ValueError, match="512 numbers"):
        distill_loss(q, k, w, targets)
    ids = torch.zeros(8, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="not a selection"):
        ops.index_kl(q, k, w, targets, [1.0], ids_SK=ids, backend="triton")


def test_the_loss_alone(small):
    q, k, w, targets = case(40, 1)
    with torch.no_grad():
        with ops.tuned(backend="triton"):
            of_kernels = distill_loss(q, k, w, targets)
        assert relative(of_kernels, distill_loss(q, k, w, targets)) < 1e-5


def test_half_precision(small):
    """The kernels are at most 10 % further from fp32 than the definition."""
    dtype = torch.bfloat16 if GPU else torch.float16  # The interpreter multiplies no bf16.
    q, k, w, targets = case(64, 2, dtype=dtype)
    exact = both(
        *(x.float() for x in (q, k, w)),
        [AttentionTarget(t[0].float(), t[1].float(), t[2].float(), t[3]) for t in targets],
        "multi",
    )[0][1]
    (_, defined), (_, got) = both(q, k, w, targets, "multi")
    for a, b, c in zip(got, defined, exact, strict=True):
        assert relative(a, c) < 1.1 * relative(b, c) + 1e-3


def with_sums(target):
    """Add the log-sum-exp of its logits to a target, as an attention kernel would."""
    logits = (
        torch.einsum("she,te->hst", target.queries(slice(None)), target.latent_TE).float()
        * target.scale
    )
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu_(1)
    return target._replace(lse_SH=logits.masked_fill(hidden, -torch.inf).logsumexp(-1).T)


@pytest.mark.parametrize("absorbed", [False, True])
def test_sums_of_the_attention_kernel_are_not_computed_again(small, monkeypatch, absorbed):
    q, k, w, targets = case(97, 2, absorbed=absorbed)
    (loss, want), _ = both(q, k, w, targets, "multi")
    monkeypatch.setattr(host, "normalise", None)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, w)]
    with ops.tuned(backend="triton"):
        got_loss = distill_loss(*leaves, [with_sums(t) for t in targets])
    assert relative(got_loss.detach(), loss) < 1e-5
    got = torch.autograd.grad(got_loss, leaves)
    assert all(relative(a, b) < 2e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="flash attention runs on a GPU")
@pytest.mark.parametrize("width", [24, 192, 256])
def test_flash_attention_gives_the_sums(width):
    from indexcache.distilling.forward import _causal

    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, 3, 517, width, generator=g, device="cuda").bfloat16() for _ in range(3)
    )
    with torch.no_grad():
        out, lse = _causal(q, k, v, 0.3)
    plain, none = _causal(q, k, v, 0.3)  # Gradients are enabled here.
    hidden = torch.ones(517, 517, dtype=torch.bool, device="cuda").triu_(1)
    want = (q.float() @ k.float().mT * 0.3).masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert none is None and lse is not None
    assert torch.equal(out, plain)
    assert float((lse - want).abs().max()) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "absorbed"), [(63, True), (257, False), (2049, True), (8193, False)]
)
@pytest.mark.parametrize("wide", [False, True])
def test_large(length, absorbed, wide, dtype):
    q, k, w, targets = case(
        length, 2, heads=9, index_heads=9, dim=256, absorbed=absorbed, dtype=dtype
    )
    if wide:  # SmolLM2 has rows of 64 + 192.
        g = torch.Generator(DEVICE).manual_seed(1)
        x, y, z = (
            torch.randn(*s, generator=g, device=DEVICE, dtype=dtype)
            for s in ((length, 9, 256), (length, 256 + 192), (9, 64, 256))
        )
        targets = [AttentionTarget(x, y, z * 0.1, 0.1), AttentionTarget(x, y[:, :256], None, 0.1)]
    (loss, want), (got_loss, got) = both(q, k, w, targets, "multi")
    (_, again) = both(q, k, w, targets, "multi")[1]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert relative(got_loss, loss) < limit
    assert all(relative(a, b) < limit for a, b in zip(got, want, strict=True))
    # No kernel uses atomics.
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
