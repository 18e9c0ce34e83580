"""Rules of the house that a machine can check: who imports what, and names that must agree."""

from __future__ import annotations

import ast
from pathlib import Path

import indexcache
from indexcache.cli.common import ModelSettings
from indexcache.exporting.checks import ENGINES, MODEL_TYPES
from indexcache.models.family import families
from indexcache.models.loading import DTYPES

PACKAGE = Path(indexcache.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def users(library: str) -> set[str]:
    return {
        p.relative_to(PACKAGE).parts[0]
        for p in PACKAGE.rglob("*.py")
        if any(m.split(".")[0] == library for m in imports(p))
    }


def test_heavy_libraries_stay_in_their_folder():
    assert users("transformers") == {"models"}
    assert users("triton") <= {"ops"}
    assert users("matplotlib") == {"report"}


def test_imports_go_down_only():
    below = {
        "ops": set(),
        "models": {"ops"},
        "searching": {"models"},
        "evals": {"models"},
        "bench": {"models"},
        "distilling": {"models", "ops", "report"},
        "exporting": set(),
        "report": set(),
    }
    for part, allowed in below.items():
        for path in (PACKAGE / part).rglob("*.py"):
            inner = {m.split(".")[1] for m in imports(path) if m.startswith("indexcache.")} & (
                set(below) | {"cli"}
            )
            assert inner <= {part, *allowed}, (path.name, inner)


def test_names_agree():
    assert set(MODEL_TYPES) == set(families())
    assert {name for name, family in families().items() if family.native_sharing} == {
        "glm_moe_dsa"
    }  # what export.doctor refuses
    dtype = ModelSettings.__dataclass_fields__["dtype"]
    assert set(dtype.metadata["choices"]) == set(DTYPES)
    assert set(ENGINES) == {"transformers", "vllm", "sglang"}
