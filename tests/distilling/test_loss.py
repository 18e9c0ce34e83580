"""Test L_multi, L_avg, L_max and L_cover, streamed, against autograd over whole [L, L] matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from indexcache import Pattern
from indexcache.distilling.forward import DistillForward, attention_replaced, run_decoder
from indexcache.distilling.indexers import trainable_indexers
from indexcache.distilling.loss import attention_kept, distill_loss
from indexcache.distilling.rows import Row
from indexcache.ops import AttentionTarget
from indexcache.records import read_json
from tests.support import refused

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES = ("multi", "avg", "max", "cover")
TOPK = 5


def definition(q, k, w, targets, objective, ids=None, queries=slice(None)):
    """Compute the loss by the paper's definition, with full matrices and log_softmax."""
    length = q.shape[0]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if ids is not None:
        chosen = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            chosen[t, ids[t][ids[t] >= 0].long()] = True
        seen &= chosen
    scores = sum(w[:, j, None] * (q[:, j] @ k.T).clamp(min=0) for j in range(q.shape[1]))
    log_q = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    ps = []
    for t in targets:
        total = 0
        for h in range(t.q_SHn.shape[1]):
            key = t.latent_TE
            if t.absorb_Hmc is not None:
                m, c = t.absorb_Hmc.shape[1:]
                key = torch.cat([t.latent_TE[:, :c] @ t.absorb_Hmc[h].T, t.latent_TE[:, c:]], -1)
                assert key.shape[1] == m + t.latent_TE.shape[1] - c
            total = total + (t.q_SHn[:, h] @ key.T * t.scale).masked_fill(
                ~seen, -torch.inf
            ).softmax(-1)
        ps.append(total / total.sum(-1, keepdim=True))

    def kl(p):
        p, log_of_q = p[queries], log_q[queries]
        inside = p > 0
        return (p[inside] * (p[inside].log() - log_of_q[inside])).sum()

    if objective == "cover":
        size = TOPK if ids is None else ids.shape[1]
        kept = [(p * (size * log_q.exp()).clamp(max=1)).sum(-1, keepdim=True) for p in ps]
        total = sum(p / c.clamp(min=0.05) for p, c in zip(ps, kept, strict=True)).detach()
        return kl(total / total.sum(-1, keepdim=True))

    if objective == "max":
        most = torch.stack(ps).amax(0)
        return kl(most / most.sum(-1, keepdim=True))
    return sum(kl(p) for p in ps) / len(ps) if objective == "multi" else kl(sum(ps) / len(ps))


def random_case(length, layers, seed=0, heads=3, index_heads=4, absorbed=True):
    g = torch.Generator().manual_seed(seed)
    q, k, w = (
        torch.randn(*s, generator=g)
        for s in ((length, index_heads, 8), (length, 8), (length, index_heads))
    )
    targets = []
    for _ in range(layers):
        if absorbed:
            t = AttentionTarget(
                torch.randn(length, heads, 10, generator=g),
                torch.randn(length, 9, generator=g),
                torch.randn(heads, 6, 5, generator=g) * 0.4,
                0.5,
            )
        else:
            t = AttentionTarget(
                torch.randn(length, heads, 9, generator=g),
                torch.randn(length, 9, generator=g),
                None,
                0.5,
            )
        targets.append(t)
    return q, k, w * 0.3, targets


def selection(length, k, seed=0):
    """Make a random selection per query among what it sees, ascending, -1 padded."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.full((length, k), -1, dtype=torch.int32)
    for t in range(length):
        some = torch.randperm(t + 1, generator=g)[:k].sort().values
        ids[t, : len(some)] = some
    return ids


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def close(a, b, bound=2e-5):
    return float((a - b).norm() / b.norm().clamp(min=1e-12)) < bound


def check(q, k, w, targets, ids=None, block=1 << 14, spans=None):
    inputs = [x.clone().requires_grad_() for x in (q, k, w)]
    options = {"ids_SK": ids, "block_bytes": block, "topk": TOPK if ids is None else None}
    queries = torch.cat([torch.arange(*span) for span in spans or [(0, len(q))]])
    losses, grads = {}, {}
    for objective in OBJECTIVES:
        loss = distill_loss(*inputs, targets, objective=objective, spans=spans, **options)
        expected = definition(*inputs, targets, objective, ids, queries)
        losses[objective] = float(loss.detach())
        bound = 2e-5 * max(float(expected.detach()), 1)
        assert losses[objective] == pytest.approx(float(expected.detach()), abs=bound), objective
        grads[objective] = gradients(loss, *inputs)
        for grad, expected_grad in zip(grads[objective], gradients(expected, *inputs), strict=True):
            assert close(grad, expected_grad), objective
    for a, b in zip(grads["multi"], grads["avg"], strict=True):
        assert close(a, b)
    # KL is convex; the two differ by what the indexer cannot change.
    assert losses["multi"] >= losses["avg"] - 1e-4


@pytest.mark.parametrize("sparse", [False, True])
def test_some_queries_alone(sparse):
    """Spans that lie in blocks, are longer than one, or hold one query, the first or the last."""
    ids = selection(40, 7) if sparse else None
    check(*random_case(40, 3), ids, block=1 << 13, spans=[(0, 1), (3, 17), (39, 40)])


def test_cover_counts_the_layer_whose_attention_is_not_kept():
    """The mean learns both layers alike; this one learns more of the layer that is lost."""
    length, steps = 64, 60
    g = torch.Generator().manual_seed(0)
    k = torch.eye(length)
    # One layer looks at key 0 alone; the other at many keys, of which a few hold nothing.
    near = AttentionTarget(torch.zeros(length, 1, 1), torch.zeros(length, 1), None, 1.0)
    sharp = torch.zeros(length, 1)
    sharp[0] = 6.0
    far = AttentionTarget(torch.ones(length, 1, 1), sharp, None, 1.0)
    shares = {}
    for objective in ("avg", "cover"):
        q = torch.rand(length, 1, length, generator=g.manual_seed(0)).requires_grad_()
        optimizer = torch.optim.Adam([q], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            ones = torch.ones(length, 1)
            distill_loss(q, k, ones, [near, far], objective=objective, topk=4).backward()
            optimizer.step()
        scores = q.detach()[-1, 0].relu()
        shares[objective] = float(scores.softmax(-1)[1:].sum())
    # Four keys keep all of the sharp layer, and 4 / 64 of the flat one.
    assert shares["cover"] > shares["avg"] + 0.1


@pytest.mark.parametrize("layers", range(1, 9))
def test_gradients_agree_on_random_attention(layers):
    check(*random_case(65, layers, seed=layers, absorbed=layers % 2 == 0))


@pytest.mark.parametrize(("layers", "k"), [(1, 8), (3, 8), (8, 5), (2, 64)])
def test_gradients_agree_over_the_selected_set(layers, k):
    check(*random_case(57, layers, seed=layers), ids=selection(57, k))


@pytest.mark.parametrize("length", [1, 2, 63, 257])
def test_the_loss_is_the_same_for_all_block_sizes(length):
    q, k, w, targets = random_case(length, 2)
    values = [distill_loss(q, k, w, targets, block_bytes=b) for b in (1, 1 << 13, 1 << 26)]
    for v in values[1:]:
        torch.testing.assert_close(v, values[0], rtol=1e-5, atol=1e-5)
    if length == 1:
        assert float(values[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_agree_on_the_attention_of_tiny(tiny, sparse):
    """Check groups of 1 to 8 layers of a trained model on text."""
    text = "The committee on finance has considered the bill, and reports it with amendments. " * 4
    row = Row.one_document(np.array(tiny.encode(text))[:80])
    assert len(row.ids) == 80
    for size in (1, 2, 3, 5, 8):
        pattern = Pattern("F" * (12 - size) + "F" + "S" * (size - 1))
        indexers = trainable_indexers(tiny.module, pattern, torch.float32)
        forward = Recorder(tiny.module, pattern, indexers, sparse=sparse)
        replaced = attention_replaced(tiny.module, forward)
        with replaced, torch.no_grad(), forward.row(row, collect=True):
            run_decoder(tiny.module, row, "cpu")
        q, k, w, targets, ids = forward.recorded[12 - size]
        assert len(targets) == size
        check(q, k, w, targets, ids, block=1 << 16)


class Recorder(DistillForward):
    """Records what each group hands to the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded = {}

    def _finish_group(self, owner, targets):
        q, k, w = (x.detach()[0] for x in self._projected[owner])
        ids = self._selected[owner][0][0] if self.sparse else None
        self.recorded[owner] = (q, k, w, targets, ids)


def test_a_perfect_indexer_has_no_loss():
    """One head whose scores are the positive logits has KL and gradient 0."""
    length = 40
    x = torch.rand(length, 6)
    target = AttentionTarget(x[:, None] * 2, x, None, 1.0)
    q = (x[:, None] * 2).requires_grad_()
    loss = distill_loss(q, x, torch.ones(length, 1), [target])
    assert abs(float(loss.detach())) < 1e-4
    assert float(gradients(loss, q)[0].abs().max()) < 1e-5


def test_unequal_weights_and_bf16():
    q, k, w, targets = random_case(40, 2)
    inputs = [x.clone().requires_grad_() for x in (q, k, w)]
    mixed = distill_loss(*inputs, targets, [0.25, 0.75])
    parts = [distill_loss(*inputs, [t]) for t in targets]
    torch.testing.assert_close(mixed, 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-5, atol=1e-4)
    for mine, a, b in zip(
        gradients(mixed, *inputs), *(gradients(p, *inputs) for p in parts), strict=True
    ):
        assert close(mine, 0.25 * a + 0.75 * b)
    half = [
        AttentionTarget(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in t))
        for t in targets
    ]
    q16, k16 = (x.bfloat16().requires_grad_() for x in (q, k))
    loss = distill_loss(q16, k16, w, half)
    assert gradients(loss, q16)[0].dtype == torch.bfloat16
    assert float(loss.detach()) == pytest.approx(float(distill_loss(q, k, w, targets)), rel=0.02)


def test_inconsistent_arguments_are_refused():
    q, k, w, targets = random_case(10, 2)
    refused(lambda: distill_loss(q, k, w, targets, objective="sum"), "multi, avg")
    refused(lambda: distill_loss(q, k, w, targets, objective="cover"), "cover", "topk")
    refused(lambda: distill_loss(q, k, w, targets, [0.5, 0.6]), "sum to 1")
    refused(lambda: distill_loss(q, k, w, []), "served layer")
    refused(lambda: distill_loss(q, k[:5], w, targets), "one document")


def test_attention_kept_is_that_of_whole_matrices():
    # With so many heads no two scores are equal.
    q, k, w, targets = random_case(50, 1, index_heads=24)
    assert float(attention_kept(q, k, w, targets[0], 50)) == pytest.approx(50, rel=1e-5)
    t = targets[0]
    kept = float(attention_kept(q, k, w, t, 5, block_bytes=5000))
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    c = t.absorb_Hmc.shape[2]
    keys = torch.cat(
        [
            torch.einsum("tc,hmc->htm", t.latent_TE[:, :c], t.absorb_Hmc),
            t.latent_TE[:, c:].expand(3, -1, -1),
        ],
        -1,
    )
    p = (
        (torch.einsum("shn,htn->hst", t.q_SHn, keys) * t.scale)
        .masked_fill(~seen, -torch.inf)
        .softmax(-1)
        .mean(0)
    )
    scores = (
        torch.einsum("sjd,td->sjt", q, k)
        .relu()
        .mul(w[..., None])
        .sum(1)
        .masked_fill(~seen, -torch.inf)
    )
    assert kept == pytest.approx(float(p.gather(-1, scores.topk(5, -1).indices).sum()), rel=1e-5)


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("sparse", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(sparse):
    sizes, saved = [], []
    for length in (256, 512, 1024):
        q, k, w, targets = random_case(length, 2)
        ids = selection(length, 16) if sparse else None
        inputs = [x.requires_grad_() for x in (q, k, w)]
        saved_sizes = []
        with (
            Largest() as seen,
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=saved_sizes: sizes.append(x.numel()) or x, lambda x: x
            ),
        ):
            distill_loss(*inputs, targets, ids_SK=ids, block_bytes=1 << 18).backward()
        sizes.append(seen.elements)
        saved.append(sum(saved_sizes))
    assert max(sizes) <= max((1 << 18) // 4, 1024 * 3 * 10)  # It is a block or an input.
    assert saved[1] == 2 * saved[0]
    assert saved[2] == 4 * saved[0]


def test_documented_memory_is_the_measured_one():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "distill.md").read_text(encoding="utf-8")
    rows = read_json(root / "benchmarks" / "results" / "distill_memory.json")["rows"]
    assert {r["tokens"] for r in rows} == {1024, 2048, 4096, 8192, 16384}
    for row in rows:
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {row['tokens']:,} |")]
        assert f"{row['added_mb']:,.0f} MB, {row['seconds']:.1f} s" in line
    added = {(r["what"], r["tokens"]): r["added_mb"] for r in rows}
    for what in ("warmup", "sparse", "pass"):
        assert added[what, 16384] < 8 * added[what, 2048]
