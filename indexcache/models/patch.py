"""Replace the forwards of modules, restore them, and keep the state of a model.

Every forward that the package replaces goes through `Patches`, and everything it remembers about
a model is in the model's `ModelState`. Nothing else is changed: weights, module tree and state
dict stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from indexcache.models.seam import Seam, Selector


class Patches:
    """Replaced forwards of modules. `undo()`, or leaving it as a context, restores them.

    A module may be replaced more than once: patches are undone in reverse order.
    """

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `forward` run in place of the module's forward."""
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def undo(self) -> None:
        """Restore every replaced forward. Calling it twice changes nothing."""
        while self._before:
            module, forward = self._before.pop()
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward

    def __bool__(self) -> bool:
        return bool(self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@dataclass(eq=False)
class ModelState:
    """The patterns and the selector in force on one model.

    It holds no reference to the model, which would keep the model alive.

    Attributes:
        patterns: the open `use_pattern` contexts; the last one is the innermost.
        selector: computes the selections; None stands for the stock indexers.
        guarded: caches filled under a pattern with shared layers, as long as they live.
        guard: the hook that refuses to continue those caches where indexer keys are missing.
    """

    patterns: list[Seam] = field(default_factory=list)
    selector: Selector | None = None
    guarded: WeakSet[Any] = field(default_factory=WeakSet)
    guard: RemovableHandle | None = None

    @property
    def accelerated(self) -> bool:
        """Whether the model is on the fast path."""
        return self.selector is not None


_states: WeakKeyDictionary[nn.Module, ModelState] = WeakKeyDictionary()


def state_of(model: nn.Module) -> ModelState:
    """Return the state of a transformers model, one object for as long as the model lives."""
    return _states.setdefault(model, ModelState())
