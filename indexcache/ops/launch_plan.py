"""Host side of ops/plan.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from indexcache.ops import plan
from indexcache.ops.reference import Plan


def group_queries(ids: Tensor, group: int) -> Plan:
    batch, queries, k = ids.shape
    ids, groups = ids.contiguous(), -(-queries // group)
    owned = torch.empty(batch, queries, k + 1, dtype=torch.int32, device=ids.device)
    own_bits = torch.empty(batch, queries, k, dtype=torch.uint8, device=ids.device)
    union = torch.full((batch, groups, group * k), -1, dtype=torch.int32, device=ids.device)
    bits = torch.zeros(batch, groups, group * k, dtype=torch.uint8, device=ids.device)
    count = torch.empty(batch, groups, dtype=torch.int32, device=ids.device)
    if ids.numel():
        below = torch.empty(group, batch * queries, k, dtype=torch.int16 if k < 2**15 else torch.int32, device=ids.device)
        constants = {"GROUP": group, "K": k, "BLOCK": min(triton.next_power_of_2(k), 1024), "num_warps": 4}
        plan.own[(queries, batch)](ids, owned, own_bits, below, queries, below.stride(0), STEPS=k.bit_length(), **constants)
        plan.place[(queries, batch)](ids, owned, own_bits, below, union, bits, count, queries, groups, below.stride(0), **constants)
    else:
        count.zero_()
    return Plan(union, bits, count, group)
