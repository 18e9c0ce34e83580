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
from weakref import WeakSet

import torch
from torch import Tensor, nn

from indexcache import ops
from indexcache.models.family import decoder_layers, either, family_of, indexers
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.layer import (
    Padding,
    Plans,
    Step,
    Turn,
    attention_forward,
    fused_norm,
    has_one_choice_of_groups,
    layer_forward,
    project,
    route,
    runs_in_pieces,
    step_turn,
    stock_norm,
)
from indexcache.models.seam import in_force
from indexcache.models.selector import StockSelector, choose_selector
from indexcache.models.timing import part

INDEX_DTYPES = ("auto", "bf16", "fp8")


class FastSelector(StockSelector):
    """Selections by `ops.index_topk`. Ids are int32 [B, S, k], ascending, -1 where a row has fewer than k keys."""

    path = "fast"

    def __init__(
        self,
        model: nn.Module,
        index_dtype: str = "auto",
        turn: Turn = lambda f: f,
        step_turn: Turn = lambda f: f,
    ):
        super().__init__(model)
        self.index_dtype = index_dtype
        self.project, self.project_one = turn(self.family.project), step_turn(self.family.project)
        self.pools = Plans()  # of the pool that several layers select from
        self._turned: tuple[Tensor, Tensor, Tensor] | None = (
            None  # the cos given, then cos and sin as `_turn` returns them
        )
        # given out in the place of what a prefill selects and publishes, for timing: ids int32 [T, k], and `rows(start, end)` of pools
        self.stand_in: Tensor | None = None
        self.stand_in_pool: Any = None

    def full(
        self,
        layer: int,
        indexer: Any,
        x: Tensor,
        q_resid: Tensor,
        rope,
        mask: Any,
        positions,
        cache: Any,
        pool: int = 0,
    ):
        return self._select(layer, indexer, x, q_resid, rope, mask, cache, pool)

    def reindex(
        self,
        layer: int,
        indexer: Any,
        x: Tensor,
        q_resid: Tensor,
        rope,
        mask: Any,
        cache: Any,
        pool: Tensor,
    ) -> Tensor:
        return self._select(layer, indexer, x, q_resid, rope, mask, cache, 0, pool)[0]

    @torch.no_grad()
    def _select(
        self,
        layer,
        indexer,
        x,
        q_resid,
        rope,
        mask: Padding,
        cache,
        pool: int,
        candidates: Tensor | None = None,
    ):
        with part("indexer"):
            project = self.project_one if x.shape[:2] == (1, 1) else self.project
            # RoPE goes with the quantisation where the keys need not be kept without
            turn = (
                self._turn(indexer, rope)
                if self.index_dtype == "fp8" and (cache is None or isinstance(cache, FastCache))
                else None
            )
            q, k, w = project(indexer, x, q_resid, None if turn else rope)
            k, scale, q, w, decoding = self._keys(layer, k, q, w, cache, turn)
        parts = []
        for rows, left in mask.groups(x.shape[0]):
            inner = None if candidates is None else _shift(candidates[rows], -left)
            plan = None
            if candidates is not None and left == 0 and rows == slice(0, len(candidates)):
                plan = self.pools.of(candidates, ops.pool_group(q, k))
            offset = (
                k.shape[1] - x.shape[1] - left if decoding is None else decoding
            )  # which has no padding
            scales = None if scale is None else scale[rows, left:]
            with part("index_topk"):
                found = ops.index_topk(
                    q[rows],
                    k[rows, left:],
                    w[rows],
                    scales,
                    indexer.index_topk,
                    offset,
                    inner,
                    pool=pool,
                    plan=plan,
                )
            parts.append(
                [_shift(ids, left) for ids in (found if isinstance(found, tuple) else (found,))]
            )
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
        self._turned = None

    def _turn(self, indexer: Any, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, r] as the quantisation takes them, made once for all layers of a forward pass."""
        if self._turned is None or self._turned[0] is not rope[0]:
            cos, sin = (t[..., : indexer.qk_rope_head_dim // 2].float().contiguous() for t in rope)
            self._turned = rope[0], cos, sin
        return self._turned[1:]

    def _keys(
        self,
        layer: int,
        k: Tensor,
        q: Tensor,
        w: Tensor,
        cache: Any,
        turn: tuple[Tensor, Tensor] | None,
    ):
        """(keys of all tokens, their scales or None, queries and weights to match, positions [B] in a step of a `Decoder`)."""
        fast = isinstance(cache, FastCache)
        if cache is not None and not fast:
            k = cache.update_indexer(
                k, layer
            )  # unquantised: a cache that is not ours has no place for scales
        scale = None
        if self.index_dtype == "fp8":
            cos, sin = turn or (None, None)
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
        k, scale = cache.layers[layer].store_index(k, scale)
        return k, scale, q, w, cache.layers[layer].positions


def _shift(ids: Tensor, by: int) -> Tensor:
    return ids if by == 0 else torch.where(ids < 0, ids, ids + by)


class Accelerated:
    """A model on the fast path. `undo()` (or leaving it as a context) restores stock, also after an exception."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._before: list[tuple[nn.Module, Any]] = []
        self._experts: Any = None  # the implementation before

    def undo(self) -> None:
        """Restore the stock model; calling it twice changes nothing. Raises ValueError under a pattern."""
        if self._before and in_force(self.model):
            raise ValueError(
                "Leave use_pattern before undoing accelerate: the pattern is in force on the fast path."
            )
        for module, forward in reversed(self._before):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        if self._before:
            choose_selector(self.model, None)
            _running.discard(self.model)
        self._before.clear()
        if self._experts is not None:
            self.model.set_experts_implementation(self._experts)  # type: ignore[operator]
            self._experts = None

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _replace(self, module: nn.Module, forward: Any) -> None:
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def _group_experts(self) -> None:
        """Experts in one grouped product each: stock's loop over experts waits for the GPU, which a CUDA graph cannot."""
        before = self.model.config._experts_implementation  # type: ignore[union-attr]
        if before == "eager":
            self.model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
            self._experts = before


_running: WeakSet[nn.Module] = WeakSet()


def accelerate(
    model: nn.Module, *, index_dtype: str = "auto", compile: bool = False
) -> Accelerated:
    """Turn a loaded model to the fast path, until `undo`. Weights, module tree and state dict stay as they are.

    Results differ from stock by rounding, and where two keys have all but the same indexer score, by which of them is
    selected. Inference only; attention weights are not returned. Routers that must take all groups of experts skip
    their choice. On a GPU the norms are fused and the experts run in grouped products as well.

    Args:
        index_dtype: how the indexer compares: "auto" in the model's dtype, "bf16", or "fp8" (e4m3 with a scale for each vector, after a
            Hadamard rotation: half the memory and time, another selection at the edge).
        compile: run MLPs, experts, projections and norms through torch.compile, which fuses what lies between the products, and
            a step of one sequence with a `FastCache` in three pieces a layer, in which hooks put on parts of a layer later are not
            called; it takes its time at the first calls.

    Raises:
        ValueError: unknown family, a model that is accelerated already or under a pattern, one without latent queries, an
            unknown index_dtype.
    """
    family = family_of(model)
    if index_dtype not in INDEX_DTYPES:
        raise ValueError(f"index_dtype is one of {', '.join(INDEX_DTYPES)}, not {index_dtype!r}.")
    if model in _running:
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
    turn: Turn = partial(torch.compile, dynamic=True) if compile else lambda f: f
    gpu = on_gpu(model)
    projection = turn(partial(project, family.rotate, fused_norm if gpu else stock_norm))
    norm = turn(fused_norm)
    step = Step.compiled(family.rotate, fused_norm if gpu else stock_norm) if compile else None
    pieces = [step is not None and runs_in_pieces(layer) for layer in layers]
    if step is not None and not all(pieces):
        warnings.warn(
            "Steps of decoding run whole where a layer has a forward, a hook or experts of its own.",
            stacklevel=2,
        )
    selector, plans = (
        FastSelector(model, index_dtype, turn, step_turn() if compile else turn),
        Plans(),
    )
    done = Accelerated(model)
    try:
        done._replace(model.model, _model_forward(model, plans, selector))  # type: ignore[arg-type]
        for i, (layer, indexer) in enumerate(zip(layers, indexers(model), strict=True)):
            done._replace(
                layer.self_attn,  # type: ignore[arg-type]
                attention_forward(layer.self_attn, family.native_sharing, projection, plans),
            )
            done._replace(layer.mlp, _timed("mlp", turn(layer.mlp.forward)))  # type: ignore[arg-type, union-attr]
            if indexer is not None:
                done._replace(indexer, _indexer_forward(selector, i, indexer))
            if step is not None and pieces[i]:
                done._replace(layer, layer_forward(layer, family.native_sharing, step))
        for module in model.modules():
            if has_one_choice_of_groups(module):
                done._replace(
                    module, MethodType(route, module)
                )  # a partial would be compiled anew for each
            elif gpu and hasattr(module, "variance_epsilon"):
                done._replace(module, partial(norm, module))
        if gpu:
            done._group_experts()
        choose_selector(model, selector)
        _running.add(model)
    except BaseException:
        done.undo()
        raise
    return done


def on_gpu(model: nn.Module) -> bool:
    """Replace also what is only slow on a GPU."""
    return next(model.parameters()).device.type == "cuda"


def _timed(name: str, forward: Any):
    def timed(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return forward(*args, **kwargs)

    return timed


def _model_forward(model: Any, plans: Plans, selector: FastSelector):
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
            plans.clear()
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


def _indexer_forward(selector: FastSelector, layer: int, indexer: Any):
    def forward(
        x: Tensor,
        q_resid: Tensor,
        rope,
        mask: Padding,
        position_ids=None,
        cache=None,
        past_key_values=None,
    ) -> Tensor:
        return selector.full(
            layer, indexer, x, q_resid, rope, mask, position_ids, either(cache, past_key_values)
        )[0]

    return forward
