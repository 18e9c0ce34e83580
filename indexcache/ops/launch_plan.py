"""Host side of ops/plan.py."""

from __future__ import annotations

import torch
from torch import Tensor

from indexcache.ops import interpreted, plan
from indexcache.ops.reference import Plan
from indexcache.ops.settings import SETTINGS, power

LONG = 4096  # lists from here on go through bitmaps
WORDS = 8192  # of a bitmap at a time, 32 keys each
BLOCK = 1024  # ids of a row at a time
PART = 256  # words at a time


def group_queries(ids: Tensor, group: int) -> Plan:
    batch, queries, k = ids.shape
    ids, groups = ids.contiguous(), -(-queries // group)
    device = ids.device
    count = torch.empty(batch, groups, dtype=torch.int32, device=device)
    union = torch.empty(batch, groups, group * k, dtype=torch.int32, device=device)
    bits = torch.empty(batch, groups, group * k, dtype=torch.uint8, device=device)
    if not ids.numel():
        return Plan(union.fill_(-1), bits.zero_(), count.zero_(), group)
    programs = min(batch * groups, 2 * SETTINGS.workers)
    rest = (union, bits, count, queries, groups, batch * groups)
    if k >= LONG:
        work = torch.zeros(programs, group, WORDS, dtype=torch.int32, device=device)
        plan.unite[(programs,)](ids, work, *rest, GROUP=group, K=k, BLOCK=BLOCK, PART=PART, WORDS=WORDS, num_warps=8)
    else:
        ranks = torch.empty(programs, group, k + 1, dtype=torch.int16, device=device)
        block = power(k, 16)
        constants = {"GROUP": group, "K": k, "BLOCK": block, "STEPS": k.bit_length(), "num_warps": min(max(block // 128, 4), 16)}
        search = plan.search(k) if k == block >= 512 and not interpreted() else None
        plan.join[(programs,)](ids, ranks, *rest, SEARCH=search, **constants)
    return Plan(union, bits, count, group)
