"""Read what every verb must know of a config.json: nesting, quantisation, next-token layers.

It is the one reader of these facts; nothing is imported here, and no file is opened. The pattern
that a config asks for is read by `Pattern.from_config`, sizes by `shapes.Shape.of`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
MTP_KEY = "num_nextn_predict_layers"

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
"""The model types whose indexers are known here; a test compares them with the families."""

NEVER_QUANTISED = ("embed_tokens", "mlp.gate", "indexer.weights_proj")
"""Ends of the names of the matrices that no released checkpoint quantises, whatever the config."""

_NESTS = re.compile(r"\b(?:language_model|text_model)\.")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the weights of a checkpoint are stored, by its config.

    Attributes:
        method: `quant_method` of the config, e.g. "fp8", "awq", "compressed-tensors".
        bits: bits of a weight in the quantised matrices; None if the config does not say.
        block: rows and columns that have one scale: (128, 128), (1, 64) for groups of 64 inputs;
            None for one scale a tensor or a row, or if the config does not say.
        scale_bits: bits of a scale.
        floating: whether the weights are floating-point numbers (fp8, fp4) and not integers.
        activations: bits of the activations that enter the products; None where they stay as they
            are, so that products run in 16 bits.
        excluded: names or wildcards of the modules that stay as they are, as in the config.
        head: whether the language model head is quantised too.
    """

    method: str
    bits: float | None
    block: tuple[int, int] | None = None
    scale_bits: int = 16
    floating: bool = False
    activations: int | None = None
    excluded: tuple[str, ...] = ()
    head: bool = False

    def covers(self, module: str) -> bool:
        """Say whether the matrix of a module, e.g. `model.layers.3.mlp.gate`, is quantised."""
        name = plain_name(module)
        if name.endswith(NEVER_QUANTISED) or (name.endswith("lm_head") and not self.head):
            return False
        return not any(_matches(pattern, name) for pattern in self.excluded)

    def bytes_of(self, rows: int, columns: int) -> float:
        """Return the bytes of a quantised matrix with its scales, partial blocks included.

        Raises:
            ValueError: the config does not say how many bits a weight has.
        """
        if self.bits is None:
            raise ValueError(
                f"The config's quantization_config ({self.method}) does not say how many bits a "
                "weight has."
            )
        down, across = self.block or (1, columns)
        scales = -(-rows // down) * -(-columns // across)
        return (rows * columns * self.bits + scales * self.scale_bits) / 8

    def __str__(self) -> str:
        bits = "an unknown number of" if self.bits is None else f"{self.bits:g}"
        block = "" if self.block is None else f", a scale for {self.block[0]} x {self.block[1]}"
        kept = f", {len(self.excluded)} names excluded" if self.excluded else ""
        return f"{self.method}, {bits} bits a weight{block}{kept}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        value = asdict(self)
        return value | {
            "block": None if self.block is None else list(self.block),
            "excluded": list(self.excluded),
        }


def text_section(config: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a config that describes the decoder: `text_config`, or all of it.

    It is the same object, not a copy.
    """
    text = config.get("text_config")
    return text if isinstance(text, dict) and "num_hidden_layers" in text else config


def is_nested(config: dict[str, Any]) -> bool:
    """Say whether the decoder is described in a section of the config, as in multimodal models."""
    return text_section(config) is not config


def model_type_of(config: dict[str, Any]) -> Any:
    """Return the model type of the decoder, which that of a nested config's section is."""
    section = text_section(config)
    return section.get("model_type") or config.get("model_type")


def mtp_layers(config: dict[str, Any]) -> int:
    """Return the number of multi-token-prediction layers that follow the decoder's layers.

    Raises:
        ValueError: the key holds no whole number of at least 0.
    """
    value = text_section(config).get(MTP_KEY, config.get(MTP_KEY))
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"The config's {MTP_KEY} is {value!r:.40}; it must be a whole number of at least 0."
        )
    return int(value)


def plain_name(name: str) -> str:
    """Return the name of a tensor or module without the prefixes of a nested model."""
    return _NESTS.sub("", name)


def quantization_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation's section of a config, at its top or nested; None without one."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            value = level.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(
                    f"The config's {key} is {value!r:.40}; it must be an object with quant_method."
                )
            if value:
                return dict(value)
    return None


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Read how the weights of a checkpoint are quantised; None where they are not.

    Raises:
        ValueError: the section is there, but is not what the format defines.
    """
    section = quantization_section(config)
    if section is None:
        return None
    nested = section.get("quantization")  # hf_quant_config.json of modelopt
    if isinstance(nested, Mapping):
        section = {"quant_method": "modelopt", **nested}
    method = section.get("quant_method") or _method_by_keys(section)
    if not isinstance(method, str):
        raise ValueError(
            f"The config's quantization_config names no quant_method, but {method!r:.40}."
        )
    facts = _READERS.get(method, _of_other)(section)
    return Quantization(method=method, excluded=_excluded(section), **facts)


def _method_by_keys(section: Mapping[str, Any]) -> Any:
    if "config_groups" in section:
        return "compressed-tensors"
    if "quant_algo" in section:
        return "modelopt"
    if "load_in_4bit" in section or "load_in_8bit" in section:
        return "bitsandbytes"
    return None


def _excluded(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the modules that stay as they are, under the keys that the formats have for them."""
    names: list[str] = []
    for key in (
        "modules_to_not_convert",
        "ignored_layers",
        "ignore",
        "exclude_modules",
        "exclude",
        "llm_int8_skip_modules",
    ):
        value = section.get(key)
        if value is None:
            continue
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ValueError(
                f"quantization_config: {key} is {value!r:.40}; it must be a list of module names."
            )
        names += value
    extra = section.get("extra_config")  # auto-round
    for name, changes in extra.items() if isinstance(extra, Mapping) else ():
        bits = changes.get("bits") if isinstance(changes, Mapping) else None
        if (_number(bits, "bits") or 0) >= 16:
            names.append(str(name))
    return tuple(dict.fromkeys(names))


def _matches(pattern: str, name: str) -> bool:
    """Say whether a module of this plain name is meant by an excluded name of a config.

    A pattern is a regular expression after "re:", has wildcards, or is a part of the dotted name.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(_NESTS.sub("", pattern[3:].replace("\\.", ".")), name) is not None
        except re.error:
            return False
    pattern = plain_name(pattern).removesuffix(".weight")
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return f".{pattern.strip('.')}." in f".{name}."


def _number(value: Any, key: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"quantization_config: {key} is {value!r:.40}; it must be a whole number.")
    return value


def _groups(size: Any, key: str = "group_size") -> tuple[int, int] | None:
    """Return the block of weights in groups of `size` inputs; 0 and -1 mean whole rows."""
    size = _number(size, key)
    return None if size is None or size < 1 else (1, size)


def _of_fp8(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read the format of DeepSeek and Z.ai: e4m3, an fp32 scale for each block."""
    block = section.get("weight_block_size")
    if block is not None and not (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
    ):
        raise ValueError(
            f"quantization_config: weight_block_size is {block!r:.40}; it must be two whole "
            "numbers, e.g. [128, 128]."
        )
    return {
        "bits": 8,
        "block": None if block is None else (block[0], block[1]),
        "scale_bits": 32,
        "floating": True,
        "activations": 8,
    }


def _of_bits(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read AWQ, GPTQ and auto-round: integers in groups, 16-bit scales and packed zero points."""
    bits = section.get("bits", section.get("w_bit"))
    bits = _number(bits, "bits")
    return {
        "bits": bits,
        "block": _groups(section.get("group_size", section.get("q_group_size"))),
        "scale_bits": 16 + (bits or 0),
        "head": section.get("lm_head") is True,
    }


def _of_groups(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read compressed-tensors, whose config_groups give each kind of weights its arguments."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return {"bits": None}
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        inputs = group.get("input_activations") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        bits = _number(weights.get("num_bits"), "num_bits")
        block = weights.get("block_structure")
        if isinstance(block, (list, tuple)) and len(block) == 2:
            down, across = (_number(n, "block_structure") or 1 for n in block)
            size: tuple[int, int] | None = (down, across)
        else:
            size = _groups(weights.get("group_size"))
        active = inputs.get("num_bits") if isinstance(inputs, Mapping) else None
        found.append(
            {
                "bits": bits,
                "block": size,
                "scale_bits": 8 if bits == 4 and weights.get("type") == "float" else 16,
                "floating": weights.get("type") == "float",
                "activations": _number(active, "num_bits"),
            }
        )
    if not found or any(f["bits"] != found[0]["bits"] for f in found):
        return {"bits": None}  # Two kinds of weights: how many there are of each is not said here.
    return found[0]


def _of_modelopt(section: Mapping[str, Any]) -> dict[str, Any]:
    algorithm = str(section.get("quant_algo") or "").upper()
    if not algorithm and section.get("config_groups"):
        return _of_groups(section)
    if "NVFP4" in algorithm:
        size = _groups(section.get("group_size")) or (1, 16)
        return {"bits": 4, "block": size, "scale_bits": 8, "floating": True, "activations": 4}
    if "MXFP8" in algorithm:
        return {"bits": 8, "block": (1, 32), "scale_bits": 8, "floating": True, "activations": 8}
    if "FP8" in algorithm and "W4" not in algorithm:
        block = (128, 128) if "PB" in algorithm or "BLOCK" in algorithm else None
        facts = {"bits": 8, "block": block, "scale_bits": 32, "floating": True}
        return facts | {"activations": None if "WO" in algorithm else 8}
    if match := re.match(r"W(\d+)A(\d+)", algorithm):
        active = int(match[2])
        return {
            "bits": int(match[1]),
            "block": _groups(section.get("group_size")),
            "activations": active if active < 16 else None,
        }
    return {"bits": None}


def _of_quark(section: Mapping[str, Any]) -> dict[str, Any]:
    overall = section.get("global_quant_config")
    weight = overall.get("weight") if isinstance(overall, Mapping) else None
    if isinstance(weight, (list, tuple)) and weight:
        weight = weight[0]
    if not isinstance(weight, Mapping):
        return {"bits": None}
    kind = str(weight.get("dtype") or "")
    bits = re.search(r"(?:int|fp|mxfp)(\d+)", kind)
    inputs = overall.get("input_tensors") if isinstance(overall, Mapping) else None
    return {
        "bits": int(bits[1]) if bits else None,
        "block": _groups(weight.get("group_size")),
        "scale_bits": 8 if weight.get("scale_format") == "e8m0" else 16,
        "floating": "fp" in kind,
        "activations": 8 if inputs and bits and int(bits[1]) == 8 else None,
    }


def _of_bitsandbytes(section: Mapping[str, Any]) -> dict[str, Any]:
    if section.get("load_in_4bit") or section.get("_load_in_4bit"):
        return {"bits": 4, "block": (1, 64), "scale_bits": 32}
    if section.get("load_in_8bit") or section.get("_load_in_8bit"):
        return {"bits": 8, "scale_bits": 32}
    return {"bits": None}


def _of_other(section: Mapping[str, Any]) -> dict[str, Any]:
    """Look for a number of bits in the keys that other formats have; None if there is none."""
    for key in ("bits", "nbits", "num_bits", "w_bit", "weight_bits"):
        if isinstance(section.get(key), int):
            return {"bits": section[key], "block": _groups(section.get("group_size"))}
    inner = section.get("quant_config")
    inner = inner.get("weight_quant_params", inner) if isinstance(inner, Mapping) else None
    if isinstance(inner, Mapping) and isinstance(inner.get("nbits"), int):
        return {"bits": inner["nbits"], "block": _groups(inner.get("group_size"))}
    for key in ("weights", "quant_type"):
        if isinstance(section.get(key), str) and (
            match := re.search(r"(float|int|fp|nf)(\d+)", section[key])
        ):
            return {"bits": int(match[2]), "floating": match[1] != "int"}
    return {"bits": None}


_READERS = {
    "fp8": _of_fp8,
    "fbgemm_fp8": _of_fp8,
    "mxfp4": lambda section: {"bits": 4, "block": (1, 32), "scale_bits": 8, "floating": True},
    "awq": _of_bits,
    "gptq": _of_bits,
    "auto-round": _of_bits,
    "intel/auto-round": _of_bits,
    "compressed-tensors": _of_groups,
    "modelopt": _of_modelopt,
    "modelopt_fp4": _of_modelopt,
    "quark": _of_quark,
    "bitsandbytes": _of_bitsandbytes,
}
