"""Check rules of the code base: what a package may import, and names that must agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import indexcache
from indexcache.cli.common import Dtype
from indexcache.cli.export import Engine
from indexcache.exporting.checks import ENGINES, MODEL_TYPES, NATIVE_SHARING
from indexcache.models.family import families
from indexcache.models.loading import DTYPES

PACKAGE = Path(indexcache.__file__).parent

# Modules and folders of the package by level. One imports those of lower levels only, and no other
# one of its own level.
LEVELS = (
    {"configs", "overrides", "reading", "seen"},
    {"pattern", "process", "records", "memory", "progress"},
    {"vacuity"},
    {"checkpoint", "data", "ops", "report"},
    {"shapes", "spec", "engines", "delta"},
    {"models"},
    {"searching", "evals", "exporting", "bench"},
    {"distilling", "crossing"},
    {"cli"},
    {"__init__"},
    {"__main__"},
)
# Some may import less than all lower levels.
FORBIDDEN = {"exporting": {"models", "ops"}, "searching": {"ops"}, "evals": {"ops"}}
HOME = {"transformers": "models", "triton": "ops", "matplotlib": "report", "cyclopts": "cli"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "indexcache":
                names |= {f"indexcache.{a.name}" for a in node.names}
    return names


def top_module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


TOP_MODULES = sorted({top_module(p) for p in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("library", HOME)
def test_a_library_is_imported_in_one_folder_only(library):
    users = {
        top_module(p)
        for p in PACKAGE.rglob("*.py")
        if any(m.split(".")[0] == library for m in imports(p))
    }
    assert users <= {HOME[library]}


def test_every_module_has_a_level():
    assert sorted(name for names in LEVELS for name in names) == TOP_MODULES


@pytest.mark.parametrize("user", TOP_MODULES)
def test_imports_go_down_only(user):
    level = next(i for i, names in enumerate(LEVELS) if user in names)
    allowed = {user}.union(*LEVELS[:level]) - FORBIDDEN.get(user, set())
    for path in PACKAGE.rglob("*.py"):
        if top_module(path) == user:
            used = {m.split(".")[1] for m in imports(path) if m.startswith("indexcache.")}
            assert used & set(TOP_MODULES) <= allowed, path.relative_to(PACKAGE)


def test_importing_the_package_imports_no_torch():
    heavy = {"torch", "transformers", "numpy", "matplotlib"}
    code = f"import sys, indexcache; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_has_a_docstring():
    for name in indexcache.__all__:
        assert getattr(indexcache, name).__doc__


def test_only_its_verb_imports_distillation():
    """The lazy names of the top level do too."""
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(m.startswith("indexcache.distilling") for m in imports(path))
    }
    outside = {name for name in importers if not name.startswith("distilling/")}
    assert outside <= {"__init__.py", "cli/distill.py"}


def test_names_of_families_dtypes_and_engines_agree():
    assert set(MODEL_TYPES) == set(families())
    assert {n for n, f in families().items() if f.native_sharing} == set(NATIVE_SHARING)
    assert set(get_args(Dtype)) == set(DTYPES)
    assert set(get_args(Engine)) == set(ENGINES)
