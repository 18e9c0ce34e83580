"""vLLM: the flag `--hf-overrides`, merged into the config of the checkpoint that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from indexcache.checkpoint import text_section
from indexcache.exporting.overrides import override_keys, write_flag
from indexcache.pattern import Pattern


def overrides(config: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """The value of `--hf-overrides`; under "text_config" for a multimodal config, which vLLM merges key by key."""
    section = text_section(config)
    keys = override_keys(section, pattern)
    return keys if section is config else {"text_config": keys}


def write(config: dict[str, Any], pattern: Pattern, folder: Path) -> list[Path]:
    """Write vllm.txt and vllm.json into `folder`."""
    return write_flag(folder, "vllm", "--hf-overrides", overrides(config, pattern))
