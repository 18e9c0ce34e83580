"""The plugin that vLLM loads in every process: load a shared pattern, and check it first.

vLLM calls `register` through the entry point group `vllm.general_plugins`. Nothing of vLLM is
imported then: a class is changed when vLLM imports it, so other models cost nothing. Two things
change for models with a lightning indexer, and one can be chosen:

- Indexer weights of layers that run no indexer are left out while loading. The default class of
  vLLM 0.29 to 0.33 stops with a KeyError there, so a checkpoint as published could not be served
  under a pattern.
- A config that asks for sharing is checked before weights are read (`sharing.check_sharing`). A
  pattern that vLLM would run differently stops the server with one sentence.
- `--attention-backend CUSTOM` is this package's sparse attention (`attention`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from indexcache.configs import model_type_of, text_section
from indexcache.engines.vllm.sharing import check_other, check_sharing, other_family, summary

TESTED = ((0, 25), (0, 33))
"""The first and the last minor version of vLLM whose code these changes were read and tested in."""

DECODERS = {
    "vllm.model_executor.models.deepseek_v2": ("DeepseekV2Model", "DeepseekV2ForCausalLM"),
    "vllm.models.deepseek_v32.nvidia.model": ("DeepseekV32Model",),
    "vllm.models.deepseek_v32.amd.model": ("DeepseekV32Model",),
}
"""The modules of vLLM's classes that build layers with an indexer, and those classes."""

INDEXER = ".indexer."
BACKENDS = "vllm.v1.attention.backends.registry"
ATTENTION = "indexcache.engines.vllm.attention.IndexCacheBackend"

log = logging.getLogger("vllm.indexcache")  # vLLM prints what is logged below its own name.


def register() -> None:
    """Arrange that vLLM's classes are changed when they are imported; calling it twice is safe."""
    changes: dict[str, Callable[[Any], None]] = {
        name: functools.partial(_change_decoder, classes=classes)
        for name, classes in DECODERS.items()
    }
    changes["vllm.config.vllm"] = _change_config
    changes[BACKENDS] = _register_attention
    for name, change in changes.items():
        if name in sys.modules:
            change(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(changes))


class _AfterImport(importlib.abc.MetaPathFinder):
    """A finder that finds nothing itself, but changes certain modules after they were executed."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]):
        self.changes = changes
        self._searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        change = self.changes.get(fullname)
        if change is None or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            change(module)

        # The instance's attribute hides the method; the loader stays the one vLLM expects.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _change_decoder(module: Any, classes: tuple[str, ...]) -> None:
    for name in classes:
        cls = getattr(module, name, None)
        if cls is None or "_indexcache" in vars(cls):
            continue
        cls._indexcache = True
        if "load_weights" in vars(cls):
            cls.load_weights = without_surplus(cls.load_weights)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)


def _change_config(module: Any) -> None:
    """Check as soon as vLLM's whole config exists, in the process that the user started."""
    cls = getattr(module, "VllmConfig", None)
    method = "try_verify_and_update_config"
    if cls is None or not hasattr(cls, method) or "_indexcache" in vars(cls):
        return  # The decoder's check remains.
    cls._indexcache = True
    before = getattr(cls, method)

    @functools.wraps(before)
    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, *args, **kwargs)
        model = getattr(self, "model_config", None)
        if model is not None and not getattr(model, "_indexcache_checked", False):
            object.__setattr__(model, "_indexcache_checked", True)
            pattern = check_vllm(self)
            if pattern is not None:
                if warning := untested(installed_version()):
                    log.warning("%s", warning)
                log.info("%s", summary(pattern))
                _export_metrics(pattern, str(getattr(model, "served_model_name", "")))
        return result

    setattr(cls, method, verify)


def _register_attention(module: Any) -> None:
    """Give the backend that vLLM keeps free for plugins, CUSTOM, to this package's attention.

    It is a fixed member of vLLM's enumeration, which its processes can send each other; a name of
    one's own cannot be read by a process that has not loaded the plugin yet.
    """
    custom = getattr(getattr(module, "AttentionBackendEnum", None), "CUSTOM", None)
    if custom is None or not hasattr(module, "register_backend"):
        return
    if not custom.is_overridden():
        module.register_backend(custom, ATTENTION)
    elif custom.get_path() != ATTENTION:
        log.warning(
            "The attention backend CUSTOM is %s already, so that of indexcache cannot be chosen.",
            custom.get_path(),
        )


def installed_version() -> str:
    """Return the version of the vLLM that is here; "unknown" where nothing says it."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:  # A copy on the path, without its metadata.
        return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


def untested(version: str) -> str | None:
    """Return a warning for a version of vLLM outside the tested range; None within it."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if TESTED[0] <= numbers <= TESTED[1]:
        return None
    first, last = (".".join(map(str, v)) for v in TESTED)
    return (
        f"indexcache was tested with vLLM {first} to {last}, not with {version}. Its checks run "
        "all the same; compare the losses of a pattern with the full model's before you serve it."
    )


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the `__init__` of a decoder so that its config is checked before layers are built."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("vllm_config", args[0] if args else None)
        if config is not None:
            check_vllm(config)
        init(self, *args, **kwargs)

    return __init__


def without_surplus(load_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_weights` so that indexer tensors of layers without an indexer are left out.

    Layers without one are those whose module has no such parameter: shared layers, and layers of
    other pipeline stages.
    """

    @functools.wraps(load_weights)
    def load(self: Any, weights: Iterable[tuple[str, Any]], *args: Any, **kwargs: Any) -> Any:
        built = {
            name.rsplit(INDEXER, 1)[0] for name, _ in self.named_parameters() if INDEXER in name
        }

        def needed() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                if INDEXER not in name or name.rsplit(INDEXER, 1)[0] in built:
                    yield name, tensor

        return load_weights(self, needed() if built else weights, *args, **kwargs)

    return load


def check_vllm(vllm_config: Any) -> Any:
    """Check vLLM's config, and return the pattern that it will run; None without sharing.

    The draft model of multi-token prediction has no pattern, and models that vLLM shares by other
    keys, or never, are only checked for keys that it ignores.

    Raises:
        ValueError: see `sharing.check_sharing` and `sharing.check_other`.
    """
    model = vllm_config.model_config
    config = _merged_config(model)
    if config is None or str(model_type_of(config)).endswith("_mtp"):
        return None
    family = other_family(config)
    if family is not None:
        check_other(config, family, str(model.model))
        return None
    stages = _stages(vllm_config.parallel_config, _layers(config))
    return check_sharing(
        config,
        stages=stages,
        without_indexer=_without_indexer(model.model),
        served=str(model.model),
    )


def _merged_config(model: Any) -> dict[str, Any] | None:
    """Return the config with its overrides as plain keys; None for a model without an indexer."""
    whole = model.hf_config
    text = getattr(model, "hf_text_config", whole)
    if getattr(text, "index_topk", None) is None:
        return None
    config = _keys_of(whole)
    # transformers computes indexer_types by itself for configs that do not give any.
    given = _given_keys(model)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and given is not None and "indexer_types" not in given:
            section.pop("indexer_types", None)
    if text is not whole and "num_hidden_layers" not in config.get("text_config", {}):
        config["text_config"] = _keys_of(text)
    return config


def _keys_of(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def _given_keys(model: Any) -> set[str] | None:
    """List the keys that config.json and the overrides hold; None where that cannot be known."""
    path = Path(str(model.model)) / "config.json"
    overrides = getattr(model, "hf_overrides", None)
    if not path.is_file() or callable(overrides):
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    levels = [raw, raw.get("text_config"), overrides, (overrides or {}).get("text_config")]
    return {key for level in levels if isinstance(level, dict) for key in level}


def _layers(config: dict[str, Any]) -> int:
    return int(text_section(config)["num_hidden_layers"])


def _stages(parallel: Any, layers: int) -> tuple[int, ...]:
    """Return the first layer of every pipeline stage, by vLLM's own division of the layers."""
    size = int(getattr(parallel, "pipeline_parallel_size", 1))
    if size == 1:
        return (0,)
    indices = importlib.import_module("vllm.distributed.utils").get_pp_indices
    return tuple(indices(layers, rank, size)[0] for rank in range(size))


def _without_indexer(model: str) -> tuple[int, ...]:
    """List the layers of a local checkpoint without indexer weights; none for other models."""
    from indexcache.checkpoint import layers_without_indexer

    folder = Path(model)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return ()
    return layers_without_indexer(folder)


def _export_metrics(pattern: Any, model: str) -> None:
    """Set two gauges that vLLM's own /metrics shows; without prometheus_client nothing happens."""
    try:
        gauge = importlib.import_module("prometheus_client").Gauge
    except ImportError:
        return
    full = len(pattern.full_layers)
    for name, text, value in (
        ("indexcache_layers_full", "Decoder layers that run their indexer.", full),
        ("indexcache_layers_shared", "Decoder layers that skip it.", len(pattern) - full),
    ):
        try:
            gauge(name, text, ["model_name"], multiprocess_mode="max").labels(model).set(value)
        except ValueError:  # It is there already: a second engine in one process.
            return
