"""Count what a search costs: evaluations, and layers that run times tokens.

Layers that the prefix cache spares are not counted, and a backward pass counts as two more forward
passes. The count is that of an uninterrupted run, so that a resumed run gives the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Work:
    """The cost of a search so far.

    Attributes:
        evaluations: patterns that were measured, each on the whole text or a part of it.
        layer_tokens: layers that ran times tokens.
        whole: layer-tokens of one pattern on the whole text, without a prefix cache.
    """

    evaluations: int = 0
    layer_tokens: int = 0
    whole: int = 0

    def add(self, layers: int, tokens: int) -> None:
        """Count `layers` layers that run over `tokens` tokens."""
        self.layer_tokens += layers * tokens

    def __str__(self) -> str:
        passes = self.layer_tokens / self.whole if self.whole else 0.0
        return (
            f"{self.evaluations} evaluations, {self.layer_tokens:.3g} layer-tokens: "
            f"{passes:.1f} times the model over the whole text"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)
