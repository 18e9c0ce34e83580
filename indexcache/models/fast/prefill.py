"""Prefill of any length in chunks: memory that does not grow with the length but for the cache, logits of the last token only.

What a chunk of S tokens holds at once, beside weights and cache, on the 30B shape (20 heads, latents of 512 + 64, k = 2048, 32
index heads of 128, 4 experts of 64 a token, hidden 2048, bf16), in MB at S = 8192. Parts follow each other, so the largest
counts, not the sum:

    always        hidden states and the residual, 2 x S x 2048                                  67
                  the selection of the last F layer, S x 2048 int32, and its plan (5 bytes)     67 + 84
    index_topk    queries S x 32 x 128, three times until rotated                              201
                  lists 537, samples 205, rows to redo 106 at 200K; publishing a pool: lists          848
                  1,074, samples 51, the pool S x 16384 int32 537                                   1,768
    attention     queries S x 20 x 256; absorbed S x 20 x 576                               84 + 189
                  output S x 20 x 512; values S x 20 x 256                                  168 + 84
    experts       4 S rows: gathered 2048, gate and up 2 x 1536, down 2048               134 + 201 + 134
                  weighted and put back in fp32, twice 4 S x 2048                               537
    dense MLP     gate, up, product, S x 3 x 10240                                              503

About 1.3 GB at 8192 tokens (2.2 with a pool), index_topk and its queries most of it; the default leaves room for fragmentation
under 4 GB.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from indexcache.models.family import AnyModel, module_of
from indexcache.models.fast.cache import FastCache
from indexcache.models.timing import timed
from indexcache.progress import progress as bar

CHUNK = 8192  # tokens of all sequences together


@torch.no_grad()
def prefill(
    model: AnyModel,
    ids_BT: Tensor,
    cache: Cache,
    *,
    chunk: int = CHUNK,
    lengths: list[int] | None = None,
    progress: bool = False,
) -> Tensor:
    """Run `ids_BT` through the decoder in chunks and append them to `cache`.

    Args:
        ids_BT: int64 token ids, on any device; they move to the model chunk by chunk.
        cache: a `FastCache`, or another of transformers'.
        chunk: tokens of a forward pass, all sequences together.
        lengths: tokens of each sequence where they differ: row b is ids_BT[b, :lengths[b]], and anything may stand after it.
            Such a cache is continued by a `Decoder`.
        progress: show a bar of tokens on stderr.

    Returns:
        Logits [B, V] of the last token of each sequence, in the model's dtype.

    Raises:
        ValueError: shapes, lengths or chunk that make no sense; lengths with another cache; tokens that do not fit.
    """
    module = module_of(model)
    if ids_BT.dim() != 2 or not ids_BT.numel():
        raise ValueError(f"prefill takes token ids [batch, tokens], got {tuple(ids_BT.shape)}.")
    if chunk < 1:
        raise ValueError(f"A chunk has at least one token, got {chunk}.")
    batch = ids_BT.shape[0]
    if lengths is not None:
        if len(lengths) != batch or min(lengths) < 1 or max(lengths) > ids_BT.shape[1]:
            raise ValueError(
                f"lengths must be {batch} numbers from 1 to {ids_BT.shape[1]}, got {lengths}."
            )
        if min(lengths) < max(lengths) and not isinstance(cache, FastCache):
            raise ValueError(
                f"Sequences of different lengths need a FastCache, got {type(cache).__name__}."
            )
        ids_BT = ids_BT[:, : max(lengths)]
    total = ids_BT.shape[1]
    ends = lengths or [total] * batch
    before = cache.get_seq_length()
    if isinstance(cache, FastCache):
        cache.check_room(total)
    device = module.get_input_embeddings().weight.device
    step = max(chunk // batch, 1)
    last: list[Tensor | None] = [None] * batch
    with bar(batch * total, "token") if progress else nullcontext() as shown:
        for start in range(0, total, step):
            ids = ids_BT[:, start : start + step].to(device, non_blocking=True)
            for b, end in enumerate(ends):
                if end < start + ids.shape[1]:  # what stands there need not be a token
                    ids = ids.clone()
                    ids[b, max(end - start, 0) :] = 0
            out = module.model(ids, None, None, cache, use_cache=True)
            for b, end in enumerate(ends):
                if start < end <= start + ids.shape[1]:
                    last[b] = out.last_hidden_state[b, end - 1 - start].clone()
            if shown is not None:
                shown.update(ids.numel())
    if lengths is not None and isinstance(cache, FastCache):
        cache.set_lengths([before + n for n in lengths])
    with timed("head"):
        return module.get_output_embeddings()(torch.stack([x for x in last if x is not None]))
