"""Look at every tensor of a checkpoint before it is loaded, and read them one at a time.

`Weights` knows the headers of all files. It refuses tensors that nobody would read, types that
cannot be read without more knowledge, and shapes that contradict the config; then it gives each
tensor as the model computes with it, dequantised if it is stored in FP8. transformers takes the
tensors from `Weights.state()` and fuses experts by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from indexcache.checkpoint import TensorEntry, read_headers
from indexcache.configs import plain_name
from indexcache.models.fp8 import (
    SCALE_DTYPES,
    SCALE_SUFFIX,
    WEIGHT_DTYPE,
    Block,
    dequantize,
    scale_shape,
)

PLAIN_DTYPES = ("F32", "BF16", "F16", "F64")
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}

# Names begin with `model.` in a language model, and without it in a bare decoder.
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.*)")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_MTP_MARKS = ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens")

# What a name that nobody reads says about its origin.
_ORIGINS = (
    (".weight_scale_inv", "a scale of block-scaled FP8"),
    ("_scale_inv", "a scale of block-scaled FP8"),
    (".qweight", "packed integers of AWQ or GPTQ"),
    (".qzeros", "zero points of AWQ or GPTQ"),
    (".g_idx", "the order of GPTQ"),
    (".scales", "scales of AWQ or GPTQ"),
    (".weight_packed", "packed integers of compressed-tensors"),
    (".weight_scale_2", "a scale of NVFP4"),
    (".weight_scale", "a scale of FP8 or INT8"),
    (".input_scale", "a scale of static FP8 activations"),
    (".SCB", "scales of bitsandbytes"),
    (".absmax", "scales of bitsandbytes"),
    ("_blocks", "packed numbers of MXFP4"),
    ("_scales", "scales of MXFP4"),
    (".k_scale", "a scale of an FP8 cache"),
    (".v_scale", "a scale of an FP8 cache"),
    (".lora_A.weight", "an adapter, which must be merged first"),
    (".lora_B.weight", "an adapter, which must be merged first"),
)


class Weights:
    """The tensors of a checkpoint that its decoder reads.

    Tensors of multi-token-prediction layers, behind the decoder's layers, are passed over: `mtp`
    lists them for those who carry them along, and `read` reads them.

    Args:
        folder: the checkpoint folder.
        layers: number of decoder layers.
        block: rows and columns of a block of FP8 weights; None without quantisation.
        nested: whether it is a multimodal model, whose decoder lies under `language_model`; the
            tensors of its other parts are passed over.

    Raises:
        ValueError: the files are damaged (`checkpoint.read_headers`), or a tensor has a type that
            is not read, lacks its scales, or is a scale without a weight.
    """

    def __init__(self, folder: Path, layers: int, block: Block | None = None, nested: bool = False):
        self.folder = folder
        self.layers = layers
        self.block = block
        entries: dict[str, TensorEntry] = {}
        self._shards: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        for shard, header in read_headers(folder).items():
            for name in header.tensors:
                if name in entries:
                    raise ValueError(
                        f"{folder}: the tensor {name} lies in two files, {self._shards[name]} and "
                        f"{shard}, so it is unclear which counts; remove the stale file."
                    )
            entries |= header.tensors
            self._shards |= dict.fromkeys(header.tensors, shard)
            self._starts[shard] = header.data_start
        self.passed_over = frozenset(
            n for n in entries if self._is_mtp(n) or (nested and not _is_text(n))
        )
        self._check_layers(entries)
        read = {n: e for n, e in entries.items() if n not in self.passed_over}
        self.scales = {} if block is None else self._scales(read)
        behind = {n: entries[n] for n in entries if self._is_mtp(n)}
        found = {n: n + SCALE_SUFFIX for n in behind if n + SCALE_SUFFIX in behind}
        self._mtp_scales = {} if block is None else found
        self.mtp = tuple(n for n in behind if n not in self._mtp_scales.values())
        scales = set(self.scales.values())
        self.entries = {n: e for n, e in read.items() if n not in scales}
        self.scale_entries = {n: read[n] for n in scales}
        self._check_types()
        self._files: dict[str, Any] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.entries)

    def _is_mtp(self, name: str) -> bool:
        match = _LAYER.match(plain_name(name))
        if match is None:
            return name.startswith(("mtp.", "model.mtp."))
        return int(match[1]) >= self.layers

    def _check_layers(self, entries: Iterable[str]) -> None:
        """Refuse decoder layers behind the last one: the config would cut the model short."""
        behind: dict[int, list[str]] = {}
        for name in entries:
            match = _LAYER.match(plain_name(name))
            if match is not None and int(match[1]) >= self.layers:
                behind.setdefault(int(match[1]), []).append(match[2])
        for layer, parts in sorted(behind.items()):
            if not any(part.startswith(_MTP_MARKS) for part in parts):
                raise ValueError(
                    f"{self.folder}: the config has {self.layers} layers, but the checkpoint holds "
                    f"layer {layer} too (model.layers.{layer}.{parts[0]}), which is no "
                    "multi-token-prediction layer; nobody would read it. Correct "
                    "num_hidden_layers."
                )

    def _scales(self, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
        """Map every FP8 weight to its scales, and check both."""
        assert self.block is not None
        scales = {}
        for name, entry in entries.items():
            if entry.dtype != WEIGHT_DTYPE:
                continue
            scale = name + SCALE_SUFFIX
            if scale not in entries:
                raise ValueError(
                    f"{self.folder}: the FP8 tensor {name} has no scales: {scale} is not there."
                )
            if len(entry.shape) < 2:
                raise ValueError(
                    f"{self.folder}: the FP8 tensor {name} {list(entry.shape)} is no matrix, so it "
                    "has no blocks."
                )
            found, expected = entries[scale], scale_shape(entry.shape, self.block)
            if found.shape != expected or found.dtype not in SCALE_DTYPES:
                raise ValueError(
                    f"{self.folder}: {scale} is {found.dtype} {list(found.shape)}, but the scales "
                    f"of {name} {list(entry.shape)} in blocks of {self.block[0]} x {self.block[1]} "
                    f"are F32 {list(expected)}."
                )
            scales[name] = scale
        return scales

    def _check_types(self) -> None:
        for name, entry in self.entries.items():
            if name in self.scales or entry.dtype in PLAIN_DTYPES:
                continue
            scale = name + SCALE_SUFFIX
            if self.block is None and scale in self.entries:
                raise ValueError(
                    f"{self.folder}: the tensor {name} is stored in FP8 ({entry.dtype}), and its "
                    f"scales {scale} would be read by nobody, because config.json has no "
                    "quantization_config; restore the checkpoint's own config.json."
                )
            ending = (
                "and config.json has no quantization_config that says how to read it; restore the "
                "checkpoint's own config.json."
                if self.block is None
                else "and the config's quantization_config (fp8) does not cover it."
            )
            raise ValueError(
                f"{self.folder}: the tensor {name} is stored as {entry.dtype} ({entry.bits} bits), "
                f"which means nothing without scales, {ending}"
            )

    def check(self, module: nn.Module) -> dict[str, str]:
        """Compare all names and shapes with the module that shall take them.

        Args:
            module: the model of the checkpoint's config, on any device, also "meta".

        Returns:
            The names in the checkpoint by the module's; experts that the module fuses have a name
            each, as in `expert_parts`.

        Raises:
            ValueError: nobody would read a tensor, its shape contradicts the config, or one that
                the model needs is missing.
        """
        needed = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        split = {name: parts for name in needed if (parts := expert_parts(name, needed[name]))}
        shapes = dict(needed)
        for parts in split.values():
            shapes |= parts
        found: dict[str, str] = {}
        for name, entry in self.entries.items():
            known = _known(name, shapes)
            if known is None:
                if not name.endswith("rotary_emb.inv_freq"):  # It is computed from the config.
                    self._refuse_unread(name, shapes)
                continue
            found[known] = name
            if shapes[known] != entry.shape:
                raise ValueError(
                    f"{self.folder}: the tensor {name} has the shape {list(entry.shape)}, but the "
                    f"config says {list(shapes[known])}."
                )
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        missing = [
            part
            for name in needed
            if name not in found and not (tied and name == "lm_head.weight")
            for part in split.get(name, (name,))
            if part not in found
        ]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} weights are missing, among them {min(missing)}; "
                "transformers would fill them with random numbers."
            )
        if tied:
            self._check_tied()
        return found

    def _refuse_unread(self, name: str, shapes: Mapping[str, Any]) -> None:
        unread = [n for n in self.entries if _known(n, shapes) is None]
        # The clearest witness is a name that tells where it comes from.
        witness, origin = next(
            ((n, f", {text}") for n in unread for end, text in _ORIGINS if n.endswith(end)),
            (name, ""),
        )
        quantised = "; config.json has no quantization_config" if self.block is None else ""
        raise ValueError(
            f"{self.folder}: {len(unread)} tensors would be read by nobody, among them {witness} "
            f"({self.entries[witness].dtype} {list(self.entries[witness].shape)}{origin})"
            f"{quantised if origin else ''}: the checkpoint and its config.json do not belong "
            "together, and its weights would be wrong."
        )

    def _check_tied(self) -> None:
        """Refuse a head of its own where the config makes the embedding the head."""
        head = next((n for n in self.entries if n.endswith("lm_head.weight")), "")
        embedding = next((n for n in self.entries if n.endswith("embed_tokens.weight")), None)
        if head not in self.entries or embedding is None:
            return
        if not torch.equal(self.read(head), self.read(embedding)):
            raise ValueError(
                f"{self.folder}: the config has tie_word_embeddings, but {head} differs from "
                f"{embedding}, and nobody would read it."
            )

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Read one tensor from its file; FP8 weights are dequantised on the device.

        Args:
            name: its name in the checkpoint.
            dtype: dtype of the result; None is the stored one, and fp32 for an FP8 weight.
            device: where the result shall be.

        Raises:
            ValueError: a scale is negative or not finite, or 0 in a block whose weights are not.
        """
        weight = self._stored(name).to(device)
        scale_name = self.scales.get(name) or self._mtp_scales.get(name)
        if scale_name is None:
            return weight if dtype is None else weight.to(dtype)
        assert self.block is not None
        scale = self._stored(scale_name)
        self.check_scales(name, weight, scale)
        return dequantize(weight, scale, self.block, dtype or torch.float32)

    def read_blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """Read an FP8 weight as it is stored, and its scales in fp32, both on the CPU.

        Raises:
            ValueError: as `read`.
        """
        weight = self._stored(name)
        scale = self._stored(self.scales[name])
        self.check_scales(name, weight, scale)
        return weight, scale.float()

    def check_scales(self, name: str, weight: Tensor, scale: Tensor) -> None:
        """Refuse scales that make no sense.

        Args:
            name: the name of the FP8 weight in the checkpoint.
            weight: the weight, on any device.
            scale: its scales, on the CPU.

        Raises:
            ValueError: a scale is negative or not finite, or 0 in a block whose weights are not.
        """
        assert self.block is not None
        scale_name = self.scales.get(name) or self._mtp_scales[name]
        scale = scale.float()
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ValueError(
                f"{self.folder}: {scale_name} holds scales that are negative, infinite or NaN."
            )
        if bool((scale == 0).any()) and bool(weight.float().any()):
            whole = dequantize(weight, torch.ones_like(scale), self.block)
            kept = dequantize(weight, (scale != 0).float(), self.block)
            if not torch.equal(whole, kept):
                raise ValueError(
                    f"{self.folder}: {scale_name} holds a scale of 0 for a block whose weights are "
                    "not 0."
                )

    def is_quantised(self, name: str) -> bool:
        """Say whether a tensor is stored in FP8 with scales."""
        return name in self.scales or name in self._mtp_scales

    def place(self, name: str) -> tuple[str, int, int]:
        """Return the file of a tensor or of scales, and its first byte and the one behind its last.

        Both count from the beginning of the file.
        """
        shard = self._shards[name]
        entry = self.entries.get(name) or self.scale_entries[name]
        start = self._starts[shard]
        return shard, start + entry.begin, start + entry.end

    def elements(self, name: str, picks: Tensor) -> Tensor:
        """Read single elements of a tensor, in its stored dtype, and in fp32 where that is FP8.

        Args:
            picks: int64 [n], positions in the flattened tensor.
        """
        shard, begin, _ = self.place(name)
        entry = self.entries.get(name) or self.scale_entries[name]
        size = entry.bits // 8
        with open(self.folder / shard, "rb", buffering=0) as file:
            raw = b"".join(os.pread(file.fileno(), size, begin + size * p) for p in picks.tolist())
        found = torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[entry.dtype])
        if name not in self.scales:
            return found
        assert self.block is not None
        rows, columns = entry.shape[-2:]
        row, column = (picks // columns) % rows, picks % columns
        wide = -(-columns // self.block[1])
        at = row // self.block[0] * wide + column // self.block[1]
        at += picks // (rows * columns) * wide * -(-rows // self.block[0])
        return found.float() * self.elements(self.scales[name], at).float()

    def _stored(self, name: str) -> Tensor:
        from safetensors import safe_open

        shard = self._shards[name]
        with self._lock:
            if shard not in self._files:
                self._files[shard] = safe_open(self.folder / shard, framework="pt")
            file = self._files[shard]
        return file.get_tensor(name)

    def layer(self, layer: int) -> list[str]:
        """List the names of a decoder layer's tensors, e.g. to load the layers one by one."""
        found = ((n, _LAYER.match(plain_name(n))) for n in self.entries)
        return [n for n, match in found if match is not None and int(match[1]) == layer]

    def state(self) -> dict[str, Any]:
        """Return every tensor by its plain name; each is read when transformers slices it."""
        return {plain_name(name): _Later(self, name) for name in self.entries}

    def close(self) -> None:
        """Forget the open files; their memory is free once no tensor is left."""
        with self._lock:
            self._files.clear()

    @cached_property
    def quantised(self) -> int:
        """The number of tensors that are stored in FP8."""
        return len(self.scales)


class _Later:
    """A tensor that is read from its file when it is sliced, as safetensors' own slices are."""

    def __init__(self, weights: Weights, name: str):
        self.weights = weights
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights.read(self.name)[index]


def _is_text(name: str) -> bool:
    return plain_name(name) != name or name.startswith("lm_head.")


def _known(name: str, names: Mapping[str, Any]) -> str | None:
    """Return the module's name of a tensor; None if it has none."""
    plain = plain_name(name)
    return next((n for n in (plain, f"model.{plain}") if n in names), None)


def expert_parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each expert's own tensors for a fused one; {} if it is not fused.

    `gate_up_proj` [experts, 2 I, E] holds gate_proj and up_proj [I, E] of every expert, `down_proj`
    [experts, E, I] the last one's.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return {}
    count, rows, columns = shape
    if match[2] == "down_proj":
        return {f"{match[1]}.{e}.down_proj.weight": (rows, columns) for e in range(count)}
    return {
        f"{match[1]}.{e}.{part}.weight": (rows // 2, columns)
        for e in range(count)
        for part in ("gate_proj", "up_proj")
    }
