"""Find the checkpointed regions that a call runs in: gradient checkpointing of any kind.

A checkpointed region runs once in the forward pass and again in the backward pass. Both runs have
one object in common, here the region's anchor: autograd's node (`ctx`) for
`torch.utils.checkpoint` with use_reentrant=True and for any other `torch.autograd.Function` whose
forward and backward run layers, and the `_CheckpointFrame` for use_reentrant=False. It lives as
long as the graph, so that what is remembered on it is released with the graph. The anchors are
found on the call stack, where torch itself has no way to ask for them.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import _disable_current_modes

_CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__
_CHECKPOINT_FILE = _CHECKPOINT.co_filename


_SELECTIVE = tuple(
    getattr(torch.utils.checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
)


class Region(NamedTuple):
    """A checkpointed region around a call.

    Attributes:
        anchor: the object that its forward run and its recomputations have in common.
        again: whether this is a recomputation.
    """

    anchor: Any
    again: bool


def in_backward() -> bool:
    """Return whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def regions(stop: CodeType | None = None, owner: Any = None) -> list[Region]:
    """Return the regions around the caller, the innermost first.

    Args:
        stop: where given, look no further than the nearest call of this code whose variable `state`
            is `owner`.
    """
    found: list[Region] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is stop and frame.f_locals.get("state") is owner:
            break
        if code is _CHECKPOINT:
            generator = frame.f_locals.get("gen")
            suspended = getattr(generator, "gi_frame", None)
            anchor = suspended.f_locals.get("new_frame") if suspended is not None else None
            if anchor is not None:
                found.append(Region(anchor, False))
        elif code.co_name == "unpack_hook" and code.co_filename == _CHECKPOINT_FILE:
            found.append(Region(frame.f_locals["frame"], True))
        elif code.co_name in ("forward", "backward") and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                found.append(Region(first, code.co_name == "backward"))
        frame = frame.f_back  # type: ignore[assignment]
    return found


def unseen_by_selective() -> AbstractContextManager:
    """Hide what runs inside from selective checkpointing (`context_fn`).

    That keeps the outputs of chosen operations and gives them out in order, so a recomputation must
    run what the forward pass ran. It does not select anew, so selecting is hidden from both.
    """
    count = torch._C._len_torch_dispatch_stack()
    modes = (torch._C._get_dispatch_stack_at(i) for i in range(count))
    hide = any(isinstance(mode, _SELECTIVE) for mode in modes)
    return _disable_current_modes() if hide else nullcontext()
