"""What text chose or trained something, so that it is never taken for held-out text.

It travels with a pattern: in result.json and pattern.json of a search, in what an export writes, in
the metadata of a delta and in the config of a checkpoint.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIG_KEY = "indexcache_calibration"
"""The key of a checkpoint's config that holds it."""
MAX_SHINGLES = 4096
"""Number of hashes that are kept: the smallest ones, a random sample of all passages."""
MAX_DIGESTS = 1 << 14
"""Number of digests that are kept, the smallest ones, of a text with more documents."""
BITS = 48
"""Bits of a hash that are kept."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The documents and passages of a text that a search or a training saw.

    Attributes:
        digests: digests of documents, of their text and of their token ids.
        shingles: hashes of their passages (see `indexcache.data.leaks`), sorted, uint64 [n]; the
            `MAX_SHINGLES` smallest.
        limit: all hashes below it are in `shingles`.
    """

    digests: frozenset[str] = frozenset()
    shingles: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    limit: int = 1 << BITS

    @classmethod
    def of(cls, digests: Iterable[str], hashes: np.ndarray) -> Seen:
        """Make one of digests and of all hashes, uint64 [n] of 64 bits."""
        unique = np.unique(hashes >> np.uint64(64 - BITS))
        known = frozenset(d for d in digests if d)
        if len(known) > MAX_DIGESTS:
            known = frozenset(sorted(known)[:MAX_DIGESTS])
        if len(unique) <= MAX_SHINGLES:
            return cls(known, unique)
        return cls(known, unique[:MAX_SHINGLES], int(unique[MAX_SHINGLES]))

    def __bool__(self) -> bool:
        return bool(self.digests) or len(self.shingles) > 0

    def __or__(self, other: Seen) -> Seen:
        limit = min(self.limit, other.limit)
        both = np.union1d(self.shingles, other.shingles)
        both = both[both < np.uint64(limit)]
        if len(both) > MAX_SHINGLES:
            limit, both = int(both[MAX_SHINGLES]), both[:MAX_SHINGLES]
        return Seen(self.digests | other.digests, both, limit)

    def share(self, hashes: np.ndarray) -> float:
        """Return which share of passages, by their hashes (uint64 [n]), was seen; 0 for none."""
        if not len(self.shingles) or not len(hashes):
            return 0.0
        short = np.unique(hashes >> np.uint64(64 - BITS))
        sampled = short[short < np.uint64(self.limit)]
        if not len(sampled):
            return 0.0
        return float(np.isin(sampled, self.shingles).mean())

    def to_json(self) -> dict[str, Any]:
        """Return digests and shingles as JSON holds them."""
        wide = self.shingles.astype("<u8").view(np.uint8).reshape(-1, 8)
        packed = base64.b64encode(wide[:, : BITS // 8].tobytes())
        return {
            "digests": sorted(self.digests),
            "shingles": {"limit": self.limit, "hashes": packed.decode()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Seen:
        """Read `to_json`, wherever a file holds it; what is not there or damaged is left out.

        Files of a search have it under "calibration", pattern.json of older versions the digests
        alone under "calibration_digests", configs under `CONFIG_KEY`.
        """
        if not isinstance(value, Mapping):
            return cls()
        found = cls()
        if isinstance(section := value.get("text_config"), Mapping):
            found |= cls.from_json(section)
        for key in ("calibration", CONFIG_KEY):
            if isinstance(part := value.get(key), Mapping):
                found |= cls._from_part(part)
        return found | cls(_strings(value.get("calibration_digests")))

    @classmethod
    def _from_part(cls, part: Mapping[str, Any]) -> Seen:
        digests = _strings(part.get("digests"))
        packed = part.get("shingles")
        try:
            raw = base64.b64decode(packed["hashes"], validate=True)  # type: ignore[index]
            limit = packed["limit"]  # type: ignore[index]
            short = np.frombuffer(raw, np.uint8).reshape(-1, 6)
        except (TypeError, KeyError, ValueError, binascii.Error):
            return cls(digests)
        if not isinstance(limit, int) or not 0 < limit <= 1 << BITS:
            return cls(digests)
        wide = np.zeros((len(short), 8), np.uint8)
        wide[:, :6] = short
        return cls(digests, np.unique(wide.reshape(-1).view("<u8").astype(np.uint64)), limit)


def _strings(values: Any) -> frozenset[str]:
    if not isinstance(values, (list, tuple)):
        return frozenset()
    return frozenset(v for v in values if isinstance(v, str))
