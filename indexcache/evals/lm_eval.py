"""Run EleutherAI's lm-evaluation-harness on a checkpoint under a pattern.

    python -m indexcache.evals.lm_eval --model_args pretrained=DIR,pattern=1/4 --tasks NAME ..

All other flags are the harness's. It needs the extra `lm-eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from indexcache.process import BAD_INPUT, say

MISSING = "lm-eval is not installed; install indexcache with it: pip install 'indexcache[lm-eval]'."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness with the model `indexcache`, and return the exit code.

    2: the harness is not installed, or the checkpoint, the pattern or a task cannot be used; one
    sentence on stderr says how.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate

        from indexcache.evals.lm_eval_model import IndexCacheLM
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "indexcache":
            raise
        say(MISSING)
        return BAD_INPUT
    if given and given[0] not in ("ls", "validate") and not _names_model(given):
        at = 1 if given[0] == "run" else 0
        given = ["run", *given[at:], "--model", "indexcache"]
    IndexCacheLM.last = None
    before, sys.argv = sys.argv, ["indexcache.evals.lm_eval", *given]
    try:
        cli_evaluate()
    except ValueError as error:
        say(" ".join(str(error).split()))
        return BAD_INPUT
    finally:
        sys.argv = before
    model = IndexCacheLM.last
    if model is not None and (note := model.about_context()):
        say(f"note: {note}")
    return 0


def _names_model(arguments: Sequence[str]) -> bool:
    """Say whether --model is given, which --model_args is not."""
    return any(a in ("--model", "-M") or a.startswith("--model=") for a in arguments)


if __name__ == "__main__":
    sys.exit(main())
