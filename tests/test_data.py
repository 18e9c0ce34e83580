"""Test how text becomes batches: sources, refusals, the two halves, and the sequences."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indexcache.data import (
    Batch,
    Document,
    check_context,
    digest_of,
    load_documents,
    make_batches,
    split_documents,
)
from tests.support import one_line, refused

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
VOCABULARY = 256


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def load(source: Any, **more: Any) -> list[Document]:
    return load_documents(source, encode, VOCABULARY, **more)


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def document(ids: Any, domain: str = "d", name: str = "") -> Document:
    array = np.asarray(ids, np.int64)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return Document(array, domain, name or digest[:8], digest)


def corpus(lengths: dict[str, list[int]]) -> list[Document]:
    """Make documents of these lengths, in which no two tokens of the corpus are the same."""
    documents = []
    at = 0
    for domain, sizes in lengths.items():
        for i, n in enumerate(sizes):
            documents.append(document(range(at, at + n), domain, f"{domain}{i}"))
            at += n
    return documents


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for b in batches for row in b.ids]


# -- reading ---------------------------------------------------------------------------------------


def test_lines_of_a_jsonl_file_are_documents(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "abc"},
        "",
        {"ids": [1, 2, 255], "domain": "code"},
        {"text": "é", "domain": "x", "more": 1},
    )
    got = load(path)
    assert [d.ids.tolist() for d in got] == [[97, 98, 99], [1, 2, 255], [195, 169]]
    assert [d.domain for d in got] == ["text", "code", "x"]
    assert [d.name for d in got] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert all(d.ids.dtype == np.int64 for d in got)
    assert [d.domain for d in load(path, domain="mine")] == ["mine", "code", "x"]
    assert [d.domain for d in load(str(path))] == ["text", "code", "x"]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst"])
def test_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("two\n\nlines", encoding="utf-8")
    (got,) = load(path)
    assert bytes(got.ids.tolist()).decode() == "two\n\nlines"
    assert (got.domain, got.name) == ("text", str(path))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8", "uint64", ">i4"])
def test_npy_files_of_every_integer_type(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(200).astype(dtype))
    (got,) = load(tmp_path / "a.npy")
    assert got.ids.dtype == np.int64
    assert got.ids.tolist() == list(range(200))
    assert got.digest == document(range(200)).digest  # The type does not matter.


def test_a_folder_gives_its_sub_folders_as_domains(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"text": "top"}, {"text": "named", "domain": "mine"})
    jsonl(tmp_path / "code" / "a.jsonl", {"text": "code"})
    (tmp_path / "code" / "deep").mkdir()
    (tmp_path / "code" / "deep" / "a.txt").write_text("deep")
    np.save(tmp_path / "code" / "z.npy", np.array([7, 8]))
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.md").write_text("law")
    (tmp_path / "law" / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    got = load(tmp_path)
    assert sorted(d.domain for d in got) == ["code", "code", "code", "law", "mine", "text"]
    assert [d.name for d in got] == [d.name for d in load(tmp_path)]
    names = [Path(d.name.split(":")[0]).relative_to(tmp_path).as_posix() for d in got]
    assert names == sorted(names)


def test_repetitions_are_dropped(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "ab"},
        {"text": "cd"},
        {"ids": [97, 98], "domain": "other"},
        {"text": "ab"},
    )
    got = load(path)
    assert [(d.ids.tolist(), d.domain) for d in got] == [([97, 98], "text"), ([99, 100], "text")]


def test_empty_documents_are_dropped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": ""}, {"ids": []}, {"text": "x"})
    assert len(load(path)) == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "JSON"),
        ("not json", "JSON"),
        ('{"text": "a"} {"text": "b"}', "JSON"),
        ("3", "neither"),
        ("null", "neither"),
        ('"text"', "neither"),
        ('["a"]', "neither"),
        ("{}", "neither"),
        ('{"Text": "a"}', "neither"),
        ('{"text": 3}', "neither"),
        ('{"text": null}', "neither"),
        ('{"text": ["a"]}', "neither"),
        ('{"ids": "1 2"}', "neither"),
        ('{"ids": {"0": 1}}', "neither"),
        ('{"text": "a", "domain": 3}', "domain"),
        ('{"text": "a", "domain": ""}', "domain"),
        ('{"text": "a", "domain": null}', "domain"),
        ('{"text": "a", "domain": ["a"]}', "domain"),
        ('{"ids": [256]}', "token id 256"),
        ('{"ids": [0, -1]}', "token id -1"),
        ('{"ids": [18446744073709551615]}', "vocabulary"),
        ('{"ids": [99999999999999999999999999]}', "whole numbers"),
        ('{"ids": [1.0, 2.0]}', "whole numbers"),
        ('{"ids": [1, 2.5]}', "whole numbers"),
        ('{"ids": [NaN]}', "whole numbers"),
        ('{"ids": [1e999]}', "whole numbers"),
        ('{"ids": [true, false]}', "whole numbers"),
        ('{"ids": [1, null]}', "whole numbers"),
        ('{"ids": ["1", "2"]}', "whole numbers"),
        ('{"ids": [[1, 2], [3, 4]]}', "whole numbers"),
        ('{"ids": [[1], [3, 4]]}', "whole numbers"),
        ('{"ids": [1, [2]]}', "whole numbers"),
        ('{"ids": [[]]}', "whole numbers"),
        ('{"ids": [{"a": 1}]}', "whole numbers"),
        ('{"ids": ' + "[" * 70 + "]" * 70 + "}", "whole numbers"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, part):
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, line)
    refused(lambda: load(path), f"{path}:2: ", part)


def test_token_ids_lie_in_the_vocabulary(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"ids": [0, 9]})
    assert len(load_documents(path, encode, 10)) == 1
    refused(lambda: load_documents(path, encode, 9), "token id 9", "vocabulary of 9")
    (tmp_path / "a.txt").write_text("abc")
    refused(lambda: load_documents(tmp_path / "a.txt", encode, 98), "token id 98", "a.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.md"])
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    refused(lambda: load(tmp_path / name), str(tmp_path / name), "UTF-8")


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_npy_files_that_are_refused(tmp_path):
    arrays = {
        "floats": np.array([1.0, 2.0]),
        "two dims": np.ones((2, 3), np.int64),
        "no dims": np.array(3),
        "bools": np.array([True, False]),
        "texts": np.array(["1"]),
        "fields": np.zeros(3, [("a", "i4")]),
        "dates": np.zeros(2, "datetime64[s]"),
    }
    path = tmp_path / "a.npy"
    for array in arrays.values():
        path.write_bytes(npy_bytes(array))
        refused(lambda: load(path), str(path), "whole numbers")
    # A pickle inside is never run.
    path.write_bytes(npy_bytes(np.array([{"a": 1}], dtype=object)))
    refused(lambda: load(path), str(path), ".npy")
    for value in (-1, 256):
        path.write_bytes(npy_bytes(np.array([0, value])))
        refused(lambda: load(path), str(path), f"token id {value}")


def test_damaged_npy_files_are_read_or_refused(tmp_path):
    path = tmp_path / "a.npy"
    intact = npy_bytes(np.arange(40))
    rng = random.Random(0)
    contents = [intact[:n] for n in range(len(intact))]
    contents += [
        b"junkjunk",
        b"PK\x03\x04junk",
        b"\x93NUMPY\x01\x00\x04\x00{{{\n",
        b"\x80\x04K\x01.",
        b"\0" * 500,
    ]
    for _ in range(100):
        broken = bytearray(intact)
        for _ in range(3):
            broken[rng.randrange(128)] = rng.randrange(256)
        contents.append(bytes(broken))
    for content in contents:
        path.write_bytes(content)
        try:
            assert len(load(path)) == 1  # A changed header may still be valid.
        except ValueError as error:
            one_line(error, str(path))


def test_sources_that_are_refused(tmp_path):
    refused(lambda: load(tmp_path / "missing.jsonl"), "missing.jsonl", "no such")
    refused(lambda: load(tmp_path), str(tmp_path), ".jsonl")
    (tmp_path / "a.pdf").write_bytes(b"x")
    refused(lambda: load(tmp_path / "a.pdf"), "a.pdf", ".pdf", ".jsonl")
    refused(lambda: load(tmp_path), str(tmp_path))
    (tmp_path / "bare").write_bytes(b"x")
    refused(lambda: load(tmp_path / "bare"), "bare", ".jsonl")
    for content in (b"", b"\n\n", b'{"text": ""}\n{"ids": []}\n'):
        (tmp_path / "a.jsonl").write_bytes(content)
        refused(lambda: load(tmp_path / "a.jsonl"), "a.jsonl", "no text")
    (tmp_path / "a.txt").write_text("")
    refused(lambda: load(tmp_path / "a.txt"), "no text")


# -- splitting -------------------------------------------------------------------------------------


def test_halves_are_disjoint_complete_and_stable():
    documents = corpus({"a": [3] * 60, "b": [5] * 60})
    halves = {
        s: [d.digest for d in split_documents(documents, s)]
        for s in ("calibration", "heldout", "all")
    }
    assert not set(halves["calibration"]) & set(halves["heldout"])
    assert sorted(halves["calibration"] + halves["heldout"]) == sorted(halves["all"])
    assert halves["all"] == [d.digest for d in documents]
    assert 30 < len(halves["heldout"]) < 90
    rng = random.Random(0)
    # A document's side does not depend on the other documents, their order or its domain.
    for _ in range(20):
        sample = [
            dataclasses.replace(d, domain="other", name="x")
            for d in rng.sample(documents, rng.randrange(10, 120))
        ]
        for side in ("calibration", "heldout"):
            digests = {d.digest for d in split_documents(sample, side)}
            assert digests == {d.digest for d in sample} & set(halves[side])


def test_new_documents_leave_the_others_on_their_side(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(40)]
    jsonl(tmp_path / "a" / "a.jsonl", *rows)
    before = {
        s: {d.digest for d in split_documents(load(tmp_path / "a"), s)}
        for s in ("calibration", "heldout")
    }
    jsonl(tmp_path / "a" / "0.jsonl", *({"text": f"new {i}", "domain": "new"} for i in range(40)))
    for side, digests in before.items():
        assert digests < {d.digest for d in split_documents(load(tmp_path / "a"), side)}


def test_splits_that_are_refused():
    documents = corpus({"a": [3] * 40})
    for bad in ("held-out", "", "train", None):
        refused(lambda bad=bad: split_documents(documents, bad), "calibration, heldout, all")
    (one,) = corpus({"a": [3]})
    sides = []
    for side in ("calibration", "heldout"):
        try:
            sides.append(split_documents([one], side))
        except ValueError as error:
            one_line(error, "'all'", side)
    assert sides == [[one]]


# -- sequences beyond k --------------------------------------------------------------------------


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

SIZES = {"a": [100, 7, 3, 25, 40], "b": [64, 64], "c": [9] * 12}


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
