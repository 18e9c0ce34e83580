"""Replace methods of modules, restore them, and keep the state of a model.

Every method that the package replaces goes through `Patches`, and everything it remembers about a
model is in the model's `ModelState`. Nothing else is changed: weights, module tree and state dict
stay as they are, and a copy of a module (`copy.deepcopy`, pickle, `torch.save`) is made without
what was replaced.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.utils.hooks import RemovableHandle

from indexcache.models.family import AnyModel, decoder_of
from indexcache.pattern import Pattern

if TYPE_CHECKING:
    from indexcache.models.passes import Record
    from indexcache.models.seam import Seam, Selector
    from indexcache.models.stream.run import Stream

LOCK = threading.RLock()
"""Held while methods are replaced or restored. It is re-entrant, because the garbage collector may
leave a context at any place."""

# A process that was forked while another thread held the lock would wait for that thread for ever.
os.register_at_fork(after_in_child=lambda: LOCK._at_fork_reinit())  # type: ignore[attr-defined]

_ABSENT = object()


class Replaced:
    """One replaced method of a module.

    Where it lies in the module's `__dict__` itself, it passes calls on to what was there before it
    once it is undone, for those who still hold it.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module = weakref.ref(module)
        self.name = name
        self.before: Any = module.__dict__.get(name, _ABSENT)
        self.live = True
        self.call: Callable[..., Any] = self.below
        self.installed: Callable[..., Any] = self

    @property
    def on_class(self) -> bool:
        """Whether the method of the class was in force before."""
        return self.before is _ABSENT

    def below(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was in force before."""
        if self.before is not _ABSENT:
            return self.before(*args, **kwargs)
        module = self.module()
        return getattr(type(module), self.name)(module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.call if self.live else self.below)(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            f"This {self.name} was replaced by indexcache and cannot be copied by itself; copy the "
            "module, or leave use_pattern and undo accelerate first."
        )


class Patches:
    """Replaced methods of modules. `undo()`, or leaving it as a context, restores them.

    A method may be replaced more than once, by several `Patches`, which may be undone in any order.
    """

    def __init__(self) -> None:
        # Modules own what replaces their methods, so that patches keep no module alive.
        self._nodes: list[weakref.ref[Replaced]] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `forward` run in place of the module's forward.

        It lies in the module as it is: torch.compile traces a bound method once for all modules.
        """
        self._put(Replaced(module, "forward"), module, forward)

    def wrap(
        self,
        module: nn.Module,
        make: Callable[[Replaced], Callable[..., Any]],
        name: str = "forward",
    ) -> None:
        """Let make(node) run in place of a method; `node.below` calls what was there before."""
        node = Replaced(module, name)
        node.call = make(node)
        self._put(node, module, node)

    def _put(self, node: Replaced, module: nn.Module, installed: Callable[..., Any]) -> None:
        with LOCK:
            node.before = module.__dict__.get(node.name, _ABSENT)
            node.installed = installed
            module.__dict__[node.name] = installed
            keep_clean(module).nodes.append(node)
            self._nodes.append(weakref.ref(node))

    def holds(self, module: nn.Module) -> bool:
        """Return whether the module's forward is one of these, with nothing put over it."""
        top = module.__dict__.get("forward")
        nodes = (ref() for ref in self._nodes)
        return any(node is not None and node.installed is top for node in nodes)

    def undo(self) -> None:
        """Restore every replaced method. Calling it twice changes nothing."""
        with LOCK:
            while self._nodes:
                node = self._nodes.pop()()
                if node is not None:
                    node.live = False
                    if (module := node.module()) is not None:
                        _take_out(module, node)

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _take_out(module: nn.Module, node: Replaced) -> None:
    """Take one replaced method out of those of its module."""
    clean = keep_clean(module)
    if node in clean.nodes:
        clean.nodes.remove(node)
    if module.__dict__.get(node.name) is node.installed:
        if node.before is _ABSENT:
            del module.__dict__[node.name]
        else:
            module.__dict__[node.name] = node.before
    else:  # It lies below another one, or below what another library has put over it.
        for other in clean.nodes:
            if other.name == node.name and other.before is node.installed:
                other.before = node.before
    unkeep(module)


def keep_clean(module: nn.Module) -> CleanState:
    """Leave out of copies and pickles of a module what this package has put on it."""
    state = module.__dict__.get("__getstate__")
    if not isinstance(state, CleanState):
        state = module.__dict__["__getstate__"] = CleanState(module)
    return state


def unkeep(module: nn.Module) -> None:
    """End `keep_clean` where nothing of this package is on the module any more."""
    state = module.__dict__.get("__getstate__")
    if isinstance(state, CleanState) and not state.nodes and not _own_hooks(module):
        del module.__dict__["__getstate__"]


def _own_hooks(module: nn.Module) -> list[int]:
    return [i for i, hook in module._forward_pre_hooks.items() if getattr(hook, "own", False)]


class CleanState:
    """The state of a patched module for copies and pickles: as if nothing had been replaced.

    It lies in the module's `__dict__`, where `object.__reduce_ex__` looks for it, and with it
    `copy.deepcopy`, `copy.copy`, pickle and `torch.save`.

    Attributes:
        nodes: the replaced methods of the module, the oldest first.
        note: returns what the copy lacks, as a warning, or None.
    """

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        self.nodes: list[Replaced] = []
        self.note: Callable[[], str | None] = lambda: None

    def __call__(self) -> Any:
        module = self.module()
        assert module is not None
        if lacking := self.note():
            warnings.warn(lacking, stacklevel=2)
        state: Any = dict(module.__dict__)
        del state["__getstate__"]
        for node in reversed(self.nodes):
            if state.get(node.name) is not node.installed:
                continue  # Another library has put something over it.
            if node.before is _ABSENT:
                del state[node.name]
            else:
                state[node.name] = node.before
        for own in _own_hooks(module):
            for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                state[name] = type(state[name])(state[name])
                state[name].pop(own, None)
        return state


@dataclass(eq=False)
class ModelState:
    """The patterns and the selector in force on one model.

    It holds no reference to the model, which would keep the model alive.

    Attributes:
        patterns: the open `use_pattern` contexts of all threads and tasks, in the order in which
            they were entered.
        selector: computes the selections; None stands for the stock indexers.
        guarded: caches filled under a pattern with shared layers, as long as they live.
        guard: the hook that refuses to continue those caches where indexer keys are missing.
        native: the roles of the model without a pattern, where there is a guard.
        router: the patches that lead each call of an indexer to the pattern of its pass.
        running: number of forward passes of the decoder that are under way in the router.
        stream: what puts the layers into a model that is read layer by layer; else None.
    """

    patterns: list[Seam] = field(default_factory=list)
    selector: Selector | None = None
    guarded: WeakSet[Any] = field(default_factory=WeakSet)
    guard: RemovableHandle | None = None
    native: Pattern | None = None
    router: Patches = field(default_factory=Patches)
    running: int = 0
    stream: Stream | None = None
    _records: set[weakref.ref[Record]] = field(default_factory=set)

    @property
    def accelerated(self) -> bool:
        """Whether the model is on the fast path."""
        return self.selector is not None

    @property
    def recorded(self) -> bool:
        """Whether a backward pass may still run layers again under a pattern."""
        return bool(self._records)

    def watch(self, record: Record) -> None:
        """Keep the router in place until `record` is released."""
        with LOCK:
            self._records.add(weakref.ref(record, self._released))

    def _released(self, ref: weakref.ref[Record]) -> None:
        with LOCK:
            self._records.discard(ref)
        self.settle()

    def forget_spent(self) -> None:
        """Forget regions whose backward pass has run, though their outputs are still held."""
        with LOCK:
            self._records = {r for r in self._records if (one := r()) is None or not one.spent}
        self.settle()

    def settle(self) -> None:
        """Take the router away if nothing needs it any more."""
        with LOCK:
            if not (self.patterns or self.running or self._records):
                self.router.undo()


_states: WeakKeyDictionary[nn.Module, ModelState] = WeakKeyDictionary()


def state_of(model: AnyModel) -> ModelState:
    """Return the state of a model, one object for as long as its decoder layers live.

    All that wraps or contains the same decoder layers has the same state.
    """
    with LOCK:
        return _states.setdefault(decoder_of(model).layers, ModelState())
