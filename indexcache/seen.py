"""What text chose or trained something, so that it is never taken for held-out text.

It travels with a pattern: in result.json and pattern.json of a search, in what an export writes, in
the metadata of a delta and in the config of a checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `import indexcache` imports this module, and numpy only when it is needed.
    import numpy as np

CONFIG_KEY = "indexcache_calibration"
"""The key of a checkpoint's config, and of a delta's metadata, that holds it."""
MAX_SHINGLES = 4096
"""Number of hashes that are kept: the smallest ones, a random sample of all passages."""
MAX_DIGESTS = 1 << 14
"""Number of digests that are kept: the smallest ones, where a text has more documents."""
BITS = 48
"""Bits of a hash that are kept."""


@dataclass(frozen=True)
class Seen:
    """The documents and passages of a text that a search or a training saw.

    Attributes:
        digests: digests of documents, of their text and of their token ids.
        shingles: hashes of their passages (see `indexcache.data.leaks`), ascending, in `BITS` bits;
            at most `MAX_SHINGLES`, the smallest.
        limit: all hashes below it are in `shingles`.
    """

    digests: frozenset[str] = frozenset()
    shingles: tuple[int, ...] = ()
    limit: int = 1 << BITS

    @classmethod
    def of(cls, digests: Iterable[str], hashes: np.ndarray) -> Seen:
        """Make one of digests and of all hashes, uint64 [n] of 64 bits."""
        known = sorted({d for d in digests if d})[:MAX_DIGESTS]
        return cls(frozenset(known), tuple(_short(hashes).tolist()))._sampled()

    def _sampled(self) -> Seen:
        if len(self.shingles) <= MAX_SHINGLES:
            return self
        return Seen(self.digests, self.shingles[:MAX_SHINGLES], self.shingles[MAX_SHINGLES])

    def __bool__(self) -> bool:
        return bool(self.digests or self.shingles)

    def __or__(self, other: Seen) -> Seen:
        if not self or not other:
            return self or other
        limit = min(self.limit, other.limit)
        both = sorted({h for h in (*self.shingles, *other.shingles) if h < limit})
        return Seen(self.digests | other.digests, tuple(both), limit)._sampled()

    def share(self, hashes: np.ndarray) -> float:
        """Return which share of passages, by their hashes (uint64 [n]), was seen; 0 for none."""
        import numpy as np

        if not self.shingles or not len(hashes):
            return 0.0
        short = _short(hashes)
        sampled = short[short < np.uint64(self.limit)]
        if not len(sampled):
            return 0.0
        return float(np.isin(sampled, np.array(self.shingles, np.uint64)).mean())

    def to_json(self) -> dict[str, Any]:
        """Return digests and shingles as JSON holds them."""
        packed = b"".join(h.to_bytes(BITS // 8, "little") for h in self.shingles)
        return {
            "digests": sorted(self.digests),
            "shingles": {"limit": self.limit, "hashes": base64.b64encode(packed).decode()},
        }

    def to_pattern_file(self) -> dict[str, Any]:
        """Return what pattern.json holds of it; nothing if nothing was seen."""
        if not self:
            return {}
        value = self.to_json()
        return {"calibration_digests": value["digests"], "calibration_shingles": value["shingles"]}

    def to_config(self) -> dict[str, Any]:
        """Return the key of a config; none if nothing was seen."""
        return {CONFIG_KEY: self.to_json()} if self else {}

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a delta; none if nothing was seen."""
        return {key: json.dumps(value) for key, value in self.to_config().items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Seen:
        """Read `to_metadata`; what is not there or damaged is left out."""
        try:
            return cls.from_json({CONFIG_KEY: json.loads(metadata.get(CONFIG_KEY, "{}"))})
        except (ValueError, RecursionError):
            return cls()

    @classmethod
    def from_json(cls, value: Any) -> Seen:
        """Read what any file of ours holds of it; what is not there or damaged is left out.

        result.json of a search has it under "calibration", pattern.json in two keys of its own, and
        a config, also a nested one, under `CONFIG_KEY`.
        """
        if not isinstance(value, Mapping):
            return cls()
        found = _part(value.get("calibration_digests"), value.get("calibration_shingles"))
        for key in ("calibration", CONFIG_KEY):
            if isinstance(part := value.get(key), Mapping):
                found |= _part(part.get("digests"), part.get("shingles"))
        return found | cls.from_json(value.get("text_config"))


def _part(digests: Any, packed: Any) -> Seen:
    digests = digests if isinstance(digests, (list, tuple)) else ()
    known = frozenset(d for d in digests if isinstance(d, str))
    size = BITS // 8
    try:
        limit = packed["limit"]
        raw = base64.b64decode(packed["hashes"], validate=True)
    except (TypeError, KeyError, ValueError, binascii.Error):
        return Seen(known)
    if not isinstance(limit, int) or not 0 < limit <= 1 << BITS or len(raw) > size << 20:
        return Seen(known)
    hashes = {int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)}
    return Seen(known, tuple(sorted(hashes)), limit)._sampled()


def _short(hashes: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.unique(hashes >> np.uint64(64 - BITS))
