"""Find the transformers model in what wraps it: handles, adapters, compilers, parallel wrappers."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import nn


class Handle(Protocol):
    """An object that carries a model in `.module`, as `indexcache.load` returns it."""

    @property
    def module(self) -> nn.Module: ...


AnyModel: TypeAlias = nn.Module | Handle


def unwrapped(model: Any) -> Any:
    """Return the transformers model that a model is, carries in `.module`, or wraps.

    These are looked through: handles of `indexcache.load`, `torch.compile`, `PeftModel`, averaged
    models, DistributedDataParallel and whatever else keeps the model in `.module`.

    Raises:
        ValueError: it is no model, or a wrapper under which the model does not run by itself.
    """
    module = wrapping(model)[-1]
    decoder = module if hasattr(module, "layers") else getattr(module, "model", None)
    if getattr(module, "config", None) is None or not isinstance(decoder, nn.Module):
        raise ValueError(
            f"{type(module).__name__} is no transformers model; pass the causal language model "
            "(..ForCausalLM) itself."
        )
    return module


def wrapping(model: Any) -> list[Any]:
    """Return what wraps a model, the outermost first, and last the model.

    Raises:
        ValueError: as `unwrapped`.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"Expected a model, as indexcache.load or transformers return it; got "
            f"{type(model).__name__}."
        )
    modules = [module]
    while (inner := _inner(modules[-1])) is not None:
        modules.append(inner)
    return modules


def is_adapted(module: Any) -> bool:
    """Return whether a module is a `PeftModel`."""
    return "PeftModel" in {kind.__name__ for kind in type(module).__mro__}


def _inner(module: Any) -> nn.Module | None:
    """Return the module in a wrapper; None: it is none."""
    names = {kind.__name__ for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in names:
        raise ValueError(
            "FullyShardedDataParallel flattens the weights, which are read here by name; shard "
            "with torch.distributed.fsdp.fully_shard, or pass the model before it is wrapped."
        )
    if "DataParallel" in names and len(module.device_ids) > 1:
        raise ValueError(
            "nn.DataParallel copies the model to every GPU in each pass, and the copies would run "
            "with the weights of the first; use DistributedDataParallel."
        )
    if is_adapted(module):
        if any(getattr(c, "is_prompt_learning", False) for c in module.peft_config.values()):
            raise ValueError(
                f"{type(module).__name__} adds virtual tokens in front of the text, which the "
                "model inside does not see; pass its base model, or use adapters of weights (LoRA)."
            )
        return module.base_model
    if "BaseTuner" in names:  # It lies in a PeftModel.
        return module.model
    return module._modules.get("_orig_mod") or module._modules.get("module")
