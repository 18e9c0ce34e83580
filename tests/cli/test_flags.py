"""The command line without a model: flags from settings, TOML below flags, one sentence per refusal, and the names of patterns."""

from __future__ import annotations

import contextlib
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import indexcache
import indexcache.cli as cli
from indexcache.cli import main
from indexcache.cli.flags import build_parser, emit, flag, fraction, parse, required
from indexcache.pattern import Pattern
from indexcache.report.tables import table
from indexcache.spec import SYNTAX, choose

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


# -- naming patterns --------------------------------------------------------------------------------------------------

FRONTIER = ["FFFFFFFF", "FFFFSFFF", "FSFFSFFF", "FSFFSSFF", "FSFSSSFF", "FSFSSSSF", "FSSSSSSF"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A search's folder `run` in the working directory, written by hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    frontier = [
        {"full": p.count("F"), "pattern": p, "loss": 1.0, "flipped": None} for p in FRONTIER
    ]
    write(
        tmp_path / "run",
        {"frontier": frontier, "uniform": [], "calibration": {"digests": ["d1", "d2"]}},
    )
    return tmp_path / "run"


def write(folder: Path, value: Any) -> None:
    (folder / "result.json").write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("FSSFSSSF", "FSSFSSSF"),
        ("FRRFRRRF@4", "FRRFRRRF@4"),
        ("FRRFRRRF", "FRRFRRRF@8"),
        ("full", "FFFFFFFF"),
        ("uniform:1/4", "FSSSFSSS"),
        ("uniform:4", "FSSSFSSS"),
        ("uniform:2/8", "FSSSFSSS"),
        ("uniform:1", "FFFFFFFF"),
        ("uniform:1/1", "FFFFFFFF"),
        ("uniform:3", "FSSFSSFS"),
        ("uniform:99", "FSSSSSSS"),
        ("uniform:4+R8", "FRRRFRRR@8"),
        ("uniform:1/4+R", "FRRRFRRR@8"),
        ("uniform:4+R2", "FRRRFRRR@2"),
        ("full+R8", "FFFFFFFF"),
        ("FRRFRRRF@4+R2", "FRRFRRRF@2"),
        ("FSSFSSSF+R16", "FRRFRRRF@16"),
        ("run", "FSSSSSSF"),
        ("run/", "FSSSSSSF"),
        ("./run", "FSSSSSSF"),
        ("run:2", "FSSSSSSF"),
        ("run:3", "FSFSSSSF"),
        ("run:8", "FFFFFFFF"),
        ("run:1/4", "FSSSSSSF"),
        ("run:1/2", "FSFSSSFF"),
        ("run:0.5", "FSFSSSFF"),
        ("run:3/8", "FSFSSSSF"),
        ("run:1/3", "FSFSSSSF"),
        ("run:1/1", "FFFFFFFF"),
        ("run+R8", "FRRRRRRF@8"),
        ("run:1/2+R4", "FRFRRRFF@4"),
    ],
)
def test_choose(run, spec, expected):
    chosen = choose(spec, 8)
    assert str(chosen.pattern) == expected
    assert chosen.name == spec
    assert chosen.seen == ({"d1", "d2"} if spec.startswith(("run", "./run")) else set())
    named = choose(f"my name={spec}", 8)
    assert named.name == "my name"
    assert (named.pattern, named.seen) == (chosen.pattern, chosen.seen)


def test_choose_files(run, tmp_path):
    Pattern("FSSFSSSF").to_file(tmp_path / "p.json")
    (tmp_path / "plain").write_text("FRRFRRRF@4\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 8, "index_topk_freq": 4})
    )
    for spec, expected in (
        ("p.json", "FSSFSSSF"),
        ("plain", "FRRFRRRF@4"),
        ("config.json", "FFSSSFSS"),
        (str(tmp_path / "p.json"), "FSSFSSSF"),
        ("x=p.json+R2", "FRRFRRRF@2"),
        ("uniform=p.json", "FSSFSSSF"),
    ):
        assert str(choose(spec, 8).pattern) == expected
        assert choose(spec, 8).seen == frozenset()


def test_syntax_names_every_form():
    for part in (
        "FSSF",
        "@8",
        "full",
        "uniform:1/4",
        "uniform:4",
        "FILE",
        "RUN:1/4",
        "RUN:3",
        "+R8",
        "NAME=",
    ):
        assert part in SYNTAX


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("", ["empty"]),
        ("  ", ["empty"]),
        ("a=", ["empty"]),
        ("+R8", ["empty"]),
        ("=", ["empty"]),
        ("FSS", ["3 layers", "8"]),
        ("FSSFSSSFF", ["9 layers", "8"]),
        ("SSSSSSSS", ["Layer 0"]),
        ("fsssssss", ["'f'", "Write 'F'"]),
        ("FXSSSSSS", ["'X'"]),
        ("FSSSSSSS@8", ["no R"]),
        ("FRRRRRRR@0", ["pool factor"]),
        ("F" * 300, ["300 layers"]),
        ("x" * 5000, ["5000 layers"]),
        ("uniform", ["'u'"]),
        ("uniform:", ["uniform:"]),
        ("uniform:0", ["above 0"]),
        ("uniform:-2", ["above 0"]),
        ("uniform:1/0", ["1/0"]),
        ("uniform:a", ["'a'"]),
        ("uniform:3/4", ["whole number"]),
        ("uniform:2.5", ["whole number"]),
        ("uniform:4+R0", ["pool factor"]),
        ("uniform:4+R1000000", ["pool factor"]),
        ("uniform:4+r8", ["uniform:4+r8"]),
        ("uniform:4+R8+R8+Rx", ["uniform:4"]),
        ("missing/run", ["missing/run", "no such"]),
        ("missing:1/4", ["missing:1/4"]),
        ("missing.json", ["missing.json"]),
        ("run:1", ["1 full", "2 to 8"]),
        ("run:9", ["9 full", "2 to 8"]),
        ("run:1/8", ["1 full"]),
        ("run:0", ["above 0"]),
        ("run:-1/4", ["above 0"]),
        ("run:5/4", ["1.25"]),
        ("run:x", ["'x'"]),
        ("run:", ["run:"]),
        ("run:1:2", ["run:1:2"]),
        ("empty", ["empty", "not finished"]),
        ("empty:1/4", ["empty", "not finished"]),
        ("a\0b", ["'a'"]),
    ],
)
def test_choose_refusals(run, tmp_path, spec, parts):
    (tmp_path / "empty").mkdir()
    refused(lambda: choose(spec, 8), *parts)
    refused(lambda: choose("n=" + spec, 8))


def test_choose_of_another_model(run):
    refused(lambda: choose("run", 9), "8 layers", "9")
    refused(lambda: choose("run:1/4", 12))


@pytest.mark.parametrize(
    "result",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        {"frontier": []},
        {"frontier": [], "calibration": {"digests": []}},
        {"frontier": {}, "calibration": {"digests": []}},
        {"frontier": [1], "calibration": {"digests": []}},
        {"frontier": [{"full": "x", "pattern": "F"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": "X"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": None}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1e999, "pattern": "F"}], "calibration": {"digests": []}},
        {"frontier": [{"full": 1, "pattern": "F"}]},
        {"frontier": [{"full": 1, "pattern": "F"}], "calibration": {"digests": 3}},
        {"frontier": [{"full": 1, "pattern": "F"}], "calibration": None},
    ],
)
def test_result_changed_by_hand(run, result):
    write(run, result)
    for spec in ("run", "run:1", "run:1/4"):
        refused(lambda spec=spec: choose(spec, 8), "run", "result.json")


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.one_of(
        st.text(max_size=20),
        st.from_regex(r"(a=)?(uniform|run|F[FRS]{7})(:[0-9]/?[0-9]?)?(\+R[0-9]?)?", fullmatch=True),
    )
)
def test_choose_anything(run, spec):
    with contextlib.suppress(ValueError):
        assert len(choose(spec, 8).pattern) == 8
