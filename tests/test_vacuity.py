"""Test that text on which a role can lose nothing is refused, through every door."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch

from indexcache import Pattern, SearchSettings, evaluate, overlap, search, use_pattern
from indexcache.cli import main
from indexcache.data import Batch, Document, make_batches
from indexcache.distilling.checks import check_run
from indexcache.distilling.rows import pack_rows
from indexcache.distilling.settings import DistillSettings
from indexcache.models.lm import hidden_states
from indexcache.vacuity import (
    check_batches,
    check_length,
    check_pools,
    default_length,
    lengths_needed,
    share_of,
)
from tests.support import SHAPE, documents, make_model, refused

K = SHAPE["index_topk"]


def cut(lengths, length=64, sequences=None, domain="text", seed=0):
    """Cut random documents of these lengths into sequences."""
    rng = np.random.default_rng(seed)
    made = [
        Document(rng.integers(0, 128, n), domain, f"{domain}{i}", f"{domain}{i}")
        for i, n in enumerate(lengths)
    ]
    return make_batches(made, length=length, sequences=sequences or 2)


def run(command: str) -> int:
    return main(shlex.split(command))


# -- counting ------------------------------------------------------------------------------------


def test_shares_are_those_of_a_loop_over_the_queries():
    batches = [*cut([64, 200], sequences=2), *cut([20] * 8, sequences=2, domain="short")]
    contexts = []
    for batch in batches:
        for row in batch.own_context.tolist():
            contexts += row
    assert max(contexts) == 64
    assert contexts.count(1) > len(batches)  # Joined documents begin anew.
    for size in (1, K, 20, 63, 64, 100):
        share = share_of(batches, size)
        assert share.beyond == pytest.approx(np.mean([c > size for c in contexts]))
        assert share.mean == pytest.approx(np.mean([min(size, c) / c for c in contexts]))
        assert share.longest == min(size / 64, 1)


@pytest.mark.parametrize("topk", [1, 32, 2048])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_a_pool_needs_twice_its_size(topk, factor):
    pattern = Pattern("FRS", factor)
    pool = factor * topk
    for length in (1, pool, 2 * pool - 1):
        refused(lambda length=length: check_pools(length, topk, [pattern]), str(pattern), str(pool))
    check_pools(2 * pool, topk, [pattern])
    check_pools(1, topk, [Pattern("FFS")])


def test_default_lengths_have_room_for_the_roles_asked_for():
    released, pooled = (2048, 163840), [Pattern("FSS"), Pattern("FRR@8"), Pattern("FRR@2")]
    assert default_length(*released) == 8192
    assert default_length(*released, pooled) == 4 * 16384
    assert check_length(None, *released, pooled) == 4 * 16384
    assert check_length(None, 32, 4096, pooled) == 1024  # tiny: 4 pools of 256
    refused(lambda: check_length(8192, *released, pooled), "FRR@8", "16384", "at least 32768")
    # A context between two and four pools is taken whole, and a shorter one is refused.
    assert check_length(None, 2048, 40_000, pooled) == 40_000
    refused(lambda: check_length(None, 2048, 32_000, pooled), "context of 32000", "at most 7")
    refused(lambda: check_length(None, 2048, 8000), "context of 8000", "index_topk = 2048")


def test_inspect_says_what_length_text_needs(checkpoint, capsys):
    assert run(f"inspect {checkpoint}") == 0
    assert "at least 32 tokens, 128 for R layers with a pool of 8 k" in capsys.readouterr().out
    assert "too short for its index_topk = 8" in lengths_needed(8, 31)
    assert lengths_needed(2048, 20_000).endswith("a pool of at most 10000 tokens")


def test_python_chooses_the_same_default_lengths(tiny):
    pooled = "FRRRRRRRRRRR"
    for patterns, length in (((), 1024), (["FFSSSSSSSFSS"], 1024), ([f"{pooled}@16"], 2048)):
        batches = tiny.batches(sequences=3, patterns=patterns)
        assert {b.ids.shape[1] for b in batches} == {length}
    refused(lambda: tiny.batches(length=511, patterns=[pooled]), "pool of 256")


# -- text in which documents are joined ------------------------------------------------------------


def test_joined_short_documents_are_refused(glm, tmp_path):
    """Such sequences are long enough, but no query has more than k tokens of its own document."""
    short = cut([K] * 40)
    says = ("domain 'text'", "0% of the queries", f"k = {K}", "own document")
    refused(lambda: evaluate(glm, "FSSSSS", short), *says)
    refused(lambda: search(glm, short, tmp_path), *says)
    refused(lambda: overlap(glm, short), *says)
    settings = DistillSettings(steps=1, rows=1)
    rows = pack_rows(documents(), 64)
    refused(lambda: check_run(glm, Pattern("FSSSSS"), rows, settings, short, 1), *says)
    assert not (tmp_path / "journal.jsonl").exists()


def test_one_domain_of_joined_documents_is_enough_to_refuse(glm):
    """Its row of the table would say that nothing is lost."""
    long = cut([640], sequences=8)
    check_batches(long, K)
    mixed = [*long, *cut([12] * 40, sequences=1, domain="notes")]
    refused(lambda: evaluate(glm, "FSSSSS", mixed), "domain 'notes'")


def test_joined_documents_with_room_pass():
    shares = check_batches(cut([40] * 40), K, [Pattern("FRSSSS@2")])
    assert list(shares) == [K, 2 * K]
    assert 0.5 <= shares[2 * K].beyond < shares[K].beyond < 0.8
    refused(lambda: check_batches(cut([40] * 40), K, [Pattern("FRS@4")]), "the pool of 32")
    refused(lambda: check_batches([], K), "no text")


# -- R layers --------------------------------------------------------------------------------------


def test_r_equals_f_where_the_pool_holds_everything(glm):
    """This is what is refused: two patterns of which one computes what the other does."""
    batches = cut([64] * 2)
    with use_pattern(glm, "FRRRRR@8"):
        pooled = hidden_states(glm, batches[0].ids)
    assert torch.equal(pooled, hidden_states(glm, batches[0].ids))
    refused(lambda: evaluate(glm, "FRRRRR@8", batches), "FRRRRR@8", "pool of 64", "only 0%")


@pytest.mark.parametrize(
    ("patterns", "against"),
    [
        ("FRRRRR@5", None),
        (["FSSSSS", "FFFFFR@8"], None),
        ({"named": "FRSRSS@5"}, None),
        ("FSSSSS", "FRRRRR@8"),
        ("FRRRRR@2", "FRRRRR@5"),
    ],
)
def test_r_is_refused_in_every_place_of_an_evaluation(glm, patterns, against):
    batches = cut([64] * 4)
    refused(lambda: evaluate(glm, patterns, batches, against=against), "R layers", "pool of")
    assert evaluate(glm, "FRRRRR@4", batches).rows  # Half of the queries see more than 32.


def test_the_baseline_of_native_sharing_needs_room_for_k():
    types = ["full", "shared", "shared", "full", "shared", "shared"]
    native = make_model("glm_moe_dsa", indexer_types=types)
    refused(lambda: evaluate(native, "FSSSSS", cut([K] * 40)), "domain 'text'")
    refused(lambda: overlap(native, cut([K] * 40)), "domain 'text'")


def test_a_batch_made_by_hand_is_one_document(glm):
    ids = torch.randint(0, 128, (2, 64))
    batch = Batch(ids, "text", ("a", "b"), ("a", "b"))
    assert check_batches([batch], K)[K].beyond == 1 - K / 64
    refused(lambda: evaluate(glm, "FRRRRR@8", [batch]), "pool of 64")


@pytest.mark.parametrize(
    ("lengths", "length", "pools", "says"),
    [
        ([64] * 4, 64, {"@4"}, "pool of 4 k"),
        ([32] * 8, 32, {"@2"}, "pool of 2 k"),
        ([128] * 2, 128, {"@8"}, None),
        ([24] * 30, 48, set(), "No uniform pattern with R layers"),
    ],
)
def test_uniform_rows_of_a_search_have_room(glm, tmp_path, lengths, length, pools, says):
    """The pool is halved until half of the queries see more; where none is left, it is said."""
    batches = cut(lengths, length, sequences=2)
    result = search(glm, batches, tmp_path, SearchSettings(keep=0.5))
    found = {str(p.pattern)[6:] for p in result.uniform if "R" in p.pattern.roles}
    assert found == pools
    assert "FSFSFS" in {str(p.pattern) for p in result.uniform}
    notes = [note for note in result.notes if "R layers" in note or "R patterns" in note]
    assert len(notes) == bool(says)
    assert all(says in note for note in notes)
    full = result.frontier[0].loss
    assert all(p.loss != full for p in result.uniform)


def test_training_and_its_held_out_text_have_room_for_the_pool(glm):
    rows, pattern = pack_rows(documents(), 64), Pattern("FRRFRR@8")
    sparse = DistillSettings(stage="sparse", freeze_backbone=True, steps=1, rows=1)
    blind = DistillSettings(steps=1, rows=1, eval_every=0)
    held_out = cut([64] * 4)
    refused(lambda: check_run(glm, pattern, rows, sparse, held_out, 1), "the pool of 64")
    refused(
        lambda: check_run(glm, pattern, rows, DistillSettings(steps=1, rows=1), held_out, 1),
        "FRRFRR@8",
    )
    assert check_run(glm, pattern, rows, blind, (), 1) > 0.7  # The warm-up has no pool.


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "evaluate tiny --length 256 --sequences 3 --pattern FRRRRRRRRRRR@8 --most 0",
        "evaluate tiny --length 500 --sequences 3 --pattern full r=uniform:1/4+R8",
        "evaluate tiny --length 256 --sequences 3 --pattern 1/4 --against 1/4+R",
        "evaluate tiny --pattern FRRRRRRRRRRR@100",
        "distill tiny --pattern FRRRRRRRRRRR@8 --length 256 --out {out}",
    ],
)
def test_commands_refuse_a_vacuous_r_before_they_load(command, tmp_path, capsys, monkeypatch):
    def loads(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("indexcache.models.loading.load", loads)
    monkeypatch.setattr("indexcache.distilling.run.load", loads)
    assert run(command.format(out=tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "@" in error
    assert "pool" in error or "selects the same tokens" in error
    assert "Traceback" not in error


def test_commands_refuse_joined_documents_and_name_the_share(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    rng = np.random.default_rng(0)

    def write(length):
        rows = [{"ids": rng.integers(0, 128, length).tolist()} for _ in range(60)]
        text.write_text("\n".join(map(json.dumps, rows)))

    common = f"--data {text} --split all --length 64 --sequences 3"
    write(6)
    for verb in ("evaluate --pattern FSSSSS", "search", "overlap"):
        verb, _, rest = verb.partition(" ")
        out = "" if rest else f"--out {tmp_path / verb}"
        assert run(f"{verb} {checkpoint} {rest} {common} {out}") == 2
        assert "own document" in capsys.readouterr().err
    write(100)
    assert run(f"evaluate {checkpoint} --pattern FRRRRR@2 {common}") == 0
    error = capsys.readouterr().err
    assert "k = 8 is 37.8% of a query's context on average, 12.5% of the longest" in error
    assert "the pool of 16 is 59.1% of a query's context on average, 25% of the longest" in error
    assert "75% of the queries see more" in error
    assert run(f"search {checkpoint} --keep 1/2 {common} --out {tmp_path / 's'}") == 0
    assert "a pool of 4 k" in capsys.readouterr().out
