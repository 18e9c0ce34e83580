"""The command line without a model: flags from settings, TOML below flags, one sentence per refusal, and the names of patterns."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import indexcache
import indexcache.cli as cli
from indexcache.cli import main
from indexcache.cli.flags import build_parser, emit, flag, fraction, parse, required
from indexcache.report.tables import table

MODULES = [
    importlib.import_module(f"indexcache.cli.{m.name}") for m in pkgutil.iter_modules(cli.__path__)
]
VERBS = {m.Settings.verb: m for m in MODULES if hasattr(m, "Settings")}


@dataclass(frozen=True, kw_only=True)
class Demo:
    verb: ClassVar[str] = "demo"
    model: str = required("a model", positional=True)
    out: str = required("a folder", metavar="DIR")
    count: int = flag(3, "a number, 100 % of it")
    start: int = flag(0, "another number")
    keep: float = flag(0.25, "a fraction", fraction=True)
    most: float | None = flag(None, "a bound")
    limit: int | None = flag(None, "a limit")
    kind: str = flag("x", "which", choices=("x", "y"))
    names: tuple[str, ...] = flag((), "some names", metavar="NAME")
    engine: tuple[str, ...] = flag(("a", "b"), "engines", choices=("a", "b"))
    long_name: bool = flag(False, "yes or no")
    prune: bool = flag(True, "no or yes")


DEMO: dict[str, Any] = {"demo": types.SimpleNamespace(Settings=Demo, __doc__="A demo.\n\nMore.")}


def read(*argv: str) -> Demo:
    verb, values = parse(build_parser(DEMO), DEMO, ["demo", *argv])
    assert verb == "demo"
    assert isinstance(values, Demo)
    return values


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(call: Any, *parts: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# -- flags ------------------------------------------------------------------------------------------------------------


def test_defaults_and_values():
    assert read("m", "--out", "o") == Demo(model="m", out="o")
    got = read(
        "m",
        "--out",
        "o",
        "--count",
        "5",
        "--start",
        "-2",
        "--keep",
        "1/8",
        "--most",
        "0.5",
        "--limit",
        "7",
        "--kind",
        "y",
        "--names",
        "p",
        "q",
        "--names",
        "r",
        "--engine",
        "b",
        "--long-name",
        "--no-prune",
    )
    assert got == Demo(
        model="m",
        out="o",
        count=5,
        start=-2,
        keep=0.125,
        most=0.5,
        limit=7,
        kind="y",
        names=("p", "q", "r"),
        engine=("b",),
        long_name=True,
        prune=False,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.count = 3  # type: ignore[misc]


def test_fractions():
    for text, value in {
        "1/4": 0.25,
        "0.25": 0.25,
        "1": 1.0,
        "1/3": 1 / 3,
        "3/4": 0.75,
        " 1 / 2 ": 0.5,
    }.items():
        assert fraction(text) == value
        assert read("m", "--out", "o", "--keep", text).keep == value
    for bad in ("a", "", "1/", "/4", "1/0", "1/2/3", "1:4", "1/4x"):
        refused(lambda bad=bad: read("m", "--out", "o", "--keep", bad), "--keep")
    refused(
        lambda: read("m", "--out", "o", "--most", "1/4"), "--most"
    )  # only where a fraction is meant


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["demo needs MODEL", "demo --help"]),
        (["m"], ["demo needs --out"]),
        (["m", "--out"], ["--out"]),
        (["m", "--out", "o", "--count", "x"], ["--count", "x"]),
        (["m", "--out", "o", "--count", "1.5"], ["--count", "1.5"]),
        (["m", "--out", "o", "--limit", ""], ["--limit"]),
        (["m", "--out", "o", "--kind", "z"], ["kind", "x, y", "'z'"]),
        (["m", "--out", "o", "--engine", "a", "c"], ["engine", "a, b", "'c'"]),
        (["m", "--out", "o", "--nothing"], ["--nothing"]),
        (["m", "--out", "o", "--coun", "3"], ["--coun"]),  # nothing is abbreviated
        (["m", "--out", "o", "more"], ["more"]),
        (["m", "--out", "o", "--long-name=1"], ["--long-name"]),
        (["m", "--out", "o", "--names"], ["--names"]),
    ],
)
def test_flags_refused(argv, parts):
    refused(lambda: read(*argv), *parts)


# -- TOML -------------------------------------------------------------------------------------------------------------

ALL = """
model = "m"
out = "o"
count = 5
keep = "1/8"
most = 1
limit = 9
kind = "y"
names = ["p", "q"]
long-name = true
prune = false
"""


def test_toml_gives_everything(tmp_path):
    path = toml(tmp_path, ALL)
    expected = Demo(
        model="m",
        out="o",
        count=5,
        keep=0.125,
        most=1.0,
        limit=9,
        kind="y",
        names=("p", "q"),
        long_name=True,
        prune=False,
    )
    assert read("--config", path) == expected
    assert isinstance(read("--config", path).most, float)
    assert read("--config", toml(tmp_path, ALL.replace("long-name", "long_name"))) == expected
    assert read("--config", toml(tmp_path, ALL.replace('"1/8"', "0.125"))) == expected


def test_flags_override_toml(tmp_path):
    path = toml(tmp_path, ALL)
    got = read(
        "n",
        "--config",
        path,
        "--out",
        "p",
        "--count",
        "6",
        "--keep",
        "0.5",
        "--most",
        "2",
        "--limit",
        "1",
        "--kind",
        "x",
        "--names",
        "z",
        "--no-long-name",
        "--prune",
    )
    assert got == Demo(
        model="n",
        out="p",
        count=6,
        keep=0.5,
        most=2.0,
        limit=1,
        kind="x",
        names=("z",),
        long_name=False,
        prune=True,
    )
    assert read("--config", path, "--start", "0").start == 0
    assert (
        read("--config", toml(tmp_path, ALL + "start = 4"), "--start", "0").start == 0
    )  # a zero is a value too
    assert read("--config", toml(tmp_path, 'out = "o"'), "m") == Demo(model="m", out="o")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("cuont = 5", ["demo has no setting 'cuont'", "count"]),
        ("verb = 'demo'", ["no setting 'verb'"]),
        ("config = 'x'", ["no setting 'config'"]),
        ("[table]\na = 1", ["no setting 'table'"]),
        ("count = '5'", ["count", "'5'"]),
        ("count = 5.0", ["count", "5.0"]),
        ("count = true", ["count", "True"]),
        ("count = [5]", ["count"]),
        ("limit = 'none'", ["limit"]),
        ("keep = 'quarter'", ["keep", "'quarter'", "1/4"]),
        ("keep = '1/0'", ["keep", "'1/0'"]),
        ("keep = true", ["keep", "True"]),
        ("most = '1/4'", ["most"]),
        ("out = 3", ["out", "3"]),
        ("out = ['o']", ["out"]),
        ("kind = 'z'", ["kind", "x, y", "'z'"]),
        ("kind = 1", ["kind"]),
        ("names = 'p'", ["names"]),
        ("names = [1]", ["names"]),
        ("names = ['p', ['q']]", ["names"]),
        ("engine = ['a', 'c']", ["engine", "a, b", "'c'"]),
        ("prune = 1", ["prune"]),
        ("prune = 'yes'", ["prune"]),
        ("count = 2026-01-01", ["count"]),
        ("[count]\na = 1", ["count"]),
    ],
)
def test_toml_refused(tmp_path, line, parts):
    path = toml(tmp_path, line)
    message = refused(lambda: read("m", "--out", "o", "--config", path), *parts)
    if "one of" not in message:
        assert path in message


def test_toml_files_refused(tmp_path):
    refused(lambda: read("m", "--config", str(tmp_path / "missing.toml")), "missing.toml")
    refused(lambda: read("m", "--config", str(tmp_path)), str(tmp_path))
    for content in (b"count = ", b"a b c", b"\xff\xfe", b"count = 1\ncount = 2"):
        (tmp_path / "a.toml").write_bytes(content)
        refused(lambda: read("m", "--config", str(tmp_path / "a.toml")), "a.toml", "TOML")


# -- main -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serach"],
        [""],
        ["--nothing"],
        ["search", "tiny", "--out", "o", "--nothing"],
        ["search", "--out", "o"],
        ["search", "tiny"],
        ["search", "tiny", "--out", "o", "--keep", "x"],
        ["search", "tiny", "--out", "o", "--stages", "1.5"],
        ["search", "tiny", "--out", "o", "--config", "missing.toml"],
        ["evaluate", "tiny"],
        ["evaluate", "tiny", "--pattern"],
        ["evaluate", "tiny", "--pattern", "F", "--split", "train"],
        ["overlap", "tiny"],
        ["export", "tiny", "--pattern", "F"],
        ["export", "tiny", "--pattern", "F", "--out", "o", "--engine", "llama"],
        ["inspect"],
        ["inspect", "missing-folder"],
        ["inspect", "a\nb"],
        ["inspect", "missing-folder", "%s %(prog)s"],
        ["search", "tiny", "--out", "o", "--dtype", "int8"],
    ],
)
def test_wrong_usage_is_one_line_and_2(capsys, monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("indexcache: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_verb_names_the_verbs(capsys):
    main(["serach"])
    err = capsys.readouterr().err
    assert all(v in err for v in VERBS)


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["--version"], *([v, "--help"] for v in VERBS)]
)
def test_help_and_version(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    if argv == ["--version"]:
        assert out == f"indexcache {indexcache.__version__}\n"
    elif argv[0] in VERBS:
        for field in dataclasses.fields(VERBS[argv[0]].Settings):
            shown = (
                field.name.upper()
                if field.metadata.get("positional")
                else "--" + field.name.replace("_", "-")
            )
            assert shown in out
    else:
        assert all(v in out for v in VERBS)


def test_help_imports_no_model_code():
    code = (
        "import sys\nfrom indexcache.cli import main\n"
        "try: main(['search', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(' '.join(m for m in ('transformers', 'triton', 'matplotlib') if m in sys.modules) or 0)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(indexcache.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_explained(verb):
    module = VERBS[verb]
    assert (module.__doc__ or "").strip()
    parameters = module.Settings.__dataclass_params__
    assert parameters.frozen
    for field in dataclasses.fields(module.Settings):
        assert field.kw_only
        assert len(field.metadata["help"].strip()) > 5
        choices = field.metadata.get("choices")
        if choices and field.default is not dataclasses.MISSING:
            given = field.default if isinstance(field.default, tuple) else (field.default,)
            assert set(given) <= set(choices)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        build_parser(DEMO).parse_args(["demo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for shown in (
        "100 % of it (default: 3)",
        "another number (default: 0)",
        "(default: 0.25)",
        "(default: a b)",
        "no or yes (default: True)",
    ):
        assert shown in out
    assert "yes or no (default" not in out
    assert "a bound (default" not in out


def test_failures_of_a_verb(capsys, monkeypatch):
    def fail(error: BaseException):
        def run(settings):
            raise error

        monkeypatch.setattr(VERBS["inspect"], "run", run)
        return main(["inspect", "x"]), capsys.readouterr().err

    for error, code, part in (
        (ValueError("two\nlines  here"), 2, "two lines here"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "memory"),
        (OSError(28, "No space left on device", "f"), 2, "disk is full"),
        (PermissionError(13, "Permission denied", "f"), 2, "f: Permission denied"),
    ):
        got, err = fail(error)
        assert got == code
        assert err.startswith("indexcache: ")
        assert err.count("\n") == 1
        assert part in err
    for error in (RuntimeError("a bug"), TypeError("a bug"), OSError(5, "Input/output error")):
        with pytest.raises(type(error)):  # a bug keeps its traceback
            fail(error)


def test_emit_is_the_last_line(capsys):
    print("table")
    emit(True, {"a": [1, None]})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"a": [1, None]}
    emit(False, {"a": 1})
    assert capsys.readouterr().out == ""


def test_table():
    text = table(["name", "n"], [["a", 1], ["long", "+10.5"], ["none", ""]])
    assert text.splitlines() == ["name      n", "----  -----", "a         1", "long  +10.5", "none"]
    assert table(["name", "n"], []) == "name  n\n----  -"
