"""Decide whether an operation runs its kernels or its torch definition."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from indexcache.ops import tuning

BACKENDS = ("auto", "torch", "triton")


def device_of(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def has_kernels(x: Tensor) -> bool:
    """Return whether kernels can run on x's device."""
    return (
        x.device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


@functools.cache
def warn_once(operation: str, reason: str) -> None:
    warnings.warn(f"{operation} runs the torch definition: {reason}", stacklevel=4)


def use_triton(backend: str, x: Tensor, operation: str, refuse: Callable[[], str | None]) -> bool:
    """Decide whether the kernels run. `refuse` returns why they cannot, or None if they can."""
    if backend == "auto":
        backend = tuning.current().backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "torch":
        return False
    on_gpu = x.device.type == "cuda"
    if importlib.util.find_spec("triton") is None:
        reason: str | None = "triton is not installed"
    elif on_gpu and torch.cuda.get_device_capability(x.device) < (9, 0):
        capability = torch.cuda.get_device_capability(x.device)
        reason = f"the kernels need compute capability 9.0, this device has {capability}"
    elif not on_gpu and not tuning.interpreted():
        reason = f"the tensors are on {x.device.type}, the kernels run on cuda"
    elif not on_gpu and backend == "auto":
        return False  # Only tests run the interpreter, and they name the backend.
    else:
        reason = refuse()
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(
            f"{operation}: backend 'triton' cannot run here: {reason}; "
            "use backend='torch' or 'auto'."
        )
    if on_gpu:  # On a CPU, torch is the expected backend.
        warn_once(operation, reason)
    return False
