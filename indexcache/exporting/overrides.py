"""The config keys that give one pattern to an engine whose base config may hold another one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from indexcache.pattern import DEFAULT_SKIP_OFFSET, Pattern

SHARING_KEYS = (
    "use_index_cache",
    "index_topk_pattern",
    "indexer_types",
    "index_topk_freq",
    "index_skip_topk_offset",
)


def override_keys(section: Mapping[str, Any], pattern: Pattern) -> dict[str, Any]:
    """`pattern.to_config()`, and what neutralises the frequency of the base config `section` where it would remain.

    An override is merged into the base config, so it can replace a key but not remove one. A frequency left over from
    the base loses against the pattern in every engine (SGLang's command-line factor beats the pattern too, but not
    `indexer_types`, which is why both are always given). It still would mislead whoever reads only the frequency, and
    a null one stops those that compute with it before they look at the pattern. So it becomes 1, with the offset that
    engines assume: such a reader then runs every indexer, or fails for want of its weights, but never shares along
    another pattern without a word.
    """
    keys = pattern.to_config()
    if "index_topk_freq" not in keys and (
        "index_topk_freq" in section or "index_skip_topk_offset" in section
    ):
        keys |= {"index_topk_freq": 1, "index_skip_topk_offset": DEFAULT_SKIP_OFFSET}
    return keys


def write_flag(folder: Path, engine: str, flag: str, value: Mapping[str, Any]) -> list[Path]:
    """Write `<engine>.txt`, the flag quoted for a POSIX shell on one line, and `<engine>.json`, its bare value."""
    text = json.dumps(value, sort_keys=True)
    paths = [folder / f"{engine}.txt", folder / f"{engine}.json"]
    paths[0].write_text(f"{flag} {shlex.quote(text)}\n", encoding="utf-8")
    paths[1].write_text(text + "\n", encoding="utf-8")
    return paths
