"""Run parts of the engines' own modules: functions, and single statements of constructors.

The modules import kernels and servers that are not installed, so only what decides about sharing is
taken out of their syntax trees. A statement that is not there any more is an error: the rule may
have changed.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(os.environ.get("ENGINES", Path(__file__).parents[2] / "build" / "engines"))


@cache
def tree(module: str) -> ast.Module:
    """Parse a module, e.g. vllm/distributed/utils.py."""
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def functions(module: str, *names: str, **known: Any) -> SimpleNamespace:
    """Return top-level functions and constants of a module, which know only these and `known`."""
    kept = []
    for node in tree(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found = {getattr(node, "name", ""), *(t.id for t in targets if isinstance(t, ast.Name))}
        if found & set(names):
            kept.append(node)
    missing = set(names) - {getattr(n, "name", None) or n.targets[0].id for n in kept}
    assert not missing, f"{module} has no {missing} any more"
    space: dict[str, Any] = {**_typing(), **known}
    exec(compile(ast.Module(kept, []), module, "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def statements(
    module: str, function: str, wanted: Callable[[ast.stmt], bool]
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs statements of a function with given names.

    They are the wanted ones of the first block that has any. It returns all names as they are
    afterwards.
    """
    blocks = [
        block
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef) and node.name == function
        for inner in ast.walk(node)
        for block in (getattr(inner, "body", []), getattr(inner, "orelse", []))
        if isinstance(block, list)
    ]
    kept = next((k for block in blocks if (k := [s for s in block if wanted(s)])), None)
    assert kept, f"{module}: {function} has no such statement any more"
    code = compile(ast.Module(kept, []), module, "exec")

    def run(**names: Any) -> dict[str, Any]:
        space = {**_typing(), **names}
        exec(code, space)
        return space

    return run


def condition(module: str, source: str) -> Callable[..., bool]:
    """Return the condition of the one `if` that reads `source`, as a function of its names."""
    found = [n for n in ast.walk(tree(module)) if isinstance(n, ast.If) and text(n.test) == source]
    assert len(found) == 1, f"{module} has no `if {source}` any more"
    code = compile(ast.Expression(found[0].test), module, "eval")
    return lambda **names: bool(eval(code, dict(names)))


def method(module: str, owner: str, name: str, **known: Any) -> Callable[..., Any]:
    """Return a method of a class as a function, which knows only the names in `known`."""
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == name:
                    space: dict[str, Any] = {**_typing(), **known}
                    exec(compile(ast.Module([inner], []), module, "exec"), space)
                    return space[name]
    raise AssertionError(f"{module} has no {owner}.{name} any more")


def text(node: ast.AST) -> str:
    """Return the source of a node."""
    return ast.unparse(node)


def _typing() -> dict[str, Any]:
    import typing

    from transformers import PretrainedConfig

    return {
        **vars(typing),
        "PretrainedConfig": PretrainedConfig,
        "PreTrainedConfig": PretrainedConfig,
    }
