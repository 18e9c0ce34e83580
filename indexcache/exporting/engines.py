"""Write the flags that give a pattern to vLLM and SGLang over any base config."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from indexcache.configs import text_section
from indexcache.pattern import DEFAULT_SKIP_OFFSET, Pattern


def override_keys(section: Mapping[str, Any], pattern: Pattern) -> dict[str, Any]:
    """Return `pattern.to_config()`, and keys that neutralise a frequency in the base config.

    An override is merged into the base config, so it can replace a key but not remove one. Every
    engine prefers the pattern to a frequency that is left over from the base. SGLang prefers its
    command-line factor to the pattern, but not to `indexer_types`, so both keys are always given.
    A left-over frequency still misleads a reader of that key alone, and a null one stops engines
    that compute with it first. So it becomes 1, with the offset that engines assume: such a reader
    then runs every indexer, or fails because weights are missing, but never silently shares along
    another pattern.
    """
    keys = pattern.to_config()
    if "index_topk_freq" not in keys and (
        "index_topk_freq" in section or "index_skip_topk_offset" in section
    ):
        keys |= {"index_topk_freq": 1, "index_skip_topk_offset": DEFAULT_SKIP_OFFSET}
    return keys


def vllm_overrides(config: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """Return the value of `--hf-overrides`.

    For a multimodal config it lies under "text_config", which vLLM merges key by key.
    """
    section = text_section(config)
    keys = override_keys(section, pattern)
    return keys if section is config else {"text_config": keys}


def sglang_overrides(config: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """Return the value of `--json-model-override-args`.

    For a multimodal config the keys lie both under "text_config", into which SGLang 0.5.23 merges
    them and which the model reads, and at the top, which its memory pools read.
    """
    section = text_section(config)
    keys = override_keys(section, pattern)
    return keys if section is config else {"text_config": keys, **keys}


FLAGS: dict[str, tuple[str, Callable[[dict[str, Any], Pattern], dict[str, Any]]]] = {
    "vllm": ("--hf-overrides", vllm_overrides),
    "sglang": ("--json-model-override-args", sglang_overrides),
}
"""Each engine's flag, and the function that makes the flag's value from a config and a pattern."""


def write_flag(
    engine: str, config: dict[str, Any], pattern: Pattern, folder: str | Path
) -> list[Path]:
    """Write `<engine>.txt`, the flag quoted for a shell, and `<engine>.json`, its bare value."""
    flag, overrides = FLAGS[engine]
    text = json.dumps(overrides(config, pattern), sort_keys=True)
    line = Path(folder) / f"{engine}.txt"
    value = Path(folder) / f"{engine}.json"
    line.write_text(f"{flag} {shlex.quote(text)}\n", encoding="utf-8")
    value.write_text(text + "\n", encoding="utf-8")
    return [line, value]
