"""Name the barrier of a Gluon program's warps, which triton renamed after 3.6."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
"""It waits for every warp of the partition; `gl.barrier` in triton 3.8."""
