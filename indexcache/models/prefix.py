"""Prefix reuse: a candidate pattern that differs from the trunk first in layer m starts from the trunk's state there.

Stock code runs every layer that is computed; the layers before m return what they returned for the trunk, so the
result is bitwise that of the whole pass.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from indexcache.models.family import decoder_layers
from indexcache.models.lm import hidden_states
from indexcache.models.patch import Patches
from indexcache.models.seam import Seam, use_pattern
from indexcache.pattern import Pattern

Saved = tuple[
    Any, Tensor | None, Tensor | None
]  # what the layer returned, and the seam's ids and pool after it


class PrefixCache:
    """Hidden states under any pattern, reusing the layers that a pattern shares with the last `rebase`d trunk.

    Args:
        model: a loaded transformers model.
        inputs: token ids int64 [B, T] of every batch, addressed by their index.
        limit_bytes: memory for saved layer outputs; when all layers do not fit, every second, third, ... is kept.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor], limit_bytes: int = 4 << 30):
        self.model, self.inputs = model, inputs
        self.trunk: Pattern | None = None
        self.saved: list[dict[int, Saved]] = [{} for _ in inputs]
        layers, config = len(decoder_layers(model)), model.config
        per_token = 4 * config.hidden_size + 8 * getattr(config, "index_topk", 0)  # type: ignore[union-attr, operator]
        total = per_token * sum(i.numel() for i in inputs) * layers
        self.stride = min(-(-total // max(limit_bytes, 1)), layers) or 1

    def rebase(self, pattern: Pattern) -> None:
        """Make `pattern` the trunk: one pass over every batch, from the first layer in which it differs."""
        if pattern == self.trunk:
            return
        for index in range(len(self.inputs)):
            self._run(index, pattern, keep=True)
        self.trunk = pattern

    def hidden(self, index: int, pattern: Pattern) -> Tensor:
        """Final hidden states [B, T, E] of batch `index` under `pattern`."""
        return self._run(index, pattern, keep=False)

    def _run(self, index: int, pattern: Pattern, keep: bool) -> Tensor:
        saved = self.saved[index]
        first = self._first_difference(pattern)
        start = max(
            (i for i in saved if i < first), default=-1
        )  # the last layer whose output can be reused
        if keep:
            for i in [i for i in saved if i > start]:
                del saved[i]
        with use_pattern(self.model, pattern) as seam, self._layers(seam, saved, start, keep):
            return hidden_states(self.model, self.inputs[index])

    def _first_difference(self, pattern: Pattern) -> int:
        """The first layer whose output may differ from the trunk's; 0 without a trunk."""
        if self.trunk is None:
            return 0
        pairs = zip(pattern.signature(), self.trunk.signature(), strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pattern))

    @contextmanager
    def _layers(self, seam: Seam, saved: dict[int, Saved], start: int, keep: bool):
        """Layers up to `start` return the saved output; the others run, and are saved when asked for."""

        def reuse(*_, **__):
            current = seam.current()
            output, current.ids, current.pool = saved[start]
            return output

        def record(i: int, forward):
            def run(*args, **kwargs):
                output = forward(*args, **kwargs)
                current = seam.current()
                saved[i] = (output, current.ids, current.pool)
                return output

            return run

        with Patches() as patches:
            for i, layer in enumerate(decoder_layers(self.model)):
                if i <= start:
                    patches.replace(layer, reuse)
                elif keep and (i + 1) % self.stride == 0:
                    patches.replace(layer, record(i, layer.forward))
            yield
