"""Put a loaded transformers model on the fast path: sparse attention through `indexcache.ops`.

Stock transformers computes the scores [B, S, H, T] of every index head, and scatters the ids into a
mask over all keys. Here the same weights run with the indexer's scores in chunks, exact top-k, and
attention in MQA form over the gathered latents. Dynamic and static caches of transformers work,
filled with latents; a `FastCache` is made for this path. `use_pattern` and `model.generate` work as
before. docs/fast-path.md lists what is honoured and what is refused.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.blocks import run_in_one, runs_in_one
from indexcache.models.effective import has_stock_forward, is_plain, moves_inputs_only
from indexcache.models.family import (
    AnyModel,
    DsaModule,
    check_latent_queries,
    decoder_layers,
    either,
    family_of,
    indexers,
    input_device,
    module_of,
    project_with,
)
from indexcache.models.fast.cache import FastCache
from indexcache.models.fast.frozen import Frozen
from indexcache.models.fast.layer import (
    CompiledStep,
    Wrap,
    attention_forward,
    has_one_choice_of_groups,
    layer_forward,
    route,
    runs_in_pieces,
    wrap_step,
)
from indexcache.models.fast.requests import check_cache, check_packing, check_request
from indexcache.models.fast.rotate import fused_rotate
from indexcache.models.fast.selector import FastSelector
from indexcache.models.fast.token import fits_indexer
from indexcache.models.fast.visible import Visible, visible_of
from indexcache.models.mla import fused_norm, head_weights, is_stock_norm, project, stock_norm
from indexcache.models.patch import ModelState, Patches, Replaced, state_of
from indexcache.models.scopes import seam_here
from indexcache.models.seam import in_force
from indexcache.models.selector import IndexerCall, indexer_forward
from indexcache.models.soundness import check_weights
from indexcache.models.timing import timed
from indexcache.ops import Selection
from indexcache.ops.tuning import current

INDEX_DTYPES = ("auto", "bf16", "fp8")
NOT_TRACED = (
    "The fast path cannot be traced into one graph (torch.compile with fullgraph=True, "
    "torch.export, torch.jit.trace): use accelerate(model, compile=True), or undo it first."
)


class FastModel:
    """A model on the fast path. `undo()`, or leaving it as a context, restores stock."""

    def __init__(self, model: DsaModule, *, compiles: bool = False):
        self.model = model
        self.compiles = compiles
        self.patches = Patches()
        # The implementation of experts that `group_experts` replaced.
        self._experts: Any = None
        # The modules that compiled functions run, as they were when those were made.
        self.compiled: Frozen | None = None

    def replace(self, module: nn.Module, forward: Any) -> None:
        """Replace a module's forward, inside of a hook of the library accelerate on the module.

        Such a hook moves inputs to the module's device and loads its weights. A hook that comes
        later lies around `forward`, and around stock once this is undone.
        """
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            forward = _hooked(module, hook, forward)
        if self.compiles:
            self.patches.replace(module, forward)
        else:
            self.patches.wrap(module, partial(_always, forward))

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
            three compiled functions a layer. A change of a layer afterwards is refused. The first
            calls are slow, because they compile.

    Raises:
        ValueError: unknown family, a model that is accelerated already or under a pattern, one
            without latent queries, with a part that does more than can be honoured or with weights
            of an indexer that are not finite, an unknown index_dtype.
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
    state.forget_spent()
    if state.recorded:
        gc.collect()  # A cycle may be all that keeps the graph alive.
    if state.recorded:
        raise ValueError(
            "A forward pass under a pattern waits for its backward pass (gradient checkpointing); "
            "run that, or drop its outputs, before accelerate."
        )
    check_latent_queries(module, "The fast path")
    check_weights(module, selecting=True)
    layers = decoder_layers(module)
    for i, layer in enumerate(layers):
        _check_layer(i, layer, module)
    wrap: Wrap = partial(torch.compile, dynamic=True) if compile else lambda f: f
    gpu = on_gpu(module)
    norm = stock_norm  # It runs hooks, and on a GPU the fused forward that is put below.
    if gpu and compile and all(map(is_plain, filter(is_stock_norm, module.model.modules()))):
        norm = fused_norm
    rotate = fused_rotate(family.rotate, family.rotates_neighbours)
    rotate_index = fused_rotate(family.rotate_index, family.interleaved)
    projection = wrap(partial(project, rotate, norm))
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
    index = partial(project_with, rotate_index)
    selector = FastSelector(module, index_dtype, wrap(index), wrap_one(index))
    fast = FastModel(module, compiles=compile)
    try:
        fast.patches.wrap(module.model, partial(_model_forward, module, fast))
        for i, (layer, indexer) in enumerate(zip(layers, indexers(module), strict=True)):
            fast.replace(
                layer.self_attn,
                attention_forward(layer.self_attn, family.native_sharing, projection),
            )
            # The forward contains the hook of the library accelerate.
            mlp = _timed("mlp", wrap(layer.mlp.forward))
            fast.patches.wrap(layer.mlp, partial(_always, mlp))
            if indexer is not None:
                fast.replace(indexer, indexer_forward(i, indexer, partial(_full, state)))
            if step is not None and in_pieces[i]:
                fits = index_dtype == "fp8" and fits_indexer(layer)
                indexes = partial(_indexes, state, i) if fits else bool
                fast.patches.replace(layer, layer_forward(layer, family, step, indexes))
        for submodule in module.modules():
            if "forward" in submodule.__dict__ and not moves_inputs_only(submodule):
                continue
            if has_one_choice_of_groups(submodule):
                # A bound method is compiled once; a partial would be compiled for each router.
                fast.replace(submodule, MethodType(route, submodule))
            elif gpu and current().linear.fused_experts and runs_in_one(submodule):
                fast.replace(submodule, MethodType(run_in_one, submodule))
            elif gpu and is_stock_norm(submodule):
                fast.replace(submodule, partial(wrapped_norm, submodule))
        if gpu:
            fast.group_experts()
        if compile:
            fast.compiled = Frozen(_compiled_modules(layers), weights=False)
        state.selector = selector
    except BaseException:
        fast.undo()
        raise
    return fast


def on_gpu(model: nn.Module) -> bool:
    """Return whether the model's weights are on a CUDA device."""
    return next(model.parameters()).device.type == "cuda"


def _check_layer(i: int, layer: Any, model: DsaModule) -> None:
    """Raise ValueError if a part that the fast path replaces does more than stock's part does."""
    a = layer.self_attn
    for name, part in (("self_attn", a), ("self_attn.indexer", a.indexer)):
        replaced = part is not None and (
            not has_stock_forward(part)
            or ("forward" in part.__dict__ and "_hf_hook" not in part.__dict__)
            # A pattern answers for an indexer without its forward.
            or (part is a.indexer and "_hf_hook" in part.__dict__ and not moves_inputs_only(part))
        )
        if replaced:
            raise ValueError(
                f"model.layers.{i}.{name} ({type(part).__name__}) has a forward that is not "
                "transformers', which the fast path would not run; restore it, or run stock."
            )
    if state_of(model).stream is not None:
        return  # Its weights are read from a checkpoint, so they are nothing but linear.
    norm = next(p for p in a.kv_a_layernorm.parameters())
    dtype: Any = model.dtype if norm.is_meta else norm.dtype
    device = input_device(a.kv_b_proj)
    head_weights(a, torch.zeros(0, a.kv_lora_rank, dtype=dtype, device=device))


def _compiled_modules(layers: Iterable[Any]) -> list[tuple[str, nn.Module]]:
    """Return the modules of decoder layers, without those whose forward a pattern replaces."""
    return [
        (f"model.layers.{i}.{name}", m)
        for i, layer in enumerate(layers)
        for name, m in layer.named_modules()
        if m is not layer and m is not layer.self_attn.indexer
    ]


def _always(forward: Any, _node: Replaced) -> Any:
    return forward


def _hooked(module: nn.Module, hook: Any, forward: Any):
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, forward(*args, **kwargs))

    return run


def _timed(name: str, forward: Any):
    def forward_timed(*args: Any, **kwargs: Any) -> Any:
        with timed(name):
            return forward(*args, **kwargs)

    return forward_timed


def _full(state: ModelState, call: IndexerCall) -> Selection:
    """Answer an indexer's call while no pattern is in force."""
    assert state.selector is not None
    return state.selector.full(call)


def _indexes(state: ModelState, layer: int) -> bool:
    """Return whether the indexer of a layer runs under the pattern in force here."""
    seam = seam_here(state)
    return seam is None or seam.pattern[layer] != "S"


def _model_forward(model: DsaModule, fast: FastModel, node: Replaced):
    """Make the decoder's forward, which replaces the dense causal mask by a `Visible`."""
    names = set(model.config.layer_types) | {"indexed_attention"}

    @torch.compiler.disable(reason=NOT_TRACED)
    def run(
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        *,
        past_key_values=None,
        **kwargs: Any,
    ):
        cache = either(cache, past_key_values)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise ValueError(NOT_TRACED)
        if fast.compiled is not None and (name := fast.compiled.changed()):
            raise ValueError(
                f"{name} was changed after accelerate(model, compile=True), whose compiled "
                "functions skip that; undo it, and accelerate again."
            )
        check_request(model, inputs_embeds, kwargs)
        visible = _visible(
            model, attention_mask, position_ids, cache, input_ids, inputs_embeds, use_cache, kwargs
        )
        return node.below(
            input_ids,
            dict.fromkeys(names, visible),
            position_ids,
            cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)  # torch.compile names the reason where a traced frame calls it.

    return forward


def _visible(
    model: DsaModule,
    mask: Any,
    positions: Tensor | None,
    cache: Any,
    ids: Tensor | None,
    embeds: Tensor | None,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> Visible:
    """Check the inputs of a pass together, and return what its queries see."""
    tokens = ids if embeds is None else embeds
    if tokens is None:
        return Visible()  # Stock says what is missing.
    batch, queries = tokens.shape[:2]
    past = check_cache(model, cache, batch, queries)
    if past is None:
        return Visible()
    caching = cache is not None or (model.config.use_cache if use_cache is None else use_cache)
    if mask is None or isinstance(mask, Tensor):
        check_packing(positions, mask, bool(caching), kwargs)
    visible = visible_of(
        mask, queries, past + queries, batch, None if caching or mask is not None else positions
    )
    if isinstance(cache, FastCache):
        cache.padded |= visible.spans is not None
    return visible
