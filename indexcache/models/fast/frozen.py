"""Notice that a module was changed after code was made for it: a CUDA graph, a compiled function.

Such code runs what a module did when it was made. Hooks, adapters, replaced modules, forwards and
weights that come later would be skipped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from indexcache.models.effective import adapter_state


class Frozen:
    """The state of modules at one time.

    Args:
        modules: names and modules, with all of their submodules.
        weights: whether the addresses of weights count, as they do for a CUDA graph.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], *, weights: bool):
        self.weights = weights
        self.states = [(name, m, self._state(m)) for name, m in modules]

    def changed(self) -> str | None:
        """Return the name of a module that has changed since, or None.

        It takes about a microsecond for each module.
        """
        for name, module, state in self.states:
            if self._state(module) != state:
                return name
        return None

    def _state(self, module: Any) -> tuple:
        """Return what changes when a module does; tensors count by identity and address."""
        fields = module.__dict__
        state = (
            module.__class__,
            fields.get("forward"),
            list(fields["_modules"].values()),
            [*fields["_forward_hooks"], *fields["_forward_pre_hooks"]],
            [p.data_ptr() for p in fields["_parameters"].values() if p is not None]
            if self.weights
            else None,
        )
        return (*state, adapter_state(module)) if "merged_adapters" in fields else state
