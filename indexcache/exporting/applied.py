"""What each engine's config becomes when the export of a pattern is given to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from indexcache.engines.overriding import overridden
from indexcache.exporting.engines import FLAGS
from indexcache.exporting.transformers import merged_config
from indexcache.pattern import Pattern


def applied(
    config: dict[str, Any], pattern: Pattern, engines: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the config as each engine sees it with the export of `pattern`.

    Those with a flag get the overrides over the original config, the others the exported
    config.json.

    Raises:
        ValueError: the pattern has R layers.
    """
    found = {}
    for engine in engines:
        if engine in FLAGS:
            found[engine] = overridden(engine, config, FLAGS[engine][1](config, pattern))
        else:
            found[engine] = merged_config(config, pattern)
    return found
