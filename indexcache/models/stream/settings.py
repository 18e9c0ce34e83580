"""The settings of streaming, which import nothing heavy because the command line reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

_BYTES = re.compile(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?)B?|B)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Whether and how the layers of a model are read one at a time instead of loaded."""

    stream: bool | None = None
    """Read the layers from the disk one at a time, each once for all patterns. The default does so
    where the weights do not fit the device."""
    host_memory: str | None = None
    """Max host memory for the states of the patterns between two layers, e.g. 64GB; the rest lies
    in a file in the folder of --out. The default has no limit."""
    dry_run: bool = False
    "Say what streaming needs (passes, bytes, memory, hours), and end."
    read_rate: float | None = None
    "GB a second that the disk reads, for the forecast. The default is measured."
    compute_rate: float | None = None
    "TFLOP a second that the device computes, for the forecast. The default is measured."

    def limit(self) -> int | None:
        """Return the max bytes of states in host memory; None for no limit.

        Raises:
            ValueError: `host_memory` is no amount of memory, or a rate is not above 0.
        """
        for name in ("read_rate", "compute_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} is a number above 0, not {rate}.")
        return None if self.host_memory is None else bytes_of(self.host_memory)

    def given(self) -> str | None:
        """Return the flag of a setting that was given, `stream` aside; None where none was."""
        chosen = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return next((f"--{n.replace('_', '-')}" for n in chosen if n != "stream"), None)


@dataclass(frozen=True, kw_only=True)
class SearchStreamSettings(StreamSettings):
    """Whether and how a search reads the layers one at a time."""

    checkpoint_layers: int | None = None
    """Number of layers after which the states of a round are saved, so that a kill costs no more;
    0 saves none. The default saves as often as takes 2 % of the time."""

    def limit(self) -> int | None:
        """Return the max bytes of states in host memory; see `StreamSettings.limit`."""
        if self.checkpoint_layers is not None and self.checkpoint_layers < 0:
            raise ValueError(
                f"--checkpoint-layers is a number of at least 0, not {self.checkpoint_layers}."
            )
        return super().limit()


def bytes_of(text: str) -> int:
    """Return the bytes of an amount of memory: 64GB, 512MB, 1.5TB, 64GiB; a bare number is GB.

    Raises:
        ValueError: it is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--host-memory is an amount of memory, e.g. 64GB, not {text!r:.40}.")
    if text.strip()[-1] in "bB" and match[2] is None:
        return int(float(match[1]))
    power = "KMGT".index((match[2] or "G").upper()) + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
