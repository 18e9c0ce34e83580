"""The definition of every operation, in plain torch.

Shapes: B batch, S queries, T keys, H index heads, D index dim, P candidates of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26  # of the largest intermediate, [B, s, H, P] or [B, s, P, D] in fp32


def index_scores(q_BSHD: Tensor, k_BTD: Tensor, w_BSH: Tensor, candidates_BSP: Tensor | None = None) -> Tensor:
    """Indexer scores I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]) (DeepSeek-V3.2, equation 1), without causality.

    Args:
        q_BSHD, k_BTD: queries and keys of the indexer, any float dtype; products are taken in fp32.
        w_BSH: head weights with every scale in them.
        candidates_BSP: int ids of the keys to score for each query (the pool of the R role); None scores all.

    Returns:
        fp32 [B, S, T], or [B, S, P] in the order of the candidates.
    """
    q, k, w = q_BSHD.float(), k_BTD.float(), w_BSH.float()
    batch, queries, heads, dim = q.shape
    width = k.shape[1] if candidates_BSP is None else candidates_BSP.shape[-1]
    out = q.new_empty(batch, queries, width)
    chunk = max(CHUNK_BYTES // (4 * batch * max(width, 1) * max(heads, dim)), 1)
    rows = torch.arange(batch, device=k.device)[:, None, None]
    for start in range(0, queries, chunk):
        part = slice(start, start + chunk)
        if candidates_BSP is None:
            products = torch.einsum("bshd,btd->bsht", q[:, part], k)
        else:
            products = torch.einsum("bshd,bspd->bshp", q[:, part], k[rows, candidates_BSP[:, part].long()])
        out[:, part] = torch.einsum("bshp,bsh->bsp", products.relu_(), w[:, part])
    return out
