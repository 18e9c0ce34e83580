"""Test how files become documents: sources, refusals, and the two halves."""

from __future__ import annotations

import dataclasses
import io
import random
from pathlib import Path

import numpy as np
import pytest

from indexcache.data import load_documents, split_documents
from tests.data.support import corpus, document, encode, jsonl, load
from tests.support import one_line, refused


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
