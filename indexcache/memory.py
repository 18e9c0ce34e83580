"""Recognise the errors that mean too little memory, on a CPU and on a GPU."""

from __future__ import annotations

import errno

_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that there is too little memory.

    torch raises a RuntimeError for it, whose message differs between a GPU and a CPU.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # A file cannot be mapped, a process not be started.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
    )
