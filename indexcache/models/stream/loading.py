"""Make a model of a checkpoint whose layers are read when they are needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from indexcache.delta import read_delta
from indexcache.memory import out_of_memory
from indexcache.models.applied import AppliedDelta
from indexcache.models.family import AnyModel, DsaModule, module_of
from indexcache.models.loading import Model, checked_class, open_weights, transformers_config
from indexcache.models.patch import state_of
from indexcache.models.random import free_memory
from indexcache.models.reader import Reader
from indexcache.models.stream.layers import Layers
from indexcache.models.stream.run import Stream
from indexcache.models.stream.settings import StreamSettings
from indexcache.models.weights import Weights
from indexcache.pattern import Pattern


def stream_model(
    facts: dict[str, Any],
    weights: Weights,
    dtype: torch.dtype,
    device: str,
    settings: StreamSettings = StreamSettings(),
    trust_remote_code: bool = False,
    delta: str | Path | None = None,
) -> Model:
    """Make a model of which the embedding, the last norm and the head are loaded.

    Its layers lie on `meta`; `stream_of` returns what runs them. See `models.loading.load`.

    Raises:
        ValueError: transformers cannot make the model, or the tensors are not its tensors.
    """
    folder = Path(facts["path"])
    module = skeleton(facts, weights, dtype, trust_remote_code)
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    layers = Layers(module, weights, place)
    module.config.name_or_path = str(folder)
    state_of(module).stream = Stream(layers, settings)
    applied = None
    if delta is not None:
        applied = AppliedDelta.put(module, delta, folder)  # It checks; `meta` takes no values.
        layers.trained = read_delta(delta)[0]
    return Model(module, Reader(folder), folder, Pattern(facts["native_pattern"]), applied)


def check_streamed(facts: dict[str, Any], dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Check that a checkpoint has the tensors of its model, without reading their values.

    Raises:
        ValueError: see `stream_model`.
    """
    weights = open_weights(facts)
    weights.check(skeleton(facts, weights, dtype, trust_remote_code))


def stream_of(model: AnyModel) -> Stream | None:
    """Return what runs a streamed model layer by layer; None for a model that is loaded."""
    return state_of(module_of(model)).stream


def spill_to(model: AnyModel, folder: str | Path | None) -> None:
    """Let a streamed model put states that find no room in memory into a folder.

    Nothing is done for a loaded model, or without a folder.
    """
    stream = stream_of(model)
    if stream is not None and folder is not None:
        stream.folder = Path(folder)


def too_large(weights: Weights, dtype: torch.dtype, device: str) -> str | None:
    """Say that the weights do not fit a device; None where they do, or nobody knows.

    Args:
        weights: the checkpoint's tensors.
        dtype: the dtype in which they are loaded.
        device: the device that has to hold them.
    """
    needed = sum(math.prod(e.shape) for e in weights.entries.values()) * dtype.itemsize
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    return (
        f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
        f"{device} has {free / 1e9:.1f} GB free"
    )


def skeleton(
    facts: dict[str, Any], weights: Weights, dtype: torch.dtype, trust_remote_code: bool
) -> DsaModule:
    """Make the model on `meta`, in eval mode, in the dtypes that transformers loads it in."""
    try:
        config = transformers_config(facts, trust_remote_code)
        kind = checked_class(config, weights, trust_remote_code)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                module = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(before)
        plan = module._get_dtype_plan(dtype)
    except ValueError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{weights.folder}: transformers cannot make this model "
            f"({(str(error) or type(error).__name__).splitlines()[0]:.200})."
        ) from None
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept = next((kind for part, kind in plan.items() if part in name), None)
        if kept is not None:
            tensor.data = tensor.data.to(kept)
    return module.requires_grad_(False).eval()
