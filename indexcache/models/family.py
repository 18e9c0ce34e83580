"""Describe what the package needs to know about a model family, and register all families.

CONTRIBUTING.md says how to add a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from indexcache.models.wrappers import AnyModel, unwrapped
from indexcache.pattern import Pattern

Projection = Callable[
    [nn.Module, Tensor, Tensor, tuple[Tensor, Tensor] | None], tuple[Tensor, Tensor, Tensor]
]


class DsaModule(nn.Module):
    """A causal language model of transformers with sparse attention, as a type for annotations.

    It names what this package uses of transformers' classes, which do not inherit from it. It is a
    class and not a Protocol because a Protocol cannot be passed where an `nn.Module` is asked for.
    `module_of` returns it.

    Attributes:
        config: transformers' config.
        model: the decoder, without the output head; `decoder_layers` returns its layers.
    """

    config: Any
    model: Any
    generate: Callable[..., Tensor]
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Linear]
    set_experts_implementation: Callable[[str], None]


@dataclass(frozen=True)
class Family:
    """A model family of transformers with an indexer at `model.layers[i].self_attn.indexer`.

    Attributes:
        model_type: the model_type in config.json.
        native_sharing: whether stock transformers obeys `indexer_types` of the config.
        rotate_index: applies RoPE to the queries and keys of the indexer. It is transformers' own
            function, with the arguments (q, k, cos, sin, unsqueeze_dim=).
        interleaved: whether `rotate_index` rotates neighbouring dims together; otherwise it rotates
            dims that lie half of the rotary dims apart.
        rotate: applies RoPE to the queries and the shared key of attention, likewise.
        rotates_neighbours: whether `rotate` rotates neighbouring dims together and leaves them half
            of the rotary dims apart.
    """

    model_type: str
    native_sharing: bool
    rotate_index: Callable[..., tuple[Tensor, Tensor]]
    interleaved: bool
    rotate: Callable[..., tuple[Tensor, Tensor]]
    rotates_neighbours: bool = False

    def project(
        self, indexer: Any, x: Tensor, q_resid: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute an indexer's projections with the arithmetic of the stock one.

        Args:
            x, q_resid: the hidden states [B, S, E] and the latent queries [B, S, Q].
            rope: cos and sin [B, S, r]; None applies no RoPE.

        Returns:
            Queries [B, S, H, D], keys [B, S, D], and weights fp32 [B, S, H], which contain both
            scales, H^-0.5 and D^-0.5.
        """
        return project_with(self.rotate_index, indexer, x, q_resid, rope)


def project_with(
    rotate: Callable[..., tuple[Tensor, Tensor]],
    indexer: Any,
    x: Tensor,
    q_resid: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the released indexer's projections: shapes and dtypes as in `Family.project`.

    Families differ only in the layout of RoPE, which `rotate` applies.
    """
    heads, dim, rotary = indexer.n_heads, indexer.head_dim, indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).unflatten(-1, (heads, dim))
    k = indexer.k_norm(indexer.wk(x))
    if rope is not None:
        q_rot, k_rot = rotate(q[..., :rotary], k[..., None, :rotary], *rope, unsqueeze_dim=2)
        q = torch.cat([q_rot, q[..., rotary:]], dim=-1)
        k = torch.cat([k_rot.squeeze(2), k[..., rotary:]], dim=-1)
    w = indexer.weights_proj(x.to(indexer.weights_proj.weight.dtype)).float() * (
        heads**-0.5 * indexer.softmax_scale
    )
    return q, k, w


@cache
def families() -> dict[str, Family]:
    """Import every module of `indexcache.models.families` and return its family by model_type."""
    package = importlib.import_module("indexcache.models.families")
    by_type = {}
    for info in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        by_type[family.model_type] = family
    return by_type


def family_named(model_type: Any, where: str = "") -> Family:
    """Return the family of that model_type; `where` begins the error message.

    Raises:
        ValueError: the package knows no family of that model_type.
    """
    if not isinstance(model_type, str) or model_type not in families():
        names = ", ".join(sorted(families()))
        raise ValueError(
            f"{where}{'the' if where else 'The'} model type {model_type!r} is not a DSA family "
            f"that is known here ({names})."
        )
    return families()[model_type]


def family_of(model: Any) -> Family:
    """Return the family of a model, a handle, or a transformers config.

    Raises:
        ValueError: the package knows no family of its model_type.
    """
    carried = isinstance(getattr(model, "module", model), nn.Module)
    if carried or not hasattr(model, "model_type"):
        model = unwrapped(model).config
    return family_named(model.model_type)


def module_of(model: AnyModel) -> DsaModule:
    """Return the causal language model of transformers that a model is, carries or wraps.

    Raises:
        ValueError: it has none, or it is a decoder without the output head.
    """
    module = unwrapped(model)
    decoder = getattr(module, "model", None)
    if hasattr(module, "layers") or not hasattr(module, "get_output_embeddings"):
        name = type(module).__name__
        raise ValueError(
            f"{name} has no output head, which is needed here; pass the causal language model that "
            f"contains it ({name.removesuffix('Model')}ForCausalLM), or use use_pattern alone."
        )
    if hasattr(decoder, "layers") and module.get_output_embeddings() is None:
        raise ValueError(
            f"{type(module).__name__} has no output head for tokens; pass a causal language model."
        )
    return cast(DsaModule, module)


def decoder_of(model: AnyModel) -> Any:
    """Return the decoder, the module that has the decoder layers in `.layers`.

    Raises:
        ValueError: there is none, as in `unwrapped`.
    """
    module = unwrapped(model)
    return module if hasattr(module, "layers") else module.model


def decoder_layers(model: AnyModel) -> Sequence[Any]:
    """Return the decoder layers, without multi-token-prediction layers."""
    return decoder_of(model).layers


def indexers(model: AnyModel) -> list[Any]:
    """Return the indexer of each decoder layer; None where the checkpoint shares natively."""
    return [layer.self_attn.indexer for layer in decoder_layers(model)]


def missing_indexers(model: AnyModel) -> list[int]:
    """Return the decoder layers that have no indexer, in ascending order."""
    return [i for i, indexer in enumerate(indexers(model)) if indexer is None]


def native_pattern(model: AnyModel) -> Pattern:
    """Return the pattern the model has by itself: F where a layer has an indexer, S elsewhere."""
    return Pattern("".join("S" if indexer is None else "F" for indexer in indexers(model)))


def check_latent_queries(model: AnyModel, user: str) -> None:
    """Raise ValueError if a layer computes its queries without a latent, which `user` needs."""
    if any(getattr(layer.self_attn, "q_a_proj", None) is None for layer in decoder_layers(model)):
        raise ValueError(f"{user} needs queries from a latent (q_lora_rank); this model has none.")


def input_device(module: Any) -> torch.device:
    """Return the device to which the input of a module goes.

    It is that of its first weight. Where the library accelerate keeps the weights elsewhere until
    they are needed, its hooks name the device.
    """
    for m in module.modules():
        hook = m.__dict__.get("_hf_hook")
        for h in getattr(hook, "hooks", (hook,)):
            if getattr(h, "offload", False) and h.execution_device is not None:
                return torch.device(h.execution_device)
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def either(cache: Any, past_key_values: Any) -> Any:
    """Return the cache that transformers passes: `cache` from 5.24 on, `past_key_values` before."""
    return past_key_values if cache is None else cache
