"""Test text on the command line: chats, data sets, numbers, and what is said before loading."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from indexcache.cli import main
from indexcache.models.reader import Reader

COMMON = "--split all --length 64 --sequences 2 --pattern FSSFSS"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


def run(command: str) -> int:
    return main(command.split())


def said(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def prose(i: int) -> str:
    return "".join(chr(97 + (i * j * j + j) % 26) for j in range(100))


@pytest.fixture
def chats(tmp_path):
    rows = [{"messages": [{"role": "user", "content": prose(i)}]} for i in range(3)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_chats_need_a_template(checkpoint, chats, tmp_path, capsys):
    command = f"--data {chats} {COMMON}"
    assert run(f"evaluate {checkpoint} {command}") == 2
    assert "chats.jsonl:" in (line := said(capsys)) and "no chat template" in line
    shutil.copytree(checkpoint, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(TEMPLATE)
    assert run(f"evaluate {tmp_path / 'chatty'} {command}") == 0
    capsys.readouterr()
    for template, why in ((STRICT, "no system"), ("{% if %}", "template")):
        (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
        assert run(f"evaluate {tmp_path / 'chatty'} {command}") == 2
        assert "refuses this chat" in (line := said(capsys)) and why in line


def test_a_downloaded_data_set_is_read_and_said(checkpoint, tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("This card says what is in the files.\n" * 100)
    command = f"evaluate {checkpoint} --data {folder} {COMMON}"
    assert run(command) == 2
    assert "README.md" in (line := said(capsys)) and "no text in this folder" in line
    table = pa.table({"text": [prose(i) for i in range(3)]})
    parquet.write_table(table, folder / "data" / "train.parquet")
    assert run(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any("read data/train.parquet; left out the card README.md." in x for x in lines)


def test_numbers_may_be_short(checkpoint, chats, tmp_path, capsys):
    assert main(["evaluate", str(checkpoint), "--data", "", "--pattern", "1/2"]) == 2
    assert "name of the text is empty" in said(capsys)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 128, 1000))
    command = f"evaluate {checkpoint} --data {tmp_path / 'ids.npy'} --split all --pattern FSSFSS"
    assert run(f"{command} --length 0.2K --sequences 2 --json") == 0
    assert "2 sequences of 200 tokens" in capsys.readouterr().err
    for length in ("1K", "0", "-64", "0K", "1.00005K", "K", "1e3", "1KK", "2k5"):
        assert run(f"{command} --length {length} --sequences 2") == 2, length
        assert "1000 tokens" in said(capsys) or length != "1K"
    config = tmp_path / "c.toml"
    config.write_text('length = "0.1K"\nsequences = 2\n')
    assert run(f"{command} --config {config}") == 0
    assert "2 sequences of 100 tokens" in capsys.readouterr().err


def test_the_text_is_checked_before_the_model_is_loaded(
    checkpoint, chats, tmp_path, capsys, monkeypatch
):
    from indexcache.distilling import run as distilling_run
    from indexcache.models import loading

    def load(*args, **more):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(distilling_run, "load", load)
    os.mkfifo(tmp_path / "pipe.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": prose(0)}) + "\n{")
    short = tmp_path / "short.txt"
    short.write_text("short")
    for data, says in (
        (bad, "bad.jsonl:2: is not JSON"),
        (chats, "no chat template"),
        (short, ""),
        (tmp_path / "pipe.jsonl", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path / "none", "no such file"),
    ):
        split = f"--data {data} --split all --length 64"
        for verb in (
            f"evaluate {checkpoint} {split} --pattern 1/2",
            f"search {checkpoint} {split} --out {tmp_path / 's'}",
            f"overlap {checkpoint} {split} --out {tmp_path / 'o'}",
            f"distill {checkpoint} --data {data} --length 64 --pattern 1/2 --out {tmp_path / 'd'}",
        ):
            assert run(verb) == 2, verb
            assert says in said(capsys)


def test_a_bench_tokenises_as_much_as_it_needs(checkpoint, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": prose(i)}) + "\n" for i in range(20)))
    reader = Reader(checkpoint)
    everything, digest = reader.tokens(path, 128)
    assert "".join(map(chr, everything.tolist())) == "".join(prose(i) for i in range(20))
    calls = []
    reader.encode = lambda text: calls.append(text) or [ord(c) for c in text]
    some, same = reader.tokens(path, 128, 150)
    assert some.tolist() == everything[:150].tolist()
    assert same == digest  # It is one of all documents, so that a bench can add longer contexts.
    assert len(calls) == 2
