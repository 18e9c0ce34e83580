"""Run whole processes: exit codes with broken streams, signals, locales and special files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import indexcache
from indexcache import process

ROOT = Path(indexcache.__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which `indexcache` is this code; end it after a minute."""
    command = command.replace("indexcache", f"{sys.executable} -m indexcache")
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, env=ENV | env
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("indexcache --version >&-", 0),
        ("indexcache --version 2>&- <&-", 0),
        ("indexcache --version >/dev/full", 2),
        ("indexcache inspect --help >/dev/full", 2),
        ("indexcache inspect --config nowhere 2>&-", 2),
        ("indexcache serach 2>/dev/full >&-", 2),
    ],
)
def test_streams_that_cannot_be_written_cost_no_traceback(command, code):
    done = shell(command)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "indexcache" in done.stdout or done.stdout == ""


def test_a_closed_stdout_is_no_file_of_ours(tmp_path):
    """What is opened next would get its number, and what libraries print would go there."""
    code = (
        "from indexcache.process import open_streams\nopen_streams()\n"
        f"f = open({str(tmp_path / 'f')!r}, 'w')\nassert f.fileno() > 2, f.fileno()\n"
        "print('x', flush=True)"
    )
    done = shell(f'{sys.executable} -c "$CODE" >&- <&-', CODE=code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_141():
    done = shell("(indexcache --help; echo $? >&2) | true")
    assert done.stderr.split()[-1] == "141", done.stderr


def test_text_that_the_locale_lacks_is_printed_all_the_same():
    for env in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        done = shell("indexcache inspect --config 小说", **env)
        assert done.returncode == 2
        assert "no such settings file" in done.stderr


@pytest.mark.parametrize("wait", [0.2, 0.5])
def test_an_interruption_while_libraries_are_imported_is_130(wait):
    p = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENV,
        # A test run in the background may ignore the signal, and its processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert p.stdout is not None
    p.stdout.readline()
    time.sleep(wait / 10)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130, err
    assert err.decode().startswith("indexcache: interrupted")
    assert err.count(b"\n") == 1


SLOW_IMPORT = """
import sys, types, importlib.abc, importlib.machinery, time
class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "cyclopts":
            return importlib.machinery.ModuleSpec(name, self)
    def exec_module(self, module):
        print("importing", flush=True)
        try:
            time.sleep(60)
        except BaseException:  # Some libraries hide whatever happens while they are imported.
            raise ImportError("hidden")
sys.meta_path.insert(0, Slow())
from indexcache.__main__ import main
sys.exit(main())
"""


def test_a_bug_keeps_its_traceback_where_nothing_can_be_written(monkeypatch, tmp_path, capsys):
    """Neither the folder for temporary files nor the current one need be writable."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(os, "curdir", str(tmp_path / "neither"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert process.end_of(KeyError("x"), ["a"], "1") == 70
    (file,) = tmp_path.glob("indexcache-*-traceback.txt")
    assert str(file) in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert process.end_of(KeyError("x"), ["a"], "1") == 70
    assert "KeyError: 'x'\n\nindexcache: This is a bug" in capsys.readouterr().err


def test_notes_that_cannot_be_written_are_dropped():
    with open("/dev/full", "w", buffering=1) as full:
        stream = process.Lenient(full)
        assert stream.write("note\n") == 5
        stream.writelines(["a\n", "b\n"])
        stream.flush()
        assert stream.fileno() == full.fileno()
        full.close = lambda: None  # type: ignore[method-assign]


def test_what_all_processes_of_torchrun_are_refused_for_is_said_once(tmp_path):
    (tmp_path / "model").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", "indexcache", "search", str(tmp_path / "model"), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("indexcache: ")]
    assert len(lines) == 1, done.stderr
    assert "config.json" in lines[0]
    codes = re.findall(r"exitcode *: (-?[0-9]+)", done.stderr)
    assert "2" in codes
    assert set(codes) <= {"2", str(-signal.SIGTERM)}  # One may still have imported libraries.


def test_a_process_that_is_refused_alone_says_it(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: waits.append(number))
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    process.say_together("started by hand")
    assert not waits
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    process.say_together("refused alone")
    assert waits == [signal.SIGTERM, process.TURN]
    monkeypatch.setenv("RANK", "0")
    process.say_together("the first")
    assert len(waits) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"indexcache: {x}" for x in ("started by hand", "refused alone", "the first")]
