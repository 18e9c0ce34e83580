"""Run a prompt of any length through the model in chunks.

Memory does not grow with the length, apart from the cache, and only the last token gets logits.

The table lists the tensors of a chunk of S tokens on the 30B shape (20 heads, latents of 512 + 64,
k = 2048, 32 index heads of 128, 4 experts of 64 a token, hidden size 2048, bf16), in MB at
S = 8192, without weights and cache. The groups below "always" follow each other, so the largest of
them counts and not their sum:

    always        hidden states and the residual, 2 x S x 2048                 67
                  selection of the last F layer, S x 2048 int32                67
                  its query groups, 5 bytes an id                              84
    index_topk    queries S x 32 x 128, three times until RoPE is applied     201
                  lists, samples and rows to redo, at 200K keys               848
    or, with a    queries as above                                            201
    pool          lists, samples and rows to redo, at 200K keys             1,231
                  pool S x 16384 int32                                        537
    attention     queries S x 20 x 256                                         84
                  absorbed queries S x 20 x 576                               189
                  output S x 20 x 512                                         168
                  values S x 20 x 256                                          84
    experts       4 S rows gathered, 2048 wide                                134
                  gate and up, 2 x 1536                                       201
                  down, 2048                                                  134
                  weighted and put back in fp32, twice 4 S x 2048             537
    dense MLP     gate, up, product, S x 3 x 10240                            503

The sum is about 1.3 GB at 8192 tokens, or 2.2 GB with a pool, most of it index_topk and its
queries. The default chunk leaves room for fragmentation under 4 GB.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from indexcache.models.family import AnyModel, input_device, module_of
from indexcache.models.fast.cache import FastCache
from indexcache.models.timing import timed
from indexcache.progress import progress as open_bar

CHUNK = 8192
"""Default number of tokens in a forward pass, all sequences together."""


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
    """Run `ids_BT` through the decoder in chunks and append it to `cache`.

    Args:
        model: a model of any known family; a `FastCache` needs an accelerated one.
        ids_BT: int64 token ids [B, T] on any device; they move to the model chunk by chunk.
        cache: a `FastCache`, or another cache of transformers.
        chunk: number of tokens in a forward pass, all sequences together.
        lengths: number of tokens of each sequence, if they differ. Row b is
            ids_BT[b, :lengths[b]], and anything may stand after it. A `Decoder` continues such a
            cache.
        progress: whether to show a progress bar of tokens on stderr.

    Returns:
        Logits [B, V] of the last token of each sequence, in the model's dtype.

    Raises:
        ValueError: the ids are no matrix or empty, the chunk is below 1, the lengths do not fit the
            ids or the kind of cache, or the cache has no room for the tokens.
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
    device = input_device(module.get_input_embeddings())
    step = max(chunk // batch, 1)
    last: list[Tensor | None] = [None] * batch
    with open_bar(batch * total, "token") if progress else nullcontext() as progress_bar:
        for start in range(0, total, step):
            ids = ids_BT[:, start : start + step].to(device, non_blocking=True)
            for b, end in enumerate(ends):
                if end < start + ids.shape[1]:  # The values after the end need not be tokens.
                    ids = ids.clone()
                    ids[b, max(end - start, 0) :] = 0
            out = module.model(ids, None, None, cache, use_cache=True)
            for b, end in enumerate(ends):
                if start < end <= start + ids.shape[1]:
                    last[b] = out.last_hidden_state[b, end - 1 - start].clone()
            if progress_bar is not None:
                progress_bar.update(ids.numel())
    if lengths is not None and isinstance(cache, FastCache):
        cache.set_lengths([before + n for n in lengths])
    with timed("head"):
        return module.get_output_embeddings()(torch.stack([x for x in last if x is not None]))
