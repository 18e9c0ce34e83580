"""Test how documents become batches: lengths beyond k, the sequences, and their digest."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indexcache.data import Batch, check_context, digest_of, make_batches
from tests.data.support import corpus, rows_of
from tests.support import one_line, refused

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
SIZES = {"a": [100, 7, 3, 25, 40], "b": [64, 64], "c": [9] * 12}


@pytest.mark.parametrize("k", [1, 2, 8, 63, 64, 257, 2048])
def test_three_quarters_of_the_queries_must_see_beyond_k(k):
    for length in (0, 1, k - 1, k, k + 1, 2 * k, 4 * k - 1):
        if length < 4 * k:
            refused(
                lambda length=length: check_context(length, k),
                str(length),
                str(k),
                str(4 * k),
                "every pattern is the same",
            )
    for length in (4 * k, 4 * k + 1, 8 * k, 100 * k):
        beyond = sum(t + 1 > k for t in range(length)) / length  # Query t sees t + 1 tokens.
        assert check_context(length, k) == pytest.approx(beyond)
        assert beyond >= 0.75
    assert check_context(4 * k, k) == 0.75


# -- batches ---------------------------------------------------------------------------------------


def test_batches_have_their_shape_domain_and_units():
    batches = make_batches(corpus(SIZES), length=16, sequences=11, batch=3, seed=1)
    for b in batches:
        assert b.ids.dtype == torch.int64
        assert b.ids.shape[1] == 16
        assert 1 <= b.ids.shape[0] == len(b.units) <= 3
    owner = {t: d for d in corpus(SIZES) for t in d.ids.tolist()}
    for b in batches:
        for row, unit in zip(b.ids, b.units, strict=True):
            sources = {owner[t].name: owner[t] for t in row.tolist()}
            assert {d.domain for d in sources.values()} == {b.domain}
            assert " + ".join(sources) == unit
            assert {d.digest for d in sources.values()} <= set(b.digests)
    assert sum(len(b.units) for b in batches) == 11


@pytest.mark.parametrize("sequences", [3, 4, 5, 9, 11, 12])
def test_domains_are_balanced(sequences):
    batches = make_batches(corpus(SIZES), length=16, sequences=sequences, batch=2)
    count = {d: sum(len(b.units) for b in batches if b.domain == d) for d in SIZES}
    assert sum(count.values()) == sequences
    assert max(count.values()) - min(count.values()) <= 1


def test_deterministic_by_seed_and_free_of_global_state():
    documents = corpus(SIZES)
    digests = {}
    for seed in range(4):
        np.random.seed(seed)
        torch.manual_seed(7 * seed)
        before = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        digests[seed] = digest_of(make_batches(documents, length=16, sequences=9, seed=seed))
        assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert len(set(digests.values())) == 4
    for seed, digest in digests.items():
        assert digest_of(make_batches(documents, length=16, sequences=9, seed=seed)) == digest


def test_sequences_do_not_depend_on_the_batch_size():
    documents = corpus(SIZES)
    rows = [rows_of(make_batches(documents, length=16, sequences=9, batch=b)) for b in (1, 2, 4, 9)]
    assert all(r == rows[0] for r in rows)


def test_sequences_of_a_domain_do_not_depend_on_the_others():
    one = rows_of(make_batches(corpus({"a": SIZES["a"]}), length=16, sequences=4))
    all_rows = rows_of(make_batches(corpus(SIZES), length=16, sequences=12))
    assert all_rows[:4] == one


def test_first_windows_come_before_second_windows():
    rows = rows_of(make_batches(corpus({"a": [64, 48, 32, 16]}), length=16, sequences=10))
    window_of = {0: 0, 64: 0, 112: 0, 144: 0, 16: 1, 80: 1, 128: 1, 32: 2, 96: 2, 48: 3}
    assert [window_of[row[0]] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_short_documents_are_joined():
    documents = corpus({"a": [5] * 10})
    batches = make_batches(documents, length=12, sequences=3)
    owner = {t: d for d in documents for t in d.ids.tolist()}
    for b in batches:
        (row,) = b.ids.tolist()
        (unit,) = b.units
        assert len({owner[t].name for t in row}) == 3
        assert unit.count(" + ") == 2
        assert len(b.digests) == 3
        for name in unit.split(" + ")[:2]:  # Only the last document is cut.
            complete = next(d for d in documents if d.name == name)
            assert set(complete.ids.tolist()) <= set(row)
    refused(
        lambda: make_batches(documents, length=12, sequences=4), "'a'", "3 sequences of 12", "4"
    )


def test_own_context_counts_the_tokens_of_the_own_document():
    joined = make_batches(corpus({"d": [3, 4, 2, 5]}), length=7, sequences=2, batch=2)[0]
    assert joined.own_context.dtype == torch.int64
    for ids, own, unit in zip(joined.ids, joined.own_context, joined.units, strict=True):
        starts = [i for i in range(7) if own[i] == 1]
        assert len(starts) == unit.count(" + ") + 1
        # The tokens of the corpus count up, so a document ends where the next is not one more.
        expected, count = [], 0
        for i in range(7):
            count = count + 1 if i and ids[i] == ids[i - 1] + 1 and i not in starts else 1
            expected.append(count)
        assert own.tolist() == expected

    long = make_batches(corpus({"d": [20]}), length=7, sequences=2)
    assert [b.own_context.tolist() for b in long] == [[[1, 2, 3, 4, 5, 6, 7]]] * 2


def test_a_batch_without_own_context_is_of_one_document():
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), "d", ("a", "b"), ("a", "b"))
    assert batch.own_context.tolist() == [[1, 2, 3, 4, 5]] * 2


def test_too_little_text_is_refused():
    refused(
        lambda: make_batches(corpus({"a": [15]}), length=16, sequences=1),
        "'a'",
        "0 sequences of 16",
    )
    assert rows_of(make_batches(corpus({"a": [16]}), length=16, sequences=1)) == [tuple(range(16))]
    refused(
        lambda: make_batches(corpus({"a": [100], "b": [31]}), length=16, sequences=4),
        "'b'",
        "1 sequences",
    )
    refused(
        lambda: make_batches(corpus(SIZES), length=16, sequences=2),
        "2 sequences",
        "3 domains",
        "a, b, c",
    )
    refused(lambda: make_batches([], length=16, sequences=2), "no document")
    for name in ("length", "sequences", "batch"):
        for bad in (0, -1):
            numbers = {"length": 4, "sequences": 3, "batch": 1, name: bad}
            refused(lambda numbers=numbers: make_batches(corpus(SIZES), **numbers), name, str(bad))


def test_sequences_of_one_token():
    rows = rows_of(make_batches(corpus({"a": [3, 1]}), length=1, sequences=4))
    assert sorted(rows) == [(0,), (1,), (2,), (3,)]


@QUICK
@given(
    st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1
    ),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**70),
)
def test_no_token_is_taken_twice(sizes, length, sequences, batch, seed):
    documents = corpus(sizes)
    try:
        batches = make_batches(
            documents, length=length, sequences=sequences, batch=batch, seed=seed
        )
    except ValueError as error:
        one_line(error, "sequences")
        return
    tokens = [t for row in rows_of(batches) for t in row]
    assert len(tokens) == len(set(tokens)) == sequences * length
    owner = {t: d for d in documents for t in d.ids.tolist()}
    at = {t: int(np.searchsorted(d.ids, t)) for t, d in owner.items()}
    for row in rows_of(batches):
        # The next token of a sequence is that of the document, or the first of the next document.
        for a, b in itertools.pairwise(row):
            assert b == a + 1 or (at[b] == 0 and at[a] == len(owner[a].ids) - 1)
    assert {d for b in batches for d in b.digests} <= {d.digest for d in documents}
    assert set(sizes) == {b.domain for b in batches}


# -- the digest ------------------------------------------------------------------------------------


def test_digest_changes_with_any_change():
    def make() -> list[Batch]:
        return make_batches(corpus(SIZES), length=16, sequences=6, batch=2)

    batches = make()
    seen = {digest_of(batches)}
    assert digest_of(make()) in seen
    for b, batch in enumerate(batches):
        for where in np.ndindex(*batch.ids.shape):
            ids = batch.ids.clone()
            ids[where] += 1
            seen.add(
                digest_of([*batches[:b], dataclasses.replace(batch, ids=ids), *batches[b + 1 :]])
            )
    assert len(seen) == 1 + 6 * 16
    changed = [
        batches[::-1],
        batches[1:],
        [*batches, batches[0]],
        [],
        [dataclasses.replace(batches[0], domain="z"), *batches[1:]],
        [dataclasses.replace(batches[0], ids=batches[0].ids.flip(0)), *batches[1:]],
        [dataclasses.replace(batches[0], ids=batches[0].ids.reshape(1, -1)), *batches[1:]],
        make_batches(corpus(SIZES), length=16, sequences=6, batch=1),
        make_batches(corpus(SIZES), length=16, sequences=6, batch=2, seed=1),
        make_batches(corpus(SIZES), length=15, sequences=6, batch=2),
    ]
    for other in changed:
        digest = digest_of(other)
        assert digest not in seen
        seen.add(digest)


def test_by_default_every_domain_has_as_many_sequences_as_a_verdict_needs():
    from indexcache.data.batches import OF_A_DOMAIN
    from indexcache.evals.statistics import LEAST_DOCUMENTS

    assert OF_A_DOMAIN == LEAST_DOCUMENTS
    sizes = {"a": [16] * 50, "b": [16] * 36, "c": [40, 16, 9, 9]}
    batches = make_batches(corpus(sizes), length=16, sequences=None, batch=100)
    assert [b.domain for b in batches] == ["a", "b", "c"]
    assert [len(b.units) for b in batches] == [36, 36, 3]  # A document gives one sequence,
    assert [len(set(b.units)) for b in batches] == [36, 36, 3]  # and two short ones give one.
    refused(
        lambda: make_batches(corpus({"a": [16], "b": [3]}), length=16, sequences=None),
        "'b'",
        "0 sequences",
    )
