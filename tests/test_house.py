"""Rules of the house that a machine can check: who imports what, and names that must agree."""

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
from indexcache.exporting.checks import ENGINES, MODEL_TYPES
from indexcache.models.family import families
from indexcache.models.loading import DTYPES

PACKAGE = Path(indexcache.__file__).parent

# The floors of the package, from the ground up. A room imports rooms of lower floors only, and
# never another room of its own floor.
FLOORS = (
    {"pattern", "records", "memory", "progress"},
    {"checkpoint", "data", "spec", "ops", "report"},
    {"shapes"},
    {"models"},
    {"searching", "evals", "exporting", "bench"},
    {"distilling"},
    {"cli"},
    {"__init__"},
    {"__main__"},
)
# Some floors are wider than what a room may use.
NOT_FOR = {"exporting": {"models", "ops"}, "searching": {"ops"}, "evals": {"ops"}}
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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = sorted({room(p) for p in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("library", HOME)
def test_a_library_stays_in_its_folder(library):
    users = {
        room(p)
        for p in PACKAGE.rglob("*.py")
        if any(m.split(".")[0] == library for m in imports(p))
    }
    assert users <= {HOME[library]}


def test_every_room_has_a_floor():
    assert sorted(r for floor in FLOORS for r in floor) == ROOMS


@pytest.mark.parametrize("user", ROOMS)
def test_imports_go_down_only(user):
    level = next(i for i, floor in enumerate(FLOORS) if user in floor)
    allowed = {user}.union(*FLOORS[:level]) - NOT_FOR.get(user, set())
    for path in PACKAGE.rglob("*.py"):
        if room(path) == user:
            used = {m.split(".")[1] for m in imports(path) if m.startswith("indexcache.")}
            assert used & set(ROOMS) <= allowed, path.relative_to(PACKAGE)


def test_importing_the_package_imports_no_torch():
    heavy = {"torch", "transformers", "numpy"}
    code = f"import sys, indexcache; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_every_public_name_is_there():
    for name in indexcache.__all__:
        assert getattr(indexcache, name).__doc__


def test_distillation_is_a_second_product():
    """Nothing but its verb and the lazy names of the top level imports it."""
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(m.startswith("indexcache.distilling") for m in imports(path))
    }
    outside = {name for name in importers if not name.startswith("distilling/")}
    assert outside <= {"__init__.py", "cli/distill.py"}


def test_names_agree():
    assert set(MODEL_TYPES) == set(families())
    # exporting.checks refuses this family by name.
    assert {n for n, f in families().items() if f.native_sharing} == {"glm_moe_dsa"}
    assert set(get_args(Dtype)) == set(DTYPES)
    assert set(get_args(Engine)) == set(ENGINES)
