"""Test ops/reference.py against naive definitions: loops, sorting, dense attention."""

import itertools

import pytest
import torch

from indexcache import ops
from indexcache.ops import reference, tuning

LENGTHS = [1, 63, 257, 2049]


def naive_scores(q, k, w, scale, query):
    """Compute one query's scores over all keys, head by head in float64."""
    total = torch.zeros(k.shape[0], dtype=torch.float64)
    for head in range(q.shape[1]):
        total += w[query, head].double() * (k.double() @ q[query, head].double()).clamp(min=0)
    return total * (1 if scale is None else scale.double())


def naive_topk(scores, ids, k):
    """Sort in Python: best score first, lower id first among equals; NaN as -inf."""
    value = {
        int(i): float(s) if s == s else float("-inf") for i, s in zip(ids, scores, strict=True)
    }
    best = sorted(sorted(value), key=lambda i: -value[i])[:k]
    return sorted(best) + [-1] * (k - len(best))


def integers(*shape, low=-3, high=4):
    return torch.randint(
        low, high, shape
    ).float()  # Sums are exact in any order, so ids must be equal.


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("topk", [1, 16, 300])
def test_topk_causal(length, topk):
    q, k, w, scale = (
        integers(1, length, 2, 8),
        integers(1, length, 8),
        integers(1, length, 2),
        integers(1, length, low=1, high=3),
    )
    selection = ops.index_topk(q, k, w, scale, topk, 0, pool=2 * topk)
    ids, pool = selection.ids, selection.pool
    assert ids.shape == (1, length, topk)
    assert ids.dtype == torch.int32
    for t in {0, 1, 62, length // 2, length - 1} & set(range(length)):
        scores = naive_scores(q[0], k[0], w[0], scale[0], t)[: t + 1]
        assert ids[0, t].tolist() == naive_topk(scores, range(t + 1), topk)
        assert pool[0, t].tolist() == naive_topk(scores, range(t + 1), 2 * topk)


def test_topk_of_a_chunk_equals_that_of_all(monkeypatch):
    q, k, w = torch.randn(1, 257, 4, 16), torch.randn(1, 257, 16), torch.randn(1, 257, 4)
    complete = ops.index_topk(q, k, w, None, 32, 0).ids
    tail = ops.index_topk(q[:, 200:], k, w[:, 200:], None, 32, 200).ids
    assert torch.equal(complete[:, 200:], tail)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 14)
    assert torch.equal(ops.index_topk(q, k, w, None, 32, 0).ids, complete)


def test_topk_decode_unequal_lengths_and_poison():
    lengths = torch.tensor([0, 1, 63, 257])
    q, k, w = integers(4, 1, 3, 8), integers(4, 300, 8), integers(4, 1, 3)
    poisoned = k.clone()
    for b, n in enumerate(lengths):
        poisoned[b, n:] = torch.nan
    got = ops.index_topk(q, poisoned, w, None, 20, lengths - 1).ids
    for b, n in enumerate(lengths.tolist()):
        scores = naive_scores(q[b], k[b], w[b], None, 0)[:n]
        assert got[b, 0].tolist() == naive_topk(scores, range(n), 20)


def test_topk_candidates():
    q, k, w = integers(2, 5, 2, 8), integers(2, 100, 8), integers(2, 5, 2)
    pool = torch.full((2, 5, 40), -1, dtype=torch.int32)
    for b, s in itertools.product(range(2), range(5)):
        n = [0, 3, 40, 39, 25][s]
        pool[b, s, :n] = torch.randperm(100)[:n].sort().values.int()
    got = ops.index_topk(q, k, w, None, 10, 60, pool).ids
    for b, s in itertools.product(range(2), range(5)):
        ids = [i for i in pool[b, s].tolist() if 0 <= i <= 60 + s]
        scores = naive_scores(q[b], k[b], w[b], None, s)[ids]
        assert got[b, s].tolist() == naive_topk(scores, ids, 10)


def test_pool_of_everything_changes_nothing():
    q, k, w = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 8), torch.randn(1, 40, 2)
    everything = torch.arange(40, dtype=torch.int32).expand(1, 40, 40)
    assert torch.equal(
        ops.index_topk(q, k, w, None, 8, 0).ids, ops.index_topk(q, k, w, None, 8, 0, everything).ids
    )


def test_select_ties_nan_inf():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor(
        [[0.0, -0.0, 1.0, 0.0, -0.0], [nan, -inf, nan, 3.0, inf], [nan] * 5, [-inf] * 5]
    )
    allowed = torch.ones_like(scores, dtype=torch.bool)
    allowed[3, 0] = False
    assert reference.select(scores, allowed, 3).tolist() == [
        [0, 1, 2],
        [0, 3, 4],
        [0, 1, 2],
        [1, 2, 3],
    ]
    assert reference.select(scores, allowed & False, 2).tolist() == [[-1, -1]] * 4
    assert reference.select(scores, allowed, 7)[0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert reference.select(scores[:, :0], allowed[:, :0], 2).tolist() == [[-1, -1]] * 4


def test_topk_nonfinite_keys():
    q, k, w = torch.ones(1, 1, 1, 4), torch.zeros(1, 6, 4), torch.ones(1, 1, 1)
    k[0, 1], k[0, 3], k[0, 4] = torch.nan, torch.inf, 2.0
    assert ops.index_topk(q, k, w, None, 2, 5).ids[0, 0].tolist() == [3, 4]
    assert ops.index_topk(q, k, w, None, 6, 5).ids[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def dense_mla(q, latent, ids, scale, value_dim):
    """Compute dense attention with a mask, in float64, without gathering."""
    mask = torch.zeros(q.shape[1], latent.shape[1] + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(ids[0] < 0, latent.shape[1], ids[0]).long(), True)
    logits = torch.einsum("she,te->sht", q[0].double(), latent[0].double()) * scale
    logits = logits.masked_fill(~mask[:, None, :-1], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0)
    return (weights @ latent[0, :, :value_dim].double())[None], logits.logsumexp(-1)[None]


def random_ids(queries, keys, k, empty=()):
    ids = torch.full((1, queries, k), -1, dtype=torch.int32)
    for s in range(queries):
        n = 0 if s in empty else int(torch.randint(1, min(k, keys) + 1, ()))
        ids[0, s, :n] = torch.randperm(keys)[:n].sort().values.int()
    return ids


@pytest.mark.parametrize("length", LENGTHS)
def test_mla_against_dense(length, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 22)
    queries = min(length, 9)
    q, latent = torch.randn(1, queries, 3, 24), torch.randn(1, length, 24)
    ids = random_ids(queries, length, 64, empty=(4,))
    out, lse = ops.sparse_mla(q, latent, ids, 0.2, value_dim=16)
    want, want_lse = dense_mla(q, latent, ids, 0.2, 16)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_mla_all_masked_with_poison():
    q, latent = torch.randn(1, 2, 3, 24), torch.full((1, 5, 24), torch.nan)
    latent[0, 3] = 1.0
    out, lse = ops.sparse_mla(
        q, latent, torch.tensor([[[-1, -1], [3, -1]]], dtype=torch.int32), 1.0, value_dim=16
    )
    assert out[0, 0].eq(0).all()
    assert lse[0, 0].eq(-torch.inf).all()
    assert out[0, 1].sub(1).abs().max() < 1e-6
    empty, _ = ops.sparse_mla(
        q[:, :0], latent, torch.zeros(1, 0, 2, dtype=torch.int32), 1.0, value_dim=16
    )
    assert empty.shape == (1, 0, 3, 16)


def test_mla_gradients(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 14)
    q, latent = (
        torch.randn(1, 13, 2, 12, dtype=torch.float64),
        torch.randn(1, 31, 12, dtype=torch.float64),
    )
    ids, weight = random_ids(13, 31, 8, empty=(0, 5)), torch.randn(1, 13, 2, 8)
    grads = []
    for call in (
        lambda a, b: ops.sparse_mla(a.float(), b.float(), ids, 0.3, value_dim=8)[0],
        lambda a, b: dense_mla(a, b, ids, 0.3, 8)[0],
    ):
        a, b = q.clone().requires_grad_(), latent.clone().requires_grad_()
        (call(a, b) * weight).sum().backward()
        assert a.grad is not None
        assert a.grad.isfinite().all()
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "k", "group"), [(1, 1, 3), (63, 16, 3), (257, 33, 4), (10, 8, 8), (7, 5, 1)]
)
def test_group_queries(queries, k, group):
    ids = random_ids(queries, 40, k, empty=(0, 6))
    groups = ops.group_queries(ids, group)
    for g in range(groups.union_BGU.shape[1]):
        rows = [set(r.tolist()) - {-1} for r in ids[0, g * group : (g + 1) * group]]
        union = sorted(set().union(*rows))
        n = int(groups.count_BG[0, g])
        assert groups.union_BGU[0, g, :n].tolist() == union
        assert groups.union_BGU[0, g, n:].eq(-1).all()
        assert groups.mask_BGU[0, g, :n].tolist() == [
            sum((i in row) << bit for bit, row in enumerate(rows)) for i in union
        ]
        assert groups.mask_BGU[0, g, n:].eq(0).all()


def test_hadamard_is_orthogonal():
    matrix = reference.hadamard(torch.eye(128))
    assert matrix.mul(128**0.5).abs().sub(1).abs().max() < 1e-5
    torch.testing.assert_close(matrix @ matrix, torch.eye(128), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="power of two"):
        reference.hadamard(torch.zeros(2, 96))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_product(interleaved):
    x, angle = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 4)
    got = ops.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    pick = (
        (lambda y: torch.complex(y[..., 0:8:2], y[..., 1:8:2]))
        if interleaved
        else (lambda y: torch.complex(y[..., :4], y[..., 4:8]))
    )
    torch.testing.assert_close(pick(got), pick(x) * torch.exp(1j * angle))
    assert torch.equal(got[..., 8:], x[..., 8:])


@pytest.mark.parametrize("rotate", [False, True])
def test_quantize(rotate):
    k = torch.randn(2, 63, 128) * torch.logspace(-6, 6, 63)[:, None]
    k[0, 5] = 0
    q, scale = ops.quantize_index_keys(k, rotate=rotate)
    assert q.dtype == torch.float8_e4m3fn
    back = q.float() * scale[..., None]
    want = reference.hadamard(k) if rotate else k
    assert ((back - want).norm(dim=-1) <= 0.04 * want.norm(dim=-1)).all()
    assert q.float().abs().amax(-1).eq(448).sum() == 2 * 63 - 1
    k[1, 7, 3] = torch.inf
    assert ops.quantize_index_keys(k, rotate=rotate)[1].isnan().nonzero().tolist() == [[1, 7]]


def test_quantized_scores_keep_the_scale():
    q, k, w = torch.randn(1, 40, 4, 128), torch.randn(1, 40, 128), torch.randn(1, 40, 4)
    (q8, w8), (k8, scale) = (
        ops.quantize_index_queries(q, w, rotate=True),
        ops.quantize_index_keys(k, rotate=True),
    )
    got, want = ops.index_scores(q8, k8, w8) * scale[:, None], ops.index_scores(q, k, w)
    assert (got - want).norm() < 0.05 * want.norm()


def test_backend_is_checked():
    q, k, w = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 1)
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.index_topk(q, k, w, None, 1, 0, backend="cuda")
    if not tuning.interpreted():
        with pytest.raises(ValueError, match="cannot run here: t"):
            ops.index_topk(q, k, w, None, 1, 0, backend="triton")
    with pytest.raises(ValueError, match="one dtype"):
        ops.index_topk(q.half(), k, w, None, 1, 0)
    with pytest.raises(ValueError, match="int32 ids"):
        ops.sparse_mla(
            torch.randn(1, 2, 1, 16), k, torch.zeros(1, 2, 1, dtype=torch.int64), 1.0, value_dim=8
        )


def test_tuning_is_restored():
    before = tuning.current()
    with pytest.raises(RuntimeError, match="stop"), ops.tuned(mla={"rows": 32}, backend="torch"):
        with ops.tuned(index={"stride": 4}) as inner:
            assert (inner.mla.rows, inner.index.stride, inner.backend) == (32, 4, "torch")
        assert tuning.current().index.stride == before.index.stride
        raise RuntimeError("stop")
    assert tuning.current() is before
    with pytest.raises(TypeError, match="columns"), ops.tuned(kl={"columns": 1}):
        pass
    with pytest.raises(AttributeError):
        before.mla.rows = 1


def test_index_kl_is_the_divergence_of_both_softmaxes():
    q, k, w = torch.randn(9, 2, 8), torch.randn(9, 8), torch.randn(9, 2)
    queries, keys = torch.randn(9, 3, 5), torch.randn(9, 5)
    leaves = [x.double().requires_grad_() for x in (q, k, w)]
    scores = torch.einsum("sjd,td->sjt", leaves[0], leaves[1]).relu()
    scores = torch.einsum("sjt,sj->st", scores, leaves[2])
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    log_q = scores.masked_fill(future, -torch.inf).log_softmax(-1)
    logits = torch.einsum("she,te->hst", queries, keys).double() * 0.3
    p = logits.masked_fill(future, -torch.inf).softmax(-1).mean(0)
    want = torch.where(future, 0.0, torch.xlogy(p, p) - p * log_q.masked_fill(future, 0.0)).sum()
    target = ops.AttentionTarget(queries, keys, None, 0.3)
    for kind in ("multi", "avg"):
        for block_bytes in (1, 1 << 20):
            options = {"kind": kind, "block_bytes": block_bytes}
            value, grads = ops.index_kl(q, k, w, [target, target], [0.5, 0.5], **options)
            assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
            for got, exact in zip(
                grads, torch.autograd.grad(want, leaves, retain_graph=True), strict=True
            ):
                torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-5)
    assert ops.index_kl(q, k, w, [target], [1.0], gradients=False)[1] is None
