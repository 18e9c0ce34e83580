"""Notice that a module was changed after code was made for it: a CUDA graph, a compiled function.

Such code runs what a module did when it was made. Hooks, adapters, replaced modules, forwards and
weights that come later would be skipped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from indexcache.models.effective import adapter_state


class Frozen:
    """The state of modules at one time.

    Every step of decoding asks whether it has changed, so that takes 0.3 ms for the thousand
    modules of the 30B shape, while the GPU runs the step before.

    Args:
        modules: names and modules, without their submodules.
        weights: whether the addresses of weights count, as they do for a CUDA graph.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], *, weights: bool):
        self.weights = weights
        self.states = [(name, m, self._state(m)) for name, m in modules]
        self._take()

    def _take(self) -> None:
        """Flatten the state into lists, which are compared at the speed of C."""
        found = [m for _, m, _ in self.states]
        self._fields = [m.__dict__ for m in found]
        owned = [f["_modules"] for f in self._fields]
        if self.weights:
            owned += [f["_parameters"] for f in self._fields]
        self._modules, self._owned = found, owned
        self._classes = list(map(type, found))
        self._counts = list(map(len, owned))
        self._owners = [d for d in owned for _ in d]
        self._names = [name for d in owned for name in d]
        self._values = [value for d in owned for value in d.values()]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._forwards = [f.get("forward") for f in self._fields]
        hooks = [h for f in self._fields for h in (f["_forward_hooks"], f["_forward_pre_hooks"])]
        self._hooked = [h for h in hooks if h]
        self._hook_counts = list(map(len, self._hooked))
        # All hooks of torch are numbered, so an equal number means that there are no new ones.
        self._next_hook = RemovableHandle.next_id
        self._adapted = [m for m, f in zip(found, self._fields, strict=True) if _adapts(f)]
        self._adapters = list(map(adapter_state, self._adapted))

    def changed(self) -> str | None:
        """Return the name of a module that has changed since, or None."""
        if (
            self._classes == list(map(type, self._modules))
            and self._counts == list(map(len, self._owned))
            and all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and self._addresses == [t.data_ptr() for t in self._tensors]
            and all(map(is_, [f.get("forward") for f in self._fields], self._forwards))
            and self._hook_counts == list(map(len, self._hooked))
            and self._next_hook == RemovableHandle.next_id
            and self._adapters == list(map(adapter_state, self._adapted))
        ):
            return None
        for name, module, state in self.states:
            if self._state(module) != state:
                return name
        self._take()  # The new hooks are on other modules.
        return None

    def _state(self, module: Any) -> tuple:
        """Return what changes when a module does; tensors count by their addresses."""
        fields = module.__dict__
        state = (
            module.__class__,
            fields.get("forward"),
            list(fields["_modules"].items()),
            [*fields["_forward_hooks"], *fields["_forward_pre_hooks"]],
            [(k, id(p), p.data_ptr()) for k, p in fields["_parameters"].items() if p is not None]
            if self.weights
            else None,
        )
        return (*state, adapter_state(module)) if _adapts(fields) else state


def _adapts(fields: dict[str, Any]) -> bool:
    """Return whether the fields are those of a layer of peft."""
    return "merged_adapters" in fields or "_active_adapter" in fields
