"""SGLang: the flag `--json-model-override-args`, applied to the config of the checkpoint that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from indexcache.checkpoint import text_section
from indexcache.exporting.overrides import override_keys, write_flag
from indexcache.pattern import Pattern


def overrides(config: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """The value of `--json-model-override-args`, always flat.

    Unlike vLLM, SGLang sets each key as one attribute: `{"text_config": {..}}` would replace the whole text config of
    a multimodal model by a dict. Newer versions apply flat keys to the text config, which is what is wanted.
    """
    return override_keys(text_section(config), pattern)


def write(config: dict[str, Any], pattern: Pattern, folder: Path) -> list[Path]:
    """Write sglang.txt and sglang.json into `folder`."""
    return write_flag(folder, "sglang", "--json-model-override-args", overrides(config, pattern))
