"""Host side of ops/plan.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from indexcache.ops import plan
from indexcache.ops.reference import Plan
from indexcache.ops.settings import SETTINGS

LONG = 8192  # lists from here on go through bitmaps
WORDS = 8192  # of a bitmap at a time, 32 keys each
BLOCK = 1024  # ids of a row at a time
PART = 1024  # words at a time


def group_queries(ids: Tensor, group: int) -> Plan:
    batch, queries, k = ids.shape
    ids, groups = ids.contiguous(), -(-queries // group)
    device = ids.device
    count = torch.empty(batch, groups, dtype=torch.int32, device=device)
    if k >= LONG and ids.numel():
        union = torch.empty(batch, groups, group * k, dtype=torch.int32, device=device)
        bits = torch.empty(batch, groups, group * k, dtype=torch.uint8, device=device)
        programs = min(batch * groups, 2 * SETTINGS.workers)
        work = torch.zeros(programs, group, WORDS, dtype=torch.int32, device=device)
        constants = {"GROUP": group, "K": k, "BLOCK": BLOCK, "PART": PART, "WORDS": WORDS, "num_warps": 8}
        plan.unite[(programs,)](ids, work, union, bits, count, queries, groups, batch * groups, **constants)
        return Plan(union, bits, count, group)
    union = torch.full((batch, groups, group * k), -1, dtype=torch.int32, device=device)
    bits = torch.zeros(batch, groups, group * k, dtype=torch.uint8, device=device)
    if ids.numel():
        owned = torch.empty(batch, queries, k + 1, dtype=torch.int32, device=device)
        own_bits = torch.empty(batch, queries, k, dtype=torch.uint8, device=device)
        below = torch.empty(group, batch * queries, k, dtype=torch.int16 if k < 2**15 else torch.int32, device=device)
        constants = {"GROUP": group, "K": k, "BLOCK": min(triton.next_power_of_2(k), 1024), "num_warps": 4}
        plan.own[(queries, batch)](ids, owned, own_bits, below, queries, below.stride(0), STEPS=k.bit_length(), **constants)
        plan.place[(queries, batch)](ids, owned, own_bits, below, union, bits, count, queries, groups, below.stride(0), **constants)
    else:
        count.zero_()
    return Plan(union, bits, count, group)
