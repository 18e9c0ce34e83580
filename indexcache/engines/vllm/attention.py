"""vLLM's sparse attention on this package's kernels: `--attention-backend CUSTOM`.

vLLM 0.33 selects and attends in `DeepseekV32Attention._sparse_indexer_and_attn`. An F layer writes
its ids into the one `topk_indices_buffer` [tokens of a step, k] of the model, as positions in the
token's own request, in no order and -1 for none; its S layers (`skip_topk`, or without an indexer)
write nothing and read what lies there. `FlashAttnMLASparseImpl.forward_mqa` then turns ids into
rows of the cache, by `req_id_per_token` and `block_table` of the step's metadata
(`triton_convert_req_index_to_global_index`): once per group of layers in decoding, and once per
layer in prefill, where `_forward_mqa_kernel` gives them to FA3. The cache of a layer is
[blocks, 64, 512 + 64], bf16; other layers' blocks may lie between two of its own.

FA3 computes 64 heads whatever a rank has. This backend changes what happens in prefill with up to
32 heads: the plan of a step (`ops.group_pages`), in which neighbouring queries share their latents,
is made in the F layer and read by the S layers that follow, and the F layer's ids are selected by
this package too (`selecting`), for queries that it turned and quantised (`rotating`). Everything
else is FA3's as before: decoding and its CUDA graphs, prompts of at most k tokens, which vLLM
attends to densely, and ranks with more heads, where no queries share a program.

The module imports vLLM, and only vLLM imports it, by `PATH` (`plugin.register`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from indexcache import ops
from indexcache.engines.vllm import rotating, selecting
from indexcache.ops import tuning
from indexcache.ops.mla import host as mla
from indexcache.ops.reference import QueryGroups

try:
    from vllm.v1.attention.backends.mla.flashattn_mla_sparse import (
        FlashAttnMLASparseBackend,
        FlashAttnMLASparseImpl,
    )
    from vllm.v1.attention.backends.mla.sparse_utils import flat_kv_row_view
except ImportError as error:
    raise ImportError(
        "indexcache's attention extends FLASH_ATTN_MLA_SPARSE of vLLM 0.32 and 0.33, which this "
        f"vLLM lacks ({error}): leave --attention-backend CUSTOM out."
    ) from error

VALUE_DIM, ROPE_DIM = 512, 64  # the dims that the kernel for Hopper takes


class IndexCacheBackend(FlashAttnMLASparseBackend):
    """An attention backend of vLLM; see the top of this file."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM knows it, which must be one of its enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[IndexCacheImpl]:
        """Return the class that a layer makes one of."""
        return IndexCacheImpl

    @classmethod
    def supports_combination(cls, head_size: int, *rest: Any, **named: Any) -> str | None:
        """Return why it cannot run here in one sentence, or None; vLLM stops with it."""
        if reason := super().supports_combination(head_size, *rest, **named):
            return reason
        if head_size != VALUE_DIM + ROPE_DIM:
            return (
                f"indexcache's kernel takes latents of {VALUE_DIM} + {ROPE_DIM} dims, this model's "
                f"have {head_size}"
            )
        if reason := tuning.gluon_refusal():
            return f"indexcache's kernels for Hopper do not run, because {reason}"
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None and config.attention_config.hisparse_config is not None:
            return "indexcache's attention reads latents on the GPU only, so HiSparse cannot be on"
        return None


@dataclass
class StepPlan:
    """The query groups that the F layer of one step made, for the S layers behind it.

    `metadata` is that of the step: vLLM makes one object per step, which its layers share.
    """

    metadata: Any
    queries: int
    groups: QueryGroups


_plans: dict[tuple[torch.device, int], StepPlan] = {}
"""The last plan made of each buffer of ids, by its device and address."""


def step_plan(
    ids: Tensor, metadata: Any, page_rows: int, group: int, *, fresh: bool
) -> QueryGroups:
    """Return the groups of a step's queries: new ones where `fresh`, else those already made.

    Args:
        ids: int32 [queries, k], the first rows of the model's buffer of ids.
        metadata: of the step, with `req_id_per_token`, `block_table`, `block_size`, `max_seq_len`.
        page_rows: rows of the cache from one page of a layer to its next.
        group: queries that share a program.
        fresh: whether this layer has just written the ids.
    """
    key = ids.device, ids.data_ptr()
    kept = _plans.get(key)
    if (
        not fresh
        and kept is not None
        and kept.metadata is metadata
        and kept.queries == len(ids)
        and kept.groups.group == group
    ):
        return kept.groups
    del kept
    _plans.pop(key, None)  # The memory of the last plan serves the new one.
    # Multiples of 16 pages, so that a kernel is compiled once for all of them.
    pages = -(-metadata.max_seq_len // (16 * metadata.block_size)) * 16
    groups = ops.group_pages(
        ids,
        metadata.req_id_per_token[: len(ids)],
        metadata.block_table[:, :pages],
        group,
        page=metadata.block_size,
        page_rows=page_rows,
    )
    _plans[key] = StepPlan(metadata, len(ids), groups)
    return groups


class IndexCacheImpl(FlashAttnMLASparseImpl):
    """The attention of one layer; its number of heads is that of this rank."""

    supports_pcp: bool = False
    decode_queries: ClassVar[int] = 0
    """Up to so many queries of a decoding step go to this package's kernel, and more to FA3."""
    selects: ClassVar[bool] = True
    """Whether this package selects in prefill too (`selecting`)."""
    rotates: ClassVar[bool] = True
    """Whether it turns and quantises the queries of long steps (`rotating`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.selects:
            selecting.install()
        if self.rotates:
            rotating.install()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Compile the kernels when a model is loaded, and not while the first prompt waits."""
        super().process_weights_after_loading(act_dtype)
        ids = self.topk_indices_buffer
        if ids.is_cuda:
            _compile(self.num_heads, ids.shape[1], ids.device, self.scale)
            indexer = getattr(self, "_indexer", None)
            if self.selects and indexer is not None:
                dims = indexer.n_head, indexer.head_dim
                selecting.compile_kernels(*dims, ids.shape[1], ids.device)

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query of a step to its selected latents.

        Args:
            q: (absorbed queries [tokens, heads, 512], rotary dims [tokens, heads, 64]), bf16.
            kv_c_and_k_pe_cache: [blocks, block size, 576], bf16.
            attn_metadata: of the step.
            layer: the attention module, whose `indexer` and `skip_topk` say whether it is full.

        Returns:
            [tokens, heads, 512], and None for the log-sums, which only DCP reads.
        """
        queries = q[0].shape[0] if isinstance(q, tuple) else q.shape[0]
        ids = self.topk_indices_buffer[:queries]
        group = ops.query_group(ids[None], self.num_heads)
        decodes = attn_metadata.num_decode_tokens >= queries
        # What a graph captures is replayed in other steps, so no plan may be made in one.
        captured = ids.is_cuda and torch.cuda.is_current_stream_capturing()
        if group == 1 or decodes or captured or not isinstance(q, tuple):
            return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)
        rows, page_rows = flat_kv_row_view(kv_c_and_k_pe_cache, attn_metadata.block_size)
        selects = getattr(layer, "indexer", None) is not None and not getattr(
            layer, "skip_topk", False
        )
        groups = step_plan(ids, attn_metadata, page_rows, group, fresh=selects)
        return _attend(q, rows, ids, self.scale, groups), None

    def _forward_mqa_kernel(
        self,
        q: Any,
        kv_cache: Tensor,
        topk_indices: Tensor,
        valid_counts: Tensor,
        *,
        layer: Any,
        block_size: int,
        is_decode: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to rows of the cache that vLLM has looked up, int32 [tokens, k], -1 at the end."""
        if not is_decode or not isinstance(q, tuple) or len(topk_indices) > self.decode_queries:
            options = {"layer": layer, "block_size": block_size, "is_decode": is_decode}
            return super()._forward_mqa_kernel(q, kv_cache, topk_indices, valid_counts, **options)
        rows, _ = flat_kv_row_view(kv_cache, block_size)
        return _attend(q, rows, topk_indices, self.scale, None), None


def _attend(
    q: tuple[Tensor, Tensor], rows: Tensor, ids: Tensor, scale: float, groups: QueryGroups | None
) -> Tensor:
    """Attend from queries in two parts [S, H, 512] and [S, H, 64] to rows [T, 576] of a cache."""
    if groups is not None and mla.takes_parts(q, rows, scale, ids.shape[1]):
        return mla.attend_parts(q, rows, scale, groups)
    both = torch.cat(q, dim=-1)[None]
    options: dict[str, Any] = {"value_dim": q[0].shape[-1], "groups": groups}
    return ops.sparse_mla(both, rows[None], ids[None], scale, **options)[0][0]


@functools.cache
def _compile(heads: int, k: int, device: torch.device, scale: float) -> None:
    """Run the kernels once for each way in which Triton compiles them.

    It compiles anew for numbers of queries and of groups that are multiples of 16, and that are
    not.
    """
    cache = torch.zeros(1024, VALUE_DIM + ROPE_DIM, dtype=torch.bfloat16, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device)[None]
    seen: set[tuple[bool, bool]] = set()
    for queries in range(512, 1024):
        ids = torch.zeros(queries, k, dtype=torch.int32, device=device)
        group = ops.query_group(ids[None], heads)
        kind = queries % 16 == 0, -(-queries // group) % 16 == 0
        if group == 1 or kind in seen:
            continue
        seen.add(kind)
        groups = ops.group_pages(ids, torch.zeros_like(ids[:, 0]), table, group)
        values = torch.zeros(heads, queries, VALUE_DIM, dtype=cache.dtype, device=device)
        rope = torch.zeros(queries, heads, ROPE_DIM, dtype=cache.dtype, device=device)
        _attend((values.transpose(0, 1), rope), cache, ids, scale, groups)
