"""The fast path: sparse attention of a loaded transformers model without the [B, S, H, T] scores and the dense mask.

Stock transformers holds the scores of every index head and scatters the ids into a mask over all keys. Here the same
weights run through `indexcache.ops`: the indexer's scores in chunks, exact top-k, and attention in MQA form over the
gathered latents. Any cache of transformers works, filled with latents; a `FastCache` is made for this path. `use_pattern` and
`model.generate` work as before.
"""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from indexcache import ops
from indexcache.models.family import decoder_layers, either, family_of, indexers
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.layer import (
    CompiledStep,
    Padding,
    SharedGroups,
    Wrap,
    attention_forward,
    has_one_choice_of_groups,
    layer_forward,
    route,
    runs_in_pieces,
    wrap_step,
)
from indexcache.models.mla import fused_norm, project, stock_norm
from indexcache.models.patch import Patches, state_of
from indexcache.models.seam import IndexerCall, Selector, in_force, indexer_forward
from indexcache.models.timing import timed

INDEX_DTYPES = ("auto", "bf16", "fp8")


class FastSelector(Selector):
    """Selections by `ops.index_topk`.

    Ids are int32 [B, S, k], ascending, -1 where a row has fewer than k keys.
    """

    path = "fast"

    def __init__(
        self,
        model: nn.Module,
        index_dtype: str = "auto",
        wrap: Wrap = lambda f: f,
        wrap_step: Wrap = lambda f: f,
    ):
        super().__init__(model)
        self.index_dtype = index_dtype
        self.project = wrap(self.family.project)
        self.project_one = wrap_step(self.family.project)
        self.pools = SharedGroups()  # of the pool that several layers select from
        # The cos of a forward pass, then cos and sin as `_quantiser_rope` returns them.
        self._rope: tuple[Tensor, Tensor, Tensor] | None = None
        # given out in the place of what a prefill selects and publishes, for timing: ids int32 [T, k], and `rows(start, end)` of pools
        self.stand_in: Tensor | None = None
        self.stand_in_pool: Any = None

    def full(self, call: IndexerCall, pool: int = 0) -> tuple[Tensor, Tensor | None]:
        return self._select(call, pool)

    def reindex(self, call: IndexerCall, pool: Tensor) -> Tensor:
        return self._select(call, 0, pool)[0]

    @torch.no_grad()
    def _select(self, call: IndexerCall, pool: int, candidates: Tensor | None = None):
        x, padding = call.x, call.mask
        with timed("indexer"):
            project = self.project_one if x.shape[:2] == (1, 1) else self.project
            # RoPE goes with the quantisation where the keys need not be kept without.
            fused = self.index_dtype == "fp8" and (
                call.cache is None or isinstance(call.cache, FastCache)
            )
            rope = self._quantiser_rope(call) if fused else None
            q, k, w = project(call.indexer, x, call.q_latent, None if rope else call.rope)
            k, scale, q, w, decoding = self._keys(call, k, q, w, rope)
        parts = []
        for rows, left in padding.groups(x.shape[0]):
            inner = None if candidates is None else _shift(candidates[rows], -left)
            groups = None
            if candidates is not None and left == 0 and rows == slice(0, len(candidates)):
                groups = self.pools.of(candidates, ops.pool_group(q, k))
            offset = (
                k.shape[1] - x.shape[1] - left if decoding is None else decoding
            )  # which has no padding
            scales = None if scale is None else scale[rows, left:]
            with timed("index_topk"):
                selection = ops.index_topk(
                    q[rows],
                    k[rows, left:],
                    w[rows],
                    scales,
                    call.indexer.index_topk,
                    offset,
                    inner,
                    pool=pool,
                    groups=groups,
                )
            found = [selection.ids] if selection.pool is None else [selection.ids, selection.pool]
            del selection
            parts.append([_shift(ids, left) for ids in found])
            start, end = k.shape[1] - x.shape[1], k.shape[1]
            if self.stand_in is not None and decoding is None:
                parts[-1][0] = self.stand_in[None, start:end].expand(len(parts[-1][0]), -1, -1)
            if self.stand_in_pool is not None and decoding is None and pool:
                batch = len(parts[-1].pop())  # its own goes before the other comes
                del found
                parts[-1].append(self.stand_in_pool.rows(start, end)[None].expand(batch, -1, -1))
        if len(parts) == 1:
            return parts[0][0], parts[0][1] if pool else None
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if pool else None

    def clear(self) -> None:
        """Forget what belongs to one forward pass."""
        self.pools.clear()
        self._rope = None

    def _quantiser_rope(self, call: IndexerCall) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, S, r] as the quantisation takes them.

        They are made once for all layers of a forward pass.
        """
        if self._rope is None or self._rope[0] is not call.rope[0]:
            half = call.indexer.qk_rope_head_dim // 2
            cos, sin = (t[..., :half].float().contiguous() for t in call.rope)
            self._rope = call.rope[0], cos, sin
        return self._rope[1:]

    def _keys(
        self, call: IndexerCall, k: Tensor, q: Tensor, w: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """Store the keys, in the dtype in which they are compared.

        Returns:
            The keys of all tokens, their scales or None, queries and weights to match, and in a
            step of a `Decoder` the positions [B].
        """
        fast = isinstance(call.cache, FastCache)
        if call.cache is not None and not fast:
            # Unquantised: a cache that is not ours has no place for scales.
            k = call.cache.update_indexer(k, call.layer)
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
            return k, scale, q, w, None
        entry = call.cache.layers[call.layer]
        k, scale = entry.store_index(k, scale)
        return k, scale, q, w, entry.positions


def _shift(ids: Tensor, by: int) -> Tensor:
    return ids if by == 0 else torch.where(ids < 0, ids, ids + by)


class FastModel:
    """A model on the fast path. `undo()`, or leaving it as a context, restores stock."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.patches = Patches()
        self._experts: Any = None  # the implementation before

    def undo(self) -> None:
        """Restore the stock model. Calling it twice changes nothing.

        Raises:
            ValueError: a pattern is in force.
        """
        if self.patches and in_force(self.model):
            raise ValueError(
                "Leave use_pattern before undoing accelerate: the pattern is in force on the fast "
                "path."
            )
        if self.patches:
            state_of(self.model).selector = None
        self.patches.undo()
        if self._experts is not None:
            self.model.set_experts_implementation(self._experts)  # type: ignore[operator]
            self._experts = None

    def __enter__(self) -> FastModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def group_experts(self) -> None:
        """Run the experts in one grouped product each.

        Stock loops over experts and waits for the GPU, which a CUDA graph cannot.
        """
        before = self.model.config._experts_implementation  # type: ignore[union-attr]
        if before == "eager":
            self.model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
            self._experts = before


def accelerate(model: nn.Module, *, index_dtype: str = "auto", compile: bool = False) -> FastModel:
    """Put a loaded model on the fast path, until `undo`.

    Weights, module tree and state dict stay as they are. Results differ from stock by rounding,
    and where two keys have all but the same indexer score, by which of them is selected. Inference
    only; attention weights are not returned. Routers that must take all groups of experts skip
    their choice. On a GPU the norms are fused and the experts run in grouped products as well.

    Args:
        model: a loaded transformers model of a known family.
        index_dtype: how the indexer compares: "auto" in the model's dtype, "bf16", or "fp8" (e4m3
            with a scale for each vector, after a Hadamard rotation: half the memory and time,
            another selection at the edge).
        compile: run MLPs, experts, projections and norms through torch.compile, which fuses what
            lies between the products, and a step of one sequence with a `FastCache` in three pieces
            a layer, in which hooks put on submodules of a layer later are not called. The first
            calls take their time.

    Raises:
        ValueError: unknown family, a model that is accelerated already or under a pattern, one
            without latent queries, an unknown index_dtype.
    """
    family = family_of(model)
    if index_dtype not in INDEX_DTYPES:
        raise ValueError(f"index_dtype is one of {', '.join(INDEX_DTYPES)}, not {index_dtype!r}.")
    if state_of(model).accelerated:
        raise ValueError("This model is accelerated already; undo that first.")
    if in_force(model):
        raise ValueError(
            "Call accelerate outside of use_pattern; patterns then apply to the accelerated model."
        )
    layers = decoder_layers(model)
    if any(getattr(layer.self_attn, "q_a_proj", None) is None for layer in layers):
        raise ValueError(
            "The fast path needs queries from a latent (q_lora_rank); this model has none."
        )
    wrap: Wrap = partial(torch.compile, dynamic=True) if compile else lambda f: f
    gpu = on_gpu(model)
    norm = fused_norm if gpu else stock_norm
    projection = wrap(partial(project, family.rotate, norm))
    wrapped_norm = wrap(fused_norm)
    step = CompiledStep.of(family.rotate, norm) if compile else None
    in_pieces = [step is not None and runs_in_pieces(layer) for layer in layers]
    if step is not None and not all(in_pieces):
        warnings.warn(
            "Steps of decoding run whole where a layer has a forward, a hook or experts of its own.",
            stacklevel=2,
        )
    selector = FastSelector(model, index_dtype, wrap, wrap_step() if compile else wrap)
    shared = SharedGroups()
    state = state_of(model)
    fast = FastModel(model)
    try:
        fast.patches.replace(model.model, _model_forward(model, shared, selector))  # type: ignore[arg-type]
        for i, (layer, indexer) in enumerate(zip(layers, indexers(model), strict=True)):
            fast.patches.replace(
                layer.self_attn,  # type: ignore[arg-type]
                attention_forward(layer.self_attn, family.native_sharing, projection, shared),
            )
            fast.patches.replace(layer.mlp, _timed("mlp", wrap(layer.mlp.forward)))  # type: ignore[arg-type, union-attr]
            if indexer is not None:
                fast.patches.replace(
                    indexer, indexer_forward(i, indexer, lambda call: selector.full(call)[0])
                )
            if step is not None and in_pieces[i]:
                fast.patches.replace(layer, layer_forward(layer, family.native_sharing, step))
        for module in model.modules():
            if has_one_choice_of_groups(module):
                # A method, since a partial would be compiled anew for each router.
                fast.patches.replace(module, MethodType(route, module))
            elif gpu and hasattr(module, "variance_epsilon"):
                fast.patches.replace(module, partial(wrapped_norm, module))
        if gpu:
            fast.group_experts()
        state.selector = selector
    except BaseException:
        fast.undo()
        raise
    return fast


def on_gpu(model: nn.Module) -> bool:
    """Return whether the model's weights are on a CUDA device."""
    return next(model.parameters()).device.type == "cuda"


def _timed(name: str, forward: Any):
    def forward_timed(*args: Any, **kwargs: Any) -> Any:
        with timed(name):
            return forward(*args, **kwargs)

    return forward_timed


def _model_forward(model: Any, shared: SharedGroups, selector: FastSelector):
    """The decoder's forward with a `Padding` in the place of the dense causal mask."""
    stock, names = model.model.forward, set(model.config.layer_types) | {"indexed_attention"}

    def forward(
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        *args: Any,
        past_key_values=None,
        **kwargs: Any,
    ):
        cache = either(cache, past_key_values)
        if model.training or (
            torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        ):
            raise ValueError(
                "The fast path is for inference: call model.eval() and use torch.no_grad()."
            )
        padding = padding_of(attention_mask)
        if isinstance(cache, FastCache):
            given = (
                input_ids
                if input_ids is not None
                else kwargs.get("inputs_embeds", args[0] if args else None)
            )
            cache.check_room(0 if given is None else given.shape[1])
            cache.padded |= padding.left is not None
        try:
            return stock(
                input_ids, dict.fromkeys(names, padding), position_ids, cache, *args, **kwargs
            )
        finally:
            shared.clear()
            selector.clear()

    return forward


def padding_of(mask: Any) -> Padding:
    """A [B, T] mask (1: token, 0: padding) as the padding at its left; padding at the right needs none, causality hides it.

    Raises:
        ValueError: a mask of another form, or holes between tokens.
    """
    if mask is None:
        return Padding()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "The fast path takes an attention mask [batch, tokens] of ones and zeros, or none."
        )
    held = mask.bool()
    left = held.int().argmax(-1)
    count = held.sum(-1)
    last = mask.shape[1] - held.flip(-1).int().argmax(-1)
    if bool((count == 0).any()) or bool((last - left != count).any()):
        raise ValueError(
            "The attention mask has a sequence without tokens or with holes; the fast path takes padding at the ends."
        )
    return Padding(tuple(left.tolist())) if int(left.max()) else Padding()
