"""The commands that start an engine on an export, quoted for bash and for PowerShell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from indexcache.configs import model_type_of
from indexcache.engines.hazards.weights import LOADER_FAILS
from indexcache.engines.rules import RULES
from indexcache.exporting.engines import FLAGS
from indexcache.pattern import Pattern

LAUNCH: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "serve"),
    "sglang": ("python", "-m", "sglang.launch_server", "--model-path"),
    "tensorrt-llm": ("trtllm-serve",),
}
"""By engine: the words before the model, in the order in which `export` prints the commands."""

POWERSHELL = "7.3 or newer"
"""Older ones drop the double quotes of JSON on the way to the program."""

_PLAIN = re.compile(r"[\w./:=+-]+", re.ASCII)
_QUOTES = re.compile("(['\u2018\u2019\u201a\u201b])")  # Each of them ends a string in PowerShell.


@dataclass(frozen=True)
class Command:
    """One way to serve an export.

    Attributes:
        engine: the engine's name.
        versions: the versions for which the command is right, e.g. "0.25 to 0.33", and what they
            need.
        words: the program and its arguments, unquoted.
        bash: the command line for bash, and for any other POSIX shell.
        powershell: the command line for PowerShell 7.3 or newer.
    """

    engine: str
    versions: str
    words: tuple[str, ...]
    bash: str
    powershell: str


def commands(
    engines: Sequence[str],
    config: dict[str, Any],
    pattern: Pattern,
    *,
    model: str,
    exported: str | None,
    surplus: tuple[bool, bool],
) -> tuple[Command, ...]:
    """List the commands that serve a pattern: on the exported checkpoint, then with a flag.

    Args:
        engines: those that were exported for.
        config: the original config.
        pattern: the pattern.
        model: the original checkpoint's path or name.
        exported: the exported checkpoint's folder; None where flags alone were written.
        surplus: whether S layers have indexer tensors, which some versions of vLLM do not load: in
            the original, and in the exported checkpoint.
    """
    family = model_type_of(config)
    found = []
    for engine in (name for name in LAUNCH if name in engines):
        if exported is not None:
            words = (*LAUNCH[engine], exported)
            found.append(_command(engine, _versions(engine, family, surplus[1]), words))
        if engine in FLAGS:
            flag, overrides = FLAGS[engine]
            value = json.dumps(overrides(config, pattern), sort_keys=True)
            words = (*LAUNCH[engine], model, flag, value)
            found.append(_command(engine, _versions(engine, family, surplus[0]), words))
    return tuple(found)


def table_of(found: Sequence[Command]) -> str:
    """Return the commands as text, each below the versions it is for.

    Both shells mostly take the same line, which is then printed once.
    """
    lines = []
    for command in found:
        both = command.bash == command.powershell
        shells = f"bash{' and PowerShell' if both else ''}"
        lines += ["", f"# {command.engine} {command.versions} ({shells})", command.bash]
        if not both:
            lines += [f"# the same in PowerShell {POWERSHELL}", command.powershell]
    return "\n".join(lines).strip()


def bash(words: Sequence[str]) -> str:
    """Quote a command for bash and other POSIX shells."""
    return shlex.join(words)


def powershell(words: Sequence[str]) -> str:
    """Quote a command for PowerShell 7.3 or newer, which passes double quotes on as they are.

    Inside single quotes nothing has a meaning but such a quote itself, which is doubled; the
    typographic ones count as well.
    """
    return " ".join(
        word if _PLAIN.fullmatch(word) else "'" + _QUOTES.sub(r"\1\1", word) + "'" for word in words
    )


def _command(engine: str, versions: str, words: tuple[str, ...]) -> Command:
    return Command(engine, versions, words, bash(words), powershell(words))


def _versions(engine: str, family: str, surplus: bool) -> str:
    """Return the versions of an engine that obey the keys on this family and load the weights."""
    rule = next(r for r in RULES if r.engine == engine and family in r.families)
    if engine != "vllm" or not surplus or rule.first is None:
        return rule.versions if rule.first or rule.last else f"as read in {rule.versions}"
    first, fails, last = (".".join(map(str, v)) for v in (rule.first, *LOADER_FAILS))
    return f"{first} and newer, but {fails} to {last} only with the plugin indexcache[vllm]"
