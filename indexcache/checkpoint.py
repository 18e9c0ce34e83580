"""A checkpoint folder on disk: its config, its tensors and their files, the layers with an indexer.

Only headers are read here, never weights, and neither torch nor transformers is imported: a
checkpoint of a terabyte is looked through in seconds. Every function raises ValueError with one
sentence: what, where, what was found, what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from indexcache.configs import Quantization, mtp_layers, quantization_of, text_section
from indexcache.records import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MODELOPT_NAME = "hf_quant_config.json"
INDEXER_PARTS = ("wq_b", "wk", "k_norm", "weights_proj")
MAX_BYTES_READ = 1 << 30
"""Weights of at most this many bytes enter the fingerprint completely; larger ones are sampled."""
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself

# It is matched from the start of a name, because `mtp.layers.0.self_attn.indexer..` belongs to a
# multi-token-prediction layer, not to decoder layer 0.
_INDEXER_NAME = re.compile(
    r"(?:(?:model|language_model|text_model)\.)*layers\.(\d+)\.self_attn\.indexer\.(\w+)"
)

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def resolve_config(model: str | Path) -> Path:
    """Return what `read_config` reads: a checkpoint's folder, or a config.json by itself.

    Raises:
        ValueError: there is neither; see `resolve`.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"Expected the path of a checkpoint, got {type(model).__name__}; save the model first "
            "(save_pretrained), and give its folder."
        )
    path = Path(model)
    return path if path.is_file() else resolve(model)


def resolve(model: str | Path) -> Path:
    """Return the folder of a checkpoint: the path itself, or the packaged model's for `tiny`.

    Raises:
        ValueError: there is no such folder. Nothing is ever downloaded.
    """
    if str(model) == "tiny":
        return Path(str(resources.files("indexcache") / "assets" / "tiny"))
    path = Path(model)
    if path.is_file():
        raise ValueError(
            f"{model}: this is a file; MODEL is the path of a checkpoint folder, with config.json "
            "and weights, or 'tiny'."
        )
    if not path.is_dir():
        raise ValueError(
            f"{model}: no such checkpoint folder; MODEL is the path of a folder or 'tiny' "
            "(nothing is downloaded)."
        )
    return path


class TensorEntry(NamedTuple):
    """One tensor in the header of a safetensors file.

    Attributes:
        dtype: its dtype, in the words of safetensors.
        shape: its shape.
        begin: byte offset of its first byte in the data behind the header.
        end: byte offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bits(self) -> int:
        """Bits per element; 8 for an unknown dtype."""
        return _BITS.get(self.dtype, 8)


class Header(NamedTuple):
    """The header of one safetensors file.

    Attributes:
        tensors: the tensors in file order, by name.
        metadata: the metadata.
        data_start: byte offset of the data in the file.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint's folder, or the file itself.

    Raises:
        ValueError: there is no such folder or config.json, it is not a JSON object, or it has no
            num_hidden_layers, neither at the top nor in text_config.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "config.json"
    if not folder.exists():
        raise ValueError(
            f"{folder}: there is no such checkpoint folder; give a local folder with config.json "
            "and weights."
        )
    if not path.is_file():
        raise ValueError(f"{folder}: there is no config.json, so this is not a checkpoint folder.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    layers = text_section(config).get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ValueError(
            f"{path}: num_hidden_layers must be a positive whole number, found {layers!r:.60}."
        )
    return config


def config_facts(folder: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says beside its sizes and pattern, the same for every verb.

    Returns:
        {"quantization": a `Quantization` or None, "mtp_layers": their number, "nested": whether the
        decoder lies in a section of the config}. hf_quant_config.json, which modelopt writes, is
        read where config.json has no quantization_config.

    Raises:
        ValueError: a section is not what its format defines; the message names the file.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "config.json"
    try:
        quantization = quantization_of(config)
        next_token = mtp_layers(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {
        "quantization": quantization or _modelopt(path.with_name(MODELOPT_NAME)),
        "mtp_layers": next_token,
        "nested": text_section(config) is not config,
    }


def _modelopt(path: Path) -> Quantization | None:
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        return quantization_of({"quantization_config": value})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def indexer_part(name: str) -> tuple[int, str] | None:
    """Return (layer, part) of a decoder layer's indexer tensor, e.g. (3, "wq_b"), else None."""
    match = _INDEXER_NAME.match(name)
    return None if match is None else (int(match[1]), match[2])


def read_header(path: Path) -> Header:
    """Read the header of one safetensors file and check it against the file's real length.

    Raises:
        ValueError: the file cannot be read, is cut off or too long, or is not safetensors.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise ValueError(
                    f"{path}: this is a Git LFS pointer, not the weights; run `git lfs pull`."
                )
            if size < 8 or length > size - 8 or length > MAX_HEADER:
                raise ValueError(
                    f"{path}: not a safetensors file, or cut off: the header should take {length} "
                    f"bytes, the file has {size}; fetch it again."
                )
            raw = f.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {name: _tensor_entry(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path}: not a safetensors file: its header is not a table of tensors; fetch it again."
        ) from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, t in tensors.items():
        wrong_size = t.dtype in _BITS and prod(t.shape) * t.bits != 8 * (t.end - t.begin)
        if t.begin != end or t.end < t.begin or wrong_size:
            raise ValueError(
                f"{path}: the header is corrupt at tensor {name!r:.120}; fetch the file again."
            )
        end = t.end
    data = size - 8 - length
    if end != data:
        state = "cut off" if end > data else "longer than its tensors"
        raise ValueError(
            f"{path}: the file is {state}: its tensors need {end} bytes, it holds {data}; fetch it "
            "again."
        )
    return Header(tensors, metadata, 8 + length)


def _tensor_entry(entry: Mapping[str, Any]) -> TensorEntry:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError
    return TensorEntry(str(entry["dtype"]), shape, begin, end)


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """Read model.safetensors.index.json; None where one model.safetensors holds all tensors.

    Raises:
        ValueError: there is neither file, the two disagree, or the index is malformed.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    single = folder / SINGLE_NAME
    if not path.is_file():
        if single.is_file():
            return None
        if any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder}: there are safetensors files, but neither {SINGLE_NAME} nor "
                f"{INDEX_NAME}."
            )
        raise ValueError(
            f"{folder}: there is no {SINGLE_NAME}; weights are read from safetensors only, not "
            "from .bin or .pt."
        )
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: there is no weight_map from tensor names to files.")
    for shard in map(str, weight_map.values()):
        # A name that leads out of the folder would let an index read, and an export write,
        # anywhere.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weight_map names {shard!r:.120}, which is not a safetensors file of this "
                "folder."
            )
    if single.is_file() and SINGLE_NAME not in weight_map.values():
        raise ValueError(
            f"{folder}: {SINGLE_NAME} and {INDEX_NAME} are both there and the index does not name "
            "that file, so it is unclear which weights count; remove the stale one."
        )
    return index


def read_headers(folder: str | Path) -> dict[str, Header]:
    """Read the header of every weight file of the checkpoint, by file name, in order of the names.

    Raises:
        ValueError: see `read_index` and `read_header`; or a file named in the index is missing, or
            lacks a tensor that the index places in it.
    """
    folder = Path(folder)
    if (index := read_index(folder)) is None:
        return {SINGLE_NAME: read_header(folder / SINGLE_NAME)}
    shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise ValueError(
                f"{folder}: the weight file {shard} is named in {INDEX_NAME} but is not there; "
                "fetch it."
            )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in index["weight_map"].items():
        if name not in headers[shard].tensors:
            raise ValueError(
                f"{folder / shard}: the tensor {name!r:.120} should be here by {INDEX_NAME}, but "
                "is not."
            )
    return headers


def has_weights(folder: str | Path) -> bool:
    """Say whether a folder has weights, or an index of them, and not a config alone."""
    folder = Path(folder)
    return folder.is_dir() and (
        (folder / INDEX_NAME).is_file() or any(folder.glob("*.safetensors"))
    )


def is_bare_config(model: str | Path) -> bool:
    """Say whether a model is a config.json, or a folder that has one and no weights of any kind."""
    path = Path(model)
    if path.is_dir():
        other = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        return (path / "config.json").is_file() and not (has_weights(path) or other)
    return path.is_file() and path.suffix == ".json"


def listed_names(folder: str | Path) -> set[str]:
    """Return the names of a checkpoint's tensors; those of its index where no weight file is there.

    Raises:
        ValueError: see `read_headers`.
    """
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")) and (index := read_index(folder)) is not None:
        return set(index["weight_map"])
    return set(tensor_names(folder))


def tensor_names(folder: str | Path) -> dict[str, str]:
    """Map every tensor of the checkpoint to the weight file that holds it.

    All headers are checked against the files' lengths.

    Raises:
        ValueError: see `read_headers`.
    """
    return {
        name: shard for shard, header in read_headers(folder).items() for name in header.tensors
    }


def layers_without_indexer(folder: str | Path) -> tuple[int, ...]:
    """List the decoder layers for which the checkpoint holds no indexer tensor at all.

    They were trained shared, or pruned by an export. Layers are 0-based, below num_hidden_layers.

    Raises:
        ValueError: see `read_config` and `tensor_names`.
    """
    layers = text_section(read_config(folder))["num_hidden_layers"]
    with_indexer = {
        part[0] for name in tensor_names(folder) if (part := indexer_part(name)) is not None
    }
    return tuple(layer for layer in range(layers) if layer not in with_indexer)


def fingerprint(path: Path) -> str:
    """Return a digest, 64 hex digits, that changes with the config or the weights of a checkpoint.

    It covers config.json, and the weights completely if they are at most `MAX_BYTES_READ` together.
    Larger files are sampled, 64 blocks of 64 KiB of each, because reading all of a large checkpoint
    takes longer than a step of a search.
    """
    h = hashlib.sha256(json.dumps(read_config(path), sort_keys=True).encode())
    files = sorted(path.glob("*.safetensors"))
    complete = sum(file.stat().st_size for file in files) <= MAX_BYTES_READ
    for file in files:
        size = file.stat().st_size
        h.update(f"{file.name}|{size}|".encode())
        with open(file, "rb") as f:
            if complete:
                while block := f.read(1 << 24):
                    h.update(block)
            else:
                for i in range(64):
                    f.seek(i * max(size - (1 << 16), 0) // 63)
                    h.update(f.read(1 << 16))
    return h.hexdigest()


def tensor_digests(folder: Path) -> tuple[str, dict[int, str]]:
    """Return a digest of all weights but the indexers', and that of each layer's indexer, hex.

    They do not depend on how tensors are divided into files, so pruning an indexer changes that of
    no other weight. Weights are read completely if those outside the indexers have at most
    `MAX_BYTES_READ`; else 16 blocks of 64 KiB of each tensor.

    Raises:
        ValueError: see `read_headers`.
    """
    headers = read_headers(folder)
    places = sorted(
        (name, file, header.data_start + entry.begin, entry)
        for file, header in headers.items()
        for name, entry in header.tensors.items()
    )
    outside = sum(e.end - e.begin for name, _, _, e in places if indexer_part(name) is None)
    rest, indexers = hashlib.sha256(), dict[int, Any]()
    files = {file: open(folder / file, "rb") for file in headers}
    try:
        for name, file, begin, entry in places:
            part = indexer_part(name)
            h = rest if part is None else indexers.setdefault(part[0], hashlib.sha256())
            h.update(f"{name}|{entry.dtype}|{entry.shape}|".encode())
            size = entry.end - entry.begin
            sampled = outside > MAX_BYTES_READ and size > 16 << 16
            blocks = [i * (size - (1 << 16)) // 15 for i in range(16)] if sampled else [0]
            for at in blocks:
                files[file].seek(begin + at)
                h.update(files[file].read(1 << 16 if sampled else size))
    finally:
        for f in files.values():
            f.close()
    return rest.hexdigest(), {layer: h.hexdigest() for layer, h in sorted(indexers.items())}
