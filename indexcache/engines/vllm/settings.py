"""The settings of vLLM, which import nothing heavy because the command line reads them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """How vLLM runs the model."""

    tensor_parallel_size: int = 1
    "Number of GPUs that share every layer."
    pipeline_parallel_size: int = 1
    "Number of groups of GPUs that hold consecutive layers. The first layer of each stays full."
    enable_expert_parallel: bool = False
    "Lay whole experts on the GPUs instead of splitting each."
    engine_arg: tuple[str, ...] = ()
    "Further arguments of vLLM's engine, NAME=VALUE, where the value is JSON or a plain word."
    sort_ids: bool = True
    """Sort the ids that vLLM's prefill selects, and settle ties of scores by position; vLLM leaves
    both to chance. Sorted, evaluations repeat; unsorted they cost a little less."""


def check_installed() -> None:
    """Raise ValueError, which says how to get it, if vLLM is not installed in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed here: run `pip install indexcache[vllm]` in an environment of "
            "its own, because vLLM chooses the versions of torch and transformers."
        )
