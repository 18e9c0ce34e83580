"""Test the contract of the command line: flags, defaults, config files, help and refusals."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import indexcache
from indexcache.cli import VERBS, build_app, common, guarded, main
from indexcache.cli import evaluate as evaluate_verb
from indexcache.cli import search as search_verb
from indexcache.models.loading import Model
from indexcache.report.tables import table

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
"""Flags of every verb, with their defaults and choices, on which users rely."""


def arguments(verb: str) -> dict[str, Any]:
    """Return the arguments of a verb by the name that a user types, leaving out groups of them."""
    collection = build_app()[verb].assemble_argument_collection(parse_docstring=True)
    leaves = [a for a in collection if a.parse and not a.children]
    return {a.name: a for a in leaves}


@pytest.mark.parametrize("verb", VERBS)
def test_flags_have_their_defaults_and_choices(verb):
    expected = FLAGS[verb]
    actual = arguments(verb)
    assert set(actual) == {name.replace("MODEL", "--model") for name in expected}
    for name, facts in expected.items():
        argument = actual[name.replace("MODEL", "--model")]
        assert argument.required == facts.get("required", False), name
        if not argument.required:
            default = argument.field_info.default
            assert json.loads(json.dumps(default)) == facts["default"], name
        assert list(argument.get_choices(force=True) or ()) == facts.get("choices", []), name


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_explained(verb):
    for name, argument in arguments(verb).items():
        text = argument.parameter.help
        assert text, name
        assert text[:1].isupper() or text[:1].isdigit() or text.startswith(("warmup", "multi")), (
            name
        )
        assert text.endswith("."), name
    assert (VERBS[verb].__doc__ or "").strip()


def test_held_out_text_has_the_defaults_of_the_library():
    defaults = inspect.signature(Model.batches).parameters
    text = common.HeldOutText()
    assert text.split == defaults["source"].default
    for name in ("length", "sequences", "batch", "seed"):
        assert getattr(text, name) == defaults[name].default


def test_settings_are_frozen():
    for verb in VERBS.values():
        for parameter in typing.get_type_hints(verb).values():
            if dataclasses.is_dataclass(parameter):
                assert parameter.__dataclass_params__.frozen
                assert all(f.kw_only for f in dataclasses.fields(parameter))


# -- Values of flags and files ----------------------------------------------------------------


class Called(ValueError):
    """The exception that a test raises in the place of loading a model."""


@pytest.fixture
def search(monkeypatch, capsys):
    """Call `main(["search", ...])`; return the settings, or the one sentence of its refusal."""

    def call(*argv: str) -> dict[str, Any] | str:
        seen: dict[str, Any] = {}

        def open_model(model, text, running):
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            seen.update(frame.f_back.f_locals)
            raise Called

        monkeypatch.setattr(search_verb, "open_model", open_model)
        code = main(["search", *argv])
        assert code == 2
        out, err = capsys.readouterr()
        assert out == ""
        if not seen:
            assert err.startswith("indexcache: ")
            assert err.count("\n") == 1
            return err
        groups = [seen[name] for name in ("settings", "text", "running", "output")]
        flat = {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
        return flat | {"model": seen["model"], "out": seen["out"]}

    return call


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_become_settings(search):
    got = search(
        *("tiny", "--out", "o", "--keep", "1/8", "--stages", "2", "--no-uniform", "--split", "all"),
        *("--length", "128", "--dtype", "bfloat16", "--no-fast", "--json", "--seed", "3"),
    )
    assert got["model"] == "tiny"
    assert got["keep"] == 0.125
    assert got["stages"] == 2
    assert (got["uniform"], got["fast"], got["json"]) == (False, False, True)
    assert (got["split"], got["length"], got["dtype"], got["seed"]) == ("all", 128, "bfloat16", 3)
    assert got["sequences"] == 9


def test_a_config_file_gives_what_flags_leave(search, tmp_path):
    path = toml(
        tmp_path,
        'model = "tiny"\nout = "o"\nkeep = "1/8"\nlength = 256\nuniform = false\npool-factor = 4\n'
        "trust_remote_code = true\nsequences = 5\n",
    )
    got = search("--config", path, "--sequences", "7", "--uniform", "--seed", "0")
    assert (got["model"], got["out"], got["keep"], got["length"]) == ("tiny", "o", 0.125, 256)
    assert (got["pool_factor"], got["trust_remote_code"]) == (4, True)
    assert (got["sequences"], got["uniform"]) == (7, True)
    number = toml(tmp_path, "keep = 0.5\n")
    assert search("tiny", "--out", "o", "--config", number)["keep"] == 0.5


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("lenght = 5", ["lenght", "Did you mean --length"]),
        ("verb = 'search'", ["verb"]),
        ("[table]\na = 1", ["table"]),
        ("stages = 'x'", ["stages", "'x'"]),
        ("stages = 1.5", ["stages", "1.5"]),
        ("stages = true", ["stages", "True"]),
        ("stages = [1]", ["stages"]),
        ("keep = 'quarter'", ["keep", "quarter"]),
        ("keep = '1/0'", ["keep"]),
        ("dtype = 'int4'", ["dtype", "int4", "bfloat16"]),
        ("uniform = 'maybe'", ["uniform", "maybe"]),
        ("stages = ", ["TOML"]),
        ("stages = 1\nstages = 2", ["TOML"]),
    ],
)
def test_config_files_are_refused_with_file_and_key(search, tmp_path, line, parts):
    path = toml(tmp_path, line)
    message = search("tiny", "--out", "o", "--config", path).replace('"', "'")
    assert all(part in message for part in [path, *parts]), message


def test_config_files_that_cannot_be_read_are_refused(search, tmp_path):
    assert "missing.toml" in search("tiny", "--config", str(tmp_path / "missing.toml"))
    assert str(tmp_path) in search("tiny", "--config", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["required", *VERBS]),
        (["serach"], [*VERBS]),
        ([""], [*VERBS]),
        (["--nothing"], ["--nothing"]),
        (["inspect"], ["inspect", "--model"]),
        (["inspect", "missing-folder"], ["missing-folder"]),
        (["inspect", "a\nb"], ["a b"]),
        (["inspect", "missing-folder", "more"], ["more"]),
        (["inspect", "missing-folder", "%s %(prog)s"], ["%(prog)s"]),
        (["search", "tiny"], ["search", "--out"]),
        (["search", "--out", "o"], ["search", "--model"]),
        (["search", "tiny", "--out"], ["--out"]),
        (["search", "tiny", "--out", "o", "--kep", "1/4"], ["--kep", "--keep"]),
        (["search", "tiny", "--out", "o", "--keep", "x"], ["--keep", "x"]),
        (["search", "tiny", "--out", "o", "--keep", "1/0"], ["--keep"]),
        (["search", "tiny", "--out", "o", "--keep", "1/2/3"], ["--keep"]),
        (["search", "tiny", "--out", "o", "--stages", "1.5"], ["--stages", "1.5"]),
        (["search", "tiny", "--out", "o", "--length", ""], ["--length"]),
        (["search", "tiny", "--out", "o", "--dtype", "int8"], ["--dtype", "int8", "float16"]),
        (["search", "tiny", "--out", "o", "--sequ", "3"], ["--sequ"]),
        (["evaluate", "tiny"], ["evaluate", "--pattern"]),
        (["evaluate", "tiny", "--pattern"], ["--pattern"]),
        (["evaluate", "tiny", "--pattern", "F", "--split", "train"], ["--split", "train"]),
        (["overlap", "tiny"], ["--out"]),
        (["export", "tiny", "--pattern", "F"], ["--out"]),
        (
            ["export", "tiny", "--pattern", "F", "--out", "o", "--engine", "llama"],
            ["llama", "vllm"],
        ),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(capsys, monkeypatch, tmp_path, argv, parts):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("indexcache: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_values_of_a_repeated_flag_add_up(capsys, monkeypatch):
    seen = []

    def parse(facts, specs):
        seen.append(specs)
        raise Called

    monkeypatch.setattr(evaluate_verb, "parse_patterns", parse)
    for argv in (["--pattern", "1/2", "1/4", "a, b=all"], ["--pattern", "1/2", "--pattern", "all"]):
        assert main(["evaluate", "tiny", *argv]) == 2
    assert seen == [("1/2", "1/4", "a, b=all"), ("1/2", "all")]


# -- Checks before a model is loaded --------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("overlap", ["--out", "o"]),
        ("evaluate", []),
        ("distill", ["--out", "o"]),
        ("export", ["--out", "o"]),
        ("generate", ["--prompt-file", "prompt.txt"]),
        ("bench", ["--patterns", "FSXS", "--device", "cpu", "--contexts", "100"]),
        ("profile", ["--device", "cpu", "--contexts", "100"]),
    ],
)
def test_a_typo_in_the_pattern_costs_no_model(monkeypatch, tmp_path, capsys, verb, more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("Once")
    import transformers

    def loaded(*args, **kwargs):
        raise AssertionError("The model was loaded before its pattern was parsed.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    pattern = [] if verb == "bench" else ["--pattern", "FSXS"]
    assert main([verb, "tiny", *pattern, *more]) == 2
    assert "'X'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.txt"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--keep", "0"], "above 0"),
        (["--stages", "13"], "pipeline stages"),
        (["--length", "40"], "too short"),
        (["--length", "100000"], "longer than the model's context"),
        (["--data", "missing.txt"], "no such file"),
        (["--out", "prompt.txt"], "a folder is needed"),
    ],
)
def test_wrong_settings_cost_no_model(search, monkeypatch, tmp_path, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("Once")
    message = search("tiny", *(argv if "--out" in argv else ["--out", "o", *argv]))
    assert says in message


# -- Help and exit codes ---------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["-h"], *([v, "--help"] for v in VERBS)])
def test_help_names_all_flags(capsys, argv):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = arguments(argv[0]) if argv[0] in VERBS else VERBS
    assert all(name in out for name in names)
    if "--pattern" in names:
        assert "RUN:1/4" in out


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"indexcache {indexcache.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["search", "--help"], ["distill", "--help"]])
def test_help_imports_no_model_code(argv):
    code = (
        f"import sys\nfrom indexcache.cli import main\nmain({argv})\n"
        "heavy = ('torch', 'transformers', 'triton', 'matplotlib')\n"
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(indexcache.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_failures_become_exit_codes_and_bugs_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(error: BaseException):
        def describe(model):
            raise error

        monkeypatch.setattr("indexcache.models.description.describe", describe)
        return main(["inspect", "x"]), capsys.readouterr().err

    for error, code, part in (
        (ValueError("two\nlines  here"), 2, "two lines here"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "--batch or --chunk"),
        (OSError(12, "Cannot allocate memory", "f"), 2, "not enough memory"),
        (OverflowError("int too large"), 2, "too large"),
        (OSError(28, "No space left on device", "f"), 2, "disk is full"),
        (OSError(27, "File too large", "f"), 2, "ulimit -f"),
        (OSError(116, "Stale file handle", "f"), 2, "f: Stale file handle"),
        (ImportError("AWQ needs gptqmodel", name="gptqmodel"), 2, "needs gptqmodel"),
        (PermissionError(13, "Permission denied", "f"), 2, "f: Permission denied"),
    ):
        got, err = fail(error)
        assert got == code
        assert err.startswith("indexcache: ")
        assert err.count("\n") == 1
        assert part in err
    for error in (
        RuntimeError("a bug"),
        TypeError("a bug"),
        OSError(5, "a bug"),
        KeyError("a bug"),
        RecursionError("a bug"),
        SystemExit("a bug"),
        GeneratorExit("a bug"),
    ):
        got, err = fail(error)
        assert got == 70
        assert err.count("\n") == 1
        assert f"{type(error).__name__}: " in err
        (file,) = tmp_path.iterdir()
        assert str(file) in err
        assert "Traceback" in file.read_text() and "a bug" in file.read_text()
        file.unlink()


def test_json_is_the_last_line(capsys):
    print("table")
    common.Output(json=True).emit({"a": [1, None]})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"a": [1, None]}
    common.Output().emit({"a": 1})
    assert capsys.readouterr().out == ""


def test_table_aligns_its_columns():
    text = table(["name", "n"], [["a", 1], ["long", "+10.5"], ["none", ""]])
    assert text.splitlines() == ["name      n", "----  -----", "a         1", "long  +10.5", "none"]
    assert table(["name", "n"], []) == "name  n\n----  -"


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--nothing"], 2), ([], 2)])
def test_flags_that_argparse_reads_end_as_it_says(argv, code, capsys):
    """Recipes and benchmarks have such flags: their help and their refusals are no bugs."""
    parser = argparse.ArgumentParser(prog="recipe")
    parser.add_argument("--out", required=True)
    assert guarded(lambda: parser.parse_args(argv)) == code
    out, err = capsys.readouterr()
    assert "usage: recipe" in (err if code else out)
    assert "bug" not in err
