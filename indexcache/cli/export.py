"""Write the files an engine accepts: a pruned checkpoint for transformers, override strings for vLLM and SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from indexcache.cli.flags import emit, flag, required
from indexcache.exporting.checks import ENGINES
from indexcache.spec import SYNTAX

EPILOG = f"SPEC is {SYNTAX}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    verb: ClassVar[str] = "export"
    model: str = required("checkpoint folder, or tiny", positional=True)
    pattern: str = required("the pattern; the forms of SPEC are below", metavar="SPEC")
    out: str = required("folder to write; must not hold anything yet", metavar="DIR")
    engine: tuple[str, ...] = flag(
        ENGINES, "engines to write for", choices=ENGINES, metavar="ENGINE"
    )
    stages: int = flag(1, "pipeline stages of the engine: the first layer of each must be full")
    prune: bool = flag(True, "leave out the indexer tensors of the shared layers")
    json: bool = flag(False, "print one JSON object as the last line")


def run(s: Settings) -> int:
    import sys

    from indexcache.exporting import export
    from indexcache.models.loading import describe
    from indexcache.spec import parse_pattern

    facts = describe(s.model)
    chosen = parse_pattern(s.pattern, facts["num_hidden_layers"])
    result = export(
        facts["path"], chosen.pattern, s.out, engines=s.engine, stages=s.stages, prune=s.prune
    )
    for warning in result["warnings"]:
        print(f"indexcache: note: {warning}", file=sys.stderr)
    for engine, files in result["files"].items():
        for file in files:
            print(f"{engine:14s}{file}")
    emit(s.json, result)
    return 0
