"""Host side of ops/plan.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from indexcache.ops import groups as plan
from indexcache.ops import interpreted
from indexcache.ops.reference import Plan
from indexcache.ops.tuning import SETTINGS, power

LONG = 4096  # lists from here on go through bitmaps
WORDS = 8192  # of a bitmap at a time, 32 keys each
BLOCK = 1024  # ids of a row at a time
PART = 64  # words at a time
REGISTERS = (
    128  # of a thread in `unite`: four programs of 4 warps a multiprocessor hide each other's waits
)


def group_queries(ids: Tensor, group: int) -> Plan:
    batch, queries, k = ids.shape
    ids, groups = ids.contiguous(), -(-queries // group)
    device = ids.device
    count = torch.empty(batch, groups, dtype=torch.int32, device=device)
    union = torch.empty(batch, groups, group * k, dtype=torch.int32, device=device)
    bits = torch.empty(batch, groups, group * k, dtype=torch.uint8, device=device)
    if not ids.numel():
        return Plan(union.fill_(-1), bits.zero_(), count.zero_(), group)
    rest = (union, bits, count, queries, groups, batch * groups)
    constants: dict[str, Any] = {"GROUP": group, "K": k}
    if k >= LONG:
        programs = min(batch * groups, 4 * SETTINGS.workers)
        work = torch.zeros(programs, group, WORDS, dtype=torch.int32, device=device)
        constants |= {
            "BLOCK": BLOCK,
            "PART": PART,
            "WORDS": WORDS,
            "num_warps": 4,
            "maxnreg": REGISTERS,
        }
        plan.unite[(programs,)](ids, work, *rest, **constants)
    else:
        programs = min(batch * groups, 8 * SETTINGS.workers)
        ranks = torch.empty(programs, group, k + 1, dtype=torch.int32, device=device)
        block = power(k, 16)
        search = plan.search(k) if k == block >= 512 and not interpreted() else None
        constants |= {
            "BLOCK": block,
            "STEPS": k.bit_length(),
            "SEARCH": search,
            "num_warps": min(max(block // 128, 4), 16),
        }
        plan.join[(programs,)](ids, ranks, *rest, **constants)
    return Plan(union, bits, count, group)
