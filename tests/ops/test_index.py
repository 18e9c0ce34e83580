"""Test the kernels of `index_topk`: small in the interpreter, large on a GPU."""

import os
from fractions import Fraction

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # This comes before triton is imported, because its own library is decorated then.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

from indexcache import ops  # noqa: E402
from indexcache.ops import reference  # noqa: E402
from indexcache.ops.index import scores_host, topk_grid, topk_host  # noqa: E402
from indexcache.ops.tuning import Tile  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def integers(*shape, low=-3, high=4):
    """Make small integers: sums are exact in any order and precision, so ids must be equal."""
    return torch.randint(low, high, shape, device=DEVICE).float()


def inputs(batch, queries, keys, heads, dim, dtype):
    q = integers(batch, queries, heads, dim).to(dtype)
    k = integers(batch, keys, dim).to(dtype)
    return q, k, integers(batch, queries, heads), integers(batch, keys, low=1, high=3)


def best(x, k):
    """Select from rows of scores by the definition."""
    return reference.select(x, torch.ones_like(x, dtype=torch.bool), k)


@pytest.fixture
def small():
    """Make lists and samples so small that short rows take the path of long ones."""
    tiles = {"tile": Tile(16, 32, 3), "chunk": 64}
    with ops.tuned(index={"listed": 64, "stride": 4, "workers": 2, **tiles}):
        yield


def check(q, k, w, scale, topk, offset, candidates=None, pool=0):
    arguments = q, k, w, scale, topk, offset, candidates
    result = ops.index_topk(*arguments, pool=pool, backend="triton")
    expected = ops.index_topk(*arguments, pool=pool, backend="torch")
    assert (result.pool is None) == (expected.pool is None) == (not pool)
    for a, b in ((result.ids, expected.ids), (result.pool, expected.pool)):
        if a is not None:
            assert a.dtype == torch.int32
            assert torch.equal(a, b), (a != b).nonzero()[:5]


@pytest.mark.parametrize(
    ("queries", "topk", "pool"),
    [(1, 4, 0), (1, 4, 40), (1, 4, 3), (33, 100, 0), (33, 100, 40), (33, 100, 3), (67, 16, 0)]
    + [pytest.param(67, 16, pool, marks=pytest.mark.long) for pool in (40, 3)],
)
def test_prefill(small, queries, topk, pool):
    check(*inputs(1, queries, queries + 70, 2, 16, torch.float16), topk, 70, pool=pool)


@pytest.mark.parametrize("pool", [0, 3, 40, 150, Fraction(1, 3), Fraction(1, 64)])
def test_short_rows(pool):
    """All keys of a row are scored and stored; parts of the queries see at most 2048, 4096, ..."""
    check(*inputs(1, 40, 110, 2, 16, torch.float16), 16, 70, pool=pool)


def test_short_rows_of_parts_and_batches():
    check(*inputs(1, 33, 2060, 2, 16, torch.float16), 8, 2027)
    offset = torch.tensor([90, -3], device=DEVICE)
    check(*inputs(2, 35, 130, 4, 16, torch.float32), 8, offset, pool=Fraction(1, 4))
    q, k, w, scale = inputs(1, 35, 40, 2, 16, torch.float16)
    k[0, 3] = torch.nan
    scale[0, 5] = torch.inf
    check(q, k, w, scale, 4, 5, pool=Fraction(1, 2))
    check(q, k * 0, w, scale, 4, 5, pool=Fraction(1, 2))


@pytest.mark.parametrize("queries", [33, 8])
def test_short_rows_inside_pools(queries):
    q, k, w, scale = inputs(2, queries, 200, 4, 16, torch.float16)
    offset = torch.tensor([160, 90], device=DEVICE)
    pool = ops.index_topk(
        *inputs(2, queries, 200, 4, 16, torch.float16), 120, offset, backend="torch"
    ).ids
    k[1, 180:] = torch.nan
    check(q, k, w, scale, 8, torch.tensor([150, 60], device=DEVICE), pool, pool=30)
    check(q, k, w, scale, 8, 0, torch.full_like(pool, -1))


def test_the_gluon_kernel_of_rows_takes_what_it_knows(monkeypatch):
    monkeypatch.setattr(scores_host.tuning, "gluon_runs", lambda device: True)

    def takes(heads, dim, dtype=torch.bfloat16, batch=1, scaled=False):
        q, k, w, scale = inputs(batch, 4, 16, heads, dim, dtype)
        x = scores_host.Inputs(q, k, w, scale if scaled else None, 12)
        return scores_host.queries_in_shared_memory(x)

    assert takes(9, 256) == takes(16, 128) == takes(1, 64, torch.float16) == 32
    assert takes(16, 256) == 16
    assert takes(9, 256, scaled=True) == takes(17, 128) == takes(9, 32) == 0
    assert takes(9, 256, torch.float32) == takes(9, 256, batch=2) == 0


def test_a_share_in_decoding_and_in_fp8():
    lengths = torch.tensor([0, 1, 63, 257, 300], device=DEVICE)
    q, k, w, scale = inputs(5, 1, 300, 4, 16, torch.float16)
    check(q, k, w, scale, 16, lengths - 1, pool=Fraction(1, 5))
    check(*inputs(1, 33, 90, 2, 32, torch.float8_e4m3fn), 8, 57, pool=Fraction(1, 4))


def test_a_share_that_is_none():
    q, k, w, scale = inputs(1, 2, 20, 2, 16, torch.float16)
    pool = torch.arange(9, dtype=torch.int32, device=DEVICE).expand(1, 2, 9)
    for share, candidates in ((Fraction(3, 2), None), (Fraction(1, 2), pool)):
        with pytest.raises(ValueError, match="pool of a share"):
            ops.index_topk(q, k, w, scale, 4, 18, candidates, pool=share)


@pytest.mark.long
def test_prefill_long_rows(small):
    check(*inputs(2, 40, 700, 2, 16, torch.float16), 8, torch.tensor([660, 300], device=DEVICE))


def test_prefill_when_samples_mislead(small):
    with ops.tuned(index={"deviations": -1.0}):  # Thresholds are too high: too few are listed.
        check(*inputs(1, 33, 300, 2, 16, torch.float16), 8, 267, pool=20)


def test_prefill_ties_overflow(small):
    q, k, w, _ = inputs(1, 33, 300, 2, 16, torch.float16)
    check(q, k * 0, w, None, 8, 267)  # Every score is zero: the lowest ids win.
    check(q, k, w * 0, None, 8, 267)


@pytest.mark.parametrize("pool", [0, 24])
def test_decode_unequal_lengths(small, pool):
    lengths = torch.tensor([0, 1, 63, 257, 300], device=DEVICE)
    q, k, w, scale = inputs(5, 1, 300, 4, 16, torch.float16)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:] = torch.nan
    check(q, k, w, scale, 16, lengths - 1, pool=pool)


def test_candidates(small):
    q, k, w, scale = inputs(2, 5, 200, 4, 16, torch.float16)
    others = inputs(2, 5, 200, 4, 16, torch.float16)
    offset = torch.tensor([190, 90], device=DEVICE)
    pool = ops.index_topk(*others, 120, offset, backend="torch").ids
    check(q, k, w, scale, 8, torch.tensor([180, 60], device=DEVICE), pool)
    check(q, k, w, scale, 8, 0, torch.full_like(pool, -1))


@pytest.mark.parametrize(
    ("queries", "heads", "width"),
    [pytest.param(8, 32, 300, marks=pytest.mark.long), (13, 4, 120), (9, 64, 40)],
)
def test_candidates_of_neighbours(small, queries, heads, width):
    q, k, w, scale = inputs(2, queries, 310, heads, 16, torch.float16)
    offset = torch.tensor([290, 90], device=DEVICE)
    pool = ops.index_topk(
        *inputs(2, queries, 310, heads, 16, torch.float16), width, offset, backend="torch"
    ).ids
    k[1, 200:] = torch.nan
    check(q, k, w, scale, 8, torch.tensor([280, 60], device=DEVICE), pool, pool=30)
    check(q, k, w, scale, 8, 0, torch.full_like(pool, -1))


def test_nonfinite(small):
    q, k, w, scale = inputs(1, 33, 40, 2, 16, torch.float16)
    k[0, 3] = torch.nan
    scale[0, 5] = torch.inf
    w[0, 7] = torch.nan
    scale[0, 9] = -torch.inf
    check(q, k, w, scale, 4, 7)
    check(q[:, :1], k, w[:, :1], scale, 4, 30)


def test_empty(small):
    q, k, w, scale = inputs(1, 4, 9, 2, 16, torch.float16)
    check(q[:, :0], k, w[:, :0], scale, 4, 0)
    check(q, k[:, :0], w, scale[:, :0], 4, 0)
    check(q, k, w, scale, 4, -10)


def test_fp8_and_fp32(small):
    for dtype in (torch.float8_e4m3fn, torch.float32):
        check(*inputs(1, 33, 200, 2, 32, dtype), 8, 167)
        check(*inputs(2, 1, 200, 2, 32, dtype), 8, 199)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "width", [1, 63, 257, *(pytest.param(n, marks=LONG) for n in (2049, 8193))]
)
def test_topk_rows_of_floats(small, width):
    x = torch.randn(4, width, device=DEVICE)
    x[0, ::7] = torch.nan
    x[1, ::5] = torch.inf
    x[1, ::9] = -0.0
    x[2] = x[2].round()
    x[3] = -torch.inf
    ids, pool = topk_host.topk_rows(x, 5, pool=12)
    assert torch.equal(ids, best(x, 5))
    assert torch.equal(pool, best(x, 12))


@pytest.mark.parametrize(
    "burst", [pytest.param(0, marks=LONG), 200, pytest.param(2000, marks=LONG)]
)
def test_topk_of_one_long_row(small, burst):
    """One row has many short lists. A burst of good keys makes one longer than the others' tile."""
    x = torch.randn(1, 12000, device=DEVICE)
    x[0, 5000 : 5000 + burst] += 10
    with ops.tuned(index={"workers": 132}):
        ids, pool = topk_host.topk_rows(x, 20, pool=50)
    assert torch.equal(ids, best(x, 20))
    assert torch.equal(pool, best(x, 50))


def test_refusals():
    q = torch.randn(1, 2, 1, 24, device=DEVICE)
    k = torch.randn(1, 2, 24, device=DEVICE)
    w = torch.randn(1, 2, 1, device=DEVICE)
    with pytest.raises(ValueError, match="24 is not a power of two"):
        ops.index_topk(q, k, w, None, 1, 0, backend="triton")


@pytest.mark.parametrize("wide", [0, 30])
def test_rescue_in_pools(wide):
    """Flagged rows are selected anew inside their pools; the others stay as they are."""
    q, k, w, scale = inputs(1, 5, 200, 4, 16, torch.float16)
    others = inputs(1, 5, 200, 4, 16, torch.float16)
    candidates = ops.index_topk(*others, 90, 195, backend="torch").ids
    candidates[0, 2, 40:] = -1
    flag = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    out, pool = (
        torch.full((5, n), -7, dtype=torch.int32, device=DEVICE) if n else None for n in (8, wide)
    )
    scores_host.rescue(scores_host.Inputs(q, k, w, scale, 180), flag, candidates[0], out, pool)
    expected = ops.index_topk(q, k, w, scale, 8, 180, candidates, pool=wide, backend="torch")
    for a, b in ((out, expected.ids), (pool, expected.pool)):
        if a is not None:
            assert torch.equal(a[flag > 0], b[0, flag > 0])
            assert (a[flag == 0] == -7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(9, 256), (16, 128), (4, 64), (1, 128), (32, 128)])
def test_short_rows_on_a_gpu(heads, dim, dtype):
    """The Gluon kernel of up to 16 heads, and the plain one of 32."""
    q, k, w, scale = inputs(1, 2100, 2177, heads, dim, dtype)
    check(q, k, w, scale, 64, 77)
    arguments = q, k, w, None, 64, 77
    check(*arguments, pool=Fraction(1, 8))
    pool = ops.index_topk(*arguments, pool=300, backend="torch").pool
    check(*arguments, pool)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 200000), (63, 8193), (257, 8193), (2049, 8193), (300, 131072)]
)
def test_large(dtype, queries, keys):
    q, k, w, scale = inputs(1, queries, keys, 32, 128, dtype)
    check(q, k, w, scale, 2048, keys - queries, pool=16384)
    arguments = q, k, w, scale, 2048, keys - queries
    twice = [ops.index_topk(*arguments, backend="triton").ids for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("queries", [63, 2049, 8192])
def test_indexers_of_256_dims(queries):
    """The recipe for SmolLM2 selects with nine heads of 256, k = 256, pools of 1,024 and 2,048."""
    q, k, w, _ = inputs(1, queries, queries, 9, 256, torch.bfloat16)
    for pool in (0, 1024, 2048):
        check(q, k, w, None, 256, 0, pool=pool)
    others = inputs(1, queries, queries, 9, 256, torch.bfloat16)[:3]
    candidates = ops.index_topk(*others, None, 256, 0, pool=2048, backend="torch").pool
    check(q, k, w, None, 256, 0, candidates)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the Gluon kernels need a GPU")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("queries", [33, 257])
def test_heads_and_pools(heads, queries, grouped):
    """The Gluon kernels take these numbers of heads; pools are padded and hold invisible keys."""
    with ops.tuned(index={"grouped_pools": grouped}):
        check_heads_and_pools(heads, queries, grouped)


def check_heads_and_pools(heads, queries, grouped):
    dtype = torch.float8_e4m3fn
    offset = torch.tensor([9000, 9000], device=DEVICE)
    q, k, w, scale = inputs(2, queries, 9300, heads, 128, dtype)
    if scores_host.gluon_fits(q, k) and heads in (16, 32, 64):
        assert ops.pool_group(q, k) == (128 // heads if grouped else 1)
    check(q[:1], k[:1], w[:1], scale[:1], 300, 9000)
    others = inputs(2, queries, 9300, heads, 128, dtype)
    pool = ops.index_topk(*others, 700, offset, backend="torch").ids
    pool[:, 5, 300:] = -1
    pool[0, 7] = -1
    k[1, 9280:] = torch.nan
    check(q, k, w, scale, 200, offset, pool, pool=450)
    check(q, k, w, scale, 200, torch.tensor([8000, 100], device=DEVICE), pool)
    group = ops.pool_group(q, k)
    groups = ops.group_queries(pool, group) if group > 1 else None
    arguments = q, k, w, scale, 200, offset, pool
    with_groups = ops.index_topk(*arguments, groups=groups, backend="triton")
    assert torch.equal(with_groups.ids, ops.index_topk(*arguments, backend="triton").ids)
    # The second stride leaves a sample so small that every list overflows.
    for stride in (4, 32):
        with ops.tuned(index={"listed": 512, "stride": stride}):
            check(q, k, w, scale, 200, offset, pool)


def hard_rows(keys, topk):
    """Make rows that are easy, full of ties or hard for `select_grid`.

    In the hard ones its sample misleads, or too many keys are near the k-th one.
    """
    x = torch.randn(keys, device=DEVICE)
    sample = torch.zeros_like(x, dtype=torch.bool)
    # `launch_grid` and the kernel place their samples like this.
    samples = min(1 << max(5 * keys // topk - 1, 31).bit_length(), 512)
    stride = -(-keys // samples)
    i = torch.arange(samples, device=DEVICE)
    at = i * stride + (((i * 40503) & 0xFFFF) * stride >> 16)
    sample[at[at < keys]] = True
    mixed = x.clone()
    mixed[::3] = mixed[::3].round()
    mixed[1::7] = torch.nan
    mixed[2::5] = torch.inf
    mixed[3::11] = -0.0
    few = torch.where(torch.arange(keys, device=DEVICE) < keys // 99, x, -torch.inf)
    rows = {
        "normal": x,
        "heavy": x / torch.randn_like(x),
        "grid": (30 * x).round(),
        "mixed": mixed,
        "few": few,
        "far": 1e3 + 1e-3 * x,
    }
    rows |= {
        "zeros": 0 * x,
        "nan": x * torch.nan,
        "inf": x * torch.inf,
        "up": x.sort().values,
        "down": x.sort(descending=True).values,
    }
    rows |= {
        "sample low": torch.where(sample, -50 - x.abs(), x),
        "sample high": torch.where(sample, 50 + x, x),
    }
    return rows | {"sample high, rest equal": torch.where(sample, 50 + x, 3.0)}


@pytest.mark.parametrize("topk", [5, 300, 2048])
@pytest.mark.parametrize("keys", [1, 63, 257, 3000, 20000])
@pytest.mark.parametrize("deviations", [5.0, -1.0])
def test_select_grid(keys, topk, deviations, monkeypatch):
    """Rows have one program each in the interpreter, which runs one program after another."""
    work = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, **options: work.append(zeros(*shape, **options)) or work[-1]
    )
    with ops.tuned(index={"deviations": deviations}):
        rounds = select_hard_rows(keys, topk, work)
    if (keys, topk, deviations) == (20000, 300, 5.0):  # The sample served or misled.
        assert rounds["normal"] == rounds["heavy"] == rounds["grid"] == rounds["zeros"] == 1, rounds
        assert min(rounds["few"], rounds["sample low"], rounds["sample high"]) > 1, rounds


def select_hard_rows(keys, topk, work):
    """Check the selection of each row, and return how many rounds it took."""
    rounds = {}
    segment = 2048 if GPU else topk_host.power(keys, 16)
    for name, row in hard_rows(keys, topk).items():
        out = torch.empty(1, topk, dtype=torch.int32, device=DEVICE)
        topk_host.launch_grid(topk_host.Rows(row[None]), out, segment)
        expected = best(row[None], topk)
        assert torch.equal(out, expected), name
        bins = work[-1][0, topk_grid.COUNTS.value :].view(topk_grid.ROUNDS.value, -1)
        rounds[name] = int(bins.any(-1).sum())
        ids = torch.arange(keys, dtype=torch.int32, device=DEVICE)[None] * 3 + 1
        topk_host.launch_grid(topk_host.Rows(row[None], mapped=ids), out, segment)
        assert torch.equal(out, torch.where(expected < 0, -1, 3 * expected + 1)), name
    return rounds


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="programs that wait for each other need a GPU")
@pytest.mark.parametrize("keys", [8193, 200_000])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_select_grid_of_many(rows, keys):
    """Many programs select from one row or a few: hard rows, and decoding at unequal lengths."""
    assert topk_host.grid_segment(rows, keys, torch.device(DEVICE))
    lengths = torch.tensor(
        [keys, keys // 2, 0, 9, keys // 40, keys - 1, 4096, keys], device=DEVICE
    )[:rows]
    for topk in (5, 2048):
        check(*inputs(rows, 1, keys, 32, 128, torch.float8_e4m3fn), topk, lengths - 1)
        hard = torch.stack([*hard_rows(keys, topk).values()])
        if rows < 8:  # These are pools of one query, of unequal lengths.
            every = torch.rand(rows, 1, 3 * keys, device=DEVICE).topk(keys, -1).indices
            filled = torch.arange(keys, device=DEVICE) < lengths.clamp(min=0)[:, None, None]
            pool = torch.where(filled, every.sort(-1).values.int(), -1)
            others = inputs(rows, 1, 3 * keys, 32, 128, torch.float8_e4m3fn)
            check(*others, topk, 3 * keys - 1, pool)
        for x in hard.split(rows):
            for _ in range(3):  # What one call left in its workspace would show in the next.
                assert torch.equal(topk_host.topk_rows(x, topk)[0], best(x, topk))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="large shapes need a GPU")
def test_addresses_past_2_31():
    keys = 2**24 + 4096  # Times 128 dims this is past 2^31 elements.
    q, k, w, _ = inputs(1, 1, 1, 32, 128, torch.float8_e4m3fn)
    k = torch.zeros(1, keys, 128, device=DEVICE, dtype=torch.float8_e4m3fn)
    hot = torch.tensor([5, 2**24 + 1, 2**24 + 4000], device=DEVICE)
    k[0, hot] = torch.ones(3, 128, device=DEVICE).to(k.dtype)
    q = torch.ones_like(q, dtype=torch.float32).to(q.dtype)
    result = ops.index_topk(q, k, w.abs() + 1, None, 3, keys - 1, backend="triton")
    assert result.ids[0, 0].tolist() == hot.tolist()
