"""Run a Gluon kernel that only starts its partitions and lets them wait at an mbarrier.

This is the control for benchmarks/sanitize.py: it shows what a sanitizer reports without any work
of the package. As in ops/mla/forward_hopper.py, racecheck names a race between the write of the
partitions' numbers and their read, in code that Triton generates for `gl.warp_specialize`.
docs/kernels.md lists the runs.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _wait(p_out, ready):
    mbarrier.arrive(ready.index(0), count=1)
    mbarrier.wait(ready.index(0), 0)


@gluon.jit
def _write(p_out, ready, W: gl.constexpr, ALL: gl.constexpr):
    o = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    if W == 0 or ALL:
        mbarrier.arrive(ready.index(0), count=1)
    # There is one phase: a partition that only waits would miss one of several.
    mbarrier.wait(ready.index(0), 0)
    gl.store(p_out + gl.program_id(0) * 256 + W * 128 + o, o)


@gluon.jit
def start(p_out, ALL: gl.constexpr):
    """Write 0 to 127 from each of two partitions into int32 [programs, 2, 128]; grid (programs,).

    ALL: all three partitions arrive at the mbarrier, not two.
    """
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=3 if ALL else 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_wait, (p_out, ready)),
            (_write, (p_out, ready, 0, ALL)),
            (_write, (p_out, ready, 1, ALL)),
        ],
        [4, 4],
        [224, 224],
    )


def run(all_arrive: bool = False, programs: int = 2000) -> bool:
    """Launch the kernel and return whether its output is right.

    all_arrive: every partition arrives at the mbarrier, not two of the three.
    """
    out = torch.full((programs, 2, 128), -1, dtype=torch.int32, device="cuda")
    start[(programs,)](out, all_arrive, num_warps=4, maxnreg=168)
    return bool((out == torch.arange(128, device="cuda")).all())
