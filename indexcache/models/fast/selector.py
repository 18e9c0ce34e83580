"""Select tokens on the fast path, through `ops.index_topk`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from indexcache import ops
from indexcache.models.family import DsaModule, Projection
from indexcache.models.fast import token
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.layer import without_autocast
from indexcache.models.fast.visible import Ids
from indexcache.models.mla import Rope
from indexcache.models.selector import IndexerCall, Selector
from indexcache.models.timing import timed
from indexcache.ops import Selection
from indexcache.ops.shares import pool_width


@dataclass(frozen=True)
class IndexInputs:
    """The inputs of one call of `ops.index_topk`.

    Attributes:
        q, w: queries [B, S, H, D] and head weights [B, S, H].
        k, k_scale: keys of all tokens [B, T, D] and their scales [B, T] or None.
        positions: int64 [B] in a step of a `Decoder`, otherwise None.
    """

    q: Tensor
    w: Tensor
    k: Tensor
    k_scale: Tensor | None
    positions: Tensor | None


class FastSelector(Selector):
    """The selector that calls `ops.index_topk`.

    Ids are int32 [B, S, k], ascending, -1 where a row has fewer than k keys.

    Args:
        model: a loaded transformers model.
        index_dtype: see `accelerate`.
        project, project_one: replace the family's projection of the indexer, the second one for a
            single token of a single sequence.
    """

    path = "fast"

    def __init__(
        self,
        model: DsaModule,
        index_dtype: str = "auto",
        project: Projection | None = None,
        project_one: Projection | None = None,
    ):
        super().__init__(model)
        self.index_dtype = index_dtype
        self.heads = int(model.config.num_attention_heads)
        self.project = project or self.family.project
        self.project_one = project_one or self.family.project

    @torch.no_grad()
    def full(self, call: IndexerCall, pool: int | Fraction = 0) -> Selection:
        selection = self.topk(call, self._inputs(call), pool)
        return replace(self.grouped(selection.ids), pool=selection.pool)

    @torch.no_grad()
    def reindex(self, call: IndexerCall, pool: Selection) -> tuple[Selection, Selection]:
        inputs = self._inputs(call)
        if pool.groups is None and call.mask.spans is None:
            pool = _in_groups(pool.ids, ops.pool_group(inputs.q, inputs.k))
        return self.grouped(self.topk(call, inputs, 0, pool).ids), pool

    def grouped(self, ids: Tensor) -> Selection:
        """Make a selection of its ids, with the query groups that attention reads it by."""
        return _in_groups(ids, ops.query_group(ids, self.heads))

    def topk(
        self,
        call: IndexerCall,
        inputs: IndexInputs,
        pool: int | Fraction,
        within: Selection | None = None,
    ) -> Selection:
        """Select the top k, within a pool or over all keys, and where `pool` > 0 the top `pool`.

        Raises:
            ValueError: a pool that is a share, in a step of a `Decoder`.
        """
        visible = call.mask
        if visible.spans is None:
            # In a step of a `Decoder` the positions say where each query is.
            offset: int | Tensor = inputs.k.shape[1] - inputs.q.shape[1]
            if inputs.positions is not None:
                offset = inputs.positions
            return self._topk(call, inputs, offset, pool, within)
        topk = call.indexer.index_topk
        widths = [topk, pool_width(pool, inputs.k.shape[1], topk)] if pool else [topk]
        shape = inputs.q.shape[:2]
        outs = [inputs.q.new_full((*shape, n), -1, dtype=torch.int32) for n in widths]
        for span in visible.spans:
            rows, keys = span.rows, span.keys
            part = IndexInputs(
                inputs.q[rows, span.queries],
                inputs.w[rows, span.queries],
                inputs.k[rows, keys],
                None if inputs.k_scale is None else inputs.k_scale[rows, keys],
                None,
            )
            pools = None
            if within is not None:
                pools = Selection(_among(keys, within.ids[rows, span.queries], inputs.k.shape[1]))
            found = self._topk(call, part, span.offset, pool, pools)
            found_ids = [found.ids] if found.pool is None else [found.ids, found.pool]
            for out, ids in zip(outs, found_ids, strict=True):
                out[rows, span.queries, : ids.shape[-1]] = _of_all(keys, ids)
        return Selection(outs[0], outs[1] if len(outs) > 1 else None)

    def _topk(
        self,
        call: IndexerCall,
        inputs: IndexInputs,
        offset: int | Tensor,
        pool: int | Fraction,
        within: Selection | None,
    ) -> Selection:
        if isinstance(pool, Fraction) and isinstance(offset, Tensor):
            raise ValueError(
                f"A Decoder has no pools of {pool} of the context; use `generate` of transformers, "
                "or a pool such as @8."
            )
        with timed("index_topk"), without_autocast(inputs.q):
            return ops.index_topk(
                inputs.q,
                inputs.k,
                inputs.w,
                inputs.k_scale,
                call.indexer.index_topk,
                offset,
                None if within is None else within.ids,
                pool=pool,
                groups=None if within is None else within.groups,
            )

    def _inputs(self, call: IndexerCall) -> IndexInputs:
        """Project queries and keys, and store the keys in the dtype in which they are compared."""
        with timed("indexer"):
            if (ready := self._quantised(call)) is not None:
                return ready
            project = self.project_one if call.x.shape[:2] == (1, 1) else self.project
            # The quantisation applies RoPE, unless the cache keeps unquantised keys.
            fused = self.index_dtype == "fp8" and (
                call.cache is None or isinstance(call.cache, FastCache)
            )
            rope = self._quantiser_rope(call) if fused else None
            q, k, w = project(call.indexer, call.x, call.q_latent, None if rope else call.rope)
            return self._stored(call, q, k, w, rope)

    def _quantised(self, call: IndexerCall) -> IndexInputs | None:
        """Quantise what the layer has projected in a step of a `Decoder`, if it has."""
        projected = call.mask.memory.pop("projected", None)
        if projected is None:
            return None
        entry = call.cache.layers[call.layer]
        q, w, k, scale = token.index(
            call.indexer, call.x, projected, call.rope, self.family.interleaved, entry
        )
        return IndexInputs(q, w, k, scale, entry.positions)

    def _quantiser_rope(self, call: IndexerCall) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, S, r] as the quantisation takes them.

        All layers of a forward pass on one device use the same two tensors.
        """
        memory = call.mask.memory
        # The pass keeps the cos that it remembers, so that no other tensor gets its identity.
        known = memory.get("rope")
        if known is None or known[0] is not call.rope[0]:
            half = call.indexer.qk_rope_head_dim // 2
            cos, sin = (t[..., :half].float().contiguous() for t in call.rope)
            memory["rope"] = known = call.rope[0], cos, sin
        return known[1:]

    def _stored(
        self, call: IndexerCall, q: Tensor, k: Tensor, w: Tensor, rope: Rope | None
    ) -> IndexInputs:
        """Append the keys to the cache, and convert all inputs to the index dtype."""
        fast = isinstance(call.cache, FastCache)
        if call.cache is not None and not fast:
            # A cache of transformers has no place for scales, so it keeps unquantised keys.
            # A static one returns its whole capacity, whose end holds nothing.
            k = call.cache.update_indexer(k, call.layer)[:, : call.mask.total]
        scale = None
        if self.index_dtype == "fp8":
            cos, sin = rope or (None, None)
            q, w = ops.quantize_index_queries(
                q, w, rotate=True, cos_BSr=cos, sin_BSr=sin, interleaved=self.family.interleaved
            )
            k, scale = ops.quantize_index_keys(
                k, rotate=True, cos_BTr=cos, sin_BTr=sin, interleaved=self.family.interleaved
            )
        elif self.index_dtype == "bf16":
            q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
        else:
            k = k.to(q.dtype)
        if not fast:
            return IndexInputs(q, w, k, scale, None)
        entry = call.cache.layers[call.layer]
        k, scale = entry.store_index(k, scale)
        return IndexInputs(q, w, k, scale, entry.positions)


def _in_groups(ids: Tensor, group: int) -> Selection:
    """Make a selection, with query groups where more than one query shares a program."""
    if group == 1:
        return Selection(ids)
    with timed("plan"):
        return Selection(ids, groups=ops.group_queries(ids, group))


def _among(keys: Ids, ids: Tensor, total: int) -> Tensor:
    """Convert ids of all `total` keys to positions among `keys`, which hold them all."""
    if isinstance(keys, slice):
        return _shift(ids, -keys.start)
    positions = torch.full((total + 1,), -1, dtype=ids.dtype, device=ids.device)
    positions[keys] = torch.arange(len(keys), dtype=ids.dtype, device=ids.device)
    return positions[ids.long()]  # -1 reads the last entry.


def _of_all(keys: Ids, ids: Tensor) -> Tensor:
    """Convert positions among `keys` to ids of all keys."""
    if isinstance(keys, slice):
        return _shift(ids, keys.start)
    return torch.where(ids < 0, -1, keys.to(ids.dtype)[ids.clamp(min=0).long()])


def _shift(ids: Tensor, by: int) -> Tensor:
    return ids if by == 0 else torch.where(ids < 0, ids, ids + by)
