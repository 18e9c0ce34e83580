"""Write a complete checkpoint folder for one pattern, for every engine that reads config.json.

Shared layers need no indexer, so its tensors are left out. Weights are copied as bytes, file by
file: no dtype is interpreted, no value can change, and memory stays at one block whatever the
checkpoint's size.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from indexcache.checkpoint import INDEX_NAME, Header, indexer_part, read_headers, read_index
from indexcache.configs import plain_name, text_section
from indexcache.delta import check_finite, read_delta
from indexcache.overrides import SHARING_KEYS
from indexcache.pattern import Pattern
from indexcache.progress import progress
from indexcache.seen import CONFIG_KEY

BLOCK = 1 << 24  # bytes

# Weights in other formats would be stale beside the pruned ones, and code is never copied.
LEFT_OUT = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".safetensors",
    ".py",
    ".pyc",
)


class Shard(NamedTuple):
    """A weight file of the source, what is left out of it, and what is replaced in it.

    Attributes:
        name: the file's name.
        header: its header.
        dropped: names of tensors that are left out.
        replaced: the new bytes of tensors, by name, as many as the old ones.
    """

    name: str
    header: Header
    dropped: frozenset[str]
    replaced: Mapping[str, bytes] = {}

    @property
    def changed(self) -> bool:
        """Whether the file differs from the source's."""
        return bool(self.dropped or self.replaced)

    @property
    def kept_bytes(self) -> int:
        """Number of bytes of the tensors that stay."""
        return sum(
            t.end - t.begin for name, t in self.header.tensors.items() if name not in self.dropped
        )


def shard_layout(
    checkpoint: Path, pattern: Pattern, *, prune: bool, delta: Path | None = None
) -> list[Shard]:
    """Decide which tensors of each weight file are left out.

    Layers outside the pattern, those of multi-token prediction, keep their indexer.
    """

    def dropped(name: str) -> bool:
        match = indexer_part(name)
        if match is None or not prune:
            return False
        layer, _ = match
        return layer < len(pattern) and pattern[layer] == "S"

    headers = read_headers(checkpoint)
    new = {} if delta is None else trained_bytes(checkpoint, headers, delta)
    return [
        Shard(
            name,
            header,
            left_out := frozenset(filter(dropped, header.tensors)),
            {n: new[n] for n in header.tensors if n in new and n not in left_out},
        )
        for name, header in headers.items()
    ]


def trained_bytes(checkpoint: Path, headers: Mapping[str, Header], delta: Path) -> dict[str, bytes]:
    """Return the bytes of a delta's tensors under the checkpoint's names, in its dtypes.

    Raises:
        ValueError: the delta cannot be read, or a tensor has no place in the checkpoint, or one
            that is quantised.
    """
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    stored = {
        plain_name(name): (name, entry)
        for header in headers.values()
        for name, entry in header.tensors.items()
        if indexer_part(name) is not None
    }
    found = {}
    for plain, value in read_delta(delta)[0].items():
        name, entry = stored.get(plain, (plain, None))
        if entry is None or entry.shape != tuple(value.shape):
            raise ValueError(
                f"{delta}: the tensor {plain:.120} has no place in {checkpoint} (shape "
                f"{tuple(value.shape)})."
            )
        if entry.dtype not in dtypes:
            raise ValueError(
                f"{checkpoint}: {name:.120} is stored as {entry.dtype}, into which trained weights "
                "cannot be written; train with --whole, which writes plain weights."
            )
        check_finite(delta, plain, value)
        raw = value.to(dtypes[entry.dtype]).contiguous().view(torch.uint8)
        found[name] = raw.numpy().tobytes()
    return found


class Written(NamedTuple):
    """The links and copies of the weight files that did not change.

    Attributes:
        links: number of hard links to the checkpoint's files.
        copies: number of copies.
        why: why a file that should have been linked was copied, as a clause; "" otherwise.
    """

    links: int = 0
    copies: int = 0
    why: str = ""


def bytes_needed(checkpoint: Path, shards: list[Shard], parent: Path, link: bool = True) -> int:
    """Count the bytes that the export adds to the disk of `parent`, where hard links add none."""
    total = sum(path.stat().st_size for path in _other_files(checkpoint))
    for shard in shards:
        source = (checkpoint / shard.name).stat()
        if shard.changed or not link or source.st_dev != parent.stat().st_dev:
            total += shard.kept_bytes + shard.header.data_start
    return total


def merged_config(config: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """Return the config to save, with the pattern's keys and no other sharing key.

    `layer_types` goes, because 5.17 and 5.23 of transformers name the same type differently and
    both derive it. `auto_map` goes, because the code that it points to is not copied.
    """
    config = json.loads(json.dumps(config))
    section = text_section(config)
    for level in (config, section):
        for key in (*SHARING_KEYS, "layer_types", "auto_map"):
            level.pop(key, None)
    section.update(pattern.to_config())
    config.pop(CONFIG_KEY, None)
    return config | pattern.seen.to_config()


def write(
    checkpoint: Path,
    config: dict[str, Any],
    pattern: Pattern,
    shards: list[Shard],
    folder: Path,
    link: bool = True,
    shown: bool = False,
) -> Written:
    """Write the checkpoint into the new `folder`, file by file, and say what was linked.

    Args:
        link: make hard links to weight files that do not change, where the disk allows it.
        shown: show a progress bar on stderr, in bytes.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: a weight file changed while it was read.
    """
    folder.mkdir()
    for path in _other_files(checkpoint):
        shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", merged_config(config, pattern))
    done = Written()
    total = sum(shard.kept_bytes for shard in shards)
    with progress(total, "B", shown=shown, delay=1.0, scaled=True) as bar:
        for shard in shards:
            source, target = checkpoint / shard.name, folder / shard.name
            if not shard.changed:
                done = _link_or_copy(source, target, link, done)
            elif len(shard.dropped) < len(shard.header.tensors):
                write_shard(source, target, shard)
            bar.update(shard.kept_bytes)
    if (index := read_index(checkpoint)) is not None:
        _write_json(folder / INDEX_NAME, _pruned_index(index, shards))
    return done


def write_shard(source: Path, target: Path, shard: Shard) -> None:
    """Copy a safetensors file without the dropped tensors; other bytes and metadata stay."""
    kept = [(name, t) for name, t in shard.header.tensors.items() if name not in shard.dropped]
    # Wide elements come first, as in the format's own writer: a tensor that is mapped into memory
    # must begin at a multiple of its element size.
    kept.sort(key=lambda item: -item[1].bits)
    entries: dict[str, Any] = (
        {"__metadata__": shard.header.metadata} if shard.header.metadata else {}
    )
    offset = 0
    for name, t in kept:
        size = t.end - t.begin
        entries[name] = {
            "dtype": t.dtype,
            "shape": t.shape,
            "data_offsets": (offset, offset + size),
        }
        offset += size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with open(source, "rb") as f, open(target, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name, t in kept:
            if name in shard.replaced:
                out.write(shard.replaced[name])
                continue
            f.seek(shard.header.data_start + t.begin)
            _copy_bytes(f, out, t.end - t.begin, source)


def _copy_bytes(f: BinaryIO, out: BinaryIO, count: int, source: Path) -> None:
    while count:
        block = f.read(min(count, BLOCK))
        if not block:
            raise ValueError(
                f"{source}: the file became shorter while it was read; export again when it is "
                "complete."
            )
        out.write(block)
        count -= len(block)


def _link_or_copy(source: Path, target: Path, link: bool, done: Written) -> Written:
    why = ""
    if link:
        try:
            # Hub caches hold symbolic links, and a hard link to one of those would point nowhere.
            os.link(source.resolve(), target)
            return done._replace(links=done.links + 1)
        except OSError as error:
            other = error.errno == errno.EXDEV
            why = "the export lies on another disk" if other else "the disk did not allow it"
    shutil.copyfile(source, target)
    return Written(done.links, done.copies + 1, why or done.why)


def _pruned_index(index: dict[str, Any], shards: list[Shard]) -> dict[str, Any]:
    stored = {
        name: shard.name
        for shard in shards
        for name in shard.header.tensors
        if name not in shard.dropped
    }
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = sum(shard.kept_bytes for shard in shards)
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] -= sum(
            prod(s.header.tensors[name].shape) for s in shards for name in s.dropped
        )
    return {**index, "metadata": metadata, "weight_map": dict(sorted(stored.items()))}


def _other_files(checkpoint: Path) -> list[Path]:
    """List the files that are copied as they are, such as tokenizer and licence."""
    written_here = ("config.json", INDEX_NAME)
    return [
        path
        for path in sorted(checkpoint.iterdir())
        if path.is_file()
        and path.name not in written_here
        and not path.name.startswith(".")
        and not path.name.removesuffix(".index.json").endswith(LEFT_OUT)
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
