"""The worker extension: switch layers between full and shared in a running vLLM, on every rank.

vLLM adds the class to its workers by name (`worker_extension_cls`), and calls its methods on all
ranks by name (`collective_rpc`). Names begin with `indexcache_`, because they must differ from all
names of vLLM's workers. Arguments and results are plain values, which vLLM may send between
processes.
"""

from __future__ import annotations

import importlib
from typing import Any

EXTENSION = "indexcache.engines.vllm.worker.WorkerExtension"
"""The value of `worker_extension_cls`."""


class WorkerExtension:
    """Methods that are added to vLLM's worker; `model_runner` and `rank` are the worker's own."""

    model_runner: Any
    rank: int

    def indexcache_layers(self) -> dict[str, Any]:
        """Return what this rank really runs.

        Returns:
            `rank`; `first` and `end`, its decoder layers; `roles`, one of F and S for each of
            them; `without_indexer`, those that have no indexer and can never be full; `model`, the
            class of the decoder; `device` and `dtype`, where and in what it computes.
        """
        model = self.model_runner.model
        layers = decoder_layers(model)
        switches = {i: switch_of(layer) for i, layer in layers.items()}
        return {
            "rank": int(self.rank),
            "first": min(layers),
            "end": max(layers) + 1,
            "roles": "".join(
                "F" if has_indexer(layers[i]) and not switches[i].skip_topk else "S"
                for i in sorted(layers)
            ),
            "without_indexer": [i for i in sorted(layers) if not has_indexer(layers[i])],
            "model": _decoder_class(model),
            "device": _device_name(),
            "dtype": str(self.model_runner.vllm_config.model_config.dtype).removeprefix("torch."),
        }

    def indexcache_set_pattern(self, roles: str) -> dict[str, Any]:
        """Make the layers of this rank full (F) or shared (S), and return what it runs now.

        Args:
            roles: one of F and S for each decoder layer of the whole model.

        Raises:
            ValueError: a wrong length or role, a first layer of this rank that is shared, or a
                full layer without an indexer.
        """
        layers = decoder_layers(self.model_runner.model)
        total = int(_text_config(self.model_runner).num_hidden_layers)
        if len(roles) != total or set(roles) - set("FS"):
            raise ValueError(
                f"The pattern {roles!r:.90} must have one of F and S for each of {total} layers."
            )
        if roles[min(layers)] != "F":
            raise ValueError(
                f"Layer {min(layers)} is the first on rank {self.rank} and must be full: "
                "selections do not cross from one pipeline stage to the next."
            )
        for i, layer in layers.items():
            if roles[i] == "F" and not has_indexer(layer):
                raise ValueError(
                    f"Layer {i} has no indexer on rank {self.rank}, so it cannot be F."
                )
        for i, layer in layers.items():
            switch_of(layer).skip_topk = roles[i] == "S"
        return self.indexcache_layers()

    def indexcache_sort_ids(self, on: bool = True) -> bool:
        """Sort each query's selected ids, or stop sorting them; return whether it could be done.

        The kernel of vLLM leaves the order of a prefill's ids, and which of several equal scores
        get the last places, to chance. Sorted and settled, an evaluation repeats.
        """
        try:
            operations: Any = importlib.import_module("vllm._custom_ops")
        except ImportError:
            return False
        kernel = getattr(operations, "top_k_per_row_prefill", None)
        if kernel is None:
            return False
        stock = getattr(kernel, "__wrapped__", kernel)
        if on:
            from indexcache.engines.vllm.ids import repeatable_topk

            stock = repeatable_topk(stock)
        operations.top_k_per_row_prefill = stock
        return True


def decoder_layers(model: Any) -> dict[int, Any]:
    """Return the decoder layers that lie on this rank, by their number in the whole model.

    Raises:
        ValueError: the model has no layers with an indexer.
    """
    for decoder in _decoders(model):
        layers = {
            i: layer
            for i, layer in enumerate(decoder.layers)
            if hasattr(getattr(layer, "self_attn", None), "indexer")
        }
        if layers:
            return layers
    raise ValueError(
        f"{type(model).__name__}: no layers with a lightning indexer were found in this model, so "
        "there is nothing to share."
    )


def _decoders(model: Any) -> list[Any]:
    """List the modules that may hold the decoder layers: the model itself and what it wraps."""
    found, queue = [], [model]
    while queue:
        module = queue.pop(0)
        if hasattr(module, "layers"):
            found.append(module)
        queue += [
            child
            for name in ("model", "language_model", "text_model")
            if (child := getattr(module, name, None)) is not None
        ]
    return found


def _decoder_class(model: Any) -> str:
    decoder = type(_decoders(model)[0])
    return f"{decoder.__module__}.{decoder.__qualname__}"


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _text_config(runner: Any) -> Any:
    model = runner.vllm_config.model_config
    return getattr(model, "hf_text_config", None) or model.hf_config


def has_indexer(layer: Any) -> bool:
    """Say whether a decoder layer of vLLM has an indexer."""
    return layer.self_attn.indexer is not None


def switch_of(layer: Any) -> Any:
    """Return the module whose `skip_topk` vLLM reads in every forward pass of a layer.

    It is the attention module since vLLM 0.29, and a module within it before that and in the older
    class.

    Raises:
        ValueError: this version has no such switch.
    """
    attention = layer.self_attn
    for module in (attention, getattr(attention, "mla_attn", None)):
        if module is not None and hasattr(module, "skip_topk"):
            return module
    raise ValueError(
        f"{type(attention).__name__}: this version of vLLM has no skip_topk in its attention, so "
        "layers cannot be switched at run time."
    )
