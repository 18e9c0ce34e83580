"""Load checkpoints, and refuse those that would give wrong results later."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from indexcache.checkpoint import fingerprint as fingerprint
from indexcache.checkpoint import read_config
from indexcache.configs import quantization_section, text_section
from indexcache.delta import check_delta
from indexcache.memory import out_of_memory
from indexcache.models.applied import AppliedDelta
from indexcache.models.blocks import WAYS
from indexcache.models.contradictions import check_config
from indexcache.models.description import describe
from indexcache.models.family import DsaModule, families
from indexcache.models.fp8 import block_of
from indexcache.models.model import Model
from indexcache.models.reader import Reader
from indexcache.models.soundness import check_weights
from indexcache.models.stream.settings import StreamSettings
from indexcache.models.weights import Weights
from indexcache.pattern import Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    delta: str | Path | None = None,
    stream: bool | StreamSettings = False,
    fp8: str = "dequantize",
) -> Model:
    """Load a DSA checkpoint with stock transformers, from safetensors only, in eval mode.

    Args:
        path: checkpoint folder, or `tiny` for the packaged model.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        device: a torch device, e.g. "cpu" or "cuda:0".
        trust_remote_code: whether to run Python code that lies in the checkpoint.
        delta: the file of a delta that `distill` trained for this checkpoint, to be put into it.
        stream: read the layers from the disk when they are needed, one at a time. `search`,
            `evaluate` and `overlap` then need memory for one layer only, and give the same numbers.
            `StreamSettings` say more than that.
        fp8: what becomes of weights in block-scaled FP8: "dequantize" to `dtype`; "keep", where
            products read them as they are stored, which takes half the memory of bf16 and gives
            the same numbers up to the order of sums; or "both", where products of many tokens
            quantise their inputs too, as DeepSeek-V3 does (`ops.block_linear`). The fast path has
            kernels for them on a GPU; elsewhere each product dequantises its weight.

    Raises:
        ValueError: `describe` refuses the checkpoint, the dtype or the device cannot be used,
            the checkpoint lacks weights that the model needs, or `fp8` cannot be done.
    """
    facts = describe(path)
    folder = Path(facts["path"])
    if dtype not in DTYPES:
        raise ValueError(f"The dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    if fp8 not in WAYS:
        raise ValueError(f"fp8 is one of {', '.join(WAYS)}, not {fp8!r}.")
    if stream and fp8 != "dequantize":
        raise ValueError(
            f"Layers that are read one at a time are dequantised, so fp8 must not be {fp8!r} then."
        )
    check_device(device)
    if delta is not None:
        check_delta(delta, folder, facts["num_hidden_layers"])
    weights = open_weights(facts)
    if stream:
        from indexcache.models.stream.loading import stream_model

        how = StreamSettings() if stream is True else stream
        return stream_model(facts, weights, DTYPES[dtype], device, how, trust_remote_code, delta)
    if fp8 == "dequantize":
        module = _module_of_weights(facts, weights, DTYPES[dtype], trust_remote_code)
    else:
        from indexcache.models.kept import load_kept
        from indexcache.models.stream.loading import skeleton

        module = skeleton(facts, weights, DTYPES[dtype], trust_remote_code)
        kept = {"quantized_inputs": fp8 == "both", "indexers": delta is None}
        load_kept(module, weights, device, **kept)
        weights.close()
        _take_generation_config(module, facts, folder)
    check_weights(module, f"{folder}: ")
    module.to(device).eval()
    applied = None if delta is None else AppliedDelta.put(module, delta, folder)
    return Model(module, Reader(folder), folder, Pattern(facts["native_pattern"]), applied)


def open_weights(facts: dict[str, Any]) -> Weights:
    """Open the weights of a checkpoint that `describe` has described, without reading them.

    Raises:
        ValueError: the config contradicts the family or is quantised in a way that is not read, or
            the tensors contradict the config (`Weights`).
    """
    folder = Path(facts["path"])
    config = read_config(folder)
    check_config(text_section(config), families()[facts["model_type"]], str(folder))
    block = block_of(facts["quantization"], quantization_section(config), f"{folder}: ")
    return Weights(folder, facts["num_hidden_layers"], block, facts["nested"])


def refusal(facts: dict[str, Any]) -> str | None:
    """Say why `load` refuses a checkpoint that `describe` has described; None if nothing is known.

    Config and headers are looked at, and no weight is read.
    """
    try:
        weights = open_weights(facts)
        checked_class(transformers_config(facts, False), weights, False)
    except Exception as error:
        if out_of_memory(error):
            raise
        return " ".join((str(error) or type(error).__name__).split())
    return None


def _module_of_weights(
    facts: dict[str, Any], weights: Weights, dtype: torch.dtype, trust_remote_code: bool
) -> DsaModule:
    """Make transformers' model of a checkpoint, and let it take the weights."""
    from transformers.utils import logging

    folder = weights.folder
    logging.disable_progress_bar()
    try:
        config = transformers_config(facts, trust_remote_code)
        kind = checked_class(config, weights, trust_remote_code)
        result: Any = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights.state(),
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        module, report = result
        _take_generation_config(module, facts, folder)
    except ValueError:
        raise
    except Exception as error:  # A config that fits no model makes transformers raise anything.
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{folder}: transformers cannot load this checkpoint "
            f"({(str(error) or type(error).__name__).splitlines()[0]:.200})."
        ) from None
    finally:
        weights.close()
    for key, what in (("missing_keys", "missing"), ("unexpected_keys", "read by nobody")):
        if names := sorted(report[key]):
            raise ValueError(
                f"{folder}: {len(names)} weights are {what}, among them {names[0]}; transformers "
                "would load another model than the checkpoint's."
            )
    return module


def _take_generation_config(module: Any, facts: dict[str, Any], folder: Path) -> None:
    """Let a model take the checkpoint's settings of generation, where there are any."""
    from transformers import GenerationConfig

    if not facts["nested"] or (folder / "generation_config.json").is_file():
        with suppress(OSError):  # The model has made one from its config already.
            module.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    module.config.name_or_path = module.name_or_path = str(folder)


def transformers_config(facts: dict[str, Any], trust_remote_code: bool) -> Any:
    """Return transformers' config: without quantisation, and full wherever there is an indexer."""
    from transformers import AutoConfig

    folder = Path(facts["path"])
    try:
        if facts["nested"]:
            section = dict(text_section(read_config(folder)))
            config = AutoConfig.for_model(**(section | {"model_type": facts["model_type"]}))
        else:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # Its validation of fields raises exceptions of its own.
        if out_of_memory(error):
            raise
        why = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(
            f"{folder}: transformers cannot read the config.json ({why:.200})."
        ) from None
    config.return_dict = True  # A caller of the module alone may want tuples; we do not.
    config.output_attentions = config.output_hidden_states = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # The weights are dequantised when they are read.
    if families()[facts["model_type"]].native_sharing:
        # A config that shares, on a checkpoint that has all indexers, is an override for an
        # engine: it does not say how the model was trained.
        missing_layers = set(facts["layers_without_indexer"])
        config.indexer_types = [
            "shared" if i in missing_layers else "full" for i in range(facts["num_hidden_layers"])
        ]
    elif facts["layers_without_indexer"]:
        layers = ", ".join(map(str, facts["layers_without_indexer"]))
        raise ValueError(
            f"{folder}: the indexers of layers {layers} are missing; an export prunes them for "
            f"engines, but transformers has no sharing for {facts['model_type']} and would fill "
            f"them with random numbers. Load the original checkpoint, with the pattern {folder}."
        )
    return config


def checked_class(config: Any, weights: Weights, trust_remote_code: bool) -> Any:
    """Return the class of the model after a comparison of its tensors with the checkpoint's.

    A class of code that lies in the checkpoint may name its tensors otherwise.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and own:
        return get_class_from_dynamic_module(own, weights.folder, local_files_only=True)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        weights.check(kind._from_config(config))
    return kind


def check_device(device: str) -> None:
    """Raise ValueError if `device` is no torch device, or is one that cannot be used here."""
    try:
        # A device such as `meta` makes tensors, but has no numbers in them.
        if torch.ones(1, device=device).tolist() != [1.0]:
            raise ValueError("it loses what is written to it")
    except Exception as error:  # Each backend raises what it likes, an ImportError too.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The device {device!r} cannot be used here ({why:.200}); use cpu or cuda."
        ) from None
