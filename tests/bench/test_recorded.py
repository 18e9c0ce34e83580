"""Test the recorded selections that a bench lets a model with random weights read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from indexcache.bench.recorded import RecordedSelector, Stretched, read_selections, stretch
from indexcache.bench.run import Grid, run_bench
from indexcache.bench.subject import open_subject
from indexcache.cli import main
from indexcache.models.seam import selector_of
from indexcache.pattern import Pattern
from indexcache.spec import NamedPattern

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "tiny_selections.safetensors"


def recorded(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Draw ascending ids for the last `rows` of 2 * rows tokens."""
    noise = torch.rand(rows, 2 * rows, generator=torch.Generator().manual_seed(seed))
    visible = torch.arange(2 * rows) <= torch.arange(rows, 2 * rows)[:, None]
    return noise.masked_fill(~visible, -1).topk(k, dim=1).indices.sort(1).values.int()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 1000, 5000])
def test_stretched_rows_are_selections(length):
    ids = stretch(recorded(64, 8), 32, length)
    visible = torch.arange(length) + 1
    valid = ids >= 0
    assert ids.shape == (length, 32) and ids.dtype == torch.int32
    assert torch.equal(valid.sum(1), visible.clamp(max=32)) and bool((ids < visible[:, None]).all())
    assert bool(((ids[:, 1:] > ids[:, :-1]) | ~valid[:, 1:]).all())
    stretched = Stretched(recorded(64, 8), 32, length)
    for start, end in ((0, length), (length // 3, length // 2), (length - 1, length)):
        assert torch.equal(stretched.rows(start, end), ids[start:end])


def test_neighbours_share_what_was_recorded():
    # These are the ids of the last 4 of 8 tokens.
    ids = torch.tensor([[0, 2, 4, 6], [0, 2, 4, 6], [1, 3, 5, 7], [1, 3, 5, 7]])
    out = stretch(ids, 8, 400)
    rows = out[-4:].tolist()
    assert rows[0] == rows[1] and rows[2] == rows[3] and not set(rows[0]) & set(rows[2])
    with pytest.raises(ValueError, match="copies of 4"):
        stretch(ids, 6, 400)


def test_a_bench_reads_them_and_says_so(tmp_path, monkeypatch):
    subject = replace(
        open_subject("tiny-random", layers=4, dtype="float32"),
        selections=(recorded(64, 8), recorded(64, 16)),
    )
    read: list[torch.Tensor] = []
    pools: list[torch.Tensor] = []
    from indexcache import ops

    attend, select = ops.sparse_mla, ops.index_topk

    def selecting(q, k, w, scale, topk, offset, inner, **options):
        pools.extend([inner] if inner is not None else [])
        return select(q, k, w, scale, topk, offset, inner, **options)

    monkeypatch.setattr(ops, "index_topk", selecting)
    monkeypatch.setattr(
        ops,
        "sparse_mla",
        lambda q, latent, ids, *a, **k: (read.append(ids), attend(q, latent, ids, *a, **k))[1],
    )
    grid = Grid(
        contexts=(100, 130),
        patterns=(NamedPattern("all", Pattern("FFFF")), NamedPattern("pool", Pattern("FRSR@2"))),
        decode_tokens=2,
        chunk=64,
    )
    result = run_bench(subject, grid, tmp_path)
    want = stretch(recorded(64, 8), 32, 100)[64:]
    # A second chunk of 36 belongs to the context of 100.
    last = [ids for ids in read if ids.shape[1] == 36]
    assert last and all(torch.equal(ids[0], want) for ids in last)
    assert [ids for ids in read if ids.shape[1] == 1]  # Decoding reads its own selections.
    wide = [ids for ids in pools if ids.shape[1] == 4]  # The last of 100 in chunks of 32.
    assert wide and all(
        torch.equal(ids[0], stretch(recorded(64, 16), 64, 100)[96:]) for ids in wide
    )
    assert "recorded selections" in result.note and result.settings["selections"]
    selector = selector_of(subject.model)
    assert isinstance(selector, RecordedSelector)
    assert selector.ids is None
    assert selector.pools is None
    with pytest.raises(ValueError, match="other settings|differ"):  # The selections differ.
        run_bench(open_subject("tiny-random", layers=4, dtype="float32"), grid, tmp_path)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nothing.safetensors:a", "no file"),
        ("{}", "FILE:NAME"),
        ("{}:topk.99", "topk.10"),
        ("{bad}:a", "no safetensors"),
        ("{odd}:falling", "no selections"),
        ("{odd}:far", "no selections"),
        ("{odd}:none", "no selections"),
        ("{odd}:seven", "copies of 7"),
        ("{}:topk.10,topk.8,topk.4", "FILE:NAME"),
        ("{odd}:good,seven", "copies of 7"),
    ],
)
def test_refusals(word, reason, tmp_path, capsys):
    bad, odd = tmp_path / "bad.safetensors", tmp_path / "odd.safetensors"
    bad.write_bytes(b"nothing")
    save_file(
        {
            "falling": torch.tensor([[3, 1]]),
            "far": torch.tensor([[0, 2], [0, 2]]) + torch.tensor([[0, 1], [0, 0]]),
            "none": torch.empty(0, 3, dtype=torch.int32),
            "seven": recorded(64, 7),
            "good": recorded(64, 8),
        },
        odd,
    )
    command = [
        "bench",
        "tiny-random",
        "--contexts",
        "100",
        "--device",
        "cpu",
        "--selections",
        word.format(FILE, bad=bad, odd=odd),
    ]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_the_recorded_file_is_one():
    assert [t.shape for t in read_selections(f"{FILE}:topk.10,pool.10")] == [
        (1024, 32),
        (1024, 256),
    ]
