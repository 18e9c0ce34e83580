"""Reuse the layers that a candidate pattern shares with the trunk.

A candidate that differs from the trunk first in layer m starts from the trunk's state there. Stock
code runs every layer from m on; the layers before m return their outputs for the trunk, so the
result is bitwise that of a complete pass.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from indexcache.models.family import AnyModel, decoder_layers, module_of
from indexcache.models.lm import hidden_states
from indexcache.models.patch import Patches, Replaced
from indexcache.models.seam import Seam, use_pattern
from indexcache.ops import Selection
from indexcache.pattern import Pattern

LEAST_BYTES = 4 << 30
# The output of a layer, and the ids of the selection and of the pool in force after it.
Saved = tuple[Any, Tensor | None, Tensor | None]


class PrefixCache:
    """Hidden states under any pattern; layers that it shares with the trunk are reused.

    The trunk is the pattern of the last `rebase`.

    Args:
        model: a loaded model, or its transformers module.
        inputs: token ids int64 [B, T] of every batch, addressed by their index.
        limit_bytes: memory for saved layer outputs; the default is `memory_for_outputs`. When not
            all layers fit, only every second (or third, and so on) is kept.
    """

    def __init__(self, model: AnyModel, inputs: list[Tensor], limit_bytes: int | None = None):
        self.model = module_of(model)
        self.inputs = inputs
        self.trunk: Pattern | None = None
        self.saved: list[dict[int, Saved]] = [{} for _ in inputs]
        layers = len(decoder_layers(self.model))
        config = self.model.config
        per_token = 4 * config.hidden_size + 8 * getattr(config, "index_topk", 0)
        total = per_token * sum(i.numel() for i in inputs) * layers
        limit = memory_for_outputs(self.model) if limit_bytes is None else limit_bytes
        self.stride = min(-(-total // max(limit, 1)), layers) or 1

    def rebase(self, pattern: Pattern) -> None:
        """Make `pattern` the trunk: run every batch from the first layer where it differs."""
        if pattern == self.trunk:
            return
        for index in range(len(self.inputs)):
            self._run(index, pattern, keep=True)
        self.trunk = pattern

    def hidden(self, index: int, pattern: Pattern) -> Tensor:
        """Compute the final hidden states [B, T, E] of batch `index` under `pattern`."""
        return self._run(index, pattern, keep=False)

    def _run(self, index: int, pattern: Pattern, keep: bool) -> Tensor:
        saved = self.saved[index]
        first = first_difference(pattern, self.trunk)
        # `start` is the last layer whose output can be reused.
        start = max((i for i in saved if i < first), default=-1)
        if keep:
            for i in [i for i in saved if i > start]:
                del saved[i]
        with use_pattern(self.model, pattern) as seam, self._layers(seam, saved, start, keep):
            return hidden_states(self.model, self.inputs[index])

    def layers_run(self, pattern: Pattern, trunk: Pattern | None) -> int:
        """Count the layers that run for a pattern once `trunk` is the trunk; all without one."""
        kept = first_difference(pattern, trunk) // self.stride * self.stride
        return len(pattern) - kept

    @contextmanager
    def _layers(self, seam: Seam, saved: dict[int, Saved], start: int, keep: bool):
        """Let layers up to `start` return saved outputs, and save later ones if `keep` is set."""

        def skip(node: Replaced):
            def run(*args, **kwargs):
                return saved[start][0] if seam.runs_here() else node.below(*args, **kwargs)

            return run

        def resume(node: Replaced):
            def run(*args, **kwargs):
                if not seam.runs_here():  # Another thread runs this model too.
                    return node.below(*args, **kwargs)
                output, ids, pool = saved[start]
                seam.resume(ids, pool)
                return output

            return run

        def record(i: int, node: Replaced):
            def run(*args, **kwargs):
                output = node.below(*args, **kwargs)
                if not seam.runs_here():
                    return output
                current = seam.current()
                saved[i] = (_without_groups(output), _ids(current.selection), _ids(current.pool))
                return output

            return run

        with Patches() as patches:
            for i, layer in enumerate(decoder_layers(self.model)):
                if i <= start:
                    patches.wrap(layer, resume if i == start else skip)
                elif keep and (i + 1) % self.stride == 0:
                    patches.wrap(layer, partial(record, i))
            yield


def memory_for_outputs(model: AnyModel) -> int:
    """Return how many bytes saved layer outputs may take.

    They are a quarter of what the weights leave of the GPUs that hold them, and 4 GiB at least. It
    does not depend on what else uses the GPUs, so that a search counts the same work every time.
    """
    held: dict[torch.device, int] = {}
    for weight in module_of(model).parameters():
        if weight.is_cuda:
            held[weight.device] = held.get(weight.device, 0) + weight.nbytes
    total = sum(torch.cuda.get_device_properties(device).total_memory for device in held)
    return max((total - sum(held.values())) // 4, LEAST_BYTES)


def first_difference(pattern: Pattern, trunk: Pattern | None) -> int:
    """Find the first layer whose output may differ from the trunk's; 0 without a trunk."""
    if trunk is None:
        return 0
    pairs = zip(pattern.signature(), trunk.signature(), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pattern))


def _without_groups(output: Any) -> Any:
    """Drop the query groups of a selection in a layer's output: they are large, and recomputed."""
    if not isinstance(output, tuple):
        return output
    return tuple(Selection(x.ids) if isinstance(x, Selection) else x for x in output)


def _ids(selection: Selection | None) -> Tensor | None:
    return None if selection is None else selection.ids
