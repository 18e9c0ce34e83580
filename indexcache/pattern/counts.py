"""Count layers: the full ones of a rule or of a fraction, and those of pipeline stages."""

from __future__ import annotations

from typing import Any

DEFAULT_SKIP_OFFSET = 2  # Engines assume it when a config gives a frequency and no offset.


def full_count(layers: int, keep: float) -> int:
    """Count the full layers of a pattern that keeps the fraction `keep`: rounded half up, min 1.

    A whole number from 2 on is the count itself; 1 is the fraction, all layers.

    Raises:
        ValueError: keep is not in (0, 1], and no whole number up to that of the layers.
    """
    if 1 < keep <= layers and keep == int(keep):
        return int(keep)
    if not 0 < keep <= 1:
        raise ValueError(
            "The full layers to keep are a fraction above 0 and at most 1, or a whole number from "
            f"2 to {layers}, not {keep:g}."
        )
    return max(int(layers * keep + 0.5), 1)


def stage_starts(layers: int, stages: int) -> tuple[int, ...]:
    """Return the first layer of each of `stages` pipeline stages of nearly equal length.

    The first stages take the remainder.

    Raises:
        ValueError: stages is not in 1..layers.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} pipeline stages.")
    size, extra = divmod(layers, stages)
    return tuple(p * size + min(p, extra) for p in range(stages))


def full_by_rule(layers: int, freq: int, offset: int) -> list[bool]:
    """Return which layers the rule of `Pattern.uniform` makes full."""
    return [max(i - offset + 1, 0) % freq == 0 for i in range(layers)]


def positive(name: str, value: Any) -> int:
    """Return a value that is an integer of at least 1, or raise ValueError with its name."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r:.60}.")
    return value
