"""Put a loaded transformers model on the fast path: sparse attention through `indexcache.ops`.

Stock transformers computes the scores [B, S, H, T] of every index head, and scatters the ids into a
mask over all keys. Here the same weights run with the indexer's scores in chunks, exact top-k, and
attention in MQA form over the gathered latents. Any cache of transformers works, filled with
latents; a `FastCache` is made for this path. `use_pattern` and `model.generate` work as before.
"""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.family import (
    AnyModel,
    DsaModule,
    check_latent_queries,
    decoder_layers,
    either,
    family_of,
    indexers,
    module_of,
)
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.layer import (
    CompiledStep,
    Padding,
    Wrap,
    attention_forward,
    has_one_choice_of_groups,
    layer_forward,
    route,
    runs_in_pieces,
    wrap_step,
)
from indexcache.models.fast.selector import FastSelector
from indexcache.models.mla import fused_norm, project, stock_norm
from indexcache.models.patch import ModelState, Patches, state_of
from indexcache.models.seam import IndexerCall, in_force, indexer_forward
from indexcache.models.timing import timed
from indexcache.ops import Selection

INDEX_DTYPES = ("auto", "bf16", "fp8")


class FastModel:
    """A model on the fast path. `undo()`, or leaving it as a context, restores stock."""

    def __init__(self, model: DsaModule):
        self.model = model
        self.patches = Patches()
        # The implementation of experts that `group_experts` replaced.
        self._experts: Any = None

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
            self.model.set_experts_implementation(self._experts)
            self._experts = None

    def __enter__(self) -> FastModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def group_experts(self) -> None:
        """Run each projection of the experts as one grouped product.

        Stock loops over experts and waits for the GPU, which a CUDA graph cannot do.
        """
        before = self.model.config._experts_implementation
        if before == "eager":
            self.model.set_experts_implementation("grouped_mm")
            self._experts = before


def accelerate(model: AnyModel, *, index_dtype: str = "auto", compile: bool = False) -> FastModel:
    """Put a loaded model on the fast path, until `undo`.

    Weights, module tree and state dict stay as they are. Results differ from stock by rounding,
    and of two keys with nearly equal indexer scores the other one may be selected. The fast path is
    for inference and returns no attention weights. Routers that must take all groups of experts
    skip the choice of groups. On a GPU the norms are fused and the experts run in grouped products.

    Args:
        model: a loaded model, or its transformers module, of a known family.
        index_dtype: the dtype in which the indexer compares: "auto" for the model's, "bf16", or
            "fp8": e4m3 with a scale for each vector after a Hadamard rotation, which takes half the
            memory and time and may change the last of the k selected ids.
        compile: run MLPs, experts, projections and norms through torch.compile, which fuses the
            operations between matrix products. A step of one sequence with a `FastCache` runs as
            three compiled functions a layer, which skip hooks that are added to its submodules
            later. The first calls are slow, because they compile.

    Raises:
        ValueError: unknown family, a model that is accelerated already or under a pattern, one
            without latent queries, an unknown index_dtype.
    """
    module = module_of(model)
    family = family_of(module)
    if index_dtype not in INDEX_DTYPES:
        raise ValueError(f"index_dtype is one of {', '.join(INDEX_DTYPES)}, not {index_dtype!r}.")
    state = state_of(module)
    if state.accelerated:
        raise ValueError("This model is accelerated already; undo that first.")
    if state.patterns:
        raise ValueError(
            "Call accelerate outside of use_pattern; patterns then apply to the accelerated model."
        )
    check_latent_queries(module, "The fast path")
    layers = decoder_layers(module)
    wrap: Wrap = partial(torch.compile, dynamic=True) if compile else lambda f: f
    gpu = on_gpu(module)
    norm = fused_norm if gpu else stock_norm
    projection = wrap(partial(project, family.rotate, norm))
    wrapped_norm = wrap(fused_norm)
    step = CompiledStep.of(family.rotate, norm) if compile else None
    in_pieces = [step is not None and runs_in_pieces(layer) for layer in layers]
    if step is not None and not all(in_pieces):
        warnings.warn(
            "Layers with a replaced forward, a hook or another implementation of experts do not "
            "compile their steps of decoding.",
            stacklevel=2,
        )
    wrap_one = wrap_step() if compile else wrap
    selector = FastSelector(module, index_dtype, wrap(family.project), wrap_one(family.project))
    fast = FastModel(module)
    try:
        fast.patches.replace(module.model, _model_forward(module, state))
        for i, (layer, indexer) in enumerate(zip(layers, indexers(module), strict=True)):
            fast.patches.replace(
                layer.self_attn,
                attention_forward(layer.self_attn, family.native_sharing, projection),
            )
            fast.patches.replace(layer.mlp, _timed("mlp", wrap(layer.mlp.forward)))
            if indexer is not None:
                fast.patches.replace(indexer, indexer_forward(i, indexer, partial(_full, state)))
            if step is not None and in_pieces[i]:
                fast.patches.replace(layer, layer_forward(layer, family.native_sharing, step))
        for submodule in module.modules():
            if has_one_choice_of_groups(submodule):
                # A bound method is compiled once; a partial would be compiled for each router.
                fast.patches.replace(submodule, MethodType(route, submodule))
            elif gpu and hasattr(submodule, "variance_epsilon"):
                fast.patches.replace(submodule, partial(wrapped_norm, submodule))
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


def _full(state: ModelState, call: IndexerCall) -> Selection:
    """Answer an indexer's call while no pattern is in force."""
    assert state.selector is not None
    return state.selector.full(call)


def _model_forward(model: DsaModule, state: ModelState):
    """Make the decoder's forward, which replaces the dense causal mask by a `Padding`."""
    stock = model.model.forward
    names = set(model.config.layer_types) | {"indexed_attention"}

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
            tokens = input_ids
            if tokens is None:
                tokens = kwargs.get("inputs_embeds", args[0] if args else None)
            cache.check_room(0 if tokens is None else tokens.shape[1])
            cache.padded |= padding.left is not None
        try:
            return stock(
                input_ids, dict.fromkeys(names, padding), position_ids, cache, *args, **kwargs
            )
        finally:
            if state.selector is not None:
                state.selector.clear()

    return forward


def padding_of(mask: Any) -> Padding:
    """Convert a mask [B, T] (1: token, 0: padding) to the padding at its left.

    Padding at the right needs no mask: causality hides it.

    Raises:
        ValueError: a mask of another form, or holes between tokens.
    """
    if mask is None:
        return Padding()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "The fast path takes an attention mask [batch, tokens] of ones and zeros, or none."
        )
    tokens = mask.bool()
    left = tokens.int().argmax(-1)
    count = tokens.sum(-1)
    end = mask.shape[1] - tokens.flip(-1).int().argmax(-1)
    if bool((count == 0).any()) or bool((end - left != count).any()):
        raise ValueError(
            "The attention mask has a sequence without tokens or with holes; the fast path takes "
            "padding at the ends."
        )
    return Padding(tuple(left.tolist())) if int(left.max()) else Padding()
