"""Load checkpoints, and refuse those that would give wrong results later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from indexcache.checkpoint import (
    config_facts,
    layers_without_indexer,
    read_config,
    resolve,
    resolve_config,
    tensor_names,
)
from indexcache.checkpoint import fingerprint as fingerprint
from indexcache.configs import model_type_of, quantization_section, text_section
from indexcache.data import Batch
from indexcache.delta import check_delta
from indexcache.memory import out_of_memory
from indexcache.models.applied import AppliedDelta
from indexcache.models.blocks import WAYS
from indexcache.models.contradictions import check_config
from indexcache.models.family import (
    AnyModel,
    DsaModule,
    decoder_layers,
    families,
    family_named,
    module_of,
)
from indexcache.models.fp8 import block_of
from indexcache.models.patch import state_of
from indexcache.models.reader import Reader
from indexcache.models.soundness import check_weights
from indexcache.models.stream.settings import StreamSettings
from indexcache.models.weights import Weights
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model with its tokenizer; every function of the package that needs a model takes it.

    The module runs every indexer that has weights, whatever pattern the config asks for.

    Attributes:
        module: the transformers model, in eval mode.
        reader: what reads text and chats with the tokenizer, which is loaded at the first text:
            token ids need none.
        path: the checkpoint folder.
        native: the pattern that the checkpoint's config asks for.
        delta: the trained indexers that were put into the module; None for the checkpoint's own.
    """

    module: DsaModule = field(repr=False)
    reader: Reader = field(repr=False)
    path: Path
    native: Pattern
    delta: AppliedDelta | None = field(default=None, repr=False)

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer of the checkpoint.

        Raises:
            ValueError: none can be read.
        """
        return self.reader.tokenizer

    @property
    def config(self) -> Any:
        """Transformers' config of the module."""
        return self.module.config

    @property
    def topk(self) -> int:
        """The number of tokens that a query selects, k."""
        return int(self.config.index_topk)

    @property
    def layers(self) -> int:
        """The number of decoder layers, which is the length of a pattern."""
        return len(decoder_layers(self.module))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        return self.reader.encode(text)

    def batches(
        self,
        source: str | Path = "heldout",
        *,
        split: str | None = None,
        length: int | None = None,
        sequences: int | None = None,
        batch: int = 1,
        seed: int = 0,
        patterns: Iterable[Pattern | str] = (),
    ) -> list[Batch]:
        """Cut text into batches of token sequences for this model.

        Args:
            source: "heldout" or "calibration" for the text that the package ships, or a file or
                a folder (see `indexcache.data`).
            split: the documents to take: "calibration", "heldout" or "all", which is the default.
            length: tokens of a sequence. The default is 4 k, or 4 pools if one of the patterns has
                R layers, at least 1024, and at most the model's context.
            sequences: number of sequences in all batches together; the default is one
                of each document, 36 of a domain at most, the least for a verdict.
            batch: max number of sequences in a batch.
            seed: random seed for the order in which documents are taken.
            patterns: what is to be measured on the batches.

        Raises:
            ValueError: the source cannot be read or has too little text, or the sequences are
                longer than the context, or too short for k or for the pool of a pattern.
        """
        return self.reader.batches(
            source,
            self.config,
            split=split,
            length=length,
            sequences=sequences,
            batch=batch,
            seed=seed,
            patterns=patterns,
        )

    def retrieval(
        self,
        kinds: Sequence[str] = ("all",),
        source: str | Path | None = None,
        *,
        split: str | None = None,
        length: int | None = None,
        sequences: int = 6,
        batch: int = 1,
        seed: int = 0,
    ) -> list[Batch]:
        """Make retrieval sequences in this model's tokenizer (see `indexcache.data.retrieval`).

        They go beside the batches of a text, into a search or an evaluation.

        Args:
            kinds: passkey, needles, key-value, variables, common-words, frequent-words, graph,
                repeat, or all of them.
            source: the text between facts, as in `batches`; None takes sentences without meaning.
            split, length, batch, seed: as in `batches`; the sequences of each split are others.
            sequences: number of sequences of each kind.

        Raises:
            ValueError: see `retrieval_batches`, or the source cannot be read.
        """
        return self.reader.retrieval(
            kinds,
            self.config,
            source=source,
            split=split,
            length=length,
            sequences=sequences,
            batch=batch,
            seed=seed,
        )

    def generate(
        self, prompt: str, *, max_new_tokens: int = 50, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Continue `prompt` under the pattern in force, and return the new text.

        An accelerated model decodes from a `FastCache`; any other runs transformers' `generate`.

        Args:
            prompt: text that is encoded without special tokens.
            max_new_tokens: max number of tokens to generate; an end token stops earlier.
            temperature: 0 takes the best token; otherwise a token is drawn from
                softmax(logits / temperature).
            seed: random seed for sampling; the global random state is neither read nor changed.

        Raises:
            ValueError: the prompt is empty, `max_new_tokens` is below 1, the temperature is
                negative, or the model's context is too short for both.
        """
        from indexcache.models.fast.generate import new_tokens

        tokens = new_tokens(
            self.module,
            self.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return self.tokenizer.decode(list(tokens))


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_lora_rank",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "max_position_embeddings",
    "vocab_size",
)


def describe(model: str | Path) -> dict[str, Any]:
    """Describe a checkpoint from its config and its file headers alone.

    The facts of `describe_config` are among the result's, and no verb reads a config otherwise.

    Raises:
        ValueError: it is no folder, its config or its safetensors cannot be read, its family is
            unknown, or the config makes a layer full that has no indexer weights.
    """
    path = resolve(model)
    facts = describe_config(path)
    native = Pattern(facts["native_pattern"])
    names = tensor_names(path)
    missing = layers_without_indexer(path)
    if len(missing) == len(native):
        raise ValueError(
            f"{path}: the checkpoint has no indexer weights in any layer, so it is a dense model: "
            "there is no selection to share, and indexers cannot be trained from nothing here."
        )
    contradicted = [i for i in missing if native[i] != "S"]
    if contradicted:
        raise ValueError(
            f"{path}: the config makes layer {contradicted[0]} full, but the checkpoint has no "
            "indexer weights for it; transformers would fill them with random numbers."
        )
    return facts | {
        "tensors": len(names),
        "files": len(set(names.values())),
        "layers_without_indexer": list(missing),
    }


def describe_config(model: str | Path) -> dict[str, Any]:
    """Describe a model from its config alone: of a folder, or a config.json by itself.

    Returns:
        The facts of `describe`, as if there were no tensors. "quantization" (`Quantization` or
        None), "mtp_layers" and "nested" are those of `checkpoint.config_facts`; "native_pattern" is
        what the config asks for.

    Raises:
        ValueError: the config cannot be read, its family is unknown, a size is missing, or its
            pattern is none.
    """
    path = resolve_config(model)
    config = read_config(path)
    family = family_named(model_type_of(config), f"{path}: ")
    section = text_section(config)
    file = path if path.is_file() else path / "config.json"
    for key in SIZES:
        if type(section.get(key)) is not int or section[key] < 1:
            raise ValueError(
                f"{file}: {key} is {section.get(key)!r:.40}; a DSA model needs a whole number of "
                "at least 1 there."
            )
    try:
        native = Pattern.from_config(section)
    except ValueError as error:
        given = ", ".join(key for key in SHARING_KEYS if section.get(key) is not None)
        raise ValueError(
            f"{file}: the config has no valid pattern ({given}): {error} Correct it, or export "
            "another pattern over it."
        ) from None
    facts = config_facts(path, config)
    return {
        "path": str(path),
        "model_type": family.model_type,
        **{k: section[k] for k in SIZES},
        "tensors": 0,
        "files": 0,
        "native_pattern": str(native),
        "layers_without_indexer": [],
        "native_sharing": family.native_sharing,
        "next_token_layers": facts["mtp_layers"],
        **facts,
    }


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


def weights_digest(model: AnyModel) -> str:
    """Return a digest, 64 hex digits, of a loaded model.

    It covers k, the names, shapes and dtypes of all weights, and 64 elements spread over each.
    """
    module = module_of(model)
    stream = state_of(module).stream
    h = hashlib.sha256(str(getattr(module.config, "index_topk", None)).encode())
    for name, p in module.state_dict().items():
        flat = p.detach().reshape(-1)
        picks = torch.linspace(
            0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64
        ).long()
        if stream is not None and p.is_meta:
            sample = stream.layers.elements(name, picks).float().numpy()
        else:
            sample = flat[picks.to(flat.device)].float().cpu().numpy()
        h.update(f"{name}|{tuple(p.shape)}|{p.dtype}".encode() + sample.tobytes())
    return h.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the last bit of a result."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
