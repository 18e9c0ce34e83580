"""Test run folders: cut journals, settings that must not change, one writer, atomic files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from indexcache import records
from indexcache.records import finished_journal, open_run, read_journal, read_json, write_json
from tests.support import one_line

ENTRIES = [
    {"pattern": "FFF", "loss": 1.25},
    {"pattern": "FSF", "loss": 0.1},
    {"pattern": "F\u00e9\r\nS", "deep": {"a": [1, None, True]}},
]
SETTINGS = {"keep": 0.25, "stages": 1, "names": ["a", "b"]}


def journal_of(folder: Path, content: bytes) -> Path:
    """Make a run's folder whose journal is `content`."""
    with open_run(folder, SETTINGS):
        pass
    (folder / "journal.jsonl").write_bytes(content)
    return folder / "journal.jsonl"


# -- the journal -----------------------------------------------------------------------------------


def test_a_journal_is_read_again(tmp_path):
    with open_run(tmp_path / "a" / "run", SETTINGS) as run:
        assert run.journal == []
        for e in ENTRIES:
            run.append(e)
        assert run.journal == ENTRIES
        on_disk = (tmp_path / "a" / "run" / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in on_disk] == ENTRIES  # The run is still open.
    with open_run(tmp_path / "a" / "run", SETTINGS) as run:
        assert run.journal == ENTRIES


def test_a_journal_is_read_while_it_is_written(tmp_path):
    lines = [json.dumps(e).encode() + b"\n" for e in ENTRIES]
    path = journal_of(tmp_path, b"".join(lines)[:-5])
    assert read_journal(tmp_path) == ENTRIES[:-1]
    assert path.read_bytes() == b"".join(lines)[:-5]  # Its writer finds it unchanged.
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        finished_journal(tmp_path)  # A finished journal has no torn line.
    one_line(error.value, "changed by hand")
    path.unlink()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_journal(tmp_path)
    one_line(error.value, "journal.jsonl", "cannot be read")


CLAIM = """
import sys
from pathlib import Path
from indexcache.records import claim
while not Path(sys.argv[2]).exists():
    pass
try:
    claim(Path(sys.argv[1]), {"a": int(sys.argv[3])})
except ValueError as error:
    print(error)
"""


def test_processes_that_claim_a_folder_together(tmp_path):
    """The first one's settings are kept; processes with other settings are refused."""
    for attempt in range(3):
        folder = tmp_path / f"{attempt}"
        go = tmp_path / f"go{attempt}"
        command = [sys.executable, "-c", CLAIM, str(folder), str(go)]
        started = [
            subprocess.Popen(
                [*command, a], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for a in "112"
        ]
        go.touch()
        outputs = [p.communicate(timeout=60)[0] for p in started]
        kept = read_json(folder / "settings.json")["a"]
        assert [bool(x) for x in outputs] == [a != str(kept) for a in "112"], outputs
        assert all("begun with other settings (a was" in x for x in outputs if x)


def test_cut_at_every_byte_of_the_last_line(tmp_path):
    lines = [json.dumps(e).encode() + b"\n" for e in ENTRIES]
    intact = b"".join(lines)
    for cut in range(len(intact) - len(lines[-1]), len(intact) + 1):
        path = journal_of(tmp_path, intact[:cut])
        with open_run(tmp_path, SETTINGS) as run:
            kept = ENTRIES if cut == len(intact) else ENTRIES[:-1]
            assert run.journal == kept
            # The torn line is gone from the disk as well.
            assert path.read_bytes() == b"".join(lines[: len(kept)])
            for e in ENTRIES[len(kept) :]:
                run.append(e)
        assert path.read_bytes() == intact


def test_a_cut_first_line_is_dropped(tmp_path):
    line = json.dumps(ENTRIES[0]).encode()
    for cut in range(len(line) + 1):
        journal_of(tmp_path, line[:cut])
        with open_run(tmp_path, SETTINGS) as run:
            assert run.journal == []


def test_torn_line_of_any_bytes_is_dropped(tmp_path):
    good = json.dumps(ENTRIES[0]).encode() + b"\n"
    for tail in (b"\0" * 64, b"\xff\xfe", b"\xc3", b"\r"):
        journal_of(tmp_path, good + tail)
        with open_run(tmp_path, SETTINGS) as run:
            assert run.journal == ENTRIES[:1]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"   ",
        b"x",
        b'{"pattern": "FF", ',
        b"\xff\xfe",
        b"\0\0\0\0",
        b"3",
        b"null",
        b'"text"',
        b"[1, 2]",
        b'{"a": 1}{"b": 2}',
        b'{"a": 1}\r{"b"',
    ],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_journal_changed_by_hand(tmp_path, line, place):
    good = json.dumps(ENTRIES[0]).encode() + b"\n"
    content = line + b"\n" + good if place == "first" else good + line + b"\n"
    path = journal_of(tmp_path, content)
    with pytest.raises(ValueError) as error, open_run(tmp_path, SETTINGS):  # noqa: PT011
        pass
    one_line(error.value, str(path), "changed by hand")
    assert path.read_bytes() == content  # Nothing is thrown away.


def test_entries_that_are_not_json_are_not_written(tmp_path):
    with open_run(tmp_path, SETTINGS) as run:
        run.append(ENTRIES[0])
        for bad in ({"loss": float("nan")}, {"loss": float("inf")}):
            with pytest.raises(ValueError, match="not JSON compliant"):
                run.append(bad)
        with pytest.raises(TypeError):
            run.append({"loss": object()})
        assert run.journal == ENTRIES[:1]
    with open_run(tmp_path, SETTINGS) as run:
        assert run.journal == ENTRIES[:1]


# -- settings --------------------------------------------------------------------------------------


def test_settings_must_be_the_same(tmp_path):
    with open_run(tmp_path, SETTINGS) as run:
        run.append(ENTRIES[0])
    now = {"keep": 0.5, "stages": 1, "names": ["a", "c"], "seed": 7}
    with pytest.raises(ValueError) as error, open_run(tmp_path, now):  # noqa: PT011
        pass
    one_line(
        error.value,
        str(tmp_path),
        "keep was 0.25, now 0.5",
        'names was ["a", "b"], now ["a", "c"]',
        "seed was null, now 7",
    )
    assert "stages" not in str(error.value)
    with (
        pytest.raises(ValueError) as error,  # noqa: PT011
        open_run(tmp_path, {k: v for k, v in SETTINGS.items() if k != "keep"}),
    ):
        pass
    one_line(error.value, "keep was 0.25, now null")
    # These are the same as JSON, in another order.
    with open_run(tmp_path, {"names": ("a", "b"), "stages": 1, "keep": 0.25}) as run:
        assert run.journal == ENTRIES[:1]


def test_of_an_object_what_differs_is_named(tmp_path):
    records.claim(tmp_path, {"engine": {"model_len": 64, "dtype": "a" * 70, "deep": {"x": 1}}})
    with pytest.raises(ValueError, match="other settings") as error:
        records.claim(tmp_path, {"engine": {"model_len": 64, "kv": "fp8", "deep": {"x": 2}}})
    for part in ("engine.kv was null, now", "engine.deep.x was 1, now 2", "engine.dtype was"):
        assert part in str(error.value)
    assert "model_len" not in str(error.value)


def test_long_settings_are_shortened(tmp_path):
    with open_run(tmp_path, {"digests": "x" * 5000}):
        pass
    other = {"digests": "y" * 5000}
    with pytest.raises(ValueError) as error, open_run(tmp_path, other):  # noqa: PT011
        pass
    one_line(error.value, "digests was", "...")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"keep"', "\ufeff{}"])
def test_settings_changed_by_hand(tmp_path, content):
    with open_run(tmp_path, SETTINGS):
        pass
    (tmp_path / "settings.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error, open_run(tmp_path, SETTINGS):  # noqa: PT011
        pass
    one_line(error.value, str(tmp_path / "settings.json"))


def test_journal_without_settings(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError) as error, open_run(tmp_path, SETTINGS):  # noqa: PT011
        pass
    one_line(error.value, str(tmp_path), "settings.json")


def test_a_kill_while_the_settings_are_written(tmp_path):
    (tmp_path / ".settings.json.part").write_text('{"keep": 0.')
    with open_run(tmp_path, SETTINGS):
        pass
    assert read_json(tmp_path / "settings.json") == SETTINGS


# -- one writer ------------------------------------------------------------------------------------


def test_second_writer_is_refused_in_the_same_process(tmp_path):
    with open_run(tmp_path, SETTINGS):
        with pytest.raises(ValueError) as error, open_run(tmp_path, SETTINGS):  # noqa: PT011
            pass
        one_line(error.value, str(tmp_path), "another process")
    with pytest.raises(RuntimeError, match="stop"), open_run(tmp_path, SETTINGS):
        raise RuntimeError("stop")
    with open_run(tmp_path, SETTINGS):  # An exception frees the folder too.
        pass


HOLDER = """
import sys
from pathlib import Path
from indexcache.records import open_run
with open_run(Path(sys.argv[1]), {"a": 1}) as run:
    run.append({"n": 1})
    run._file.write('{"n": 2, "torn')
    run._file.flush()
    print("open", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_and_a_kill_frees_the_lock(tmp_path):
    root = str(Path(records.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            before = (tmp_path / "journal.jsonl").read_bytes()
            with pytest.raises(ValueError) as error, open_run(tmp_path, {"a": 1}):  # noqa: PT011
                pass
            one_line(error.value, str(tmp_path), "another process", f"kill {holder.pid},")
            # The writer's torn line is still there.
            assert (tmp_path / "journal.jsonl").read_bytes() == before
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with open_run(tmp_path, {"a": 1}) as run:
        assert run.journal == [{"n": 1}]


# -- atomic files ----------------------------------------------------------------------------------


def test_write_json_and_read_json(tmp_path):
    path = tmp_path / "result.json"
    for value in ({"a": [1, 2.5, None]}, [], "x", {"long": list(range(10_000))}):
        write_json(path, value)
        assert read_json(path) == value
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    with open_run(tmp_path / "run", SETTINGS) as run:
        assert run.save("result.json", {"a": 1}) == tmp_path / "run" / "result.json"
    assert read_json(tmp_path / "run" / "result.json") == {"a": 1}


@pytest.mark.parametrize("what", ["dump", "fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, what):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def half(value, file, **kwargs):
        file.write('{"new": ')
        file.flush()
        full()

    with monkeypatch.context() as m:
        if what == "dump":
            m.setattr(records.json, "dump", half)
        else:
            m.setattr(records.os, what, full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"new": 2})
    assert path.read_bytes() == before
    write_json(path, {"new": 2})
    assert read_json(path) == {"new": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {"a": [1, {1, 2}]}])
def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"new": [1, 2, value]})
    assert read_json(path) == {"old": 1}


def test_write_json_reaches_the_disk_before_it_replaces(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(records.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(
        records.os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1]
    )
    write_json(tmp_path / "a.json", 1)
    assert order == ["fsync", "replace", "fsync"]  # first the file, last the folder


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"{} {}"])
def test_read_json_refuses_what_is_not_json(tmp_path, content):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_json(path)
    one_line(error.value, str(path), "JSON")
