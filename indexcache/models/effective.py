"""Read weights past the forward of their module, and honour or refuse what the forward adds.

The fast path and training read some weights without calling the module: kv_b_proj, which attention
absorbs, and those of routers and norms. A forward may do more than the product: adapters, hooks,
scales of quantised weights, loading from the disk. A linear map is known by its values on an
identity matrix, so such a module is called on one; what is not linear is refused by name.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from indexcache.models.blocks import BlockExperts, BlockLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Max relative deviation of a module from a linear map; 5e-3 in dtypes that are missing.
Rounding stays below these, quantised activations do not."""

# The state in which a module was last found to be linear.
_checked: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight of a module whose stock forward reads the same attribute.

    A parametrization, also a temporary one, is honoured because the attribute computes it.
    """
    return getattr(module, name)


def linear_map(module: Any, where: str, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the matrix [out, in] and the bias [out] or None that a module applies to its input.

    Args:
        module: a linear layer, or anything that acts as one: with adapters, parametrizations or
            offloading, or with quantised weights and unquantised activations.
        where: the module's name in the model, for refusals.
        like: a tensor with the dtype and device of the module's input, and its width as last dim.

    Returns:
        The parameters themselves for a plain `nn.Linear`, else tensors in `like`'s dtype.

    Raises:
        ValueError: the module has forward hooks, or is not linear.
    """
    if is_plain_linear(module):
        return module.weight, module.bias
    _refuse_hooks(module, where)
    width = like.shape[-1]
    probe = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # Ends with a zero.
    state = adapter_state(module)
    check = _checked.get(module) != state
    if check and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        row = 3 * torch.linspace(1, width, width, device=like.device).sin()
        # The check is a call of its own, so that a pass that is computed again is the same pass.
        with torch.no_grad():
            out = _called(module, where, torch.cat([probe, row.to(probe.dtype)[None]]))
        _check_linear(out, row.to(probe.dtype), where, module)
        _checked[module] = state
    out = _called(module, where, probe)
    bias = out[width].to(like.dtype)
    return (out[:width].to(like.dtype) - bias).t(), bias


def is_plain_linear(module: Any) -> bool:
    """Return whether a module is a linear layer that does nothing but the product.

    It costs about a microsecond, for use in every pass.
    """
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype in FLOATS
        and not weight.is_meta
        and ("forward" not in module.__dict__ or moves_inputs_only(module))
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
    )


def has_stock_forward(module: Any) -> bool:
    """Return whether the forward of a module's class is transformers' or torch's.

    A forward that was replaced on the module itself does not count here.
    """
    source = getattr(type(module).forward, "__module__", None) or ""
    return source.startswith(("transformers.", "torch.nn."))


def is_plain(module: Any) -> bool:
    """Return whether calling a module runs its stock forward on its own weights, and nothing else.

    Weights of other types than torch's own and of integers do not count as its own.
    """
    if isinstance(module, nn.Linear):
        return is_plain_linear(module)
    if isinstance(module, BlockLinear | BlockExperts):
        return not (module._forward_hooks or module._forward_pre_hooks) and (
            "forward" not in module.__dict__ or moves_inputs_only(module)
        )
    return (
        has_stock_forward(module)
        and not torch.nn.utils.parametrize.is_parametrized(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and ("forward" not in module.__dict__ or moves_inputs_only(module))
        and all(
            type(p) in (nn.Parameter, Tensor) and p.dtype in FLOATS and not p.is_meta
            for p in module.parameters(recurse=False)
        )
    )


def moves_inputs_only(module: nn.Module) -> bool:
    """Return whether a forward replaced by the library accelerate only moves inputs to a device.

    The weights then lie on the device where the product runs.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    return all(
        type(h).__name__ == "AlignDevicesHook" and not h.offload
        for h in getattr(hook, "hooks", (hook,))
    )


def _refuse_hooks(module: nn.Module, where: str) -> None:
    """Raise ValueError if a module has forward hooks, but for those of torch that set its weight.

    These are weight_norm, spectral_norm and pruning: they run before a call, whatever its input.
    """
    hooks = [
        hook
        for m in module.modules()
        for hook in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]
    ]
    for hook in hooks:
        if not type(hook).__module__.startswith("torch.nn.utils."):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise ValueError(
                f"{where} has a forward hook ({name}), which would not see the module's input: its "
                "weight is used here without calling it; remove the hook, or run stock."
            )


def adapter_state(module: Any) -> tuple:
    """Return what a module's adapters do now: names, merging, scales. It compares by ==.

    The attributes are those of peft's layers.
    """
    scaling = getattr(module, "scaling", None)
    return (
        type(module),
        module.__dict__.get("forward"),
        getattr(module, "_active_adapter", None),
        getattr(module, "_disable_adapters", None),
        tuple(getattr(module, "merged_adapters", ())),
        tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
    )


def _called(module: Any, where: str, probe: Tensor) -> Tensor:
    """Call a module on the rows of `probe`."""
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    if type(module) is nn.Linear and weight is not None and weight.dtype not in FLOATS:
        raise ValueError(
            f"{where} holds {weight.dtype} values without their scales; load the model in bf16, or "
            "with the library that quantised it."
        )
    # Torch multiplies by a weight on the meta device without an error and returns anything.
    lost = any(p.is_meta for p in module.parameters())
    if lost and not any("_hf_hook" in m.__dict__ for m in module.modules()):
        raise ValueError(
            f"{where} ({kind}) has weights on the meta device, and nothing that loads them; load "
            "the model anew."
        )
    try:
        out = module(probe)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{where} ({kind}) cannot be multiplied out: its forward failed on an identity matrix "
            f"({type(error).__name__}: {reason}); merge or dequantise it, or run stock."
        ) from error
    if type(out) is not Tensor or out.is_meta or out.shape[:-1] != probe.shape[:-1]:
        raise ValueError(
            f"{where} ({kind}) gives no plain tensor for an identity matrix, because its weights "
            "are sharded; gather them, or run stock."
        )
    return out


def _check_linear(out: Tensor, x: Tensor, where: str, module: Any) -> None:
    """Check the last of a module's outputs, that of x, against those of the identity and of 0."""
    *weight, bias, product = out.double()
    matrix = torch.stack(weight) - bias
    expected = x.double() @ matrix + bias
    size = float((product - bias).norm())
    if not float((product - expected).norm()) <= TOLERANCE.get(x.dtype, 5e-3) * size:
        raise ValueError(
            f"{where} ({type(module).__name__}) is not linear: it quantises its input, drops "
            "values or does something else beside a product, which attention over latents cannot "
            "absorb; dequantise it, or run stock."
        )
