"""Make stock transformers models of any DSA config with random weights.

Weights are drawn on the device in their final dtype, tensor by tensor: the 30B shape takes 60 GB in
bf16 and exists once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.models.blocks import WAYS, replace_kept
from indexcache.models.family import family_named
from indexcache.models.fp8 import SCALE_SUFFIX
from indexcache.models.loading import DTYPES, check_device
from indexcache.ops.reference import FP8
from indexcache.shapes import Shape

STD = 0.02  # standard deviation of the random weights
BLOCK = (128, 128)
UNQUANTIZED = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "weights_proj", "bias")
"""Parts of the names of tensors that checkpoints in FP8 keep in bf16."""


def random_model(
    config: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    fp8: str = "dequantize",
) -> nn.Module:
    """Make a stock transformers model of a DSA config, in eval mode and without gradients.

    Every matrix is drawn from N(0, 0.02), norms are 1 and biases 0.

    Args:
        config: the content of a config.json, with the `model_type` of a known family.
        dtype: float32, bfloat16 or float16.
        device: a torch device with room for all weights.
        seed: random seed of the weights.
        fp8: "dequantize" makes all weights in `dtype`; see `load` for "keep" and "both", with which
            matrices are in block-scaled FP8 as in DeepSeek's checkpoints.

    Raises:
        ValueError: unknown family, dtype or fp8, an unusable device, or one with too little memory.
    """
    import transformers

    values = dict(config)
    kind = values.pop("model_type", None)
    family = family_named(kind)
    if dtype not in DTYPES:
        raise ValueError(f"The dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    if fp8 not in WAYS:
        raise ValueError(f"fp8 is one of {', '.join(WAYS)}, not {fp8!r}.")
    check_device(device)
    size = DTYPES[dtype].itemsize if fp8 == "dequantize" else 1
    _check_room(Shape.of(config).weights * size, device)
    model_config = transformers.AutoConfig.for_model(kind, **values)
    if family.native_sharing:
        model_config.indexer_types = ["full"] * model_config.num_hidden_layers
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(DTYPES[dtype])
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                model_config, attn_implementation="sdpa", dtype=DTYPES[dtype]
            )
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.layers:
        # transformers keeps this matrix in fp32 when it loads a checkpoint.
        layer.self_attn.indexer.weights_proj.float()
    if fp8 != "dequantize":
        replace_kept(model, BLOCK, lambda n: not any(p in n for p in UNQUANTIZED), fp8 == "both")
    model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == FP8:
                _draw_fp8(parameter, generator)
            elif name.endswith(SCALE_SUFFIX):
                parameter.fill_(STD)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in model.buffers():
            buffer.zero_()
    # The frequencies of RoPE are buffers, which `to_empty` dropped, so they are computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(model_config).to(device)
    return model.requires_grad_(False).eval()


def _draw_fp8(parameter: Tensor, generator: torch.Generator) -> None:
    """Fill an FP8 weight from N(0, 1), in pieces: torch draws none in FP8."""
    for part in parameter.view(-1).split(1 << 26):
        drawn = torch.empty(part.shape, device=part.device).normal_(generator=generator)
        part.copy_(drawn.to(part.dtype))


def _check_room(needed: int, device: str) -> None:
    """Raise ValueError where the device has fewer than `needed` bytes free."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"The weights of this shape take {needed / 1e9:.1f} GB and {device} has "
            f"{free / 1e9:.1f} GB free; take fewer layers with --layers."
        )


def free_memory(device: str) -> int | None:
    """Return the bytes of memory that a device has free; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _free_host()


def _free_host() -> int | None:
    """Read MemAvailable of Linux in bytes; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(
                1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable:")
            )
    except (OSError, StopIteration, ValueError, IndexError):
        return None
