"""Test the groups of paged requests, and attention over a paged cache, against the definition."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # The variable must be set before triton is imported, which decorates its library then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.ops import pages as page_kernels  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # The interpreter's bf16 products are wrong.
PAGE = 32


def batch(queries, contexts, k, *, spare=3, seed=0):
    """Make ids [S, k] in no order, the request of each query, and a table of shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    rows, requests = [], []
    for r, (n, context) in enumerate(zip(queries, contexts, strict=True)):
        for s in range(n):
            seen = context - n + s + 1  # the last n tokens of the context are the queries
            ids = torch.randperm(seen, generator=generator)[:k]
            row = torch.full((k,), -1)
            row[torch.randperm(k, generator=generator)[: len(ids)]] = ids
            rows.append(row)
            requests.append(r)
    width = -(-max(contexts) // PAGE)
    order = torch.randperm(len(queries) * width + spare, generator=generator)
    table = order[: len(queries) * width].view(len(queries), width)
    ids = torch.stack(rows) if rows else torch.zeros(0, k)
    return tuple(t.int().to(DEVICE) for t in (ids, torch.tensor(requests), table))


def contiguous(ids, requests, table, cache, page_rows):
    """Return each query's selected rows of a paged cache, one query at a time."""
    for row, request in zip(ids.tolist(), requests.tolist(), strict=True):
        slots = [int(table[request, i // PAGE]) * page_rows + i % PAGE for i in row if i >= 0]
        yield cache[slots]


@pytest.mark.parametrize(
    ("queries", "contexts", "k", "group"),
    [
        ((8,), (70,), 40, 3),
        ((3, 1, 1, 6), (5, 90, 33, 200), 33, 8),  # fresh, decodes, and a later chunk
        ((1,) * 6, tuple(range(1, 80, 15)), 16, 4),  # every query its own request
        ((3, 0, 4), (64, 1, 65), 24, 1),  # a request without queries; whole pages
        ((0,), (1,), 4, 3),
    ],
)
def test_groups(queries, contexts, k, group, monkeypatch):
    """A window of bitmaps has two words, so that longer contexts take several."""
    monkeypatch.setattr(page_kernels, "SLICE", 4)
    monkeypatch.setattr(page_kernels, "WORDS", 2 if group > 2 else 64)
    ids, requests, table = batch(queries, contexts, k)
    got, want = (
        ops.group_pages(ids, requests, table, group, page=PAGE, page_rows=48, backend=backend)
        for backend in ("triton", "torch")
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for s, row in enumerate(ids.tolist()):  # the definition itself: what each query reads
        union, bits = want.union_BGU[0, s // group], want.mask_BGU[0, s // group]
        mine = union[(bits >> s % group & 1).bool()].tolist()
        slot = [int(table[requests[s], i // PAGE]) * 48 + i % PAGE for i in sorted(row) if i >= 0]
        assert mine == slot


def test_groups_of_bad_ids():
    """Ids beyond a request's pages are none, doubled ids are one, and rows may be views."""
    ids = torch.tensor([[5, 64, 5, 1000, -7, 2]] * 3, dtype=torch.int32, device=DEVICE)
    requests = torch.tensor([0, 0, 1], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[4, 1, 9], [0, 3, 9]], dtype=torch.int32, device=DEVICE)[:, :2]
    wide = torch.cat([ids, ids], 1)
    for backend in ("triton", "torch"):
        got = ops.group_pages(wide[:, :6], requests, table, 3, page=PAGE, backend=backend)
        assert got.count_BG.tolist() == [[4]]
        assert got.union_BGU[0, 0, :4].tolist() == [130, 133, 2, 5]
        assert got.mask_BGU[0, 0, :5].tolist() == [3, 3, 4, 4, 0]


def test_attention(monkeypatch):
    """Unequal requests in shuffled pages, among other layers' pages, as each query by itself."""
    monkeypatch.setattr(page_kernels, "SLICE", 4)
    heads = 20
    ids, requests, table = batch((4, 1, 2), (40, 90, 130), 24)
    page_rows = 3 * PAGE
    torch.manual_seed(0)
    cache = torch.randn(int(table.max() + 1) * page_rows, 48).to(DEVICE, HALF)
    free = torch.ones(len(cache), dtype=torch.bool)
    for start in table.flatten().tolist():
        free[start * page_rows : start * page_rows + PAGE] = False
    cache[free] = torch.nan  # other layers' pages are never read
    q = torch.randn(1, len(ids), heads, 48).to(DEVICE, HALF)
    groups = ops.group_pages(
        ids, requests, table, 3, page=PAGE, page_rows=page_rows, backend="triton"
    )
    options = {"value_dim": 32, "backend": "triton"}
    got, lse = ops.sparse_mla(q, cache[None], ids[None], 0.2, groups=groups, **options)
    rows = list(contiguous(ids, requests, table, cache, page_rows))
    for s, row in enumerate(rows):
        logits = 0.2 * q[0, s].float() @ row.float().T
        want = logits.softmax(-1) @ row[:, :32].float()
        torch.testing.assert_close(got[0, s].float(), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[0, s], logits.logsumexp(-1), rtol=1e-2, atol=1e-2)
    # Other pages, and ids in another order, give the same bits.
    order = torch.randperm(int(table.max() + 1), device=DEVICE)
    moved = torch.full_like(cache, torch.nan)
    blocks = cache.view(-1, page_rows, 48)
    moved.view(-1, page_rows, 48)[order] = blocks
    elsewhere = order[table.long()].int()
    again = ops.group_pages(
        ids.flip(-1), requests, elsewhere, 3, page=PAGE, page_rows=page_rows, backend="triton"
    )
    same, _ = ops.sparse_mla(q, moved[None], ids[None], 0.2, groups=again, **options)
    assert torch.equal(same, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 9}, "1 to 8 queries"),
        ({"page": 48}, "multiple of 32"),
        ({"page_rows": 16}, "page_rows at least"),
        ({"requests_S": torch.zeros(2, dtype=torch.int32)}, "want ids"),
        ({"table_RP": torch.zeros(1, 2)}, "must be int32"),
    ],
)
def test_refusals(change, message):
    ids, requests, table = batch((3,), (40,), 4)
    inputs = {"ids_SK": ids, "requests_S": requests, "table_RP": table, "group": 2, "page": PAGE}
    with pytest.raises(ValueError, match=message):
        ops.group_pages(**(inputs | change))
