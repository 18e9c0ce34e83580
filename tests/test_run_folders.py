"""Test what the library's functions say of an `out` that is no folder or cannot be written.

`tests/cli/test_out.py` asks the verbs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from indexcache import Pattern, SearchSettings, evaluate, export, search
from indexcache.bench.run import Grid, run_bench
from indexcache.bench.subject import open_subject
from indexcache.crossing.run import matrix
from indexcache.data import make_batches
from indexcache.spec import NamedPattern
from tests.distilling import worker
from tests.support import documents, refused


@pytest.fixture(scope="module")
def texts():
    both = documents(80, 48)
    return (
        make_batches(both[:4], length=48, sequences=4),
        make_batches(both[4:], length=48, sequences=74, batch=37),
    )


@pytest.fixture(scope="module")
def calls(glm, glm_folder, texts):
    """By name, functions that write a folder."""
    subject = open_subject(
        "tiny-random", layers=2, dtype="float32", device="cpu", index_dtype="auto"
    )
    grid = Grid(
        contexts=(40,), patterns=(NamedPattern("all", Pattern.full(2)),), decode_tokens=2, chunk=64
    )
    return {
        "search": lambda out: search(glm, texts[0], out, SearchSettings(keep=0.8)),
        "evaluate": lambda out: evaluate(glm, "FSFSSS", texts[0], out=out),
        "matrix": lambda out: matrix(glm, *texts, out),
        "distill": lambda out: worker.train(out, "frozen", pattern="FSFSSS", steps=1, rows=1),
        "export": lambda out: export(glm_folder, "FSFSSS", out, engines=("vllm",)),
        "bench": lambda out: run_bench(subject, grid, out),
        "bench --fresh": lambda out: run_bench(subject, grid, out, fresh=True),
    }


NAMES = ("search", "evaluate", "matrix", "distill", "export", "bench", "bench --fresh")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_folder_is_refused_in_a_sentence(calls, tmp_path, name):
    file = tmp_path / "file"
    file.write_text("x")
    broken = tmp_path / "broken"
    broken.symlink_to("nowhere")
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for out, says in (
        (file, "overwritten" if name == "export" else "this is a file"),
        (file / "inside", f"{file} is a file"),
        (file / "far" / "inside", f"{file} is a file"),
        (broken, "this is a symbolic link to nowhere"),
        (broken / "inside", f"{broken} is a symbolic link to nowhere"),
        (loop, "a symbolic link to loop"),
        (Path("/proc/none/inside"), "written"),
        (tmp_path / ("n" * 300), "name too long"),
    ):
        refused(lambda out=out: calls[name](out), str(out), says)
    assert sorted(tmp_path.iterdir()) == [broken, file, loop]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_cannot_be_written_is_refused(calls, tmp_path, monkeypatch, name):
    """The calls fail as on a read-only disk, because root may write in spite of a folder's mode."""
    opened, made = os.open, os.mkdir

    def read_only(call):
        def wrapped(path, *args, **kwargs):
            inside = isinstance(path, str | Path) and Path(path).is_relative_to(tmp_path)
            if inside and (call is made or args[0] & os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return call(path, *args, **kwargs)

        return wrapped

    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "open", read_only(opened))
    monkeypatch.setattr(os, "mkdir", read_only(made))
    for out in (tmp_path / "old", tmp_path / "new" / "folder"):
        refused(lambda out=out: calls[name](out), str(out), "Read-only file system")
