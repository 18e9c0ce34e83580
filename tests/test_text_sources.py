"""Test which files of a source are text, how they are read, and that no input is read forever."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from indexcache.data import (
    Tokenizing,
    batches,
    digest_of,
    load_documents,
    readers,
    scan,
    split_documents,
)
from indexcache.data.cache import FILE, TokenCache, cache_folder
from tests.support import refused

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["first document", "second document", "third document"]
CONFIG = SimpleNamespace(index_topk=4, max_position_embeddings=512, vocab_size=256)


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def texts(source, **more) -> list[str]:
    return [bytes(d.ids.tolist()).decode() for d in load_documents(source, encode, 256, **more)]


def lines(*rows) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def write(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def arrow(path: Path, stream: bool) -> Path:
    table = pa.table({"text": TEXTS, "other": [1, 2, 3]})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


# -- formats ---------------------------------------------------------------------------------------


def formats(folder: Path) -> list[Path]:
    rows = [{"text": t} for t in TEXTS]
    table = "text,other\n" + "".join(f'"{t}",1\n' for t in TEXTS)
    return [
        write(folder / "a.jsonl", lines(*rows)),
        write(folder / "dos.jsonl", lines(*rows).replace(b"\n", b"\r\n")),
        write(folder / "bom.jsonl", b"\xef\xbb\xbf" + lines(*rows)),
        write(folder / "A.JSONL", lines(*rows)),
        write(folder / "a.ndjson", lines(*rows)),
        write(folder / "a.jsonl.gz", gzip.compress(lines(*rows))),
        write(folder / "a.json", json.dumps(rows)),
        write(folder / "b.json", json.dumps({"version": 1, "data": rows})),
        write(folder / "c.json", lines(*rows)),
        write(folder / "a.json.gz", gzip.compress(json.dumps(rows).encode())),
        write(folder / "a.csv", table),
        write(folder / "content.jsonl", lines(*({"content": t} for t in TEXTS))),
        write(folder / "ids.jsonl", lines(*({"input_ids": encode(t)} for t in TEXTS))),
        parquet(folder / "a.parquet", text=TEXTS, other=[1, 2, 3]),
        parquet(folder / "b.parquet", content=TEXTS),
        parquet(folder / "ids.parquet", ids=[encode(t) for t in TEXTS]),
        parquet(folder / "null.parquet", text=[TEXTS[0], None, *TEXTS[1:]]),
        arrow(folder / "a.arrow", stream=True),
        arrow(folder / "b.arrow", stream=False),
    ]


def test_every_format_gives_the_same_documents(tmp_path):
    for path in formats(tmp_path):
        assert texts(path) == TEXTS, path
        found = scan(path, 256)
        found._kept.clear()  # What a large source does not keep is read again, in any order.
        how = Tokenizing(encode, 256)
        for wanted in (found.documents[::-1], found.documents[1:2], found.documents[2:]):
            got = [bytes(d.ids.tolist()).decode() for d in found.read(wanted, how)]
            order = [found.documents.index(d) for d in wanted]
            assert got == [TEXTS[i] for i in order], path


def test_text_files_are_one_document(tmp_path):
    for name, content in {
        "a.txt": "one\ntwo",
        "b.md": "\ufeffone\r\ntwo",
        "c.txt.gz": gzip.compress(b"one\rtwo"),
    }.items():
        assert texts(write(tmp_path / name, content)) == ["one\ntwo"]


def test_damaged_files_are_refused(tmp_path):
    packed = gzip.compress(lines({"text": "x" * 1000}))
    for name, content, says in (
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read as a .parquet file"),
        ("b.parquet", b"", "cannot be read as a .parquet file"),
        ("a.arrow", b"ARROW1" + bytes(50), "cannot be read as a .arrow file"),
        ("a.jsonl.gz", packed[:-10], "cannot be unpacked"),
        ("b.jsonl.gz", b"plain", "cannot be unpacked"),
        ("c.jsonl.gz", packed[:20] + b"\xff\xff\xff" + packed[23:], "cannot be unpacked"),
        ("a.json", "{", "is not JSON"),
        ("a.txt", b"a\0b", "NUL"),
        ("b.txt", "utf-16".encode("utf-16"), "UTF-8"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1: is not UTF-8"),
        ("b.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.csv", "a,b\n1,2\n", "its columns are a, b"),
    ):
        refused(lambda p=write(tmp_path / name, content): texts(p), name, says)
    refused(lambda: texts(parquet(tmp_path / "c.parquet", a=[1], b=["x"])), "columns are a, b")


def test_pyarrow_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in (path, tmp_path):
        refused(lambda source=source: texts(source), "a.parquet", "indexcache[data]")


# -- bounds ----------------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.jsonl", tmp_path / "zero.txt", Path("/dev/zero")):
        refused(lambda path=path: texts(path), str(path), "a pipe or a device")
    refused(lambda: texts(tmp_path), "pipe or device pipe.jsonl", "pipe or device zero.txt")
    write(tmp_path / "a.txt", "text")
    assert texts(tmp_path) == ["text"]


def test_bounds_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    monkeypatch.setattr(readers, "MAX_JSON", 1000)
    monkeypatch.setattr(readers, "HARMLESS", 5000)
    long = lines({"text": "ok"}, {"text": "x" * 1000})
    refused(lambda: texts(write(tmp_path / "a.jsonl", long)), "a.jsonl:2: is longer than")
    refused(lambda: texts(write(tmp_path / "a.txt", "x" * 1001)), "a.txt: is larger than")
    refused(lambda: texts(write(tmp_path / "a.json", "[" + "1," * 600 + "1]")), "is larger than")
    trap = gzip.compress(lines({"text": "x"}) * 5000)
    refused(lambda: texts(write(tmp_path / "a.jsonl.gz", trap)), "a.jsonl.gz", "200 times its size")
    zeros = gzip.compress(bytes(10**6))
    refused(lambda: texts(write(tmp_path / "b.jsonl.gz", zeros)), "b.jsonl.gz")
    refused(lambda: texts(write(tmp_path / "c.csv.gz", zeros)), "c.csv.gz")


# -- folders ---------------------------------------------------------------------------------------


def test_a_data_set_as_it_was_downloaded(tmp_path, caplog):
    caplog.set_level(logging.INFO, "indexcache")
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", text=TEXTS[:2])
    parquet(tmp_path / "data" / "python" / "test.parquet", text=TEXTS[2:])
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes", "state.json"):
        write(tmp_path / name, "---\nlicense: mit\n---\nA card.")
    write(tmp_path / "NOTICE.txt", "no text")
    write(tmp_path / "readme_zh.md", "no text")
    write(tmp_path / ".cache" / "huggingface" / "a.jsonl", lines({"text": "hidden"}))
    write(tmp_path / "data" / ".ipynb_checkpoints" / "a.jsonl", lines({"text": "hidden"}))
    write(tmp_path / ".git" / "a.txt", "hidden")
    write(tmp_path / "picture.png", b"x")
    write(tmp_path / "archive.tar.gz", b"x")
    got = load_documents(tmp_path, encode, 256)
    assert sorted(bytes(d.ids.tolist()).decode() for d in got) == TEXTS
    assert [d.domain for d in got] == ["python", "text", "text"]
    (said,) = [r.getMessage() for r in caplog.records]
    for part in ("read 2 files", "test.parquet", "README.md", ".cache", ".tar.gz", "left out"):
        assert part in said
    (tmp_path / "cards").mkdir()
    write(tmp_path / "cards" / "README.md", "A card of a data set. " * 100)
    write(tmp_path / "cards" / "data.zip", b"PK")
    refused(lambda: texts(tmp_path / "cards"), "no text in this folder", "README.md", ".zip")
    write(tmp_path / "README.md", "asked for by name")
    assert texts(tmp_path / "README.md") == ["asked for by name"]


def test_a_data_set_saved_to_disk(tmp_path):
    arrow(tmp_path / "data-00000-of-00001.arrow", stream=True)
    arrow(tmp_path / "cache-0123456789abcdef.arrow", stream=True)
    write(tmp_path / "dataset_info.json", "{}")
    write(tmp_path / "state.json", "{}")
    assert texts(tmp_path) == TEXTS


def test_links_do_not_lead_out_of_a_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO, "indexcache")
    outside = write(tmp_path / "outside" / "secret.txt", "secret")
    write(tmp_path / "in" / "a.txt", "inside")
    (tmp_path / "in" / "b.txt").symlink_to(outside)
    (tmp_path / "in" / "linked").symlink_to(outside.parent)
    (tmp_path / "in" / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert texts(tmp_path / "in") == ["inside"]
    said = caplog.records[0].getMessage()
    for part in ("b.txt, which leads out", "linked folder linked", "broken link broken.txt"):
        assert part in said
    (tmp_path / "named").symlink_to(tmp_path / "in")
    assert texts(tmp_path / "named") == ["inside"]  # It was asked for by name.


def test_the_cache_of_the_hub_is_a_folder_of_links(tmp_path):
    home = tmp_path / "datasets--a--b"
    blob = parquet(home / "blobs" / "0f", text=TEXTS)
    revision = home / "snapshots" / "abc" / "data"
    revision.mkdir(parents=True)
    (revision / "train.parquet").symlink_to(os.path.relpath(blob, revision))
    for source in (home, revision.parent, revision):
        assert texts(source) == TEXTS
        assert {d.domain for d in load_documents(source, encode, 256)} == {"text"}


# -- chats -----------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]


def chat(messages) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_chats_go_through_the_template(tmp_path):
    for name, rows in {
        "messages": [{"messages": MESSAGES}],
        "shared": [{"conversations": SHARED}],
        "both": [{"messages": MESSAGES}, {"conversations": SHARED}],
        "text first": [{"messages": SHARED, "text": "<user>Why?<assistant>Because."}],
    }.items():
        path = write(tmp_path / f"{name}.jsonl", lines(*rows))
        assert texts(path, chat=chat) == ["<user>Why?<assistant>Because."]
    table = parquet(tmp_path / "a.parquet", messages=[MESSAGES], id=[1])
    assert texts(table, chat=chat) == ["<user>Why?<assistant>Because."]
    refused(lambda: texts(table), "a.parquet:1: is a chat", "chat template")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user"}]},
        {"messages": ["Why?"]},
        {"messages": [{"content": "Why?"}]},
        {"messages": [{"role": 3, "content": "Why?"}]},
        {"conversations": [{"from": "narrator", "value": "Why?"}]},
        {"conversations": [{"from": "human"}]},
    ],
)
def test_chats_that_are_refused(tmp_path, row):
    path = write(tmp_path / "a.jsonl", lines({"messages": MESSAGES}, row))
    refused(lambda: texts(path, chat=chat), "a.jsonl:2: message 0 of ")


# -- sides, order, and the cache -------------------------------------------------------------------


def test_copies_fall_on_one_side(tmp_path):
    rows = [f"document {i}, caf\u00e9 {i * i}" for i in range(40)]
    kinds = (
        lambda t: t + "\n",
        lambda t: "\ufeff" + t,
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: t.replace(" ", "\r\n"),
        str.upper,
    )
    first = scan(write(tmp_path / "a.jsonl", lines(*({"text": t} for t in rows))), 256)
    for n, kind in enumerate(kinds):
        path = write(tmp_path / f"{n}.jsonl", lines(*({"text": kind(t)} for t in rows)))
        for side in ("calibration", "heldout"):
            expected = [d.row for d in split_documents(first.documents, side)]
            assert [d.row for d in split_documents(scan(path, 256).documents, side)] == expected
    both = lines(*({"text": t} for t in [*rows, *map(kinds[0], rows)]))
    assert len(texts(write(tmp_path / "both.jsonl", both))) == 40


def test_only_what_is_needed_is_tokenised(tmp_path):
    rows = [{"text": f"{i} " * 50, "domain": "ab"[i % 2]} for i in range(200)]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    calls = []

    def counted(text: str) -> list[int]:
        calls.append(text)
        return encode(text)

    made = batches(path, counted, CONFIG, length=64, sequences=6)
    assert len(calls) == 6
    assert len(made) == 6
    # All documents at once give the same sequences.
    from indexcache.data import make_batches

    eager = make_batches(load_documents(path, encode, 256), length=64, sequences=6)
    assert digest_of(eager) == digest_of(made)


def test_the_cache_holds_what_the_tokenizer_gave(tmp_path, monkeypatch):
    monkeypatch.setenv("INDEXCACHE_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", lines(*({"text": f"{i} " * 3000} for i in range(3))))
    calls = []

    def counted(text: str) -> list[int]:
        calls.append(text)
        return encode(text)

    def read(tokenizer: str | None) -> list[list[int]]:
        calls.clear()
        found = load_documents(path, counted, 256, tokenizer=tokenizer)
        return [d.ids.tolist() for d in found]

    expected = read(None)
    assert len(calls) == 3
    assert read("a") == expected and len(calls) == 3
    assert read("a") == expected and not calls
    assert read("b") == expected and len(calls) == 3  # Another tokenizer has its own.
    file = tmp_path / "cache" / FILE
    whole = file.read_bytes()
    for damaged in (
        b"junk" * 5000,
        b"",
        whole[: len(whole) // 2],
        whole.replace(bytes([48, 0, 0, 0, 32, 0, 0, 0]), bytes([49, 0, 0, 0, 32, 0, 0, 0])),
    ):
        file.write_bytes(damaged)
        assert read("a") == expected
        assert calls, "damaged ids were believed"
    monkeypatch.setenv("INDEXCACHE_CACHE", "/proc/nowhere")
    assert read("a") == expected and len(calls) == 3
    with TokenCache.open("a") as cache:
        assert cache.ids("x" * 5000, lambda: np.array([1])).tolist() == [1]
    monkeypatch.setenv("INDEXCACHE_CACHE", str(tmp_path / "shared"))
    text = ["x" * 5000, "y" * 5000]
    with TokenCache.open("a") as one, TokenCache.open("a") as two:
        assert one.ids(text[0], lambda: np.array([1])).tolist() == [1]
        assert two.ids(text[1], lambda: np.array([2])).tolist() == [2]
        one._write()
        two._write()
        for cache in (one, two):
            assert [cache.ids(t, lambda: np.array([3])).tolist() for t in text] == [[1], [2]]
    for off in ("off", "", "0"):
        monkeypatch.setenv("INDEXCACHE_CACHE", off)
        assert cache_folder() is None
        assert read("a") == expected and len(calls) == 3


def test_a_refusal_names_the_fields_and_domains_are_printable(tmp_path):
    path = write(tmp_path / "b.jsonl", lines({"instruction": "do", "output": "done"}))
    refused(lambda: texts(path), "b.jsonl:1", "its fields are instruction, output")
    path = write(tmp_path / "c.jsonl", lines({"text": "one", "domain": "a\n\x1b[31mb"}))
    refused(lambda: texts(path), "c.jsonl:1", "control characters")


def test_splits_of_a_data_set_are_no_domains(tmp_path):
    for i, name in enumerate(
        ("train/a.txt", "test/code/b.txt", "data/validation/c.txt", "law/d.txt")
    ):
        write(tmp_path / name, f"document {i}")
    found = load_documents(tmp_path, encode, 256)
    assert sorted(d.domain for d in found) == ["code", "law", "text", "text"]
