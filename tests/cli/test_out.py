"""What --out takes, that it is tried before any work, and that finished results are not lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys

import pytest

from indexcache.cli import main, results
from indexcache.cli.common import Output


def no_model(*args, **kwargs):
    raise AssertionError("The model was loaded before --out was tried.")


VERBS = {
    "search": "search {model} --data {text} --length 64",
    "matrix": "matrix {model} --data {text} --length 64 --sequences 1",
    "evaluate": "evaluate {model} --data {text} --length 64 --pattern FSSSSS",
    "overlap": "overlap {model} --data {text} --length 64",
    "distill": "distill {model} --data {text} --length 64 --pattern FSSSSS",
    "bench": "bench {model} --contexts 64 --patterns FSSSSS --device cpu",
    "profile": "profile {model} --contexts 64 --pattern FSSSSS --device cpu",
    "export": "export {model} --pattern FSSSSS",
}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"ids": [i % 128] * 400}) for i in range(8)))
    return file


@pytest.fixture
def command(checkpoint, text, monkeypatch, capsys, tmp_path):
    """Call a verb with an --out; return its exit code and stderr. Its model must not be loaded."""
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_model)
    monkeypatch.chdir(tmp_path)

    def call(verb: str, out: str):
        words = shlex.split(VERBS[verb].format(model=checkpoint, text=text))
        code = main([*words, "--out", out])
        printed = capsys.readouterr()
        assert printed.out == ""
        return code, printed.err

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_an_out_that_names_no_usable_folder_costs_no_model(command, tmp_path, checkpoint, verb):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    before = sorted(tmp_path.iterdir())
    for out, says in (
        ("", "names no folder"),
        (" \t", "names no folder"),
        ("file", "this is a file"),
        ("pipe", "this is a file"),
        ("socket", "this is a file"),
        ("/dev/full", "this is a file"),
        ("file/inside", "file/inside: file is a file"),
        ("broken", "broken: this is a symbolic link to nowhere"),
        ("broken/inside", "broken is a symbolic link to nowhere"),
        ("/proc/none/inside", "/proc/none/inside: "),
        ("n" * 300, "name too long"),
        (str(checkpoint), "the checkpoint itself"),
        (f"{checkpoint}/../{checkpoint.name}/.", "the checkpoint itself"),
    ):
        code, err = command(verb, out)
        assert code == 2, (out, err)
        assert says in err.replace("File name too long", "name too long"), (out, err)
        assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_in_which_nothing_can_be_written_costs_no_model(command, tmp_path, monkeypatch):
    """It is created for the trial, and gone after the refusal."""

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for verb in set(VERBS) - {"export"}:
        code, err = command(verb, "a/b/c")
        assert code == 2
        assert "a/b/c: nothing can be written there (the disk is full)" in err
        assert not (tmp_path / "a").exists()


def test_a_folder_that_another_process_writes_costs_no_model(command, tmp_path):
    (tmp_path / "o").mkdir()
    handle = os.open(tmp_path / "o", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for verb in set(VERBS) - {"export"}:
            code, err = command(verb, "o")
            assert code == 2
            assert "another process" in err
    finally:
        os.close(handle)
    assert results.CLAIMS.handles == []


def test_a_refused_verb_leaves_no_folder(checkpoint, text, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    words = f"evaluate {checkpoint} --data {text} --split all --pattern FSSSSS --length 64"
    assert main(shlex.split(f"{words} --sequences 1000 --out {out}")) == 2
    assert not out.parent.exists()
    (tmp_path / "old").mkdir()
    relative = os.path.relpath(tmp_path / "old" / ".." / "old")
    words = f"{words} --split all --sequences 4"
    assert main(shlex.split(f"{words} --out {relative}")) == 0, capsys.readouterr().err
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["evidence.json"]


# -- Finished results -----------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Read the one result that was kept, and whether the error names its file."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def read(error: BaseException):
        (file,) = folder.iterdir()
        assert str(file) in str(error)
        return json.loads(file.read_text())

    return read


def test_a_result_whose_file_cannot_be_written_is_kept(kept, tmp_path, capsys):
    (tmp_path / "o" / "evidence.json").mkdir(parents=True)  # A folder is in its place.
    files = {tmp_path / "o" / "evidence.json": {"a": 1}, tmp_path / "o" / "b.json": {"b": 2}}
    with pytest.raises(ValueError, match="Is a directory") as error:
        results.deliver("table", {"a": 1}, Output(), files)
    assert kept(error.value) == {"a": 1}
    assert json.loads((tmp_path / "o" / "b.json").read_text()) == {"b": 2}
    assert capsys.readouterr().out == "table\n"
    assert (tmp_path / "o" / "evidence.json").is_dir()


def test_a_result_that_stdout_does_not_take_is_kept(kept, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr("indexcache.process.drop_stdout", lambda: None)
        with pytest.raises(ValueError, match="disk is full") as error:
            results.deliver("table", {"a": 1}, Output(), {tmp_path / "f.json": {"f": 1}})
        monkeypatch.undo()
        full.close = lambda: None  # type: ignore[method-assign]
    assert json.loads((tmp_path / "f.json").read_text()) == {"f": 1}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "kept"))
    assert kept(error.value) == {"a": 1}


def test_files_are_written_where_nobody_reads_stdout(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "flush", gone)
    with pytest.raises(BrokenPipeError):
        results.deliver("table", {}, Output(json=True), {tmp_path / "f.json": {"f": 1}})
    assert json.loads((tmp_path / "f.json").read_text()) == {"f": 1}


def test_a_result_for_which_there_is_no_room_at_all_goes_to_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("indexcache.process.keep", lambda name, text: None)
    (tmp_path / "f.json").mkdir()
    with pytest.raises(ValueError, match="JSON above"):
        results.deliver("table", {"a": 1}, Output(), {tmp_path / "f.json": {"f": 1}})
    assert json.loads(capsys.readouterr().err) == {"a": 1}


# -- Equal contents have equal bytes --------------------------------------------------------------


def test_equal_deltas_have_equal_bytes(tmp_path):
    from indexcache.distilling.delta import apply_delta, save_delta
    from indexcache.pattern import Pattern
    from tests.support import make_model

    model = make_model("glm_moe_dsa", num_hidden_layers=2)
    base = {"base": "a", "base_digest": "b"}
    for i in range(8):
        save_delta(model, Pattern("FS"), tmp_path / f"{i}.safetensors", base)
    contents = {file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    assert len(contents) == 1
    assert apply_delta(model, tmp_path / "0.safetensors") == Pattern("FS")
